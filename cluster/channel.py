"""What travels between a host and its training process: messages up, commands down.

The channel is a local socket. Its end is also the training process's lifeline: when the host
closes it or dies, the process ends itself at once.
"""

import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True)
class Message:
    """A message of one training process, as the coordinator sees it.

    Attributes:
        generation: The formation that sent it; older ones are ignored.
        rank: The sender.
        kind: What it says; "finished", "exception" and "exited" are the cluster's own.
        body: Plain values.
    """

    generation: int
    rank: int
    kind: str
    body: Any


class Channel:
    """A training process's side: thread-safe `send`, and commands as they arrive."""

    def __init__(self, connection: Connection, rank: int, generation: int) -> None:
        self.rank = rank
        self.generation = generation
        self._connection = connection
        self._send_lock = threading.Lock()
        self._arrived = threading.Condition()
        self._commands: list[tuple[str, Any]] = []
        threading.Thread(target=self._listen, name="channel", daemon=True).start()

    def send(self, kind: str, body: Any = None) -> None:
        """Send a message to the coordinator; blocks while the host does not read."""
        with self._send_lock:
            self._connection.send((kind, body))

    def has_command(self, command: str) -> bool:
        """Whether a command of this kind has arrived."""
        with self._arrived:
            return any(kind == command for kind, _ in self._commands)

    def wait_for(self, command: str, timeout_s: float) -> bool:
        """Wait for a command; returns False when it did not arrive in time."""
        with self._arrived:
            return self._arrived.wait_for(
                lambda: any(kind == command for kind, _ in self._commands), timeout_s
            )

    def _listen(self) -> None:
        while True:
            try:
                command = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # the host is gone: nobody is left to work for
            with self._arrived:
                self._commands.append(command)
                self._arrived.notify_all()
