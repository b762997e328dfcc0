"""Checkpoints under real trouble: an S3 store, full disks, writers that are killed."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from pyarrow import fs

from data_pipeline import storage
from data_pipeline.errors import DataError
from tests.support.killed_writers import KILLS
from tests.support.stores import FailingStore, s3_server
from trainer.checkpoint import pack, read_checkpoint
from trainer.checkpoint_store import CheckpointStore, Found, Origin
from trainer.errors import CheckpointError

OURS = Origin("run-1", "job-a")
ATTEMPTS = 2
LARGE_ELEMENTS = 3_000_000  # 24 MB: a store gets it in three parts


def killed_writers(folder: Path, mode: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_writers", str(folder), mode],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    looks: list[dict[str, Any]] = json.loads(done.stdout)
    return looks


def test_a_writer_killed_at_any_moment_shows_no_part_of_a_checkpoint(tmp_path):
    looks = killed_writers(tmp_path, "moments")
    newest = [0, 0]
    for look in looks:
        assert look["is_whole"]
        for sentence in look["skipped"]:
            assert "is without a manifest" in sentence
        place = look["place"] or [0, 0]
        assert place >= newest, "a later look found an earlier checkpoint"
        newest = place
        if look["acknowledged"] is not None:
            assert place >= look["acknowledged"], "a save that had returned is lost"
    deaths = [look for look in looks if "is_cut" in look]
    assert len(deaths) == KILLS
    assert all(look["acknowledged"][1] >= 1 for look in deaths)
    assert any(look["is_cut"] for look in deaths)  # some were killed while they wrote
    assert len(looks) > 2 * KILLS


def test_a_writer_killed_at_each_call_leaves_the_old_or_the_new_one(tmp_path):
    looks = killed_writers(tmp_path, "calls")
    assert all(look["is_whole"] for look in looks)
    assert [look["was_killed"] for look in looks] == [True] * (len(looks) - 1) + [False]
    # Each of the two files is synced, renamed, its partial file removed if it is there still, its
    # folder synced. The sixth call names the manifest: from then on the new one is found.
    calls, naming = 8, 5
    places = [look["place"] for look in looks]
    assert places[: 2 * naming + 1] == [[1, 1]] * (2 * naming + 1)
    assert places[2 * naming + 1 :] == [[2, 2]] * (2 * (calls - naming))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def save(store: CheckpointStore, step: int, elements: int = 100, generation: int = 1) -> str:
    return store.save(step, generation, {"a": np.full(elements, float(step))}, {"step": step})


def assert_is(found: Found | None, step: int, elements: int = 100) -> None:
    assert found is not None
    assert found.step == step
    assert found.meta == {"step": step}
    assert np.array_equal(found.arrays["a"], np.full(elements, float(step)))


def test_a_full_disk_is_told_and_the_one_before_is_found(small_disk):
    store = CheckpointStore(str(small_disk / "checkpoints"), OURS)
    save(store, 1)
    before = sorted(path.name for path in small_disk.rglob("*"))
    for elements in (100_000, 200_000, 10_000_000):
        (small_disk / "ballast").write_bytes(bytes(400_000))
        with pytest.raises(CheckpointError, match="No space left on device. Free the storage"):
            save(store, 2, elements)
        (small_disk / "ballast").unlink()
        assert sorted(path.name for path in small_disk.rglob("*")) == before
    found, skipped = store.newest()
    assert_is(found, 1)
    assert skipped == []
    save(store, 2, 100_000)
    assert_is(store.newest()[0], 2, 100_000)


def test_a_disk_with_room_for_the_data_and_not_for_its_manifest(small_disk, monkeypatch):
    store = CheckpointStore(str(small_disk / "checkpoints"), OURS)
    save(store, 1)
    written: list[str] = []
    real = storage.write_whole

    def watched(path: str, *pieces: Any) -> None:
        written.append(Path(path).suffix)
        real(path, *pieces)

    monkeypatch.setattr(storage, "write_whole", watched)
    size_bytes = pack({"a": np.full(5_000, 2.0)}, {"step": 2}).size_bytes
    disk = os.statvfs(small_disk)
    data_blocks = -(-size_bytes // disk.f_bsize)
    (small_disk / "ballast").write_bytes(bytes((disk.f_bavail - data_blocks) * disk.f_bsize))
    with pytest.raises(CheckpointError, match="No space left"):
        save(store, 2, 5_000)
    assert written == [".h5", ".json"]
    assert not list((small_disk / "checkpoints").glob("*0002*"))
    assert_is(store.newest()[0], 1)


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
        client.create_dir("runs")
        yield address


@pytest.fixture
def point_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a store's address, and little patience, into the environment."""
    values = {
        "AWS_ACCESS_KEY_ID": "writer-of-checkpoints",
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


@pytest.fixture
def uri(server: str, point_to: Callable[[str], None], request: pytest.FixtureRequest) -> str:
    """A place of its own for each test."""
    point_to(server)
    return f"s3://runs/{abs(hash(request.node.nodeid))}/checkpoints"


def test_checkpoints_on_a_store(uri):
    store = CheckpointStore(f"{uri}/", OURS)
    assert not store.has_any()
    assert store.newest() == (None, [])
    save(store, 100, LARGE_ELEMENTS)
    save(store, 200)
    path = save(store, 150, generation=2)
    assert path == f"{uri}/step-0000000150-g000002.h5"
    assert store.has_any()
    assert store.last_generation() == 2
    assert_is(store.newest()[0], 150)
    assert read_checkpoint(path)[1] == {"step": 150}
    for last in (150, 200):
        storage.remove(f"{uri}/step-{last:010d}-g{2 if last == 150 else 1:06d}.json")
    found, skipped = store.newest()
    assert_is(found, 100, LARGE_ELEMENTS)
    assert [sentence.partition(" is without a manifest")[0] for sentence in skipped] == [
        path,
        f"{uri}/step-0000000200-g000001.h5",
    ]
    save(store, 160, generation=2)
    store.clean()
    assert store.newest()[1] == []
    assert store.prune(1, None, "auto") == [f"{uri}/step-0000000100-g000001.h5"]
    store.save_final(2, {"a": np.ones(3)}, {}, step=160)
    names = [entry.name for entry in storage.list_folder(uri) if entry.is_file]
    assert sorted(name for name in names if name) == [
        *("final-g000002.h5", "final-g000002.json"),
        *("step-0000000160-g000002.h5", "step-0000000160-g000002.json"),
    ]
    assert store.final()[0] is not None


DAMAGES: dict[str, tuple[Callable[[str], None], str]] = {
    "truncated": (lambda path: change(path, lambda data: data[:-1]), "bytes; its manifest says"),
    "bit flipped": (
        lambda path: change(path, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        "is damaged: its digest",
    ),
    "missing": (storage.remove, "is missing; its manifest is there"),
    "folder": (lambda path: to_folder(path), "is a folder; a file belongs there"),
}


def change(path: str, how: Callable[[bytes], bytes]) -> None:
    storage.write_whole(path, how(storage.read_whole(path)))


def to_folder(path: str) -> None:
    storage.remove(path)
    storage.write_whole(f"{path}/part", b"x")


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_one_on_a_store_is_named_and_the_one_before_is_used(uri, damage, reason):
    store = CheckpointStore(uri, OURS)
    save(store, 100)
    path = save(store, 200)
    damage(path)
    found, skipped = store.newest()
    assert_is(found, 100)
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{path} ")
    assert reason in skipped[0]


@pytest.mark.parametrize(("status", "most_s"), [(500, 20), (503, 20), (None, 30)])
def test_a_store_that_fails_is_given_up_and_nothing_is_lost(uri, server, point_to, status, most_s):
    store = CheckpointStore(uri, OURS)
    save(store, 100)
    with FailingStore(status) as failing:
        point_to(failing.address)
        begin = time.monotonic()
        with pytest.raises(CheckpointError, match="cannot write .*failed: .*Gave up after") as bad:
            save(store, 200)
        assert time.monotonic() - begin < most_s
        assert bad.value.is_retryable
        for look in (store.newest, store.has_any, store.clean)[: None if status else 1]:
            with pytest.raises(CheckpointError, match="cannot be reached: .*Gave up after"):
                look()
    point_to(server)
    found, skipped = store.newest()
    assert_is(found, 100)
    assert skipped == []


def test_a_store_that_refuses_is_told(uri, point_to):
    store = CheckpointStore(uri, OURS)
    with FailingStore(403) as failing:
        point_to(failing.address)
        with pytest.raises(CheckpointError, match="cannot write .* refuses access"):
            save(store, 1)
        with pytest.raises(DataError, match="refuses access") as error:
            store.newest()
    assert error.value.exit_status == 2


def test_a_bucket_that_is_not_there_is_told(uri):
    with pytest.raises(CheckpointError, match="cannot write .* no such bucket"):
        save(CheckpointStore("s3://ruins/checkpoints", OURS), 1)


class CutLink:
    """A way to a store that ends for good after some bytes."""

    def __init__(self, address: str, bytes_until_cut: int) -> None:
        parts = urlsplit(address)
        self._target = (parts.hostname, parts.port)
        self._left = bytes_until_cut
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def is_cut(self) -> bool:
        return self._left < 0

    def __enter__(self) -> "CutLink":
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._cut()
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                target = socket.create_connection(self._target)
                self._ends += [client, target]
                self._start(self._pump, client, target, True)
                self._start(self._pump, target, client, False)

    def _pump(self, source: socket.socket, target: socket.socket, is_counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                with self._lock:
                    self._left -= len(data) * is_counted
                if self.is_cut:
                    self._cut()
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def _cut(self) -> None:
        for end in [self._listener, *self._ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.mark.parametrize("megabytes", [0.0, 3.0, 11.0, 20.0, 23.9])
def test_a_store_that_is_lost_in_the_middle_of_a_save(uri, server, point_to, megabytes):
    store = CheckpointStore(uri, OURS)
    save(store, 100)
    with CutLink(server, int(megabytes * 1e6)) as link:
        point_to(link.address)
        with pytest.raises(CheckpointError, match="cannot write .*Gave up after"):
            save(store, 200, LARGE_ELEMENTS)
        assert link.is_cut
    point_to(server)
    found, skipped = store.newest()
    assert_is(found, 100)
    assert skipped == []
    save(store, 200, LARGE_ELEMENTS)
    assert_is(store.newest()[0], 200, LARGE_ELEMENTS)
