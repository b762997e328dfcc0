"""A PostgreSQL server of the tests' own, on a socket in a folder, from the machine's binaries.

Nothing listens on the network. The server ends with the block, and also when the process that
started it dies. PostgreSQL refuses to be run by root; then the user `postgres` runs it, whose files
cannot lie below pytest's private folders: they lie in a folder of `/tmp` that the block removes.
"""

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

_BINARIES = Path("/usr/lib/postgresql")
_START_S = 60
_STOP_S = 30
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # the machine's own failure is not what is tested
    "max_connections": "60",
    "shared_buffers": "16MB",
    "autovacuum": "off",
    "log_min_messages": "warning",
}
_numbers = itertools.count()


def postgres_binaries() -> Path | None:
    """The folder of the newest server on this machine; None without one."""
    found = [path for path in _BINARIES.glob("*/bin") if (path / "initdb").exists()]
    return max(found, key=lambda path: float(path.parent.name), default=None)


@contextlib.contextmanager
def running_postgres(folder: Path) -> Iterator[str]:
    """A server while the block runs; gives the URL of its database `postgres`.

    `folder` receives `postgres.log`. Takes one to two seconds.
    """
    binaries = postgres_binaries()
    assert binaries is not None, "there is no PostgreSQL on this machine"
    home = Path(tempfile.mkdtemp(prefix="lockstep-pg-", dir="/tmp"))  # a socket's path is short
    try:
        user = _hand_over(home)
        data = home / "data"
        options = ["--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8"]
        subprocess.run(
            [*user, str(binaries / "initdb"), *options, "--no-locale", "-D", str(data)],
            check=True,
            capture_output=True,
            timeout=_START_S,
            cwd=home,
        )
        settings = {**_SETTINGS, "unix_socket_directories": str(home)}
        arguments = [text for item in settings.items() for text in ("-c", "=".join(item))]
        command = [*user, str(binaries / "postgres"), "-D", str(data), *arguments]
        with (
            open(folder / "postgres.log", "wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log, cwd=home) as process,
        ):
            try:
                url = f"postgresql://postgres@/postgres?host={home}"
                _wait_for(binaries, home, process)
                yield url
            finally:
                process.send_signal(signal.SIGQUIT)  # at once: nothing of it is needed again
                try:
                    process.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def new_database(server_url: str) -> str:
    """An empty database of its own on a running server; gives its URL. Takes 0.05 to 1 s."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    _execute(server_url, f"CREATE DATABASE {name}")
    return sa.make_url(server_url).set(database=name).render_as_string(hide_password=False)


def emptied(database_url: str) -> str:
    """Drop all that is in a database, which nobody may be using; gives its URL. Takes 0.01 s."""
    _execute(
        database_url,
        "SET lock_timeout = 10000",
        "DROP SCHEMA public CASCADE",
        "CREATE SCHEMA public",
    )
    return database_url


def _execute(url: str, *statements: str) -> None:
    driver = sa.make_url(url).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(driver, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    engine.dispose()


def _hand_over(home: Path) -> list[str]:
    """Give the folder to who will run the server; returns what to put before a command.

    The kernel sends the server SIGINT, its fast shutdown, when the thread that starts it is gone.
    """
    command = ["setpriv", "--pdeathsig", "INT"]
    if os.getuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(home, user.pw_uid, user.pw_gid)
        command += ["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
    return [*command, "--"]


def _wait_for(binaries: Path, home: Path, process: "subprocess.Popen[bytes]") -> None:
    check = [str(binaries / "pg_isready"), "-q", "-h", str(home)]
    for _ in range(_START_S * 20):
        if subprocess.run(check, timeout=_START_S, cwd=home).returncode == 0:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
            raise AssertionError(f"PostgreSQL ended with status {process.returncode}")
    raise AssertionError(f"PostgreSQL was not ready within {_START_S} s")
