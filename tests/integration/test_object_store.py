"""Rows on an S3 store: the same as local ones; and stores that refuse, fail, or say nothing."""

import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from configs.data import DataConfig
from data_pipeline import storage
from data_pipeline.blocks import BlockReader
from data_pipeline.errors import DataError, ReadError
from data_pipeline.features import InputLayout, input_layout
from data_pipeline.plan import Plan, Share
from data_pipeline.reader import TrainingChunks
from data_pipeline.scan import scan
from data_pipeline.source import Source, open_source
from tests.support.stores import FailingStore, s3_server

ROOT = "s3://rows/flights"
COLUMNS = ["a", "v", "year", "y"]
ATTEMPTS = 3


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        client = fs.S3FileSystem(
            access_key="writer",
            secret_key="writer",
            region="us-east-1",
            endpoint_override=address,
            allow_bucket_creation=True,
        )
        client.create_dir("rows")
        yield address


@pytest.fixture
def point_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a store's address, and little patience, into the environment."""
    values = {
        "AWS_ACCESS_KEY_ID": "reader-of-rows",
        "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-prints",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
        "LOCKSTEP_STORAGE_ATTEMPTS": str(ATTEMPTS),
        "LOCKSTEP_STORAGE_TIMEOUT_S": "1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    return lambda address: monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of several blocks, in folders that are a column."""
    root = tmp_path_factory.mktemp("flights")
    numbers = np.random.default_rng(0)
    for year, rows in ((2013, 400), (2014, 300)):
        vectors = pa.FixedSizeListArray.from_arrays(numbers.normal(size=rows * 3), 3)
        table = pa.table({"a": numbers.normal(size=rows), "v": vectors, "y": range(rows)})
        (root / f"year={year}").mkdir()
        pq.write_table(table, root / f"year={year}" / "part.parquet", row_group_size=64)
    return root


@pytest.fixture
def remote(server: str, point_to: Callable[[str], None], local: Path) -> str:
    """The same files as objects."""
    point_to(server)
    for file in local.rglob("*.parquet"):
        storage.write_whole(f"{ROOT}/{file.relative_to(local)}", file.read_bytes())
    return ROOT


def opened(root: str) -> tuple[Source, InputLayout]:
    data = DataConfig(train=root, features=["a", "v", "year"], label="y", normalize=True)
    source = open_source("train", root, data.columns)
    return source, input_layout(data, source)


def chunks_of(root: str) -> list[Any]:
    """Everything that two epochs hold, for both of two workers."""
    source, layout = opened(root)
    found = scan(source, layout, "error")
    plan = Plan(found.block_rows, 96, 5, 32, "window", seed=3)
    chunks = []
    for rank in range(2):
        reader = BlockReader(source, layout, "error", 2**20)
        of_rank = TrainingChunks(Share(plan, rank, 2), reader, layout, 2, has_places=True)
        chunks += [of_rank.assemble(chunk) for chunk in range(of_rank.chunks)]
    return [found.statistics, *chunks]


def test_a_store_gives_the_rows_that_local_files_give(remote, local):
    local_source, _ = opened(str(local))
    source, _ = opened(remote)
    assert [file.path for file in source.files] == [
        f"{ROOT}/year=2013/part.parquet",
        f"{ROOT}/year=2014/part.parquet",
    ]
    assert source.columns == local_source.columns
    assert source.block_rows.tolist() == local_source.block_rows.tolist()
    theirs, ours = chunks_of(str(local)), chunks_of(remote)
    assert len(ours) == len(theirs) > 2
    np.testing.assert_array_equal(ours[0].mean, theirs[0].mean)
    np.testing.assert_array_equal(ours[0].variance, theirs[0].variance)
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        for mine, other in zip(our, their, strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("pattern", ["*/part.parquet", "**", "year=201[3]/*", "year=2014"])
def test_patterns_match_objects_as_they_match_files(remote, local, pattern):
    found = storage.find("data.train", f"{ROOT}/{pattern}", (".parquet",))
    theirs = storage.find("data.train", f"{local}/{pattern}", (".parquet",))
    assert found == [path.replace(str(local), ROOT) for path in theirs]
    assert found


def test_an_object_that_was_replaced_is_not_used(remote):
    source, layout = opened(remote)
    path = source.files[1].path
    storage.write_whole(path, storage.open_file(path).read() + b" ")
    reader = BlockReader(source, layout, "error")
    assert reader.read(0).rows == 64
    with pytest.raises(ReadError, match=f"^{path} changed since the run was planned"):
        reader.read(len(source.blocks) - 1)


def test_an_object_of_the_same_size_and_a_later_time_is_not_used(remote):
    source, layout = opened(remote)
    time.sleep(1.1)  # the time of an object counts whole seconds
    path = source.files[0].path
    storage.write_whole(path, storage.open_file(path).read())
    with pytest.raises(ReadError, match="changed since the run was planned"):
        BlockReader(source, layout, "error").read(0)


def test_an_object_that_is_removed_during_the_run(remote):
    source, layout = opened(remote)
    storage.remove(source.files[0].path)
    with pytest.raises(ReadError) as error:
        BlockReader(source, layout, "error").read(0)
    assert str(error.value).startswith(f"cannot read block 0 of {source.files[0].path}: ")


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"", lambda data: b"x"])
def test_an_object_that_is_not_parquet(remote, damage):
    path = f"{ROOT}/year=2014/part.parquet"
    storage.write_whole(path, damage(storage.open_file(path).read()))
    with pytest.raises(DataError, match=f"^{path} is not a readable Parquet file: "):
        opened(remote)


def test_an_object_that_is_damaged_inside_is_told_with_its_block(remote):
    path = f"{ROOT}/year=2014/part.parquet"
    data = bytearray(storage.open_file(path).read())
    data[4:400] = bytes(396)
    storage.write_whole(path, bytes(data))
    source, layout = opened(remote)
    with pytest.raises(ReadError, match=f"^cannot read block 0 of {path}: "):
        BlockReader(source, layout, "error").read(7)


def test_a_bucket_that_is_not_there(remote, server):
    for entry in ("s3://roms/flights", "s3://roms/*.parquet", "s3://roms"):
        with pytest.raises(DataError) as error:
            open_source("train", entry, COLUMNS)
        assert f"no bucket 'roms' at {server}" in str(error.value)
        assert error.value.exit_status == 2
    with pytest.raises(DataError, match="has no such bucket"):
        storage.write_whole("s3://roms/x", b"x")


def test_an_object_that_is_not_there(remote):
    with pytest.raises(DataError, match="no object or folder at 's3://rows/flightz'"):
        open_source("train", "s3://rows/flightz", COLUMNS)


def test_wrong_credentials(remote, server):
    def set_free_requests(count: int) -> None:
        request = urllib.request.Request(
            f"{server}/moto-api/reset-auth",
            data=str(count).encode(),
            headers={"Content-Type": "text/plain"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()

    set_free_requests(0)
    try:
        with pytest.raises(DataError) as error:
            open_source("train", ROOT, COLUMNS)
    finally:
        set_free_requests(10**9)
    message = str(error.value)
    assert f"the store ({server}) refuses access: " in message
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message
    assert "nobody-prints" not in message
    assert "reader-of-rows" not in message


def test_no_credentials(point_to, monkeypatch):
    with FailingStore(403) as store:
        point_to(store.address)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(DataError, match="not set in the environment: set them"):
            open_source("train", ROOT, COLUMNS)
        assert store.requests == 1


@pytest.mark.parametrize(("status", "most_s"), [(503, 20), (None, 30)])
def test_a_store_that_fails_is_given_up(point_to, status, most_s):
    with FailingStore(status) as store:
        point_to(store.address)
        begin = time.monotonic()
        with pytest.raises(ReadError) as error:
            open_source("train", ROOT, COLUMNS)
        elapsed_s = time.monotonic() - begin
        assert store.requests == ATTEMPTS
    assert elapsed_s < most_s
    message = str(error.value)
    assert f"{ROOT}: the store ({store.address}) failed: " in message
    assert f"and {ATTEMPTS} attempt(s) of at most 1 s each" in message
    assert error.value.exit_status == 3


def test_a_store_that_is_down(point_to):
    with socket.socket() as held:  # bound, so that nobody else listens there; not listening
        held.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{held.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(ReadError, match="Gave up after"):
            open_source("train", ROOT, COLUMNS)
    assert time.monotonic() - begin < 20


def test_a_store_that_fails_during_the_run_is_told_with_the_block(remote, point_to):
    source, layout = opened(remote)
    reader = BlockReader(source, layout, "error")
    assert reader.read(0).rows == 64
    with FailingStore(503) as store:
        point_to(store.address)
        with pytest.raises(ReadError, match=r"\(http://127.* failed: .* Gave up after"):
            reader.read(len(source.blocks) - 1)


def test_writing_to_a_store_that_fails(point_to):
    with FailingStore(503) as store:
        point_to(store.address)
        with pytest.raises(ReadError, match="s3://rows/x: the store"):
            storage.write_whole("s3://rows/x", b"x")
