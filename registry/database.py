"""The database of all that outlives a run: SQLite in a file by default, PostgreSQL by URL.

Owns connections, transactions, the version of each component's tables, and the wording of what a
database raises. Components (models, pipelines, schedules, users, batches) bring tables and
statements; none of them knows which of the two databases it runs on.

A transaction that writes excludes every other writer of its component from its first statement on,
so it may read, decide, and write what it decided: SQLite takes the file's write lock, PostgreSQL a
lock of the component's name. Readers never wait, and see one state throughout.
"""

import os
import random
import re
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from registry.errors import DatabaseFailure, RegistryError

_URL_VARIABLE = "LOCKSTEP_DATABASE"
_FILE = "metadata.db"
_BUSY_S = 30.0
_SHOWN_OPTIONS = ("host", "port", "mode")
_RETRY_S = 0.05
_DIALECTS = "sqlite:///FILE and postgresql://USER@HOST/NAME are allowed"

# A server that vanished without a word is noticed within half a minute.
_WATCHFUL = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}

_versions = sa.MetaData()
_VERSIONS = sa.Table(
    "schema_versions",
    _versions,
    sa.Column("component", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
)


@dataclass(frozen=True)
class Component:
    """Tables that change together.

    Attributes:
        name: Names the component in the database, and its lock.
        tables: The tables as they are now.
        migrations: What leads from version 1 to 2, from 2 to 3, and so on; each is given the
            connection of the transaction that all of them run in.
    """

    name: str
    tables: sa.MetaData
    migrations: tuple[Callable[[sa.Connection], None], ...] = ()

    @property
    def version(self) -> int:
        """The version of `tables`."""
        return 1 + len(self.migrations)


class Database:
    """Connections to one database. Safe to share between threads; not across a fork.

    Args:
        url: `sqlite:///FILE`, or `postgresql://USER@HOST/NAME` (the extra `postgres`). None: what
            LOCKSTEP_DATABASE says, else `metadata.db` below LOCKSTEP_HOME (~/.lockstep).
        busy_s: How long a transaction waits for another writer.

    Raises:
        RegistryError: The URL is not one of these.
    """

    def __init__(self, url: str | None = None, busy_s: float = _BUSY_S) -> None:
        self._busy_s = busy_s
        self._engine = _make_engine(url or os.environ.get(_URL_VARIABLE) or default_url(), busy_s)
        self._is_sqlite = self._engine.dialect.name == "sqlite"

    @property
    def name(self) -> str:
        """The URL without its password, and without options that may hold one."""
        return _shown(self._engine.url)

    def prepare(self, component: Component) -> None:
        """Create or migrate a component's tables. Idempotent; any number of processes may call it.

        Raises:
            DatabaseFailure: The database failed.
            RegistryError: The tables are of a newer Lockstep.
        """
        with self.reading() as connection:
            if self._version(connection, component) == component.version:
                return
        with self.writing(component.name) as connection:
            self._lock(connection, _VERSIONS.name)
            _versions.create_all(connection)
            found = self._version(connection, component)
            if found is None:
                component.tables.create_all(connection)
                connection.execute(
                    _VERSIONS.insert().values(component=component.name, version=component.version)
                )
                return
            for migrate in component.migrations[found - 1 :]:
                migrate(connection)
            connection.execute(
                _VERSIONS.update()
                .where(_VERSIONS.c.component == component.name)
                .values(version=component.version)
            )

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that reads one state of the database, and waits for nobody.

        Raises:
            DatabaseFailure: The database failed.
        """
        with self._explained(), self._engine.connect() as connection:
            if not self._is_sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self, component: str) -> Iterator[sa.Connection]:
        """A transaction of the only writer of a component; committed where the block ends well.

        Raises:
            DatabaseFailure: Another writer did not end in time, or the database failed; nothing of
                the block was kept.
        """
        with self._explained(), self._engine.connect() as connection:
            connection = connection.execution_options(lockstep_begin="BEGIN IMMEDIATE")
            with connection.begin():
                self._lock(connection, component)
                yield connection

    def close(self) -> None:
        """Close all connections; a later transaction opens new ones."""
        self._engine.dispose()

    def _lock(self, connection: sa.Connection, component: str) -> None:
        if not self._is_sqlite:
            key = zlib.crc32(f"lockstep/{component}".encode())
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})

    def _version(self, connection: sa.Connection, component: Component) -> int | None:
        if not sa.inspect(connection).has_table(_VERSIONS.name):
            return None
        version = connection.execute(
            sa.select(_VERSIONS.c.version).where(_VERSIONS.c.component == component.name)
        ).scalar()
        if version is not None and version > component.version:
            raise RegistryError(
                f"{self.name}: the tables of {component.name} are of version {version}; this "
                f"Lockstep knows {component.version} and older. Upgrade Lockstep."
            )
        return version

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except exc.IntegrityError:
            raise  # a statement's own business
        except exc.DBAPIError as error:
            raise DatabaseFailure(self._explain(error)) from error
        except exc.TimeoutError as error:
            raise DatabaseFailure(
                f"{self.name}: all connections of this process were in use for {self._busy_s:g} s. "
                "Nothing was changed; try again, with less at once."
            ) from error

    def _explain(self, error: exc.DBAPIError) -> str:
        reason = " ".join(str(error.orig).split())[:300]
        text = reason.lower()
        if "locked" in text or "lock timeout" in text:
            return (
                f"{self.name} is locked: another process has been writing for {self._busy_s:g} s. "
                "Nothing was changed; try again, or end that process."
            )
        if "full" in text or "no space" in text:
            return f"{self.name}: its storage is full ({reason}). Nothing was changed; make room."
        if "readonly" in text or "read-only" in text:
            return f"{self.name} may not be written to ({reason}). Give this user the right to."
        if "unable to open" in text or "not a database" in text or "malformed" in text:
            return (
                f"{self.name} cannot be used ({reason}). Check the path, or restore the file from "
                "a copy."
            )
        if isinstance(error, exc.OperationalError) and not self._is_sqlite:
            return (
                f"{self.name} cannot be reached ({reason}). Check that the server runs, and user "
                f"and password in {_URL_VARIABLE}."
            )
        return f"{self.name} failed ({reason}). Nothing was changed; try again."


def default_url() -> str:
    """SQLite in a file below LOCKSTEP_HOME."""
    return f"sqlite:///{home() / _FILE}"


def home() -> Path:
    """LOCKSTEP_HOME, absolute; `~/.lockstep` without it."""
    return Path(os.environ.get("LOCKSTEP_HOME") or "~/.lockstep").expanduser().absolute()


def _make_engine(url: str, busy_s: float) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:
        scheme = re.sub(r"(?s)[^A-Za-z0-9+].*", "", url)[:40]
        raise RegistryError(
            f"received a database URL that begins with {scheme!r}; {_DIALECTS}. Correct "
            f"{_URL_VARIABLE}."
        ) from None
    shown = _shown(parsed)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise RegistryError(f"received {shown}; {_DIALECTS}. Name a file.")
        return _sqlite(parsed, busy_s)
    if parsed.get_backend_name() == "postgresql":
        return _postgres(parsed.set(drivername="postgresql+psycopg"), busy_s)
    raise RegistryError(f"received the database {shown}; {_DIALECTS}. Correct {_URL_VARIABLE}.")


def _shown(url: sa.URL) -> str:
    """A URL for messages: libpq takes passwords as options too."""
    query = {key: value for key, value in url.query.items() if key in _SHOWN_OPTIONS}
    plain = url.set(drivername=url.get_backend_name(), query=query)
    return plain.render_as_string(hide_password=True)


def _sqlite(url: sa.URL, busy_s: float) -> sa.Engine:
    file = Path(str(url.database)).absolute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseFailure(
            f"cannot make {file.parent}, the folder of the database: {error}. Set LOCKSTEP_HOME or "
            f"{_URL_VARIABLE} to a place that can be written to."
        ) from error
    engine = sa.create_engine(
        url,
        pool_timeout=busy_s,
        connect_args={"timeout": busy_s, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        _write_ahead(connection, busy_s)
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: sa.Connection) -> None:
        begin = connection.get_execution_options().get("lockstep_begin", "BEGIN")
        connection.exec_driver_sql(begin)

    return engine


def _write_ahead(connection: sqlite3.Connection, busy_s: float) -> None:
    """Switch a file to write-ahead logging, where no earlier connection did.

    SQLite's own patience does not cover the switch: of eight processes that open a new file at
    once, one in 250 was told at once that it is locked.
    """
    deadline = time.monotonic() + busy_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S * random.random())


def _postgres(url: sa.URL, busy_s: float) -> sa.Engine:
    try:
        return sa.create_engine(
            url,
            pool_pre_ping=True,
            pool_timeout=busy_s,
            connect_args={
                "connect_timeout": 10,
                "options": f"-c lock_timeout={int(busy_s * 1000)}",
                **_WATCHFUL,
            },
        )
    except ModuleNotFoundError:
        raise RegistryError(
            f"received {_shown(url)}; PostgreSQL needs the extra "
            "`postgres`. Install lockstep[postgres], or use SQLite."
        ) from None
