"""How much memory the bodies of requests may take, of all users together and of one.

Owns the count of one process. A body is charged with its declared length before a byte of it is
read, without one as it comes, and with what it inflates to, a piece at a time, before the piece is
made. What does not fit is refused at once, to be sent again: to wait would keep what was read. All
is given back when the request was answered.
"""

import threading

from serving.errors import Overloaded

_RETRY_S = 1.0


class BodyMemory:
    """The bytes of bodies in one process. Safe to share between threads.

    Args:
        most_bytes: Of all users together.
        user_bytes: Of one user.
    """

    def __init__(self, most_bytes: int = 2**30, user_bytes: int = 2**29) -> None:
        self._most = most_bytes
        self._user_most = user_bytes
        self._lock = threading.Lock()
        self._used = 0
        self._used_by: dict[str, int] = {}

    @property
    def used_bytes(self) -> int:
        """What is charged now."""
        return self._used

    def take(self, user: str, count: int) -> None:
        """Charge bytes that are about to be read or made.

        Raises:
            Overloaded: They do not fit; nothing was charged.
        """
        with self._lock:
            mine = self._used_by.get(user, 0)
            if mine + count > self._user_most:
                raise Overloaded(
                    f"your requests hold {mine} bytes of bodies; {self._user_most} at once are "
                    "allowed. Send this one when others were answered.",
                    _RETRY_S,
                )
            if self._used + count > self._most:
                raise Overloaded(
                    f"the bodies of all requests take {self._used} bytes; {self._most} at once "
                    "are allowed. Send this one again later.",
                    _RETRY_S,
                )
            self._used += count
            self._used_by[user] = mine + count

    def give_back(self, user: str, count: int) -> None:
        """End the charge of bytes."""
        with self._lock:
            self._used -= count
            rest = self._used_by.get(user, 0) - count
            if rest > 0:
                self._used_by[user] = rest
            else:
                self._used_by.pop(user, None)


class Hold:
    """What one request is charged with; `end` gives it back, once it was answered.

    A thread that still works for a request whose caller has gone is charged nothing more: it is
    told to stop instead.

    Args:
        memory: Where it is charged.
        user: Whose request it is.
    """

    def __init__(self, memory: BodyMemory, user: str) -> None:
        self._memory = memory
        self._user = user
        self._count = 0
        self._is_over = False
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Charge more bytes.

        Raises:
            Overloaded: They do not fit, or the request is over.
        """
        with self._lock:
            if self._is_over:
                raise Overloaded("the request is over.", _RETRY_S)
            self._memory.take(self._user, count)
            self._count += count

    def end(self) -> None:
        """Give everything back."""
        with self._lock:
            self._is_over = True
            self._memory.give_back(self._user, self._count)
            self._count = 0
