"""Files by name: found and read alike locally and on stores, and written whole."""

import datetime
import os
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from configs.data import DataConfig
from data_pipeline import object_stores, storage
from data_pipeline.blocks import BlockReader
from data_pipeline.errors import DataError, ReadError
from data_pipeline.features import input_layout
from data_pipeline.source import open_source
from data_pipeline.tables import open_tables
from tests.support.parquet import write_parquet
from tests.support.stores import MemoryStores

SUFFIXES = (".parquet", ".pq")
SECRET = "wJalrXUtnFEMI-K7MDENG"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStores:
    return MemoryStores(monkeypatch)


@pytest.fixture
def both(tmp_path: Path, memory: MemoryStores) -> Path:
    """A folder, and a bucket of the same name in memory with the same files."""
    root = tmp_path / "bucket"
    for name in (
        *("a.parquet", "b/2.parquet", "b/10.PARQUET", "b/deep/er/x.pq", "b/notes.txt"),
        *("b/.hidden.parquet", "b/_SUCCESS.parquet", "b/_temporary/1.parquet", "b/.spark/1.pq"),
        *("c/y=1/1.parquet", "c/y=2/1.parquet", "c/y=2/[x].parquet"),
    ):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    memory.copy(root, "s3://bucket")
    return root


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        ("", 7),
        ("b", 3),
        ("b/", 3),
        ("b/deep", 1),
        ("a.parquet", 1),
        ("b/.hidden.parquet", 1),
        ("b/_temporary", 1),
        ("*.parquet", 1),
        ("b/?.parquet", 1),
        ("b/*", 4),
        ("b/.*/*", 1),
        ("*/2.*", 1),
        ("**/*.p[qx]", 1),
        ("**/1.parquet", 3),
        ("b/**/x.pq", 1),
        ("b/**/er/**", 1),
        ("**", 10),
        ("c/y=[!1]/*", 2),
        ("c/*/1.parquet", 2),
        ("c/y=2/[[]x].parquet", 1),
    ],
)
def test_stores_are_searched_as_folders_are(both, entry, count):
    local = storage.find("data.train", str(both / entry) + "/" * entry.endswith("/"), SUFFIXES)
    remote = storage.find("data.train", f"s3://bucket/{entry}", SUFFIXES)
    assert remote == [path.replace(str(both), "s3://bucket") for path in local]
    assert len(remote) == count


def test_one_level_is_listed_where_one_will_do(both, memory):
    asked: list[fs.FileSelector] = []

    class Watched:
        def get_file_info(self, selector: fs.FileSelector) -> Any:
            asked.append(selector)
            return memory.system.get_file_info(selector)

    assert object_stores.store_of("s3://bucket").inner("s3://bucket/b/*.pq") == "bucket/b/*.pq"
    assert storage._match(Watched(), "bucket/c/y=2/1.*") == ["bucket/c/y=2/1.parquet"]
    assert storage._match(Watched(), "bucket/c/*/1.*")[0] == "bucket/c/y=1/1.parquet"
    assert [(one.base_dir, one.recursive) for one in asked] == [
        ("bucket/c/y=2", False),
        ("bucket/c", True),
    ]


def test_a_list_keeps_its_order_over_local_files_and_stores(both):
    entries = ["s3://bucket/b", str(both / "a.parquet"), "s3://bucket/b/2.parquet"]
    found = storage.find("data.train", entries, SUFFIXES)
    assert found == [
        *(f"s3://bucket/b/{name}" for name in ("10.PARQUET", "2.parquet", "deep/er/x.pq")),
        str(both / "a.parquet"),
    ]


def test_file_uris_are_local_paths(both):
    assert storage.find("x", f"file://{both}/a.parquet", SUFFIXES) == [f"{both}/a.parquet"]
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"
    assert storage.absolute("a") == str(Path.cwd() / "a")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "s3://bucket/b/3.parquet",
            "data.train: no object or folder at 's3://bucket/b/3.parquet'. Check the path; names "
            "of objects are compared letter by letter.",
        ),
        (
            "s3://bucket/b/*.csv",
            "data.train: 's3://bucket/b/*.csv' matches no object. Check the pattern.",
        ),
        (
            "s3://bucket/b/.spark/",
            "data.train: folder 's3://bucket/b/.spark' holds no data file (*.parquet). Name the "
            "folder that does.",
        ),
        (
            "s3://buckett/b",
            "data.train: no bucket 'buckett' at Amazon S3, region us-east-1; 's3://buckett/b' "
            "names it. Check its name, and the endpoint and region in the environment.",
        ),
        (
            "s3://buckett/*.parquet",
            "data.train: no bucket 'buckett' at Amazon S3, region us-east-1; "
            "'s3://buckett/*.parquet' names it. Check its name, and the endpoint and region in the "
            "environment.",
        ),
        (
            "s3://buck*/b",
            "'s3://buck*/b' names no single bucket; s3://bucket/path is allowed, with wildcards in "
            "the path only. Name the bucket.",
        ),
        (
            "s3:///b",
            "'s3:///b' names no single bucket; s3://bucket/path is allowed, with wildcards in the "
            "path only. Name the bucket.",
        ),
        (
            "s3a://bucket/b",
            "paths that begin with s3a:// are not understood; local paths and s3://, gs://, "
            "gcs://, abfs://, abfss://, hdfs://, viewfs:// are. Did you mean 's3'?",
        ),
    ],
)
def test_uris_without_files(both, entry, message):
    with pytest.raises(DataError) as error:
        storage.find("data.train", entry, (".parquet",))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIA0:{SECRET}@bucket/b",
        f"s3://{SECRET}@bucket/b",
        f"abfs://container:{SECRET}@account/b",
        f"s3://bucket/b?secret_key={SECRET}",
        f"s3://bucket?X-Amz-Signature={SECRET}",
    ],
)
def test_secrets_in_uris_are_refused_and_not_repeated(uri):
    with pytest.raises(DataError) as error:
        storage.find("data.train", uri, SUFFIXES)
    assert "holds credentials or options" in str(error.value)
    assert SECRET not in str(error.value)


def test_the_state_of_a_file_tells_it_from_a_later_one(tmp_path, memory):
    local = str(tmp_path / "x")
    for path in (local, "gs://bucket/a/x"):
        assert not storage.exists(path)
        if path == local:
            storage.write_whole(path, b"12345")
        else:
            memory.put(path, b"12345")
        state = storage.stat(path)
        assert (state.path, state.size_bytes) == (path, 5)
        assert storage.exists(path)
        with storage.open_file(path, state) as file:
            assert file.read_at(3, 1) == b"234"
        storage.write_whole(path, b"123456")
        with pytest.raises(ReadError) as error:
            storage.open_file(path, state)
        assert str(error.value) == (
            f"{path} changed since the run was planned (size or time of change). Start a new run."
        )
        storage.remove(path)
        storage.remove(path)
        for missing in (storage.stat, storage.open_file):
            with pytest.raises(FileNotFoundError):
                missing(path)


def test_a_file_of_the_same_size_and_another_time_is_another(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"1")
    state = storage.stat(str(path))
    os.utime(path, ns=(0, state.modified_ns + 1))
    with pytest.raises(ReadError, match="changed since the run was planned"):
        storage.open_file(str(path), state)
    systems = iter(
        fs._MockFileSystem(datetime.datetime(2026, 1, 1, second=second)) for second in (1, 2)
    )
    states = []
    for system in systems:
        memory = MemoryStores(monkeypatch)
        memory.system = system
        states.append(storage.stat(memory.put("s3://bucket/x", b"1")))
    assert states[1].modified_ns - states[0].modified_ns == 10**9


def test_a_new_file_appears_whole(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with storage.new_file(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_new_object_appears_whole(memory):
    path = memory.put("s3://bucket/x", b"old")
    with storage.new_file(path) as file:
        file.write(b"new" * 10)
        assert storage.open_file(path).read() == b"old"
    assert storage.open_file(path).read() == b"new" * 10


def test_readers_of_paths_get_a_local_copy(tmp_path, memory):
    remote = memory.put("s3://bucket/a.npy", b"123")
    with storage.local_copy(remote) as path:
        assert path.endswith(".npy")
        assert Path(path).read_bytes() == b"123"
    assert not Path(path).exists()
    local = tmp_path / "x"
    local.write_bytes(b"1")
    with storage.local_copy(str(local)) as path:
        assert path == str(local)
    assert local.exists()


class Broken(Exception):
    pass


def break_off(path: str) -> None:
    with storage.new_file(path) as file:
        file.write(b"new")
        raise Broken


def test_a_file_that_could_not_be_finished_leaves_nothing(tmp_path, memory):
    for path in (tmp_path / "x", tmp_path / "y"):
        (tmp_path / "x").write_bytes(b"old")
        with pytest.raises(Broken):
            break_off(str(path))
        assert os.listdir(tmp_path) == ["x"]
        assert (tmp_path / "x").read_bytes() == b"old"
    old = memory.put("s3://bucket/x", b"old")
    with pytest.raises(Broken):
        break_off(old)
    assert storage.open_file(old).read() == b"old"
    with pytest.raises(Broken):
        break_off("s3://bucket/y")
    assert not storage.exists("s3://bucket/y")


def test_folders_are_made_where_there_are_folders(tmp_path, memory):
    for _ in range(2):
        storage.make_folder(str(tmp_path / "a" / "b"))
        storage.make_folder("s3://bucket/a/b")
    assert (tmp_path / "a" / "b").is_dir()
    assert memory.system.get_file_info("bucket").type == fs.FileType.NotFound


def test_rows_of_a_store_are_read_as_rows_of_files(tmp_path, memory, monkeypatch):
    for number in (1, 2):
        rows = {"a": [float(number * row) for row in range(10)], "y": range(10)}
        write_parquet(tmp_path / f"k={number}" / "x.parquet", rows, block_rows=3)
    memory.copy(tmp_path, "s3://bucket/rows")
    stats: list[str] = []
    stat = storage.stat
    monkeypatch.setattr(storage, "stat", lambda path: stats.append(path) or stat(path))
    blocks = []
    for root in (str(tmp_path), "s3://bucket/rows"):
        source = open_source("train", root, ["a", "k", "y"])
        data = DataConfig(train="x", features=["a", "k"], label="y")
        reader = BlockReader(source, input_layout(data, source), "error")
        stats.clear()
        blocks.append([reader.read(block) for block in range(8)])
        assert stats == [file.path for file in source.files]  # one look a file, not one a block
    for ours, theirs in zip(*blocks, strict=True):
        assert ours.label.tolist() == theirs.label.tolist()
        for index in (0, 1):
            assert ours.features[index].tolist() == theirs.features[index].tolist()
    shapes = {"a": ()}
    tables = [open_tables("input", root, shapes, True) for root in (str(tmp_path), "s3://bucket")]
    assert [[rows.table.to_pylist() for rows in table] for table in tables[:1]] == [
        [rows.table.to_pylist() for rows in table] for table in tables[1:]
    ]


def test_a_block_of_an_object_that_changed_is_not_used(tmp_path, memory):
    rows = {"a": [1.0, 2.0], "y": [0, 1]}
    local = write_parquet(tmp_path / "x.parquet", rows)
    path = memory.put("s3://bucket/x.parquet", Path(local).read_bytes())
    source = open_source("train", path, ["a", "y"])
    layout = input_layout(DataConfig(train="x", features=["a"], label="y"), source)
    memory.put(path, Path(local).read_bytes() + b"more")
    with pytest.raises(ReadError, match=f"^{path} changed since the run was planned"):
        BlockReader(source, layout, "error").read(0)


def test_csv_on_a_store_is_read_for_prediction(memory):
    path = memory.put("s3://bucket/x.csv", b"a\n1\n2\n")
    (rows,) = open_tables("input", path, {"a": ()})
    assert rows.table["a"].to_pylist() == [1, 2]


def test_a_store_without_a_bucket_is_told(memory):
    with pytest.raises(DataError, match="'s3://' names no single bucket"):
        storage.find("data.train", "s3://", [".parquet"])
