"""The scheduler: a small daemon that starts pipelines when they are due.

One scheduler is at work on a database (a lease). It keeps nothing to itself: what was decided, what
runs and how it ended is in the database and beside the logs, so that one that was killed is
followed by another one as if nothing had been. What is due is decided by `cluster.schedule`; runs
are the business of `lockstep.scheduled_runs`. The wall clock tells what is due, never how long to
wait.
"""

import os
import select
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.schedule import Decision, Schedule, State, decide, wait_s
from configs.errors import UserError
from lockstep.pipeline_files import PipelineFiles
from lockstep.run_process import ProcessName, host_name, is_alive, process_name
from lockstep.scheduled_runs import RunSettings, Say, ScheduledRuns
from registry.errors import DatabaseFailure
from registry.schedules import Holder, Round, ScheduleRecord, Schedules, TickRecord

LEASE_S = 90.0
LOOK_EVERY_S = 10.0
"""How late files that changed, and runs that were asked for by hand, are noticed."""

_POLL_S = 2.0
_DATABASE_AGAIN_S = 5.0
_KEPT_TICKS = 1000
_FORGET_EVERY_S = 86400.0


class Bell:
    """Ends a wait: rung by other threads, and by signal handlers, where no lock may be taken."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def ring(self) -> None:
        """End the wait that goes on, or else the next one."""
        try:
            os.write(self._writer, b".")
        except BlockingIOError:  # rung often enough
            return

    def wait(self, timeout_s: float) -> None:
        """Wait until it is rung, or for so long."""
        if select.select([self._reader], [], [], max(0.0, timeout_s))[0]:
            os.read(self._reader, 4096)


class Scheduler:
    """Starts what is due, until `stop`.

    Args:
        store: Schedules and their history.
        files: The pipelines.
        settings: How runs are made, and the clock.
        say: Is told what happens, one mapping with `event` a time.
        lease_s: How long it may be silent before another scheduler takes over.
    """

    def __init__(
        self,
        store: Schedules,
        files: PipelineFiles,
        settings: RunSettings,
        say: Say,
        lease_s: float = LEASE_S,
    ) -> None:
        self._store = store
        self._files = files
        self._clock = settings.clock
        self._say = say
        self._bell = Bell()
        self._stops = 0
        self._forgotten_at: float | None = None
        me = process_name(os.getpid())
        started = "" if me is None else me.started
        self._me = Holder(uuid.uuid4().hex, host_name(), os.getpid(), started, lease_s)
        self._runs = ScheduledRuns(store, self._me, settings, say, self._bell.ring)

    def stop(self) -> None:
        """End, after all runs were asked to; a second time: end them at once. For handlers."""
        self._stops += 1
        self._bell.ring()

    def run(self) -> None:
        """Work until `stop`.

        Raises:
            UserError: Another scheduler is at work.
            SchedulerSuperseded: Another one has taken over.
        """
        with self.at_work():
            while not self._stops:
                self._bell.wait(self.work())

    def run_once(self) -> int:
        """Start what is due, wait for the runs, and end; returns how many of them failed.

        Raises:
            UserError: Another scheduler is at work.
            DatabaseFailure: The database failed; runs were ended.
        """
        with self.at_work():
            failed = 0 if self._stops else self._settle()
            while self._runs.count and not self._stops:
                self._bell.wait(_POLL_S)
                failed += self._settle(is_deciding=False)
        return failed

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Hold the lease while the block runs; then end all runs, and give the lease back.

        Where `stop` came while another one held it, the block runs without.
        """
        self._claim()
        try:
            yield
        finally:
            stops = self._stops
            try:
                self._runs.end_all(lambda: self._stops > max(1, stops), self._bell.wait)
            finally:
                self._store.release(self._me)

    def work(self) -> float:
        """Do all that is to do now; returns for how many seconds there is nothing more to do."""
        for problem in self._files.reload():
            self._say({"event": "refused", "reason": str(problem)})
        try:
            self._settle()
            self._forget()
        except DatabaseFailure as error:  # runs go on, and what is due stays due
            self._say({"event": "database", "reason": str(error)})
            return _DATABASE_AGAIN_S
        wait = min(wait_s(self._schedules, self._clock()), LOOK_EVERY_S, self._me.lease_s / 3)
        return min(wait, _POLL_S) if self._runs.is_watching else wait

    def _claim(self) -> None:
        """Become the scheduler at work, once the one before is known to have ended."""
        other = self._store.claim(self._me)
        if other is not None and other.host == self._me.host:
            if is_alive(ProcessName(other.pid, other.process)):
                raise _already_at_work(other)
            other = self._store.claim(self._me, other)
        if other is not None:
            self._say({"event": "waiting", "host": other.host, "lease_s": other.lease_s})
        since = time.monotonic()
        while other is not None and not self._stops:
            self._bell.wait(min(1.0, other.lease_s / 4))
            is_silent = time.monotonic() - since > other.lease_s
            now = self._store.claim(self._me, other if is_silent else None)
            if now is not None and now != other:
                raise _already_at_work(now)
            other = now
        if other is not None:
            self._say({"event": "stopped"})
            return
        self._say({"event": "at_work", "pid": self._me.pid, "schedules": len(self._schedules)})

    @property
    def _schedules(self) -> list[Schedule]:
        return [each.schedule for each in self._files.pipelines.values()]

    def _settle(self, is_deciding: bool = True) -> int:
        """Record what ended, decide what is due, start what may start; returns failures."""
        failed = self._runs.reap()
        with self._store.round(self._me) as round_:
            said = self._runs.find(round_)
            if is_deciding:
                said += self._decide(round_)
        for event in said:
            self._say(event)
        paths = {name: pipeline.path for name, pipeline in self._files.pipelines.items()}
        self._runs.start_queued(paths)
        return failed

    def _decide(self, round_: Round) -> list[dict[str, Any]]:
        now = self._clock()
        said = []
        records = self._note_schedules(round_, now)
        opened = round_.open_ticks()
        for schedule in self._schedules:
            name = schedule.name
            mine = [tick.outcome for tick in opened if tick.schedule == name]
            looked_until = records[name].looked_until
            state = State(looked_until, "running" in mine, "queued" in mine)
            decision = decide(schedule, state, now, round_.decided(name))
            round_.looked(name, now)
            if decision is not None:
                round_.add(_record_of(name, decision))
                said.append(_event_of(name, decision))
        return said

    def _note_schedules(self, round_: Round, now: float) -> dict[str, ScheduleRecord]:
        """Bring the schedules on record to what the files say."""
        records = round_.schedules()
        for name, pipeline in self._files.pipelines.items():
            schedule = pipeline.schedule
            cron = schedule.cron
            record = ScheduleRecord(
                *(name, str(pipeline.path), cron.expression, cron.timezone),
                *(schedule.jitter_s, schedule.overlap, now),
            )
            old = records.get(name)
            if old is not None and _is_due_alike(old, record):
                record = replace(record, looked_until=old.looked_until)
            if record != old:
                round_.put(record)
            records[name] = record
        for name, record in records.items():
            if record.is_active and name not in self._files.pipelines:
                round_.put(replace(record, is_active=False))
        return records

    def _forget(self) -> None:
        """Drop what is old of the history, once a day."""
        now = time.monotonic()
        if self._forgotten_at is not None and now - self._forgotten_at < _FORGET_EVERY_S:
            return
        self._forgotten_at = now
        for name in self._files.pipelines:
            with self._store.round(self._me) as round_:
                old = round_.forget(name, _KEPT_TICKS)
            for tick in old:
                if tick.log and tick.host == self._me.host:
                    for kind in ("log", "pid", "status"):
                        Path(tick.log).with_suffix(f".{kind}").unlink(missing_ok=True)


def retrain_command(pipeline: Path) -> list[str]:
    """What runs a pipeline file."""
    return [sys.executable, "-m", "lockstep.cli", "retrain", str(pipeline)]


def _already_at_work(other: Holder) -> UserError:
    return UserError(
        f"another scheduler is at work on this database: process {other.pid} on {other.host}; one "
        "is allowed. End it, or give it the pipelines."
    )


def _is_due_alike(one: ScheduleRecord, other: ScheduleRecord) -> bool:
    return (one.cron, one.timezone) == (other.cron, other.timezone)


def _record_of(name: str, decision: Decision) -> TickRecord:
    outcome: Any = "queued" if decision.action == "run" else "skipped"
    return TickRecord(
        name, decision.tick, outcome=outcome, missed=decision.missed, reason=decision.reason
    )


def _event_of(name: str, decision: Decision) -> dict[str, Any]:
    event = "due" if decision.action == "run" else "skipped"
    said = {"event": event, "schedule": name, "planned_at": decision.tick}
    if decision.missed:
        said["missed"] = decision.missed
    return {**said, "reason": decision.reason} if decision.reason else said
