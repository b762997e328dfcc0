"""The account of a run: how far it is, how its time was spent, and what its failures cost.

Kept in a small file of the run folder, so that a coordinator that goes on after another one goes on
with its account: the run is one, whoever led it.
"""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.files import read_json, write_json
from trainer.goodput import Goodput

_FILE = "account.json"
_KEEP_EVERY_S = 1.0


class Account:
    """Of one run, by its coordinator. Used by one thread.

    Args:
        folder: The run folder.

    Attributes:
        step: Steps completed, as far as the run ever was.
        recoveries: Each failure that was recovered from: kind, rank, detected_s, recovered_s,
            steps_replayed.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._goodput = Goodput(time.monotonic())
        self._speed = _Speed()
        self._open: list[tuple[float, dict[str, Any]]] = []
        self._resumed_step = 0
        self._kept_s = 0.0
        self.step = 0
        self.recoveries: list[dict[str, Any]] = []

    def go_on(self, lost_at: float | None) -> None:
        """Take over the account of the coordinator before this one.

        Args:
            lost_at: When that one was lost, seconds since 1970. Its last moments pass for silence.
                None: it had ended, and nobody was at work in between.
        """
        now, clock = time.monotonic(), time.time()
        account = read_json(self._path) or {}
        earlier = account.get("seconds")
        self.step = account.get("step", 0)
        self.recoveries = account.get("recoveries", [])
        self._speed = _Speed(**account.get("speed", {}))
        if lost_at is None:
            self._goodput = Goodput(now, earlier)
            return
        lost_s = now - (clock - lost_at)
        self._goodput = Goodput(min(lost_s, now - (clock - account.get("time", lost_at))), earlier)
        self._goodput.failed(lost_s, math.inf)
        lost = {"kind": "coordinator_lost", "rank": -1, "detected_s": 0.0}
        self._open.append((lost_s, lost))

    def formed(self, step: int | None) -> None:
        """A generation goes on from a step; None where its work has none."""
        self._resumed_step = self.step if step is None else step

    def progressed(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A call of the compiled loop is done; returns the recoveries that end with it.

        Args:
            call: `step`, `steps`, `rows`, `seconds`, `is_first`, and `times_s` by kind.
        """
        now = time.monotonic()
        steps, step, seconds = call["steps"], int(call["step"]), float(call["seconds"])
        replayed = min(steps, max(0, self.step - (step - steps))) / steps
        parts = dict(call["times_s"])
        if call["is_first"]:  # most of it is the trace: a part of start or restart
            self._goodput.passed(now, parts)
            parts = {}
        else:
            parts |= {"productive": seconds * (1 - replayed), "replay": seconds * replayed}
        self._goodput.worked(now, parts)
        self._speed.add(int(call["rows"]), seconds, call["is_first"])
        recovered = self.recovered()
        self.step = max(self.step, step)
        if now - self._kept_s >= _KEEP_EVERY_S:
            self._kept_s = now
            self.keep()
        return recovered

    def worked(self, parts: Mapping[str, float]) -> None:
        """Work without steps was done, so many seconds of each kind."""
        self._goodput.worked(time.monotonic(), parts)

    def began(self, kind: str) -> None:
        """Something of this kind begins."""
        self._goodput.began(kind, time.monotonic())

    def failed(self, kind: str, rank: int, silent_s: float) -> None:
        """Begin a recovery; it ends with the next step, whoever else dies before."""
        now = time.monotonic()
        self._goodput.failed(now, silent_s)
        self._open.append((now, {"kind": kind, "rank": rank, "detected_s": silent_s}))
        self.keep()

    def recovered(self) -> list[dict[str, Any]]:
        """Work goes on: the steps between where it was and where it resumed are done again."""
        now = time.monotonic()
        recoveries, self._open = self._open, []
        for number, (failed_at, recovery) in enumerate(recoveries, 1):
            replayed = self.step - self._resumed_step if number == len(recoveries) else 0
            recovery["recovered_s"] = now - failed_at
            recovery["steps_replayed"] = max(0, replayed)
            self.recoveries.append(recovery)
        return [recovery for _, recovery in recoveries]

    def keep(self) -> None:
        """Write it down; a full disk keeps the one before."""
        account = {
            "time": time.time(),
            "seconds": self._goodput.seconds,
            "step": self.step,
            "recoveries": self.recoveries,
            "speed": self._speed.sums,
        }
        with contextlib.suppress(OSError):
            write_json(self._path, account)

    def summary(self) -> dict[str, Any]:
        """`rows_per_s`, `wall_s`, `recoveries`, and `goodput`, which adds up to the wall time."""
        goodput = self._goodput.summary(time.monotonic())
        self.keep()
        return {
            "rows_per_s": self._speed.rows_per_s,
            "wall_s": sum(part["seconds"] for part in goodput.values()),
            "recoveries": self.recoveries,
            "goodput": goodput,
        }


class _Speed:
    """Rows a second over all calls of the compiled loop; first ones, which trace, if no others."""

    def __init__(self, first: Sequence[float] = (0, 0), others: Sequence[float] = (0, 0)) -> None:
        self.sums: dict[str, Sequence[float]] = {"first": first, "others": others}

    def add(self, rows: int, seconds: float, is_first: bool) -> None:
        kind = "first" if is_first else "others"
        all_rows, all_s = self.sums[kind]
        self.sums[kind] = (all_rows + rows, all_s + seconds)

    @property
    def rows_per_s(self) -> float:
        rows, seconds = self.sums["others"] if self.sums["others"][0] else self.sums["first"]
        return rows / seconds if seconds else 0.0
