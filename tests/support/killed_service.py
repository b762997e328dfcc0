"""`lockstep serve` as a process that is killed with all that it has started, and started again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from lockstep.batch_client import BatchClient
from serving.haproxy import free_ports
from tests.support.served import ROOT, database_url

_START_S = 180
_END_S = 90


class KilledService:
    """The service of a home, at one address through all of its lives.

    Args:
        folder: As `tests.support.served.prepare` left it.
        key: Of a user.
        options: Of the command.

    Attributes:
        batches: A client of its batch jobs.
    """

    def __init__(self, folder: Path, key: str, *options: str) -> None:
        (self._port,) = free_ports(1)
        self._folder, self._options = folder, options
        self._process: subprocess.Popen[Any] | None = None
        self._lives = 0
        self.batches = BatchClient(f"http://127.0.0.1:{self._port}", key)

    def start(self) -> None:
        """Start it; returns when it answers."""
        self._lives += 1
        log = self._folder / f"serve-{self._lives}.log"
        home = str(self._folder / "home")
        command = [sys.executable, "-m", "lockstep.cli", "serve", "--port", str(self._port)]
        command += ["--database", database_url(self._folder), *self._options]
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "LOCKSTEP_HOME": home, "CUDA_VISIBLE_DEVICES": "-1"},
            )
        deadline = time.monotonic() + _START_S
        while "serving at " not in log.read_text():
            assert self._process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)

    def descendants(self) -> list[psutil.Process]:
        """All processes that it has started, and those that they have."""
        assert self._process is not None
        return psutil.Process(self._process.pid).children(recursive=True)

    def kill(self) -> int:
        """SIGKILL to the command, and then to all that it has started; how many there were.

        Ray's own processes end with the command's; those of its workers follow when they notice.
        """
        assert self._process is not None
        started = self.descendants()
        self._process.kill()
        self._process.wait()
        for each in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        _, alive = psutil.wait_procs(started, timeout=20)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
        return len(started)

    def end(self) -> None:
        """SIGTERM; its status must be 0."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(_END_S) == 0

    def close(self) -> None:
        """End it in any case."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
