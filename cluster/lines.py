"""Runs that wait, in lines: those of one user, shape and priority, by their submission. Pure."""

import heapq
from dataclasses import dataclass, field

from cluster.room import Placed, Shape

WAITING = "waiting"
RUNNING = "running"
YIELDING = "yielding"
"""Asked to write a checkpoint and go: holds what it held until it has."""


@dataclass
class QueuedRun:
    """One run in the queue, from its submission to its end.

    Attributes:
        run_id: Unique.
        user: Whose it is.
        shape: What it asks for.
        priority: Greater goes first; 0 is usual.
        sequence: Counts submissions; its place among the user's runs, for good.
        state: WAITING, RUNNING or YIELDING.
        placed: Where it is, while it is not waiting.
        lent_by: The head for which it makes room first; nothing where it owes none.
        started_at: When it last started.
    """

    run_id: str
    user: str
    shape: Shape
    priority: int = 0
    sequence: int = 0
    state: str = WAITING
    placed: Placed = field(default_factory=dict)
    lent_by: str = ""
    started_at: float = 0.0


Line = tuple[str, Shape, int]
"""User, shape, priority: runs of which only the order of submission decides."""


def line_of(run: QueuedRun) -> Line:
    """The line in which a run waits."""
    return run.user, run.shape, run.priority


class WaitingLines:
    """All lines. Whoever waits enters; whoever starts or goes leaves. Both take logarithmic time.

    A line whose last run has left stays until it is looked at (`first`).
    """

    def __init__(self) -> None:
        self._waiting: dict[str, QueuedRun] = {}
        self._lines: dict[Line, list[tuple[int, str]]] = {}
        self._of_user: dict[str, dict[Line, None]] = {}
        self._of_shape: dict[Shape, dict[Line, None]] = {}
        self._top: dict[str, int] = {}

    def enter(self, run: QueuedRun) -> None:
        """A run waits, at the place of its submission."""
        line = line_of(run)
        if line not in self._lines:
            self._lines[line] = []
            self._top.pop(run.user, None)
            self._of_user.setdefault(run.user, {})[line] = None
            self._of_shape.setdefault(run.shape, {})[line] = None
        self._waiting[run.run_id] = run
        heapq.heappush(self._lines[line], (run.sequence, run.run_id))

    def leave(self, run: QueuedRun) -> None:
        """A run waits no more."""
        self._waiting.pop(run.run_id, None)

    def first(self, line: Line) -> QueuedRun | None:
        """The run that was submitted first; None where nobody waits, and the line is gone."""
        places = self._lines.get(line)
        while places:
            run = self._waiting.get(places[0][1])
            if run is not None:
                return run
            heapq.heappop(places)
        if places is not None:
            self._forget(line)
        return None

    def users(self) -> list[str]:
        """Users who have lines."""
        return list(self._of_user)

    def shapes(self) -> list[Shape]:
        """Shapes that have lines."""
        return list(self._of_shape)

    def of(self, owner: str | Shape) -> list[Line]:
        """The lines of a user or of a shape."""
        lines = self._of_user[owner] if isinstance(owner, str) else self._of_shape[owner]
        return list(lines)

    def top_of(self, user: str) -> int:
        """The highest priority of a user's lines."""
        if user not in self._top:
            self._top[user] = max(priority for _, _, priority in self._of_user[user])
        return self._top[user]

    def _forget(self, line: Line) -> None:
        user, shape, _ = line
        del self._lines[line]
        self._top.pop(user, None)
        del self._of_user[user][line]
        del self._of_shape[shape][line]
        if not self._of_user[user]:
            del self._of_user[user]
        if not self._of_shape[shape]:
            del self._of_shape[shape]
