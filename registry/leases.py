"""Leases: who may work on a thing, one process at a time, also where processes and machines die.

A lease ends by itself unless its holder shows life. Each time it changes hands its *fence* grows,
and what the holder writes is guarded by `check` in the transaction of the write: a process that was
given up for dead and wakes again can write nothing any more, however late it notices.

Times are the database server's, where there is one: the clocks of machines do not matter.
"""

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import sqlalchemy as sa

from registry.database import Component, Database
from registry.errors import DatabaseFailure, LeaseHeld, LeaseLost
from registry.owners import is_gone, own_mark

_tables = sa.MetaData()
_LEASES = sa.Table(
    "leases",
    _tables,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("holder", sa.String(400), nullable=False),
    sa.Column("fence", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)
_COMPONENT = Component("leases", _tables)

_BEATS = 3  # signs of life within the time of a lease


@dataclass(frozen=True)
class Lease:
    """A lease as it was granted.

    Attributes:
        name: What it is for.
        holder: Who holds it; see `this_process`.
        fence: Grows with each holder.
        lasts_s: Time after which it ends without a sign of life.
    """

    name: str
    holder: str
    fence: int
    lasts_s: float


class Leases:
    """All leases of a database. Safe to share between threads.

    Args:
        database: Where they are kept.
        clock: Seconds since 1970; None: the database server's, or this machine's for SQLite.
    """

    def __init__(self, database: Database, clock: Callable[[], float] | None = None) -> None:
        self._database = database
        self._clock = clock
        database.prepare(_COMPONENT)

    def acquire(
        self,
        name: str,
        holder: str,
        lasts_s: float,
        is_dead: Callable[[str], bool] = lambda _: False,
    ) -> Lease:
        """Become the holder of a lease that is free, or whose holder is dead.

        Args:
            name: What it is for.
            holder: Unique to this call.
            lasts_s: Time until it ends without a sign of life.
            is_dead: Whether a holder is known to be dead; then its time need not be awaited.

        Raises:
            LeaseHeld: Another one holds it.
            DatabaseFailure: The database failed.
        """
        with self._database.writing(_COMPONENT.name) as connection:
            now = self._now(connection)
            row = connection.execute(
                sa.select(_LEASES).where(_LEASES.c.name == name).with_for_update()
            ).one_or_none()
            if row is not None and row.expires_at > now and not is_dead(row.holder):
                raise LeaseHeld(
                    f"{name} is at work: {describe_holder(row.holder)} holds it for another "
                    f"{row.expires_at - now:.0f} s, and longer while it lives. One at a time is "
                    "allowed; wait for its end."
                )
            fence = 1 if row is None else row.fence + 1
            values = {"holder": holder, "fence": fence, "expires_at": now + lasts_s}
            if row is None:
                connection.execute(_LEASES.insert().values(name=name, **values))
            else:
                connection.execute(_LEASES.update().where(_LEASES.c.name == name).values(values))
        return Lease(name, holder, fence, lasts_s)

    def renew(self, lease: Lease) -> None:
        """Show a sign of life.

        A lease that ran out while nobody took it goes on.

        Raises:
            LeaseLost: Another one holds it.
            DatabaseFailure: The database failed.
        """
        with self._database.writing(_COMPONENT.name) as connection:
            self.check(connection, lease)
            connection.execute(
                _LEASES.update()
                .where(_LEASES.c.name == lease.name)
                .values(expires_at=self._now(connection) + lease.lasts_s)
            )

    def release(self, lease: Lease) -> None:
        """Give it up; nothing where another one holds it. Idempotent."""
        with self._database.writing(_COMPONENT.name) as connection:
            connection.execute(
                _LEASES.update()
                .where(_LEASES.c.name == lease.name, _LEASES.c.fence == lease.fence)
                .values(expires_at=0.0)
            )

    def check(self, connection: sa.Connection, lease: Lease) -> None:
        """Whether the lease is still this one's, inside a transaction that writes what it guards.

        Until the transaction ends, nobody can take the lease.

        Raises:
            LeaseLost: Another one holds it.
        """
        row = connection.execute(
            sa.select(_LEASES.c.holder, _LEASES.c.fence)
            .where(_LEASES.c.name == lease.name)
            .with_for_update()
        ).one_or_none()
        if row is None or row.fence != lease.fence:
            by = "it was removed" if row is None else f"{describe_holder(row.holder)} took it over"
            raise LeaseLost(
                f"{lease.name}: {by} after {lease.lasts_s:g} s without a sign of life from this "
                "process. What this one did not write by then, that one does."
            )

    def _now(self, connection: sa.Connection) -> float:
        if self._clock is not None:
            return self._clock()
        if connection.dialect.name == "sqlite":
            return time.time()
        return float(
            connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
        )


class Heartbeat:
    """Keeps a lease alive from a thread while a block runs, and gives it up at the end.

    A database that cannot be reached is tried again; the lease may then go to another one.

    Attributes:
        leases: Where the lease is.
        lease: The lease.
    """

    def __init__(self, leases: Leases, lease: Lease) -> None:
        self.lease = lease
        self.leases = leases
        self._lost: LeaseLost | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Heartbeat":
        """Begin to show life."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop, and give the lease up where the database allows."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(DatabaseFailure):  # then it runs out
            self.leases.release(self.lease)

    def check(self) -> None:
        """Raise LeaseLost as soon as it is known that another one holds the lease. Never blocks."""
        if self._lost is not None:
            raise self._lost

    def _beat(self) -> None:
        while not self._end.wait(self.lease.lasts_s / _BEATS):
            try:
                self.leases.renew(self.lease)
            except LeaseLost as error:
                self._lost = error
                return
            except DatabaseFailure:
                continue


def this_process() -> str:
    """A holder's name that tells machine and process, and is another one at each call."""
    return f"{socket.gethostname()}|{os.getpid()}|{secrets.token_hex(4)}|{own_mark()}"


def is_dead(holder: str) -> bool:
    """Whether a holder was a process of this machine that is no more; False where unknown."""
    parts = holder.split("|")
    return len(parts) == 4 and is_gone(parts[3])


def describe_holder(holder: str) -> str:
    """A holder as people know it."""
    parts = holder.split("|")
    return f"process {parts[1]} on {parts[0]}" if len(parts) == 4 else holder
