"""What every component may expect of the database, on SQLite and on PostgreSQL."""

import os
import sqlite3
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from registry.database import Component, Database, _write_ahead
from registry.errors import DatabaseFailure, RegistryError
from tests.support.processes import run_at_once
from tests.support.registry_workers import prepare_at_once

_tables = sa.MetaData()
ROWS = sa.Table(
    "things",
    _tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("worker", sa.Integer),
    sa.Column("text", sa.Text),
)
THINGS = Component("things", _tables)
PROCESSES = 8
SECRET = "a-secret-that-nobody-prints"


def rows(database: Database) -> int:
    with database.reading() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(ROWS)).scalar() or 0


def _insert(database: Database, *values: dict[str, object]) -> None:
    with database.writing("things") as connection:
        for row in values:
            connection.execute(ROWS.insert().values(**row))


def test_eight_processes_may_be_the_first_at_once(database_url: str) -> None:
    answers = run_at_once(prepare_at_once, [(database_url, THINGS)] * PROCESSES, 100)
    assert answers == [None] * PROCESSES
    database = Database(database_url)
    assert rows(database) == PROCESSES
    database.close()


def test_a_block_is_kept_whole_or_not_at_all(database: Database) -> None:
    database.prepare(THINGS)
    with pytest.raises(exc.IntegrityError):
        _insert(database, {"id": 1}, {"id": 1})
    assert rows(database) == 0
    _insert(database, {"id": 1}, {"id": 2})
    assert rows(database) == 2


def test_a_reader_sees_one_state_and_waits_for_nobody(database: Database) -> None:
    database.prepare(THINGS)
    count = sa.select(sa.func.count()).select_from(ROWS)
    with database.reading() as reader:
        assert reader.execute(count).scalar() == 0
        with database.writing("things") as writer:
            writer.execute(ROWS.insert().values(worker=1))
            assert reader.execute(count).scalar() == 0
        assert reader.execute(count).scalar() == 0
    assert rows(database) == 1


def test_a_writer_that_waits_too_long_says_so(database_url: str) -> None:
    first, second = Database(database_url), Database(database_url, busy_s=0.05)
    first.prepare(THINGS)
    with (
        first.writing("things"),
        pytest.raises(DatabaseFailure, match=r"is locked: another process .* for 0\.05 s"),
        second.writing("things"),
    ):
        pass
    first.close()
    second.close()


def test_more_threads_than_connections_wait_for_each_other(database: Database) -> None:
    database.prepare(THINGS)
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(2):
                with database.writing("things") as connection:
                    connection.execute(ROWS.insert().values(worker=1))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert rows(database) == 48


def _add_text(connection: sa.Connection) -> None:
    connection.execute(sa.text("ALTER TABLE things ADD COLUMN text TEXT"))


def _fill_text(connection: sa.Connection) -> None:
    connection.execute(sa.text("UPDATE things SET text = 'filled'"))


def _fail(connection: sa.Connection) -> None:
    connection.execute(sa.text("UPDATE things SET text = 'half'"))
    raise ZeroDivisionError


def test_tables_are_migrated_step_by_step(database: Database) -> None:
    old = sa.MetaData()
    sa.Table(
        "things",
        old,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("worker", sa.Integer),
    )
    database.prepare(Component("things", old))
    with database.writing("things") as connection:
        connection.execute(sa.text("INSERT INTO things (id, worker) VALUES (1, 2)"))
    database.prepare(Component("things", _tables, (_add_text,)))
    with pytest.raises(ZeroDivisionError):
        database.prepare(Component("things", _tables, (_add_text, _fill_text, _fail)))
    text = sa.select(ROWS.c.text)
    with database.reading() as connection:
        assert connection.execute(text).scalars().all() == [None]
    newest = Component("things", _tables, (_add_text, _fill_text))
    for _ in range(2):
        database.prepare(newest)
    with database.reading() as connection:
        assert connection.execute(text).scalars().all() == ["filled"]
    with pytest.raises(RegistryError, match="are of version 3; this Lockstep knows 1 and older"):
        database.prepare(THINGS)


def test_components_are_independent(database: Database) -> None:
    other = sa.MetaData()
    sa.Table("others", other, sa.Column("id", sa.Integer, primary_key=True))
    database.prepare(THINGS)
    database.prepare(Component("others", other))
    assert rows(database) == 0


# SQLite alone


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "lockstep.db"


def test_sqlite_writes_ahead_and_syncs(file: Path) -> None:
    database = Database(f"sqlite:///{file}")
    database.prepare(THINGS)
    with database.reading() as connection:
        pragmas = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert pragmas == ["wal", 2, 1]
    assert file.with_name("lockstep.db-wal").exists()
    database.close()
    with sqlite3.connect(file) as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    plain.close()


class BusyFile:
    """Says a number of times that it is locked, as SQLite does at once, whatever its patience."""

    def __init__(self, times: int, code: int) -> None:
        self.left = times
        self._code = code

    def execute(self, statement: str) -> "BusyFile":
        assert statement == "PRAGMA journal_mode=WAL"
        self.left -= 1
        if self.left >= 0:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = self._code
            raise error
        return self

    def close(self) -> None:
        pass


@pytest.mark.parametrize("code", [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_BUSY_RECOVERY])
def test_the_switch_to_writing_ahead_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    file = BusyFile(3, code)
    _write_ahead(file, busy_s=60)  # type: ignore[arg-type]
    assert file.left == -1
    with pytest.raises(sqlite3.OperationalError):
        _write_ahead(BusyFile(3, code), busy_s=-1)  # type: ignore[arg-type]
    with pytest.raises(sqlite3.OperationalError):
        _write_ahead(BusyFile(1, sqlite3.SQLITE_FULL), busy_s=60)  # type: ignore[arg-type]


def test_a_full_database_says_so_and_stays_usable(file: Path) -> None:
    database = Database(f"sqlite:///{file}")
    database.prepare(THINGS)
    database.close()
    database = Database(f"sqlite:///{file}")
    with database.reading() as connection:  # the pool keeps this connection, and it its bound
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(DatabaseFailure, match="storage is full"):
        _insert(database, {"text": "x" * 100_000})
    assert rows(database) == 0
    database.close()


def test_files_that_are_no_databases_are_named(tmp_path: Path) -> None:
    file = tmp_path / "text.db"
    file.write_text("no database at all, and longer than a page's header " * 20)
    with pytest.raises(DatabaseFailure, match=r"text\.db cannot be used .*not a database"):
        Database(f"sqlite:///{file}").prepare(THINGS)
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(DatabaseFailure, match="cannot be used .*unable to open"):
        Database(f"sqlite:///{tmp_path / 'folder.db'}").prepare(THINGS)
    with pytest.raises(DatabaseFailure, match=r"cannot make .*text\.db"):
        Database(f"sqlite:///{file}/inside.db")


def test_a_database_that_may_only_be_read_can_be(file: Path) -> None:
    database = Database(f"sqlite:///{file}")
    database.prepare(THINGS)
    database.close()
    read_only = Database(f"sqlite:///file:{file}?mode=ro&uri=true")
    read_only.prepare(THINGS)
    assert rows(read_only) == 0
    with pytest.raises(DatabaseFailure, match="may not be written to"):
        _insert(read_only, {"worker": 0})
    read_only.close()


# URLs


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "Name a file"),
        ("mysql://ann:{}@db/x", r"mysql://ann:\*\*\*@db/x; sqlite:///FILE and"),
        ("nonsense {}", "begins with 'nonsense'"),
        ("postgres://ann:{}@db/x", "sqlite:///FILE and postgresql://USER@HOST/NAME are allowed"),
    ],
)
def test_urls_that_are_not_understood(url: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        Database(url.format(SECRET))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ann:{SECRET}@127.0.0.1:1/x",
        f"postgresql://ann@127.0.0.1:1/x?password={SECRET}",
        f"postgresql://127.0.0.1:1/x?user=ann&password={SECRET}&sslpassword={SECRET}",
    ],
)
def test_a_server_that_does_not_answer_is_named_without_the_password(url: str) -> None:
    database = Database(url)
    with pytest.raises(DatabaseFailure, match=r"127\.0\.0\.1:1/x.* cannot be reached") as caught:
        database.prepare(THINGS)
    assert SECRET not in str(caught.value)
    assert SECRET not in database.name
    assert SECRET not in repr(database)
    database.close()


def test_a_password_that_is_refused_is_not_shown(postgres_server: str) -> None:
    url = sa.make_url(postgres_server).set(username="nobody", password=SECRET)
    database = Database(url.render_as_string(hide_password=False))
    with pytest.raises(DatabaseFailure, match='role "nobody" does not exist') as caught:
        database.prepare(THINGS)
    assert SECRET not in str(caught.value)
    database.close()


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LOCKSTEP_DATABASE", raising=False)
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "home"))
    assert Database().name == f"sqlite:///{tmp_path / 'home' / 'metadata.db'}"
    monkeypatch.setenv("LOCKSTEP_DATABASE", f"sqlite:///{tmp_path / 'x.db'}")
    assert Database().name.endswith("/x.db")
    assert os.listdir(tmp_path / "home") == []
