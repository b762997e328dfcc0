"""When a schedule starts a run: decisions, as a pure function of (schedule, state, now).

Nothing here reads a clock, starts a process or keeps a state: whoever does hands in what it knows
and records what is decided. So years of a schedule can be gone through in a test.

Ticks that were not looked at in time (the machine was off, the clock was put forward) become one
run, of the newest of them. A clock that is put back makes nothing due twice: decided ticks are on
record. What comes after the moment it was put back to is due as it comes, unless it is on record.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.cron import Cron

LONGEST_WAIT_S = 30.0
"""A wait is cut to this: the clock may be changed meanwhile, and a wait does not notice."""


@dataclass(frozen=True)
class Schedule:
    """What is to run, and when.

    Attributes:
        name: Tells schedules apart, and their jitter.
        cron: Its ticks.
        jitter_s: How late a run may start, in seconds.
        overlap: Whether a tick is skipped or queued while a run goes on.
    """

    name: str
    cron: Cron
    jitter_s: float = 0.0
    overlap: Literal["skip", "queue"] = "skip"

    def start_of(self, tick: int) -> float:
        """When the run of a tick starts, seconds since 1970: before the tick that follows it."""
        if not self.jitter_s:
            return tick
        digest = hashlib.sha256(f"{self.name}/{tick}".encode()).digest()
        share = int.from_bytes(digest[:6]) / 2**48  # [0, 1), and exact
        return tick + share * min(self.jitter_s, self.cron.next(tick) - tick)

    def next_start(self, now: float) -> tuple[int, float]:
        """The first tick whose run starts later than a moment, and when it starts."""
        newest = self.cron.newest(now)
        if newest is not None and self.start_of(newest) > now:
            return newest, self.start_of(newest)
        tick = self.cron.next(now)
        return tick, self.start_of(tick)


@dataclass(frozen=True)
class State:
    """What is known of a schedule.

    Attributes:
        looked_until: What was due up to this moment has been decided, seconds since 1970.
        is_running: A run goes on.
        is_queued: A run waits for its start.
    """

    looked_until: float
    is_running: bool = False
    is_queued: bool = False


@dataclass(frozen=True)
class Decision:
    """What becomes of a tick.

    Attributes:
        tick: The tick, seconds since 1970.
        action: `run`: now, or when the run before it has ended. `skip`: not at all.
        missed: Ticks before it that nobody looked at in time; they are part of this one.
        reason: Why it is skipped; empty otherwise.
    """

    tick: int
    action: Literal["run", "skip"]
    missed: int = 0
    reason: str = ""


def decide(
    schedule: Schedule, state: State, now: float, is_decided: Callable[[int], bool]
) -> Decision | None:
    """What is due now, or None. Whoever asks records the decision, and `now` as looked until.

    `is_decided` tells whether a tick is on record already.
    """
    after = state.looked_until
    if after > now:  # the clock was put back, a wait ago at most; what was decided is on record
        after = now - LONGEST_WAIT_S
    newest = _newest_started(schedule, now)
    if newest is None or schedule.start_of(newest) <= after or is_decided(newest):
        return None
    missed = _count_started(schedule, after, now) - 1
    if state.is_queued:
        return Decision(newest, "skip", missed, "another run was waiting for its start")
    if state.is_running and schedule.overlap == "skip":
        return Decision(newest, "skip", missed, "the run before it had not ended")
    return Decision(newest, "run", missed)


def wait_s(schedules: list[Schedule], now: float) -> float:
    """Seconds until something may be due, `LONGEST_WAIT_S` at most."""
    starts = [schedule.next_start(now)[1] for schedule in schedules]
    return max(0.0, min([now + LONGEST_WAIT_S, *starts]) - now)


def _newest_started(schedule: Schedule, now: float) -> int | None:
    tick = schedule.cron.newest(now)
    if tick is not None and schedule.start_of(tick) > now:
        return schedule.cron.newest(tick - 1)
    return tick


def _count_started(schedule: Schedule, after: float, now: float) -> int:
    """Ticks whose runs start later than one moment and not later than another.

    A run starts before the tick that follows it, so only the newest tick of a moment can be on the
    other side of it than its start.
    """
    return (
        schedule.cron.count(after, now)
        + _is_started_later(schedule, after)
        - _is_started_later(schedule, now)
    )


def _is_started_later(schedule: Schedule, moment: float) -> bool:
    newest = schedule.cron.newest(moment)
    return newest is not None and schedule.start_of(newest) > moment
