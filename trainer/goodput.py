"""Where the wall time of a run went, in seconds that add up to it.

start        until the first step: placing, forming, building, the first trace
productive   steps that count
data_wait    waiting for rows
evaluation   validation and test rows
checkpoint   taking snapshots, as far as training waited for it
callbacks    the job's callbacks
detect       from the last sign of a generation to the notice that it failed
restart      from there to the first step of the next one, its trace included
replay       steps that were done before, and lost
export       the artifact
other        the rest
"""

from collections.abc import Mapping

_PARTS = (
    *("start", "productive", "data_wait", "evaluation", "checkpoint", "callbacks"),
    *("detect", "restart", "replay", "export", "other"),
)


class Goodput:
    """Accounts for the time up to each call of its methods; times are monotonic seconds.

    Args:
        now: The time.
        earlier: What `seconds` gave to a process that went before in the same run.
    """

    def __init__(self, now: float, earlier: Mapping[str, float] | None = None) -> None:
        self._until = now
        self._seconds = dict.fromkeys(_PARTS, 0.0)
        for name, value in (earlier or {}).items():
            self._seconds[name] += value
        self._rest = "start"

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by kind, up to the last call; their sum is the time that is accounted for."""
        return dict(self._seconds)

    def worked(self, now: float, parts: Mapping[str, float]) -> None:
        """Work was done, so many seconds of each kind; what is left of the time is "other"."""
        self.passed(now, parts)
        self._rest = "other"

    def passed(self, now: float, parts: Mapping[str, float]) -> None:
        """Time passed; what no part accounts for is of the kind that goes on at present."""
        for name, seconds in parts.items():
            self._seconds[name] += seconds
        self._seconds[self._rest] += now - self._until - sum(parts.values())
        self._until = now

    def failed(self, now: float, silent_s: float) -> None:
        """A failure was noticed, `silent_s` after the last sign of the generation."""
        self.passed(now, {"detect": min(silent_s, now - self._until)})
        self._rest = "restart"

    def began(self, name: str, now: float) -> None:
        """Something of this kind begins."""
        self.passed(now, {})
        self._rest = name

    def summary(self, now: float) -> dict[str, dict[str, float]]:
        """Seconds and share of the wall time by kind.

        Workers measure with their own clocks: what they count twice is taken off the largest part.
        """
        self.passed(now, {})
        seconds = self.seconds
        owed = sum(min(0.0, value) for value in seconds.values())
        seconds = {name: max(0.0, value) for name, value in seconds.items()}
        largest = max(seconds, key=lambda name: seconds[name])
        seconds[largest] += owed
        wall_s = max(sum(seconds.values()), 1e-9)
        return {
            name: {"seconds": value, "share": value / wall_s} for name, value in seconds.items()
        }
