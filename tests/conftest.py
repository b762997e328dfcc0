"""Databases for all tests of tables: each of these runs on SQLite and on PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.database import Database
from tests.support.clock import Clock
from tests.support.postgres import emptied, new_database, postgres_binaries, running_postgres


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server, one for the session."""
    if postgres_binaries() is None:
        pytest.skip("PostgreSQL's server is not installed")
    with running_postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(scope="session")
def shared_postgres(postgres_server: str) -> str:
    """The URL of a database that is emptied before each test that gets it."""
    return new_database(postgres_server)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'lockstep.db'}"
    return emptied(request.getfixturevalue("shared_postgres"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Connections to it."""
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def clock() -> Clock:
    """A clock that stands until it is set."""
    return Clock()
