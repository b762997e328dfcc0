"""Pools: stations that work off tasks one at a time, started, replaced and ended at will.

`Pool` is the seam. `ProcessPool` keeps stations as processes of this machine, without Ray;
`cluster.actors.ActorPool` keeps them as actors, on any machine of a Ray cluster. A pool knows
nothing of what the tasks are. Its methods are called by one thread.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

_END_S = 5.0


@dataclass(frozen=True)
class Ended:
    """How a task ended.

    Attributes:
        station: Which had it.
        result: What it gave; None where it failed.
        failure: What was raised, or that the station is gone; None where it was done.
        is_lost: The station is gone, and the task with it.
    """

    station: int
    result: Any = None
    failure: str | None = None
    is_lost: bool = False


class Pool(Protocol):
    """Stations by number. Numbers are never used twice."""

    def resize(self, stations: int) -> None:
        """Have so many stations: start those that are missing, end idle ones that are too many."""

    def idle(self) -> list[int]:
        """Stations without a task."""

    def give(self, station: int, task: Any) -> None:
        """Give an idle station a task, plain values; never blocks for its end."""

    def poll(self, timeout_s: float) -> list[Ended]:
        """Tasks that have ended; waits until there is one, at most `timeout_s`.

        A station that was lost is no longer there; `resize` starts another in its place.
        """

    def kill(self, station: int) -> None:
        """End a station at once; where it had a task, `poll` tells that it was lost."""

    def close(self) -> None:
        """End all stations. Idempotent."""


@dataclass
class _Process:
    process: "subprocess.Popen[bytes]"
    connection: Connection
    is_busy: bool = False


def stations_within(
    resources: Mapping[str, float], cpus: float, gpus: float, kept_cpus: float = 0.0
) -> int:
    """How many stations the resources of a cluster hold; at least one, which may have to wait.

    Args:
        resources: Of all nodes, by Ray's names.
        cpus: CPUs of each station.
        gpus: GPUs of each station.
        kept_cpus: CPUs that others have or will have.
    """
    most = (resources.get("CPU", 0.0) - kept_cpus) / cpus
    if gpus:
        most = min(most, resources.get("GPU", 0.0) / gpus)
    return max(1, int(most))


class ProcessPool:
    """A pool of processes of this machine. They end with this process, whatever ends it.

    Args:
        target: `module:factory` of what works; see `cluster.station`.
        options: Plain values for the factory.
        environment: Added to this process's environment.
        log_file: Receives what the stations print; None: nothing does.
    """

    def __init__(
        self,
        target: str,
        options: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        log_file: str | None = None,
    ) -> None:
        self._command = [target, json.dumps(dict(options))]
        self._environment = dict(environment or {})
        self._log_file = log_file
        self._stations: dict[int, _Process] = {}
        self._lost: list[int] = []
        self._next = 0

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by station."""
        return {number: station.process.pid for number, station in self._stations.items()}

    def resize(self, stations: int) -> None:
        """As `Pool.resize`."""
        while len(self._stations) < stations:
            self._stations[self._next] = self._start()
            self._next += 1
        for number in self.idle()[: max(0, len(self._stations) - stations)]:
            self._end(number)

    def idle(self) -> list[int]:
        """As `Pool.idle`."""
        return [number for number, station in self._stations.items() if not station.is_busy]

    def give(self, station: int, task: Any) -> None:
        """As `Pool.give`."""
        found = self._stations[station]
        found.is_busy = True
        try:
            found.connection.send(task)
        except OSError:
            self._lost.append(station)

    def poll(self, timeout_s: float) -> list[Ended]:
        """As `Pool.poll`."""
        by_connection = {s.connection: number for number, s in self._stations.items()}
        if not by_connection:
            time.sleep(timeout_s)
            return []
        ended = []
        for ready in wait(list(by_connection), 0 if self._lost else timeout_s):
            number = by_connection[ready]  # type: ignore[index]
            try:
                kind, body = self._stations[number].connection.recv()
            except (EOFError, OSError):
                self._lost.append(number)
                continue
            self._stations[number].is_busy = False
            is_done = kind == "done"
            ended.append(Ended(number, body if is_done else None, None if is_done else body))
        for number in dict.fromkeys(self._lost):
            was_busy = number in self._stations and self._stations[number].is_busy
            code = self._end(number)
            if was_busy:
                ended.append(Ended(number, failure=f"the process ended ({code})", is_lost=True))
        self._lost = []
        return ended

    def kill(self, station: int) -> None:
        """As `Pool.kill`."""
        if station in self._stations:
            self._stations[station].process.kill()

    def close(self) -> None:
        """As `Pool.close`."""
        for number in list(self._stations):
            self._end(number)

    def _start(self) -> _Process:
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "cluster.station", str(theirs.fileno()), *self._command]
        log_file = os.path.abspath(self._log_file or os.devnull)
        os.makedirs(os.path.dirname(log_file), exist_ok=True)
        with open(log_file, "ab") as log:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
            )
        theirs.close()
        return _Process(process, ours)

    def _end(self, number: int) -> int:
        station = self._stations.pop(number, None)
        if station is None:
            return 0
        station.connection.close()  # a station's cue to end
        try:
            return station.process.wait(_END_S if not station.is_busy else 1.0)
        except subprocess.TimeoutExpired:
            station.process.kill()
            return station.process.wait(_END_S)
