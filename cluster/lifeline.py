"""The lifeline: a connection on which nobody says anything, and whose end is the host's.

Ray tells of a dead process within 50 ms where its node lives, and after some two seconds where the
node went with it. The kernel closes a dead process's connections at once. What it cannot tell is
silence: a host behind a cut network keeps its lifeline, and is found by its unanswered polls.
"""

import contextlib
import select
import socket
import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

Owner = TypeVar("Owner", bound=Hashable)


class Beacon:
    """A host's end: accepts lifelines and holds them while its process lives."""

    def __init__(self, address: str) -> None:
        self._listening = socket.create_server((address, 0))
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, name="beacon", daemon=True).start()

    @property
    def port(self) -> int:
        """Where to connect to."""
        return int(self._listening.getsockname()[1])

    def _accept(self) -> None:
        while True:
            with contextlib.suppress(ConnectionError):
                self._held.append(self._listening.accept()[0])


class Lifelines(Generic[Owner]):
    """The other ends, by whom they belong to. Used by one thread; never blocks.

    One that cannot be connected is left out: a firewall is no dead host.
    """

    def __init__(self) -> None:
        self._lines: dict[Owner, socket.socket] = {}

    def connect(self, owner: Owner, address: str, port: int) -> None:
        """Begin to hold a line to `owner`; nothing where there is one."""
        if owner in self._lines:
            return
        line = socket.socket()
        line.setblocking(False)
        line.connect_ex((address, port))
        self._lines[owner] = line

    def broken(self) -> list[Owner]:
        """Whose lines have ended since the last call."""
        ended = []
        poll = select.poll()
        owners = {line.fileno(): owner for owner, line in self._lines.items()}
        for descriptor in owners:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(0):
            owner = owners[descriptor]
            try:
                self._lines[owner].recv(1)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                ended.append(owner)
            except OSError:
                pass  # never connected
            else:
                ended.append(owner)
            self.drop(owner)
        return ended

    def drop(self, owner: Owner) -> None:
        """Hold the line no longer. Idempotent."""
        line = self._lines.pop(owner, None)
        if line is not None:
            line.close()

    def close(self) -> None:
        """Hold none any more."""
        for owner in list(self._lines):
            self.drop(owner)
