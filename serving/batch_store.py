"""What is kept of files and jobs: submissions, their states, and one owner of the dispatching.

Any process may submit, read and ask to cancel. Everything else is the owner's: who holds the lease
of the database, under an epoch that grows with each owner. Each of the owner's transactions begins
by looking at that epoch, so an owner that was held up and superseded changes nothing any more.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from registry.database import Database
from serving.batch_tables import (
    ACTIVE,
    COMPONENT,
    FILES,
    JOBS,
    OWNERS,
    SHARDS,
    Job,
    StoredFile,
    StoredShard,
)
from serving.errors import BatchError, OwnershipLost, QuotaExceeded

_OWNER = "dispatcher"
_INSERTED_AT_ONCE = 1_000
_QUEUE_RETRY_S = 30.0
_IN_VAIN = ("failed", "expired", "cancelling", "cancelled")


def new_id(kind: str) -> str:
    """A name that nobody can guess: `batch_...` or `file-...`."""
    return f"{kind}{'-' if kind == 'file' else '_'}{secrets.token_hex(12)}"


class BatchStore:
    """Files and jobs of a database. Safe to share between threads.

    Args:
        database: Where they are kept; the tables are made where they are missing.
        own_folder: Outputs below it are the service's to keep, and count as stored; those in a
            place of the user's own do not. None: all count.
    """

    def __init__(self, database: Database, own_folder: str | None = None) -> None:
        database.prepare(COMPONENT)
        self._database, self._own_folder = database, own_folder

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        self._database.close()

    # -- files ---------------------------------------------------------------------------------

    def add_file(self, file: StoredFile, most_bytes: int | None = None) -> None:
        """Keep a file; all bytes of its user may be `most_bytes`.

        Raises:
            QuotaExceeded: They would be more.
        """
        with self._writing() as connection:
            if most_bytes is not None:
                held = self._stored_bytes(connection, file.user_name)
                if held + file.size_bytes > most_bytes:
                    raise QuotaExceeded(
                        f"{file.size_bytes:,} bytes more than the {held:,} that are stored; "
                        f"{most_bytes:,} are allowed. Delete files, or wait until they expire.",
                        "bytes",
                        3600.0,
                    )
            connection.execute(FILES.insert().values(**vars(file)))

    def stored_bytes(self, user: str) -> int:
        """Bytes of a user's uploads and of outputs that the service keeps."""
        with self._database.reading() as connection:
            return self._stored_bytes(connection, user)

    def file(self, name: str) -> StoredFile | None:
        """One file, or None."""
        if not name.isprintable():  # PostgreSQL takes no NUL in a text
            return None
        with self._database.reading() as connection:
            row = (
                connection.execute(sa.select(FILES).where(FILES.c.id == name))
                .mappings()
                .one_or_none()
            )
        return None if row is None else StoredFile(**row)

    def files(
        self, user: str | None, purpose: str | None, after: str | None, limit: int
    ) -> list[StoredFile]:
        """Files of a user, or of all (None), newest first, those after `after`."""
        query = sa.select(FILES)
        if purpose is not None:
            query = query.where(FILES.c.purpose == purpose)
        with self._database.reading() as connection:
            rows = connection.execute(self._page(connection, query, FILES, user, after, limit))
            return [StoredFile(**row) for row in rows.mappings()]

    def remove_file(self, name: str) -> None:
        """Forget a file. Idempotent."""
        with self._writing() as connection:
            connection.execute(FILES.delete().where(FILES.c.id == name))

    def expired_files(self, now: float) -> list[StoredFile]:
        """Files whose time is over."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(FILES).where(FILES.c.expires_at <= now))
            return [StoredFile(**row) for row in rows.mappings()]

    # -- jobs, for everybody -------------------------------------------------------------------

    def add_job(self, job: Job, most_queued: int | None = None) -> tuple[Job, bool]:
        """Keep a job, or find the one that was made under the same idempotency key.

        Returns:
            The job, and whether it is new.

        Raises:
            BatchError: The key was used for another request.
            QuotaExceeded: The user has as many unfinished jobs as are allowed.
        """
        with self._writing() as connection:
            if job.idempotency_key is not None:
                found = self._keyed(
                    connection, job.user_name, job.idempotency_key, job.request_hash
                )
                if found is not None:
                    return found, False
            active = connection.execute(
                sa.select(sa.func.count()).where(
                    JOBS.c.user_name == job.user_name, JOBS.c.status.in_(ACTIVE)
                )
            ).scalar_one()
            if most_queued is not None and active >= most_queued:
                raise QuotaExceeded(
                    f"{active} jobs are not finished; {most_queued} are allowed. Wait for one to "
                    "finish, or cancel one.",
                    "queued_jobs",
                    _QUEUE_RETRY_S,
                )
            connection.execute(JOBS.insert().values(**vars(job)))
            return job, True

    def keyed_job(self, user: str, key: str, request_hash: str) -> Job | None:
        """The job that was made under an idempotency key, or None.

        Raises:
            BatchError: The key was used for another request.
        """
        with self._database.reading() as connection:
            return self._keyed(connection, user, key, request_hash)

    def job(self, name: str) -> Job | None:
        """One job, or None."""
        if not name.isprintable():
            return None
        with self._database.reading() as connection:
            row = (
                connection.execute(sa.select(JOBS).where(JOBS.c.id == name))
                .mappings()
                .one_or_none()
            )
        return None if row is None else Job(**row)

    def jobs(self, user: str | None, after: str | None, limit: int) -> list[Job]:
        """Jobs of a user, or of all (None), newest first, those after `after`."""
        with self._database.reading() as connection:
            query = self._page(connection, sa.select(JOBS), JOBS, user, after, limit)
            return [Job(**row) for row in connection.execute(query).mappings()]

    def recent_job(self, user: str, request_hash: str, since: float) -> Job | None:
        """The newest job of the same request since then that may still end well, or None."""
        with self._database.reading() as connection:
            row = (
                connection.execute(
                    sa.select(JOBS)
                    .where(
                        JOBS.c.user_name == user,
                        JOBS.c.request_hash == request_hash,
                        JOBS.c.created_at >= since,
                        JOBS.c.status.not_in(_IN_VAIN),
                    )
                    .order_by(JOBS.c.created_at.desc())
                )
                .mappings()
                .first()
            )
        return None if row is None else Job(**row)

    def ask_to_cancel(self, name: str, now: float) -> Job | None:
        """Have the owner cancel a job. Idempotent; a finished job stays as it is."""
        with self._writing() as connection:
            connection.execute(
                JOBS.update()
                .where(JOBS.c.id == name, JOBS.c.status.in_(("validating", "in_progress")))
                .values(status="cancelling", cancelling_at=now)
            )
        return self.job(name)

    def expired_outputs(self, now: float) -> list[Job]:
        """Ended jobs whose output's time is over."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(JOBS).where(JOBS.c.output_expires_at <= now))
            return [Job(**row) for row in rows.mappings()]

    def forget_output(self, job: Job) -> None:
        """A job's output is no more, nor are the files that it was. Idempotent."""
        gone = {"output_bytes": 0, "output_expires_at": None, "output_file": None}
        with self._writing() as connection:
            connection.execute(FILES.delete().where(FILES.c.job == job.id))
            connection.execute(
                JOBS.update().where(JOBS.c.id == job.id).values(**gone, error_file=None)
            )

    def active_jobs(self) -> list[Job]:
        """All jobs that are not finished, oldest first."""
        query = sa.select(JOBS).where(JOBS.c.status.in_(ACTIVE))
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(JOBS.c.created_at, JOBS.c.id))
            return [Job(**row) for row in rows.mappings()]

    def shards(self, job: str, *statuses: str) -> list[StoredShard]:
        """Shards of a job in order; only those in certain states where some are named."""
        query = sa.select(SHARDS).where(SHARDS.c.job == job)
        if statuses:
            query = query.where(SHARDS.c.status.in_(statuses))
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(SHARDS.c.number))
            return [StoredShard(**row) for row in rows.mappings()]

    # -- the owner -----------------------------------------------------------------------------

    def acquire(self, holder: str, now: float, lease_s: float, is_dead: Any) -> int | None:
        """Become the owner of the dispatching, if nobody is.

        Args:
            holder: Who asks.
            now: The time.
            lease_s: How long the right lasts without `renew`.
            is_dead: Tells of the present holder whether it is known to be gone.

        Returns:
            The epoch of the new owner, or None.
        """
        with self._writing() as connection:
            row = connection.execute(sa.select(OWNERS).where(OWNERS.c.name == _OWNER)).one_or_none()
            is_held = row is not None and row.expires_at > now and row.holder != holder
            if row is not None and is_held and not is_dead(row.holder):
                return None
            epoch = 1 if row is None else row.epoch + 1
            values = {"holder": holder, "epoch": epoch, "expires_at": now + lease_s}
            if row is None:
                connection.execute(OWNERS.insert().values(name=_OWNER, **values))
            else:
                connection.execute(OWNERS.update().where(OWNERS.c.name == _OWNER).values(**values))
            return epoch

    @contextmanager
    def owning(self, owner: int) -> Iterator[sa.Connection]:
        """A transaction of the owner of this epoch.

        Raises:
            OwnershipLost: There is a newer owner; nothing was changed.
        """
        with self._writing() as connection:
            epoch = connection.execute(
                sa.select(OWNERS.c.epoch).where(OWNERS.c.name == _OWNER)
            ).scalar()
            if epoch != owner:
                raise OwnershipLost(
                    f"another service dispatches the jobs of this database (epoch {epoch}, ours "
                    f"was {owner}). One at a time is allowed; this one waits for its turn."
                )
            yield connection

    def renew(self, owner: int, now: float, lease_s: float) -> None:
        """Keep the right for `lease_s` from now. Raises as `owning`."""
        with self.owning(owner) as connection:
            connection.execute(OWNERS.update().values(expires_at=now + lease_s))

    def release(self, owner: int) -> None:
        """Give the right up, so that another need not wait."""
        with self._writing() as connection:
            connection.execute(
                OWNERS.update().where(OWNERS.c.epoch == owner).values(expires_at=0.0)
            )

    def move(
        self, owner: int, job: str, sources: Sequence[str], status: str, **values: Any
    ) -> bool:
        """Take a job from one of some states to another; returns whether it was in one of them.

        Raises as `owning`.
        """
        with self.owning(owner) as connection:
            moved = connection.execute(
                JOBS.update()
                .where(JOBS.c.id == job, JOBS.c.status.in_(sources))
                .values(status=status, **values)
            )
            return bool(moved.rowcount)

    def planned(
        self,
        owner: int,
        job: str,
        plan: Mapping[str, Any],
        shards: Sequence[dict[str, Any]],
        now: float,
        pay: Callable[[sa.Connection], None] = lambda _: None,
    ) -> bool:
        """Record a job's plan and begin it; False where the job is not being validated any more.

        Args:
            owner: The epoch of the owner.
            job: Its id.
            plan: What its shards share.
            shards: Each one's record.
            now: The time.
            pay: Called in the same transaction; what it raises leaves everything as it was.

        Raises as `owning`.
        """
        with self.owning(owner) as connection:
            moved = connection.execute(
                JOBS.update()
                .where(JOBS.c.id == job, JOBS.c.status == "validating")
                .values(
                    status="in_progress",
                    in_progress_at=now,
                    plan=json.dumps(plan),
                    row_total=sum(shard["rows"] for shard in shards),
                    shard_total=len(shards),
                )
            )
            if not moved.rowcount:
                return False
            pay(connection)
            rows = [
                {
                    "job": job,
                    "number": number,
                    "record": json.dumps(shard),
                    "row_count": shard["rows"],
                    **_FRESH,
                }
                for number, shard in enumerate(shards)
            ]
            for start in range(0, len(rows), _INSERTED_AT_ONCE):
                connection.execute(SHARDS.insert(), rows[start : start + _INSERTED_AT_ONCE])
            return True

    def tell_progress(
        self, owner: int, told: Mapping[str, tuple[int | None, float | None]]
    ) -> None:
        """Record position and time to the end of jobs. Raises as `owning`."""
        if not told:
            return
        with self.owning(owner) as connection:
            for job, (position, eta_s) in told.items():
                connection.execute(
                    JOBS.update().where(JOBS.c.id == job).values(position=position, eta_s=eta_s)
                )

    # -- inside --------------------------------------------------------------------------------

    def _writing(self) -> Any:
        return self._database.writing(COMPONENT.name)

    @staticmethod
    def _keyed(connection: sa.Connection, user: str, key: str, request_hash: str) -> Job | None:
        mine = sa.select(JOBS).where(JOBS.c.user_name == user, JOBS.c.idempotency_key == key)
        row = connection.execute(mine).mappings().one_or_none()
        if row is not None and row["request_hash"] != request_hash:
            raise BatchError(
                "this Idempotency-Key was used for another request; a key belongs to one request. "
                "Use a new key.",
                "idempotency_key_reused",
            )
        return None if row is None else Job(**row)

    def _stored_bytes(self, connection: sa.Connection, user: str) -> int:
        uploads = sa.select(sa.func.coalesce(sa.func.sum(FILES.c.size_bytes), 0)).where(
            FILES.c.user_name == user, FILES.c.path != ""
        )
        outputs = sa.select(sa.func.coalesce(sa.func.sum(JOBS.c.output_bytes), 0)).where(
            JOBS.c.user_name == user
        )
        if self._own_folder is not None:
            outputs = outputs.where(JOBS.c.folder.startswith(self._own_folder, autoescape=True))
        return int(
            connection.execute(uploads).scalar_one() + connection.execute(outputs).scalar_one()
        )

    @staticmethod
    def _page(
        connection: sa.Connection,
        query: Any,
        table: sa.Table,
        user: str | None,
        after: str | None,
        limit: int,
    ) -> Any:
        if user is not None:
            query = query.where(table.c.user_name == user)
        if after is not None:
            at = connection.execute(
                sa.select(table.c.created_at).where(table.c.id == after)
            ).scalar()
            if at is None:
                raise BatchError(
                    f"there is nothing called {after[:80]!r}.", "not_found", status=404
                )
            earlier = table.c.created_at < at
            query = query.where(earlier | ((table.c.created_at == at) & (table.c.id < after)))
        return query.order_by(table.c.created_at.desc(), table.c.id.desc()).limit(limit)


_FRESH = {
    "status": "pending",
    "epoch": 0,
    "failures": 0,
    "row_bad": 0,
    "files": None,
    "compute_s": 0.0,
}
