"""A pool whose stations are Ray actors, on any machine of the cluster.

A station that does not find room waits for it, and its first task with it; Ray's own autoscaler
sees the demand. Nothing is tried again here: a lost actor is told, and whoever gave the task
decides.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from cluster.pool import Ended, stations_within
from cluster.station import Station

_NICE = 10


class _ActorStation:
    """The actor: a station whose process gives way to those of requests."""

    def __init__(self, target: str, options: dict[str, Any]) -> None:
        os.nice(_NICE)
        self._station = Station(target, options)

    def run(self, task: Any) -> tuple[str, Any]:
        return self._station.run(task)


def capacity(cpus: float, gpus: float, kept_cpus: float = 0.0) -> int:
    """How many stations the Ray that this process has joined can hold; see `stations_within`."""
    return stations_within(ray.cluster_resources(), cpus, gpus, kept_cpus)


@dataclass
class _Actor:
    handle: Any
    pending: Any = None


class ActorPool:
    """A pool of actors of the Ray that this process has started or joined.

    Args:
        target: `module:factory` of what works; see `cluster.station`.
        options: Plain values for the factory.
        cpus: CPUs of each station.
        gpus: GPUs of each station.
        environment: Added to the stations' environment.
    """

    def __init__(
        self,
        target: str,
        options: Mapping[str, Any],
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._target, self._options = target, dict(options)
        self._actor = ray.remote(_ActorStation).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            runtime_env={"env_vars": dict(environment or {})},
        )
        self._stations: dict[int, _Actor] = {}
        self._next = 0

    def resize(self, stations: int) -> None:
        """As `Pool.resize`."""
        while len(self._stations) < stations:
            self._stations[self._next] = _Actor(self._actor.remote(self._target, self._options))
            self._next += 1
        for number in self.idle()[: max(0, len(self._stations) - stations)]:
            ray.kill(self._stations.pop(number).handle)

    def idle(self) -> list[int]:
        """As `Pool.idle`."""
        return [number for number, actor in self._stations.items() if actor.pending is None]

    def give(self, station: int, task: Any) -> None:
        """As `Pool.give`."""
        actor = self._stations[station]
        actor.pending = actor.handle.run.remote(task)

    def poll(self, timeout_s: float) -> list[Ended]:
        """As `Pool.poll`."""
        pending = {a.pending: n for n, a in self._stations.items() if a.pending is not None}
        if not pending:
            time.sleep(timeout_s)  # whoever polls in a loop relies on it
            return []
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        return [self._ended(pending[reference], reference) for reference in ready]

    def kill(self, station: int) -> None:
        """As `Pool.kill`."""
        if station in self._stations:
            ray.kill(self._stations[station].handle)

    def close(self) -> None:
        """As `Pool.close`."""
        for number in list(self._stations):
            ray.kill(self._stations.pop(number).handle)

    def _ended(self, number: int, reference: Any) -> Ended:
        self._stations[number].pending = None
        try:
            kind, body = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._stations.pop(number)
            reason = " ".join(str(error).split())[:300]
            return Ended(number, failure=f"the actor is gone: {reason}", is_lost=True)
        return Ended(number, body) if kind == "done" else Ended(number, failure=body)
