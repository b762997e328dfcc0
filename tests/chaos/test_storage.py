"""Storage of checkpoints that is full or fails: training goes on, and what is missing is told."""

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from tests.support.chaos import chaos_job, events_of
from tests.support.drivers import driving, wait_for
from tests.support.stores import s3_server

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few checkpoints."""
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


@pytest.fixture
def large_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a run."""
    with mounted(tmp_path / "disk", "64m") as folder:
        yield folder


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def summary_of(driver: Any) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((driver.folder / "summary.json").read_text())
    return summary


def test_a_full_disk_that_gets_room_again(
    rows: Path, tmp_path: Path, small_disk: Path, undisturbed: Any
) -> None:
    job = chaos_job(rows, tmp_path / "runs", checkpoint__uri=str(small_disk / "kept"))
    filler = fill(small_disk)
    with driving(job, "--chaos", "kill:1@step=40") as driver:
        failed = driver.until("checkpoint_failed")
        assert "No space left on device" in failed["error"]
        driver.until("recovered")  # from memory: there is no checkpoint
        filler.unlink()
        assert driver.wait() == 0
    assert events_of(driver.folder, "checkpoint")
    summary = summary_of(driver)
    assert summary["weights_sha256"] == undisturbed.summary["weights_sha256"]
    assert summary["metrics"] == undisturbed.summary["metrics"]


def test_a_disk_that_stays_full(
    rows: Path, tmp_path: Path, small_disk: Path, undisturbed: Any
) -> None:
    """The trained weights cannot be kept either: status 3, and what to do."""
    job = chaos_job(rows, tmp_path / "runs", checkpoint__uri=str(small_disk / "kept"))
    filler = fill(small_disk)
    with driving(job) as driver:
        assert driver.wait() == 3
        assert "Free the storage, or name another place in checkpoint.uri" in driver.said
        assert "Traceback" not in driver.said
    filler.unlink()
    with driving(job, "--resume") as driver:
        assert driver.wait() == 0
    assert summary_of(driver)["weights_sha256"] == undisturbed.summary["weights_sha256"]


def test_the_disk_of_the_run_folder_may_be_full_for_a_while(
    rows: Path, tmp_path: Path, large_disk: Path, undisturbed: Any
) -> None:
    """Checkpoints, events, metrics and logs, all on it: nothing is torn, nothing is lost."""
    job = own_folder_job(rows, large_disk)
    with driving(job, "--chaos", "kill:1@step=40", log_folder=tmp_path) as driver:
        driver.until("checkpoint")
        filler = fill(large_disk)
        driver.printed("recovered in")
        filler.unlink()
        assert driver.wait() == 0, driver.said
    told = [event["event"] for event in events_of(driver.folder)]
    assert told.count("recovered") == 1
    assert "checkpoint_failed" in told
    lines = (driver.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(len(lines)))
    assert summary_of(driver)["weights_sha256"] == undisturbed.summary["weights_sha256"]
    assert summary_of(driver)["metrics"] == undisturbed.summary["metrics"]


def test_the_disk_of_the_run_folder_may_stay_full(
    rows: Path, tmp_path: Path, large_disk: Path, undisturbed: Any
) -> None:
    with driving(own_folder_job(rows, large_disk), log_folder=tmp_path) as driver:
        driver.until("checkpoint")
        filler = fill(large_disk)
        assert driver.wait() == 3, driver.said
        assert "--resume" in driver.said or "Free the storage" in driver.said
        assert "Traceback" not in driver.said
    filler.unlink()
    with driving(own_folder_job(rows, large_disk), "--resume", log_folder=tmp_path) as driver:
        assert driver.wait() == 0, driver.said
    assert summary_of(driver)["weights_sha256"] == undisturbed.summary["weights_sha256"]
    assert summary_of(driver)["metrics"] == undisturbed.summary["metrics"]


def own_folder_job(rows: Path, disk: Path) -> dict[str, Any]:
    """Without callbacks that write, which fail as the user's code does."""
    job = chaos_job(rows, disk / "runs")
    writers = ("ModelCheckpoint", "CSVLogger")
    callbacks = job["train"]["callbacks"]
    job["train"]["callbacks"] = [one for one in callbacks if not set(one) & set(writers)]
    return job


class Passage:
    """A way to a server that can be closed: connections are cut and refused until it opens."""

    def __init__(self, server: str) -> None:
        host, _, port = server.removeprefix("http://").partition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_open = True
        self._pairs: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.is_open = False
        for end in self._pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self.close()
        self._listener.close()
        for end in self._pairs:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if not self.is_open:
                    client.close()
                    continue
                server = socket.create_connection(self._server)
                self._pairs += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=_pass_on, args=ends, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def passage() -> Iterator[Passage]:
    """To an S3 store with the bucket `kept`."""
    with s3_server() as server:
        client = fs.S3FileSystem(
            access_key="writer",
            secret_key="writer",
            region="us-east-1",
            endpoint_override=server,
            allow_bucket_creation=True,
        )
        client.create_dir("kept")
        way = Passage(server)
        yield way
        way.end()


def test_a_store_that_fails_for_a_while(
    rows: Path, tmp_path: Path, passage: Passage, undisturbed: Any
) -> None:
    environment = {
        "AWS_ACCESS_KEY_ID": "writer",
        "AWS_SECRET_ACCESS_KEY": "writer",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": passage.address,
        "LOCKSTEP_STORAGE_ATTEMPTS": "2",
        "LOCKSTEP_STORAGE_TIMEOUT_S": "1",
    }
    job = chaos_job(rows, tmp_path / "runs", checkpoint__uri="s3://kept/here")
    with driving(job, "--chaos", "kill:0@step=40", environment=environment) as driver:
        driver.until("checkpoint")
        passage.close()
        failed = driver.until("checkpoint_failed")
        assert "s3://kept/here" in failed["error"]
        passage.is_open = True
        assert driver.wait() == 0, driver.said
    after = wait_for(
        lambda: [e for e in events_of(driver.folder, "checkpoint") if e["time"] > failed["time"]],
        "checkpoint after the failure",
    )
    assert after[-1]["step"] > failed["step"] - 16
    summary = summary_of(driver)
    assert summary["weights_sha256"] == undisturbed.summary["weights_sha256"]
    assert summary["metrics"] == undisturbed.summary["metrics"]
