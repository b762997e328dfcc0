"""Kills at times of the benchmark's own, and what is learnt from each.

Owns when whom a signal hits and how the time to the next completed step is taken; how the victims
run is `benchmarks.recovery_lockstep`'s and `benchmarks.recovery_peers`' matter.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from lockstep.follow import SilentListener


@dataclass(frozen=True)
class Blow:
    """One kill of the plan: so long after training goes on, to this rank."""

    pause_s: float
    rank: int


def plan_blows(count: int, workers: int, pauses_s: tuple[float, float], seed: int) -> list[Blow]:
    """As many kills at random moments; all ranks are hit about equally often."""
    generator = random.Random(seed)
    ranks = [index % workers for index in range(count)]
    generator.shuffle(ranks)
    return [Blow(generator.uniform(*pauses_s), rank) for rank in ranks]


def kill_process(pid: int) -> None:
    """SIGKILL to a training process."""
    os.kill(pid, signal.SIGKILL)


def kill_host(pid: int) -> None:
    """SIGKILL to the host of a training process: its parent is the template, whose parent it is."""
    template = psutil.Process(pid).ppid()
    os.kill(psutil.Process(template).ppid(), signal.SIGKILL)


def start_timer(pause_s: float, action: Callable[[], None]) -> None:
    """Call `action` in a thread of its own after a while."""
    timer = threading.Timer(pause_s, action)
    timer.daemon = True
    timer.start()


@dataclass
class Outcome:
    """What the kills showed, in their order.

    Attributes:
        next_step_s: Seconds from SIGKILL to the next completed step.
        steps_lost: Steps that had been completed and were taken again.
        steps: Steps that were seen to be taken between failures ...
        seconds: ... in so many seconds.
    """

    next_step_s: list[float] = field(default_factory=list)
    steps_lost: list[int] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For the process that asked."""
        return {
            "next_step_s": self.next_step_s,
            "steps_lost": self.steps_lost,
            "steps_per_s": self.steps / self.seconds if self.seconds else 0.0,
        }


class Killer(SilentListener):
    """Follows a run of Lockstep and kills by plan; ends the run, as Ctrl-C does, after the last.

    A step counts as the next one when the ranks have been formed anew since the kill and rank 0
    has reported a call of the compiled loop: the time includes its way to the driver.

    Args:
        blows: The plan.
        kill: Takes the process id of a rank.
        later: Calls an action after a while.
        clock: Seconds.
    """

    def __init__(
        self,
        blows: Sequence[Blow],
        kill: Callable[[int], None],
        later: Callable[[float, Callable[[], None]], None] = start_timer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outcome = Outcome()
        self._blows = list(blows)
        self._kill = kill
        self._later = later
        self._clock = clock
        self._pids: list[int] = []
        self._struck_at: float | None = None
        self._is_formed = False
        self._seen: tuple[float, int] | None = None

    def event(self, event: dict[str, Any]) -> None:
        """A live event of the run."""
        if event["event"] == "formed":
            self._pids, self._is_formed, self._seen = event["pids"], True, None
        elif event["event"] == "recovered":
            self.outcome.steps_lost.append(int(event["steps_replayed"]))
        elif event["event"] == "progress" and self._is_formed:
            self._on_step(self._clock(), int(event["step"]))

    def _on_step(self, now: float, step: int) -> None:
        if self._seen is None:
            self._seen = (now, step)
            if self._struck_at is not None:
                self.outcome.next_step_s.append(now - self._struck_at)
            if not self._blows:
                raise KeyboardInterrupt
            self._struck_at = None
            blow = self._blows.pop(0)
            self._later(blow.pause_s, lambda: self._strike(blow))
        elif self._struck_at is None:
            seen_at, seen_step = self._seen
            self.outcome.steps += step - seen_step
            self.outcome.seconds += now - seen_at
            self._seen = (now, step)

    def _strike(self, blow: Blow) -> None:
        """The blow; what the old processes still have to say counts for nothing."""
        self._is_formed = False
        self._struck_at = self._clock()
        self._kill(self._pids[blow.rank])
