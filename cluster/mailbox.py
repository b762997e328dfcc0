"""The mailbox: what a host has heard from its training processes and nobody has fetched yet.

Holds a bounded number of bytes: a training process that says more than is fetched waits in its
`Channel.send`. Knows generations, so that what a given-up one still says takes no room. Of pulses
it keeps the newest, which goes along with what is fetched next: by itself it wakes nobody, so that
a thousand workers that wait do not keep the coordinator busy.
"""

import threading
import time
from collections import deque

from cluster.channel import Message


class Mailbox:
    """Messages in the order in which they came. Thread-safe.

    Args:
        most_bytes: Bound of what waits; one message may be larger.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._messages: deque[tuple[Message, int]] = deque()
        self._pulse: Message | None = None
        self._fence = 0
        self._is_woken = False
        self._changed = threading.Condition()

    def put(self, message: Message, size_bytes: int) -> None:
        """Add a message; waits for room, and drops it once its generation is fenced off.

        Messages of size 0 never wait: the end of a process is always told.
        """
        with self._changed:
            if message.kind == "pulse":
                self._pulse = message
                return
            self._changed.wait_for(
                lambda: self._has_room(size_bytes) or message.generation < self._fence
            )
            if message.generation >= self._fence:
                self._messages.append((message, size_bytes))
                self._bytes += size_bytes
                self._changed.notify_all()

    def take(self, timeout_s: float, most: int, most_bytes: int) -> list[Message]:
        """Up to `most` messages of up to `most_bytes` together, at least one if there is any.

        Waits up to `timeout_s` for the first, or until `wake`.
        """
        deadline = time.monotonic() + timeout_s
        taken: list[Message] = []
        taken_bytes = 0
        with self._changed:
            self._changed.wait_for(
                lambda: self._messages or self._is_woken, deadline - time.monotonic()
            )
            self._is_woken = False
            while self._messages and len(taken) < most:
                message, size_bytes = self._messages[0]
                if taken and taken_bytes + size_bytes > most_bytes:
                    break
                self._messages.popleft()
                taken.append(message)
                taken_bytes += size_bytes
            self._bytes -= taken_bytes
            pulse, self._pulse = self._pulse, None
            self._changed.notify_all()
        if pulse is not None and pulse.generation >= self._fence:
            taken.append(pulse)
        return taken

    def fence(self, generation: int) -> None:
        """Drop everything of generations below this one, now and from now on."""
        with self._changed:
            self._fence = max(self._fence, generation)
            kept = [entry for entry in self._messages if entry[0].generation >= self._fence]
            self._messages = deque(kept)
            self._bytes = sum(size_bytes for _, size_bytes in kept)
            self._changed.notify_all()

    def wake(self) -> None:
        """Let a waiting `take` return, though there is nothing."""
        with self._changed:
            self._is_woken = True
            self._changed.notify_all()

    def _has_room(self, size_bytes: int) -> bool:
        return not size_bytes or not self._bytes or self._bytes + size_bytes <= self._most_bytes
