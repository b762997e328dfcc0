"""Snapshots on their way to the coordinator, while training goes on.

A snapshot is taken in two parts. The loop *holds* the values of all variables: what lies in this
process's memory is copied into buffers that are kept from one snapshot to the next, what lies on
another device is read later. A thread then sends it in parts. One snapshot is on its way at a time.

Why kept buffers: memory that is new to a process costs the kernel several times what copying does.
TensorFlow, which copies a variable that somebody holds when a step is about to change it, takes new
memory each time.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from trainer.payloads import Arrays, Snapshot

_SENT_S = 300.0
_SHARE = 0.05  # of the time, at most, does sending go on


class Link(Protocol):
    """A rank's connection to the coordinator; `cluster.channel.Channel` is one."""

    def send(self, kind: str, body: Any = None) -> None:
        """Send a message."""

    def send_large(self, kind: str, body: Any) -> None:
        """Send a message of any size."""

    def mark(self, phase: str, step: int = -1) -> None:
        """Say where this rank is: before everything that all ranks do together."""

    def has_command(self, command: str) -> bool:
        """Whether the coordinator has sent a command."""
        ...


class SnapshotSender:
    """Sends snapshots in a thread of its own. Used by one thread.

    Args:
        link: Where to.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._rest_until = 0.0
        self._buffers: Arrays = {}

    @property
    def is_idle(self) -> bool:
        """Whether a snapshot may be sent that nobody waits for.

        Large ones take long and take cores from training: after each there is a rest.
        """
        return not self._is_sending and time.monotonic() >= self._rest_until

    def make_room(self, values: Mapping[str, Any]) -> None:
        """Take the memory for snapshots of such values beforehand; blocks.

        Without it the first snapshot is held by TensorFlow, which costs the next step the time
        that new memory takes.
        """
        for name, value in values.items():
            if isinstance(value, np.ndarray) and name not in self._buffers:
                self._buffers[name] = np.array(value)

    def submit(self, snapshot: Snapshot) -> None:
        """Send a snapshot; waits until the one before is sent.

        Memory that arrays share with variables is free to change when this returns, but for the
        first snapshot without `make_room`: TensorFlow keeps what is held.
        """
        self.flush()
        held = Snapshot(snapshot.step, self._copied(snapshot.arrays), snapshot.meta)
        self._thread = threading.Thread(
            target=self._send, args=(held,), name="snapshot", daemon=True
        )
        self._thread.start()

    def flush(self) -> None:
        """Wait until nothing is on its way.

        Raises:
            TimeoutError: It takes longer than a host that lives ever would.
            Exception: What the thread raised.
        """
        if self._thread is not None:
            self._thread.join(_SENT_S)
            if self._thread.is_alive():
                raise TimeoutError(f"a snapshot was not sent within {_SENT_S:g} s.")
            self._thread = None
        if self._error is not None:
            raise self._error

    @property
    def _is_sending(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _copied(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values with those copied for which there is a buffer: from the second snapshot on."""
        copied: dict[str, Any] = {}
        for name, value in values.items():
            buffer = self._buffers.get(name)
            if buffer is not None and (buffer.shape, buffer.dtype) == (value.shape, value.dtype):
                np.copyto(buffer, value)
                value = buffer
            copied[name] = value
        return copied

    def _send(self, snapshot: Snapshot) -> None:
        begin = time.monotonic()
        try:
            arrays = {name: np.asarray(held) for name, held in snapshot.arrays.items()}
            if snapshot.is_durable:
                self._link.mark("checkpoint", snapshot.step)
            self._link.send_large("snapshot", Snapshot(snapshot.step, arrays, snapshot.meta))
        except Exception as error:  # the thread's main: the loop's to raise
            self._error = error
        took_s = time.monotonic() - begin
        self._rest_until = time.monotonic() + took_s * (1 / _SHARE - 1)
        self.make_room(snapshot.arrays)
