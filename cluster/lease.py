"""The lease: how a training process ends that nobody can reach to end it.

A host may keep its training process for as long as it hears from the coordinator. Behind a cut
network it hears nothing, and ends the process itself; the coordinator waits for that long before it
goes on without the host. So a generation that was given up cannot go on writing.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import ray


class Lease:
    """The right to keep a training process, renewed by whoever speaks for the coordinator."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._renewed_at = clock()

    def renew(self) -> None:
        """Let it run anew from now on."""
        self._renewed_at = self._clock()

    def left_s(self) -> float:
        """Seconds until it runs out; 0 when it has."""
        return max(0.0, self._renewed_at + self._seconds - self._clock())


class Lessor:
    """Renews the leases of hosts while this process lives, however busy its main thread is."""

    def __init__(self, lease_s: float) -> None:
        self._every_s = lease_s / 5
        self._hosts: list[Any] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def lease(self, hosts: list[Any]) -> None:
        """Renew the leases of these hosts from now on, and no others."""
        self._hosts = hosts
        if self._thread is None and hosts:
            self._thread = threading.Thread(target=self._renew, name="lessor", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Renew nothing any more. Idempotent."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self._every_s)

    def _renew(self) -> None:
        while not self._ended.wait(self._every_s):
            for host in self._hosts:
                with contextlib.suppress(ray.exceptions.RayError):
                    host.renew.remote()
