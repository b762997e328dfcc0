"""The runs of a scheduler: started, found again, ended, and how it all goes on record.

Owns the order of what is written and what is done, from which it follows that no tick is run twice
and none is lost, whoever is killed in between: a run is on record before it is started; one that
has no process and left no number was never started, and is to start once more. So is one that was
lost with its machine, or interrupted by its scheduler's own end: pipelines go on from where they
were.
"""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lockstep.run_process import LOST, ProcessName, RunProcess
from registry.schedules import Holder, Outcome, Round, Schedules, TickRecord

_ATTEMPTS = 3

Say = Callable[[dict[str, Any]], None]
Key = tuple[str, int, bool]


@dataclass(frozen=True)
class RunSettings:
    """How runs are made.

    Attributes:
        logs: Folder that receives what they print.
        command: The command that runs a pipeline file.
        grace_s: How long they may take to end when the scheduler is stopped.
        clock: Seconds since 1970.
    """

    logs: Path
    command: Callable[[Path], list[str]]
    grace_s: float = 60.0
    clock: Callable[[], float] = time.time


class ScheduledRuns:
    """The runs that go on, of one scheduler. Not for several threads.

    Args:
        store: Where all is recorded.
        me: The scheduler.
        settings: How runs are made.
        say: Is told what happens.
        on_end: Is called, from any thread, when a run has ended.

    Raises:
        DatabaseFailure: From all methods; what goes on is kept in mind, and recorded later.
        SchedulerSuperseded: From all methods: another scheduler is at work.
    """

    def __init__(
        self,
        store: Schedules,
        me: Holder,
        settings: RunSettings,
        say: Say,
        on_end: Callable[[], None],
    ) -> None:
        self._store = store
        self._me = me
        self._settings = settings
        self._say = say
        self._on_end = on_end
        self._runs: dict[Key, tuple[TickRecord, RunProcess]] = {}
        self._is_leaving = False

    @property
    def count(self) -> int:
        """How many go on, as far as was looked."""
        return len(self._runs)

    @property
    def is_watching(self) -> bool:
        """Whether there are runs whose end nobody tells: those of an earlier scheduler."""
        return any(not run.is_mine for _, run in self._runs.values())

    def reap(self) -> int:
        """Record the runs that have ended; returns how many of them failed."""
        failed = 0
        for key, (tick, run) in list(self._runs.items()):
            status = run.poll()
            if status is None:
                continue
            with self._store.round(self._me) as round_:
                said = self._conclude(round_, tick, status)
            del self._runs[key]
            failed += said["event"] == "failed"
            self._say(said)
        return failed

    def find(self, round_: Round) -> list[dict[str, Any]]:
        """Take over the runs on record that are not known here; returns what is to be said."""
        said = []
        for tick in round_.open_ticks():
            if tick.outcome != "running" or _key(tick) in self._runs:
                continue
            if tick.host != self._me.host:  # its scheduler was silent, and ends its runs then
                said.append(self._lose(round_, tick, f"the scheduler on {tick.host} was lost"))
                continue
            name = None if tick.pid is None else ProcessName(tick.pid, tick.process)
            run = RunProcess.find(Path(tick.log), name)
            if run is None:
                round_.change(tick, outcome="queued", attempt=tick.attempt - 1)
            else:
                self._runs[_key(tick)] = (tick, run)
                said.append({"event": "found", **_named(tick), "pid": run.process.pid})
        return said

    def start_queued(self, pipelines: Mapping[str, Path]) -> None:
        """Start what waits and is not held up by a run before it, of these pipeline files."""
        with self._store.round(self._me) as round_:
            opened = round_.open_ticks()
        busy = {tick.schedule for tick in opened if tick.outcome == "running"}
        for tick in opened:
            if tick.outcome == "queued" and tick.schedule in pipelines.keys() - busy:
                busy.add(tick.schedule)
                self._start(tick, pipelines[tick.schedule])

    def end_all(self, is_hurried: Callable[[], bool], wait: Callable[[float], None]) -> None:
        """Ask all runs to end, and end those that take longer than the grace, or all in a hurry.

        Every process is ended, also where that cannot be recorded.
        """
        self._is_leaving = True
        end = time.monotonic() + self._settings.grace_s
        self._signal(signal.SIGTERM)
        if self._runs:
            grace_s = self._settings.grace_s
            self._say({"event": "stopping", "runs": len(self._runs), "grace_s": grace_s})
        while any(run.poll() is None for _, run in self._runs.values()):
            wait(0.2)
            if time.monotonic() > end or is_hurried():
                self._signal(signal.SIGKILL)
        self.reap()

    def _signal(self, number: signal.Signals) -> None:
        for _, run in self._runs.values():
            if run.poll() is None:
                run.signal(number)

    def _start(self, tick: TickRecord, pipeline: Path) -> None:
        settings = self._settings
        log = log_of(settings.logs, tick)
        tick = replace(
            tick,
            outcome="running",
            attempt=tick.attempt + 1,
            started_at=settings.clock(),
            ended_at=None,
            host=self._me.host,
            log=str(log),
        )
        values = ("outcome", "attempt", "started_at", "ended_at", "host", "log")
        fresh = {name: getattr(tick, name) for name in values}
        RunProcess.clear(log)  # before it is on record: numbers of an earlier attempt
        with self._store.round(self._me) as round_:
            round_.change(tick, **fresh, pid=None, process="", exit_status=None, reason="")
        try:
            run = RunProcess.start(settings.command(pipeline), log, self._on_end)
        except OSError as error:
            with self._store.round(self._me) as round_:
                said = self._end(round_, tick, None, "failed", f"it could not be started: {error}")
            self._say(said)
            return
        self._runs[_key(tick)] = (tick, run)
        self._say({"event": "started", **_named(tick), "pid": run.process.pid, "log": tick.log})
        with self._store.round(self._me) as round_:
            round_.change(tick, pid=run.process.pid, process=run.process.started)

    def _conclude(self, round_: Round, tick: TickRecord, status: int) -> dict[str, Any]:
        if status == 0:
            return self._end(round_, tick, 0, "done")
        if self._is_leaving:
            reason = "interrupted by the end of the scheduler"
            round_.change(tick, outcome="queued", attempt=tick.attempt - 1, reason=reason)
            return {"event": "interrupted", **_named(tick), "exit_status": status}
        if status == LOST:
            return self._lose(round_, tick, "the run was killed")
        return self._end(round_, tick, status, "failed")

    def _lose(self, round_: Round, tick: TickRecord, reason: str) -> dict[str, Any]:
        """A run ended without a status: it is started once more, up to a limit."""
        if tick.attempt >= _ATTEMPTS:
            return self._end(round_, tick, None, "failed", reason)
        round_.change(tick, outcome="queued", reason=reason)
        return {"event": "lost", **_named(tick), "reason": reason}

    def _end(
        self,
        round_: Round,
        tick: TickRecord,
        status: int | None,
        outcome: Outcome,
        reason: str = "",
    ) -> dict[str, Any]:
        ended_at = max(self._settings.clock(), tick.started_at or 0.0)
        round_.change(tick, outcome=outcome, ended_at=ended_at, exit_status=status, reason=reason)
        said = {"event": outcome, **_named(tick), "exit_status": status, "log": tick.log}
        return {**said, "reason": reason} if reason else said


def log_of(logs: Path, tick: TickRecord) -> Path:
    """The file that receives what the next attempt of a tick prints."""
    planned = datetime.fromtimestamp(tick.planned_at, UTC)
    hand = "-hand" if tick.is_by_hand else ""
    return logs / tick.schedule / f"{planned:%Y%m%dT%H%M%SZ}{hand}-{tick.attempt + 1}.log"


def _key(tick: TickRecord) -> Key:
    return tick.schedule, tick.planned_at, tick.is_by_hand


def _named(tick: TickRecord) -> dict[str, Any]:
    return {"schedule": tick.schedule, "planned_at": tick.planned_at}
