"""Converted files: whole or not at all, found again, converted anew after a change."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import DataConfig
from data_pipeline import converted, ingest
from data_pipeline.converted import PartWriter, find_converted
from data_pipeline.errors import ConvertError, DataError, ReadError
from data_pipeline.ingest import ingested


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


def write_csv(path: Path, first: int, rows: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{row},{row / 2}" for row in range(first, first + rows)]
    path.write_text("x,y\n" + "".join(line + "\n" for line in lines))
    return path


def read(paths: Any) -> list[int]:
    return [row for path in paths for row in pq.read_table(path)["x"].to_pylist()]


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "cache").iterdir())


def test_rows_come_in_the_order_of_files_and_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_PART_BYTES", 1_000)
    monkeypatch.setattr(converted, "_GROUP_ROWS", 70)
    for number in range(7):
        write_csv(tmp_path / "rows" / f"{number}.csv", 100 * number, 100)
    paths = ingested("train", str(tmp_path / "rows"), config(tmp_path))
    assert read(paths) == list(range(700))
    assert 1 < len(paths) < 7, "small files share parts, and parts are several"
    groups = [
        footer.row_group(group).num_rows
        for footer in map(pq.read_metadata, paths)
        for group in range(footer.num_row_groups)
    ]
    assert max(groups) == 70


def test_parquet_is_read_in_place(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    for paths in (str(tmp_path), [str(tmp_path / "a.parquet")], str(tmp_path / "*.parquet")):
        assert ingested("train", paths, config(tmp_path)) == paths
        assert ingested("train", paths, config(tmp_path, format="parquet")) == paths
    assert not (tmp_path / "cache").exists()


def test_an_unchanged_source_is_not_read_again(tmp_path):
    path = write_csv(tmp_path / "a.csv", 0, 10)
    first = ingested("train", str(path), config(tmp_path))
    stat, text = path.stat(), path.read_text()
    path.write_text(text.replace("9", "8"))  # what nobody can see without reading
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ingested("train", str(path), config(tmp_path)) == first
    assert read(first) == list(range(10))
    assert ingested("test", str(path), config(tmp_path)) == first, "in another role either"


@pytest.mark.parametrize("change", ["size", "time", "another file", "settings"])
def test_a_changed_source_is_converted_again(tmp_path, change):
    folder = tmp_path / "rows"
    path = write_csv(folder / "a.csv", 0, 10)
    first = ingested("train", str(folder), config(tmp_path))
    expected, settings = list(range(10)), {}
    if change == "size":
        write_csv(path, 0, 11)
        expected = list(range(11))
    elif change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "another file":
        write_csv(folder / "b.csv", 10, 5)
        expected = list(range(15))
    else:
        settings = {"on_bad_rows": "skip"}
    second = ingested("train", str(folder), config(tmp_path, **settings))
    assert set(first).isdisjoint(second)
    assert read(second) == expected
    assert read(first) == list(range(10)), "what was there stays for those who read it"


def test_the_default_place_is_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "home"))
    path = write_csv(tmp_path / "a.csv", 0, 3)
    (part,) = ingested("train", str(path), config(tmp_path, ingest_dir=None))
    assert Path(part).parents[1] == tmp_path / "home" / "ingested"


def test_a_conversion_that_ends_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_PART_BYTES", 1)
    for number in range(5):
        write_csv(tmp_path / "rows" / f"{number}.csv", number, 1)
    write = PartWriter.write

    def fail(part: PartWriter, batch: Any) -> None:
        if batch["x"][0].as_py() == 3:
            raise OSError(28, "No space left on device")
        write(part, batch)

    monkeypatch.setattr(PartWriter, "write", fail)
    with pytest.raises(ConvertError, match="No space left on device. Nothing of it counts"):
        ingested("train", str(tmp_path / "rows"), config(tmp_path))
    assert folders(tmp_path) == []
    monkeypatch.setattr(PartWriter, "write", write)
    assert read(ingested("train", str(tmp_path / "rows"), config(tmp_path))) == list(range(5))


def test_what_a_killed_process_left_counts_for_nothing_and_goes_when_it_is_old(tmp_path):
    path = write_csv(tmp_path / "a.csv", 0, 10)
    (part,) = ingested("train", str(path), config(tmp_path))
    folder = Path(part).parent
    young, old = (folder.with_name(f".{folder.name}.{mark}.partial") for mark in ("1", "2"))
    folder.rename(young)  # complete, but never given its name
    old.mkdir()
    (old / "part-000000.parquet").write_bytes(b"half")
    day_ago = time.time() - 100_000
    os.utime(old / "part-000000.parquet", (day_ago, day_ago))
    os.utime(old, (day_ago, day_ago))
    assert read(ingested("train", str(path), config(tmp_path))) == list(range(10))
    assert folders(tmp_path) == sorted([young.name, folder.name])


@pytest.mark.parametrize("damage", ["part gone", "part cut", "no record"])
def test_a_damaged_folder_is_replaced(tmp_path, damage):
    path = write_csv(tmp_path / "a.csv", 0, 10)
    (part,) = map(Path, ingested("train", str(path), config(tmp_path)))
    if damage == "part gone":
        part.unlink()
    elif damage == "part cut":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        (part.parent / converted.RECORD_FILE).unlink()
    assert find_converted(part.parent) is None
    assert read(ingested("train", str(path), config(tmp_path))) == list(range(10))
    assert folders(tmp_path) == [part.parent.name]


def test_who_finds_the_place_taken_uses_what_is_there(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "a.csv", 0, 10)
    together = threading.Barrier(3)
    publish = ingest.publish

    def at_once(*arguments: Any) -> Any:
        together.wait(10)  # all have converted, none has published
        return publish(*arguments)

    monkeypatch.setattr(ingest, "publish", at_once)
    with ThreadPoolExecutor(3) as threads:
        tasks = [threads.submit(ingested, "train", str(path), config(tmp_path)) for _ in range(3)]
        found = [task.result(30) for task in tasks]
    assert found[0] == found[1] == found[2]
    assert read(found[0]) == list(range(10))
    assert folders(tmp_path) == [Path(found[0][0]).parent.name]


def test_a_source_that_changes_while_it_is_read_is_named(tmp_path):
    path = write_csv(tmp_path / "a.csv", 0, 10)
    with pytest.raises(ReadError, match=r"a\.csv changed while it was read"):
        ingested("train", str(path), config(tmp_path), lambda *_: os.utime(path, ns=(1, 1)))
    assert folders(tmp_path) == []


def test_progress_grows_to_all_bytes(tmp_path):
    for number in range(3):
        write_csv(tmp_path / "rows" / f"{number}.csv", 0, 100)
    told: list[tuple[int, int]] = []
    ingested("train", str(tmp_path / "rows"), config(tmp_path), lambda *each: told.append(each))
    done = [each for each, _ in told]
    assert done == sorted(done)
    assert {whole for _, whole in told} == {done[-1]}
    assert done[0] < done[-1]


def test_lines_left_out_are_told_each_time(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,2\n3\n4,5,6\n7,8\n")
    data = config(tmp_path, on_bad_rows="skip")
    warnings: list[str] = []
    for _ in range(2):
        (part,) = ingested("train", str(path), data, warned=warnings.append)
    assert read([part]) == [1, 7]
    skipped = Path(part).parent / "skipped.ndjson"
    assert [json.loads(line) for line in skipped.read_text().splitlines()] == [
        {
            "file": str(path),
            "line": line,
            "reason": f"{count} values; the first line names 2 columns",
            "text": text,
        }
        for line, count, text in ((3, 1, "3"), (4, 3, "4,5,6"))
    ]
    told = "data.train: 2 lines cannot be read and are left out (data.on_bad_rows: skip); they"
    assert warnings == [f"{told} are listed in {skipped}."] * 2


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"x": 1, "y": 2}\n' if "json" in name else "x,y\n1,2\n")


ERRORS = {
    "several formats": (
        ["rows/a.csv", "rows/b.ndjson"],
        "rows",
        {},
        r"several formats: csv \(.*a\.csv\), ndjson \(.*b\.ndjson\); one is allowed",
    ),
    "parquet among others": (["rows/a.csv", "rows/b.parquet"], "rows", {}, "several formats"),
    "no known suffix": (["a.dat"], "a.dat", {}, r"a\.dat says no format; .*\.csv.* are allowed"),
    "nothing in the folder": (["rows/a.txt"], "rows", {}, "no data file"),
    "gzip of a format without": (["a.npy.gz"], "a.npy.gz", {}, "says no format"),
    "images without size": (["rows/a.png"], "rows", {}, "data.images must say their size"),
    "images and a format": (
        ["a.csv"],
        "a.csv",
        {"format": "csv", "images": {"height": 2, "width": 2}},
        "data.images has no effect with data.format: csv",
    ),
    "an object store to write to": (
        ["a.csv"],
        "a.csv",
        {"ingest_dir": "s3://x"},
        "ingest_dir=s3://x is no folder",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_converted_is_told(tmp_path, case):
    names, entry, changes, message = ERRORS[case]
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        ingested("train", str(tmp_path / entry), config(tmp_path, **changes))


def test_a_stated_format_chooses_among_files(tmp_path):
    touch(tmp_path, "rows/a.csv", "rows/b.ndjson", "rows/_c.csv", "rows/notes.txt")
    for kind in ("csv", "ndjson"):
        (part,) = ingested("train", str(tmp_path / "rows"), config(tmp_path, format=kind))
        assert Path(part).parent.name.startswith(f"{kind}-")
    touch(tmp_path, "strange.dat")
    for entry in ("strange.dat", "*.dat"):
        paths = ingested("train", str(tmp_path / entry), config(tmp_path, format="csv"))
        assert read(paths) == [1]


def test_no_row_at_all_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n")
    with pytest.raises(DataError, match=r"no row at all; .*a\.csv"):
        ingested("train", str(tmp_path / "a.csv"), config(tmp_path))
    assert folders(tmp_path) == []


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    path = write_csv(tmp_path / "a.csv", 0, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError, match="set data.ingest_dir or LOCKSTEP_HOME"):
        ingested("train", str(path), config(tmp_path, ingest_dir=str(tmp_path / "file")))


def test_row_groups_are_bounded_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(converted, "_GROUP_BYTES", 8_000)
    with PartWriter(tmp_path / "a.parquet") as part:
        for start in (0, 700):
            part.write(pa.RecordBatch.from_pydict({"x": list(range(start, start + 700))}))
    footer = pq.read_metadata(tmp_path / "a.parquet")
    groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    assert sum(groups) == part.rows == 1_400
    assert 900 < max(groups) <= 1_000
    assert len(groups) == 2


def test_blocks_follow_large_files_and_join_small_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(converted, "_GROUP_ROWS", 8)
    with PartWriter(tmp_path / "a.parquet") as part:
        for rows in (11, 1, 1, 2, 9):
            part.write(pa.record_batch({"a": list(range(rows))}))
            part.end_source()
    footer = pq.read_metadata(part.path)
    groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    assert groups == [8, 3, 2, 2, 8, 1]  # a quarter of a group is enough
