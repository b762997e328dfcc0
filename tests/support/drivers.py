"""`lockstep train` in a process of its own, watched from outside."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.support.chaos import events_of

WAIT_S = 90.0
RUN_ID = "run"


class Driver:
    """A command line that trains a job.

    Args:
        job: The job; its file is written beside the run folders.
        arguments: More of the command line.
        environment: More of the environment.
        log_folder: Where what it prints goes; beside the run folders if not given.
    """

    def __init__(
        self,
        job: dict[str, Any],
        *arguments: str,
        environment: dict[str, str] | None = None,
        log_folder: Path | None = None,
    ) -> None:
        self.folder = Path(job["runs_dir"]) / job["name"] / RUN_ID
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        file = self.folder.parent / "job.yaml"
        file.write_text(yaml.safe_dump(job))
        self._log_path = (log_folder or self.folder.parent) / "driver.log"
        self._log = open(self._log_path, "ab")  # noqa: SIM115
        command = ["-m", "lockstep.cli", "train", str(file), "--run-id", RUN_ID, *arguments]
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **(environment or {})},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def until(self, what: str, is_so: Callable[[dict[str, Any]], bool] = bool) -> dict[str, Any]:
        """The first event of this name that is so; the run may be over by then."""
        found = wait_for(
            lambda: next((e for e in events_of(self.folder, what) if is_so(e)), None),
            f"{what} in {self.folder}",
            lambda: self.process.poll() is None,
        )
        return dict(found)

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(WAIT_S)

    @property
    def said(self) -> str:
        """All that it has printed, words apart by one space."""
        return " ".join(self._log_path.read_text().split())

    def printed(self, text: str) -> None:
        """Wait until it has printed this."""
        wait_for(lambda: text in self.said, text, lambda: self.process.poll() is None)

    def close(self) -> None:
        """End it, if it has not ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._log.close()


@contextlib.contextmanager
def driving(
    job: dict[str, Any],
    *arguments: str,
    environment: dict[str, str] | None = None,
    log_folder: Path | None = None,
) -> Iterator[Driver]:
    """A driver that does not outlive the block."""
    driver = Driver(job, *arguments, environment=environment, log_folder=log_folder)
    try:
        yield driver
    finally:
        driver.close()


def wait_for(
    look: Callable[[], Any], what: str, is_possible: Callable[[], bool] = lambda: True
) -> Any:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        could_come = is_possible()
        if found := look():
            return found
        assert could_come, f"there will be no {what}"
        time.sleep(0.05)
    raise AssertionError(f"no {what} within {WAIT_S:g} s")


class Belongings:
    """What a process and all below it hold: processes, ports, memory files. Taken once."""

    def __init__(self, pid: int) -> None:
        root = psutil.Process(pid)
        self.processes = [root, *root.children(recursive=True)]
        self.ports: set[int] = set()
        self.memory: set[str] = set()
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        self.ports.add(connection.laddr.port)
                paths = [mapped.path for mapped in process.memory_maps()]
                paths += [file.path for file in process.open_files()]
                self.memory |= {path for path in paths if path.startswith("/dev/shm/")}

    def left(self) -> list[str]:
        """What is still there; processes that ended and were not waited for are gone."""
        there: list[str] = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    there.append(f"{process.pid} {process.name()}")
        ours = {connection.laddr.port for connection in _listening()}
        there += [f"port {port}" for port in self.ports & ours]
        return there + [path for path in self.memory if os.path.exists(path)]


def _listening() -> list[Any]:
    connections = psutil.net_connections("inet")
    return [one for one in connections if one.status == psutil.CONN_LISTEN]
