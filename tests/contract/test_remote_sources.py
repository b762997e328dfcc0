"""Every kind of source gives the same rows from a store as from a folder."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.ingest import ingested
from tests.support.kinds import WRITERS, write_images
from tests.support.stores import MemoryStores


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStores:
    return MemoryStores(monkeypatch)


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate(
        {
            "train": "unused",
            "features": ["x"],
            "label": "y",
            "ingest_dir": str(root / "cache"),
            **changes,
        }
    )


def rows_of(entry: str, data: DataConfig) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in ingested("train", entry, data)])


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "parquet"])
def test_rows_of_a_store_are_those_of_a_folder(kind, memory, tmp_path):
    WRITERS[kind](tmp_path / "rows")
    memory.copy(tmp_path / "rows", "s3://bucket/rows")
    data = config(tmp_path)
    here, there = (rows_of(entry, data) for entry in (str(tmp_path / "rows"), "s3://bucket/rows"))
    assert here.num_rows == 1003
    assert here.equals(there)


def test_images_and_their_labels_come_from_a_store(memory, tmp_path):
    labels = write_images(tmp_path / "all" / "rows", 9)
    memory.copy(tmp_path / "all", "s3://bucket")
    tables = []
    for root in (str(tmp_path / "all"), "s3://bucket"):
        images = {"height": 2, "width": 3, "labels": f"{root}/{labels.name}"}
        tables.append(rows_of(f"{root}/rows", config(tmp_path, images=images)))
    assert tables[0].num_rows == 9
    assert tables[0].equals(tables[1])


def test_compressed_objects_and_mistakes_in_them(memory, tmp_path):
    uri = "s3://bucket/a.csv.gz"
    memory.put("s3://bucket/unused", b"")
    with memory.system.open_output_stream("bucket/a.csv.gz", compression=None) as out:
        out.write(gzip.compress(b"x,y\n1,2\n3\n"))
    with pytest.raises(DataError, match=r"s3://bucket/a\.csv\.gz, line 3: 1 values"):
        rows_of(uri, config(tmp_path))
    assert rows_of(uri, config(tmp_path, on_bad_rows="skip")).to_pydict() == {"x": [1], "y": [2]}
