"""Schedules, what became of each of their ticks, and which scheduler is at work.

Owns the tables and what has to change together: a tick is decided in the transaction that says up
to when a schedule has been looked at, by the scheduler that holds the lease, so that no tick is
decided twice, whoever dies when. When a tick is due and what becomes of it is decided elsewhere.

A tick's outcome, and what may follow it:

    queued    its run is to start, or to start once more      -> running
    running   its run goes on                                 -> done, failed, queued
    done      its run ended with status 0                     final
    failed    its run ended with another one, or is lost      final
    skipped   it had no run                                   final
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import sqlalchemy as sa

from configs.errors import did_you_mean
from registry.database import Component, Database
from registry.errors import RegistryError, SchedulerSuperseded

Outcome = Literal["queued", "running", "done", "failed", "skipped"]

_TABLES = sa.MetaData()
_SCHEDULES = sa.Table(
    "schedules",
    _TABLES,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("pipeline", sa.Text, nullable=False),
    sa.Column("cron", sa.Text, nullable=False),
    sa.Column("timezone", sa.String(100), nullable=False),
    sa.Column("jitter_s", sa.Float(53), nullable=False),
    sa.Column("overlap", sa.String(10), nullable=False),
    sa.Column("looked_until", sa.Float(53), nullable=False),
    sa.Column("is_active", sa.Boolean, nullable=False),
)
_TICKS = sa.Table(
    "schedule_ticks",
    _TABLES,
    sa.Column("schedule", sa.String(100), primary_key=True),
    sa.Column("planned_at", sa.BigInteger, primary_key=True),
    sa.Column("is_by_hand", sa.Boolean, primary_key=True),
    sa.Column("outcome", sa.String(10), nullable=False, index=True),
    sa.Column("missed", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("started_at", sa.Float(53)),
    sa.Column("ended_at", sa.Float(53)),
    sa.Column("exit_status", sa.Integer),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("log", sa.Text, nullable=False),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.BigInteger),
    sa.Column("process", sa.Text, nullable=False),
)
_SCHEDULER = sa.Table(
    "scheduler",
    _TABLES,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("key", sa.String(40), nullable=False),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.BigInteger, nullable=False),
    sa.Column("process", sa.Text, nullable=False),
    sa.Column("lease_s", sa.Float(53), nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False),
)
_COMPONENT = Component("schedules", _TABLES)
_OPEN = ("queued", "running")


@dataclass(frozen=True)
class ScheduleRecord:
    """A schedule as it was last seen by a scheduler.

    Attributes:
        name: The pipeline's.
        pipeline: The pipeline file.
        cron: Its expression.
        timezone: Of the expression.
        jitter_s: How late a run may start.
        overlap: `skip` or `queue`.
        looked_until: Up to when its ticks are decided, seconds since 1970.
        is_active: Whether the newest scheduler looks after it.
    """

    name: str
    pipeline: str
    cron: str
    timezone: str
    jitter_s: float
    overlap: Literal["skip", "queue"]
    looked_until: float
    is_active: bool = True


@dataclass(frozen=True)
class TickRecord:
    """What became of a tick.

    Attributes:
        schedule: Name of its schedule.
        planned_at: The tick, seconds since 1970.
        is_by_hand: Whether somebody started the run, not the clock.
        outcome: See the head of this file.
        missed: Ticks before it that this one stands for.
        attempt: How often its run was started; 0 before the first.
        started_at: Of the newest attempt, seconds since 1970.
        ended_at: Of the newest attempt.
        exit_status: Of the newest attempt; None where it was lost.
        reason: Why it was skipped, queued once more, or lost.
        log: File of what the run printed, on `host`.
        host: Machine that runs it.
        pid: Its process, which leads a process group.
        process: Tells this process from others that had, or get, the same number.
    """

    schedule: str
    planned_at: int
    is_by_hand: bool = False
    outcome: Outcome = "queued"
    missed: int = 0
    attempt: int = 0
    started_at: float | None = None
    ended_at: float | None = None
    exit_status: int | None = None
    reason: str = ""
    log: str = ""
    host: str = ""
    pid: int | None = None
    process: str = ""


@dataclass(frozen=True)
class Holder:
    """The scheduler at work.

    Attributes:
        key: Its own, new for each process.
        host: Its machine.
        pid: Its process.
        process: Tells this process from others of the same number.
        lease_s: How long it may be silent.
        beat: Grows whenever it says something.
    """

    key: str
    host: str
    pid: int
    process: str
    lease_s: float
    beat: int = 0


class Round:
    """What a scheduler does in one transaction: look at schedules, and decide ticks."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def schedules(self) -> dict[str, ScheduleRecord]:
        """All schedules, by name."""
        return {record.name: record for record in _schedules(self._connection)}

    def put(self, record: ScheduleRecord) -> None:
        """Write a schedule, new or changed."""
        values = asdict(record)
        changed = self._connection.execute(
            _SCHEDULES.update().where(_SCHEDULES.c.name == record.name).values(**values)
        )
        if not changed.rowcount:
            self._connection.execute(_SCHEDULES.insert().values(**values))

    def open_ticks(self, schedule: str | None = None) -> list[TickRecord]:
        """Ticks that are queued or running, of one schedule or of all, the oldest first."""
        query = sa.select(_TICKS).where(_TICKS.c.outcome.in_(_OPEN))
        if schedule is not None:
            query = query.where(_TICKS.c.schedule == schedule)
        return _ticks(self._connection, query.order_by(_TICKS.c.planned_at))

    def decided(self, schedule: str) -> Callable[[int], bool]:
        """Tells whether a tick of a schedule, not one by hand, is on record."""
        return lambda planned_at: self.has(TickRecord(schedule, planned_at))

    def has(self, tick: TickRecord) -> bool:
        """Whether a tick of this schedule, moment and kind is on record."""
        query = sa.select(sa.literal(1)).select_from(_TICKS).where(_row_of(tick))
        return self._connection.execute(query).first() is not None

    def looked(self, schedule: str, now: float) -> None:
        """All that was due until now is decided."""
        self._connection.execute(
            _SCHEDULES.update().where(_SCHEDULES.c.name == schedule).values(looked_until=now)
        )

    def add(self, tick: TickRecord) -> None:
        """Put a tick on record."""
        self._connection.execute(_TICKS.insert().values(**asdict(tick)))

    def change(self, tick: TickRecord, **values: Any) -> None:
        """Set fields of a tick."""
        self._connection.execute(_TICKS.update().where(_row_of(tick)).values(**values))

    def forget(self, schedule: str, keep: int) -> list[TickRecord]:
        """Delete all but the newest ended ticks of a schedule; returns the deleted ones."""
        query = (
            sa.select(_TICKS)
            .where(_TICKS.c.schedule == schedule, _TICKS.c.outcome.not_in(_OPEN))
            .order_by(_TICKS.c.planned_at.desc())
            .offset(keep)
            .limit(10_000)
        )
        old = _ticks(self._connection, query)
        for tick in old:
            self._connection.execute(_TICKS.delete().where(_row_of(tick)))
        return old


class Schedules:
    """Schedules, ticks and the lease in one database. Safe to share between threads.

    Raises:
        DatabaseFailure: From any method: the database failed, and nothing was changed.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        database.prepare(_COMPONENT)

    def claim(self, me: Holder, ended: Holder | None = None) -> Holder | None:
        """Become the scheduler at work; returns the one that is, where there is another.

        `ended` is a holder that is known to have ended: it is replaced, unless it has said
        something since. Idempotent.
        """
        with self._database.writing(_COMPONENT.name) as connection:
            holder = _holder(connection)
            if holder is not None and holder.key != me.key and holder != ended:
                return holder
            connection.execute(_SCHEDULER.delete())
            connection.execute(_SCHEDULER.insert().values(number=1, **asdict(me)))
            return None

    def release(self, me: Holder) -> None:
        """Be at work no longer. Idempotent."""
        with self._database.writing(_COMPONENT.name) as connection:
            connection.execute(_SCHEDULER.delete().where(_SCHEDULER.c.key == me.key))

    def holder(self) -> Holder | None:
        """The scheduler at work, as far as the database knows."""
        with self._database.reading() as connection:
            return _holder(connection)

    @contextmanager
    def round(self, me: Holder) -> Iterator[Round]:
        """One transaction of the scheduler at work; renews its lease.

        Raises:
            SchedulerSuperseded: Another one has taken over; nothing is changed.
        """
        with self._database.writing(_COMPONENT.name) as connection:
            mine = _SCHEDULER.c.key == me.key
            renewed = connection.execute(
                _SCHEDULER.update().where(mine).values(beat=_SCHEDULER.c.beat + 1)
            )
            if not renewed.rowcount:
                raise SchedulerSuperseded(
                    f"this scheduler was silent for more than {me.lease_s:g} s, and another one "
                    "has taken over. It ends; the other goes on."
                )
            yield Round(connection)

    def ask(self, tick: TickRecord) -> bool:
        """Ask for a run by hand; returns False where one waits already. Any process may.

        Two of a schedule in one second are told apart by the next second that is free.
        """
        with self._database.writing(_COMPONENT.name) as connection:
            round_ = Round(connection)
            if any(each.outcome == "queued" for each in round_.open_ticks(tick.schedule)):
                return False
            while round_.has(tick):
                tick = replace(tick, planned_at=tick.planned_at + 1)
            round_.add(tick)
            return True

    def schedules(self) -> list[ScheduleRecord]:
        """All schedules, by name."""
        with self._database.reading() as connection:
            return _schedules(connection)

    def schedule(self, name: str) -> ScheduleRecord:
        """One schedule.

        Raises:
            RegistryError: There is none of this name; the nearest is named.
        """
        names = {record.name: record for record in self.schedules()}
        if name not in names:
            raise RegistryError(
                f"no schedule {name!r} in {self._database.name}.{did_you_mean(name, names)} "
                "`lockstep schedule list` shows all; `lockstep schedule run` makes them."
            )
        return names[name]

    def history(self, schedule: str, limit: int) -> list[TickRecord]:
        """The newest ticks of a schedule, the newest first."""
        query = sa.select(_TICKS).where(_TICKS.c.schedule == schedule)
        order = (_TICKS.c.planned_at.desc(), _TICKS.c.is_by_hand)
        with self._database.reading() as connection:
            return _ticks(connection, query.order_by(*order).limit(limit))

    def newest(self, schedule: str, outcomes: Sequence[Outcome]) -> TickRecord | None:
        """The newest tick of a schedule with one of these outcomes."""
        query = sa.select(_TICKS).where(
            _TICKS.c.schedule == schedule, _TICKS.c.outcome.in_(outcomes)
        )
        with self._database.reading() as connection:
            found = _ticks(connection, query.order_by(_TICKS.c.planned_at.desc()).limit(1))
        return found[0] if found else None


def _row_of(tick: TickRecord) -> sa.ColumnElement[bool]:
    return sa.and_(
        _TICKS.c.schedule == tick.schedule,
        _TICKS.c.planned_at == tick.planned_at,
        _TICKS.c.is_by_hand == tick.is_by_hand,
    )


def _ticks(connection: sa.Connection, query: sa.Select[Any]) -> list[TickRecord]:
    return [TickRecord(**row._mapping) for row in connection.execute(query)]


def _schedules(connection: sa.Connection) -> list[ScheduleRecord]:
    rows = connection.execute(sa.select(_SCHEDULES).order_by(_SCHEDULES.c.name))
    return [ScheduleRecord(**row._mapping) for row in rows]


def _holder(connection: sa.Connection) -> Holder | None:
    columns = [_SCHEDULER.c[field.name] for field in fields(Holder)]
    row = connection.execute(sa.select(*columns)).first()
    return None if row is None else Holder(**row._mapping)
