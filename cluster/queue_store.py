"""What the queue must not forget, in a SQLite file: runs, what they sent, users and their shares.

Each method is one transaction. The file is for one queue at a time: a lock is held on it for as
long as the store is open.
"""

import fcntl
import hashlib
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cluster.room import Shape, Worker
from cluster.shares import Terms
from configs.errors import EnvironmentFailure

_KEPT_ENDED = 10_000
_FORMAT = 1

ENDED = ("done", "failed", "stopped")


@dataclass
class Record:
    """A run as it is kept. What is more than the scheduler's concern is here only.

    Attributes:
        run_id: Unique.
        name: Of its job.
        user: Whose it is.
        priority: As submitted.
        sequence: Counts submissions.
        shape: What it asks for.
        entrypoint: Its command.
        run_folder: Where it writes.
        package: Digest of the files that it runs in.
        status: waiting; starting (its job is being submitted); running; yielding (asked to go back
            to the queue); stopping (asked to end); done, failed or stopped.
        attempt: Of its newest job; 0 before the first.
        losses: Attempts that ended for no fault of the run's own.
        placed: Where its workers are.
        lent_by: Whose room it has borrowed.
        submitted_at: Unix time, as the two others.
        started_at: Of the newest attempt.
        ended_at: Of the run.
        message: How it ended.
        was_placed: Whether its gang has been seen in its place since the newest start.
    """

    run_id: str
    name: str
    user: str
    priority: int
    sequence: int
    shape: Shape
    entrypoint: str
    run_folder: str
    package: str
    status: str = "waiting"
    attempt: int = 0
    losses: int = 0
    placed: dict[str, int] = field(default_factory=dict)
    lent_by: str = ""
    submitted_at: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0
    message: str = ""
    was_placed: bool = False

    @property
    def is_ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.status in ENDED


class QueueStore:
    """The queue's file. Used by one thread at a time.

    Raises:
        EnvironmentFailure: Another queue uses the file, or it is of a newer Lockstep.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = path.with_name(f"{path.name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise EnvironmentFailure(
                f"{path} belongs to the queue of another cluster on this machine. Set "
                "LOCKSTEP_HOME to another folder before Ray is started."
            ) from None
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            self._database.execute(f"PRAGMA {pragma}")
        self._prepare(path)

    def close(self) -> None:
        """Close the file, for the next queue."""
        self._database.close()
        self._lock.close()

    def records(self) -> list[Record]:
        """All runs, by submission."""
        rows = self._database.execute("SELECT body FROM runs ORDER BY sequence")
        return [_record(body) for (body,) in rows]

    def save(self, *records: Record) -> None:
        """Keep these runs as they are now: all or none."""
        with self._database as transaction:
            transaction.execute("BEGIN IMMEDIATE")
            self._write(records)

    def add(self, record: Record, package: bytes) -> None:
        """Keep a new run and what it runs in."""
        record.package = hashlib.sha256(package).hexdigest()
        with self._database as transaction:
            transaction.execute("BEGIN IMMEDIATE")
            transaction.execute(
                "INSERT OR IGNORE INTO packages VALUES (?, ?)", (record.package, package)
            )
            self._write([record])

    def package(self, digest: str) -> bytes:
        """What a run runs in.

        Raises:
            EnvironmentFailure: It is not there.
        """
        row = self._database.execute(
            "SELECT content FROM packages WHERE digest = ?", (digest,)
        ).fetchone()
        if row is None:
            raise EnvironmentFailure(f"the files with the digest {digest} are lost. Submit again.")
        return bytes(row[0])

    def tidy(self, kept: int = _KEPT_ENDED) -> list[str]:
        """Forget all but the newest runs that have ended, and files that no other run needs.

        Returns the ids of runs that are forgotten.
        """
        with self._database as transaction:
            transaction.execute("BEGIN IMMEDIATE")
            forgotten = [
                str(run_id)
                for (run_id,) in transaction.execute(
                    "SELECT run_id FROM runs WHERE is_ended "
                    "ORDER BY sequence DESC LIMIT -1 OFFSET ?",
                    (kept,),
                )
            ]
            transaction.executemany(
                "DELETE FROM runs WHERE run_id = ?", [(run_id,) for run_id in forgotten]
            )
            transaction.execute(
                "DELETE FROM packages WHERE digest NOT IN "
                "(SELECT package FROM runs WHERE NOT is_ended)"
            )
        return forgotten

    def users(self) -> dict[str, tuple[Terms, float]]:
        """Terms and virtual time of each user."""
        rows = self._database.execute("SELECT name, terms, virtual_s FROM users")
        return {name: (Terms(**json.loads(terms)), had) for name, terms, had in rows}

    def save_users(self, users: dict[str, tuple[Terms, float]]) -> None:
        """Keep what users may have, and have had."""
        with self._database as transaction:
            transaction.execute("BEGIN IMMEDIATE")
            transaction.executemany(
                "INSERT OR REPLACE INTO users VALUES (?, ?, ?)",
                [(name, json.dumps(asdict(terms)), had) for name, (terms, had) in users.items()],
            )

    def _write(self, records: Iterable[Record]) -> None:
        self._database.executemany(
            "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?)",
            [
                (one.run_id, one.sequence, one.is_ended, one.package, json.dumps(asdict(one)))
                for one in records
            ],
        )

    def _prepare(self, path: Path) -> None:
        with closing(self._database.execute("PRAGMA user_version")) as cursor:
            found = int(cursor.fetchone()[0])
        if found > _FORMAT:
            self.close()
            raise EnvironmentFailure(f"{path} is of a newer Lockstep. Upgrade the cluster's.")
        if found == _FORMAT:
            return
        with self._database as transaction:
            transaction.execute("BEGIN IMMEDIATE")
            for statement in (
                "CREATE TABLE IF NOT EXISTS runs (run_id TEXT PRIMARY KEY, sequence INTEGER, "
                "is_ended INTEGER, package TEXT, body TEXT NOT NULL)",
                "CREATE TABLE IF NOT EXISTS packages (digest TEXT PRIMARY KEY, content BLOB)",
                "CREATE TABLE IF NOT EXISTS users (name TEXT PRIMARY KEY, terms TEXT, "
                "virtual_s REAL)",
                f"PRAGMA user_version = {_FORMAT}",
            ):
                transaction.execute(statement)


def shape_from(values: dict[str, Any]) -> Shape:
    """What `dataclasses.asdict` made of a shape."""
    return Shape(int(values["workers"]), Worker(**values["worker"]))


def _record(body: str) -> Record:
    values = json.loads(body)
    known = {one.name for one in fields(Record)}
    values = {name: value for name, value in values.items() if name in known}
    return Record(**{**values, "shape": shape_from(values["shape"])})
