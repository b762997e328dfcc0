"""What is recorded of data files tells one from another."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import provenance as module
from data_pipeline.errors import ReadError
from data_pipeline.provenance import listed, provenance
from data_pipeline.source import open_source
from tests.support.stores import MemoryStores

COLUMNS = ["a"]


def write(path: Path, values: list[float]) -> None:
    pq.write_table(pa.table({"a": np.array(values)}), path)


def test_local_files_are_known_by_their_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 64)
    for name, values in (("a", [1.0, 2.0]), ("b", [1.0, 3.0]), ("c", [1.0, 2.0])):
        write(tmp_path / f"{name}.parquet", values)
    source = open_source("train", str(tmp_path), COLUMNS)
    records = provenance(source.files)
    assert [record["path"] for record in records] == [file.path for file in source.files]
    for record in records:
        found = Path(record["path"]).stat()
        assert record["size_bytes"] == found.st_size
        assert record["modified_ns"] == found.st_mtime_ns
        assert record["rows"] == 2
    a, b, c = (record["ends_sha256"] for record in records)
    assert a == c != b


def test_a_file_that_has_changed_is_not_recorded(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [1.0])
    source = open_source("train", str(tmp_path), COLUMNS)
    write(tmp_path / "a.parquet", [1.0] * 1000)
    with pytest.raises(ReadError, match="changed since the run was planned"):
        provenance(source.files)


def test_objects_without_a_tag_are_recorded_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.parquet", [1.0])
    stores = MemoryStores(monkeypatch)
    stores.put("s3://rows/a.parquet", (tmp_path / "a.parquet").read_bytes())
    (record,) = provenance(open_source("train", "s3://rows/a.parquet", COLUMNS).files)
    assert record["etag"] is None
    assert "ends_sha256" not in record


def test_many_files_are_listed_as_one() -> None:
    files = [{"path": str(n), "rows": 2, "size_bytes": 3} for n in range(1001)]
    assert listed(files[:1000]) == files[:1000]
    record = listed(files)
    assert isinstance(record, dict)
    assert (record["files"], record["rows"], record["size_bytes"]) == (1001, 2002, 3003)
    other = [*files[:-1], {**files[-1], "size_bytes": 4}]
    assert listed(other)["sha256"] != record["sha256"]  # type: ignore[call-overload]
