"""Leases of shards: who computes what under which epoch, and what of it counts.

A shard is pending, leased to an attempt, reported by it, and done when its files have their own
names. The order decides what a crash can leave: first the report is recorded, then the files are
renamed, then the shard is done. So whoever comes next finds, for each shard, either nothing to
trust, or files with hashes that tell whether they are the reported ones.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from serving.batch_output import PartFile
from serving.batch_store import BatchStore
from serving.batch_tables import ATTEMPTS, JOBS, SHARDS, StoredShard


class ShardLeases:
    """The shards' part of the owner's transactions; all of them raise OwnershipLost.

    Args:
        store: Where they are kept.
        owner: The owner's epoch.
    """

    def __init__(self, store: BatchStore, owner: int) -> None:
        self._store, self._owner = store, owner

    def lease(self, job: str, number: int, station: int, now: float) -> StoredShard | None:
        """Begin an attempt, under the next epoch; None where the shard or job waits for none."""
        with self._store.owning(self._owner) as connection:
            row = (
                connection.execute(
                    sa.select(SHARDS, JOBS.c.status.label("job_status"))
                    .join(JOBS, JOBS.c.id == SHARDS.c.job)
                    .where(SHARDS.c.job == job, SHARDS.c.number == number)
                )
                .mappings()
                .one_or_none()
            )
            if row is None or row["status"] != "pending" or row["job_status"] != "in_progress":
                return None
            epoch = row["epoch"] + 1
            values = {**row, "status": "leased", "epoch": epoch}
            values.pop("job_status")
            self._set(connection, job, number, status="leased", epoch=epoch)
            connection.execute(
                ATTEMPTS.insert().values(
                    job=job,
                    number=number,
                    epoch=epoch,
                    station=station,
                    owner_epoch=self._owner,
                    started_at=now,
                )
            )
            return StoredShard(**values)

    def report(
        self, shard: StoredShard, files: Sequence[PartFile], bad_rows: int, compute_s: float
    ) -> bool:
        """Record what an attempt has written; False where it is superseded."""
        with self._store.owning(self._owner) as connection:
            reported = connection.execute(
                SHARDS.update()
                .where(
                    *self._this(shard),
                    SHARDS.c.status == "leased",
                    SHARDS.c.epoch == shard.epoch,
                    sa.select(JOBS.c.status).where(JOBS.c.id == shard.job).scalar_subquery()
                    == "in_progress",
                )
                .values(
                    status="reported",
                    files=json.dumps([asdict(file) for file in files]),
                    row_bad=bad_rows,
                    compute_s=compute_s,
                )
            )
            return bool(reported.rowcount)

    def done(self, shard: StoredShard, now: float) -> None:
        """The files of a reported shard have their own names: count it, once."""
        with self._store.owning(self._owner) as connection:
            moved = connection.execute(
                SHARDS.update()
                .where(*self._this(shard), SHARDS.c.status == "reported")
                .values(status="done")
            )
            if not moved.rowcount:
                return
            row = connection.execute(sa.select(SHARDS).where(*self._this(shard))).one()
            self._count(connection, row, 1)
            self._close(connection, shard, now, "done")

    def give_back(self, shard: StoredShard, now: float, outcome: str, is_failure: bool) -> int:
        """An attempt has not worked: the shard is pending again. Returns failures so far."""
        with self._store.owning(self._owner) as connection:
            failures = SHARDS.c.failures + (1 if is_failure else 0)
            connection.execute(
                SHARDS.update()
                .where(*self._this(shard), SHARDS.c.epoch == shard.epoch, SHARDS.c.status != "done")
                .values(status="pending", files=None, row_bad=0, failures=failures)
            )
            self._close(connection, shard, now, outcome)
            found = connection.execute(sa.select(SHARDS.c.failures).where(*self._this(shard)))
            return int(found.scalar_one())

    def reopen(self, shard: StoredShard) -> None:
        """A shard that was done has lost its files: it is pending again."""
        with self._store.owning(self._owner) as connection:
            row = connection.execute(sa.select(SHARDS).where(*self._this(shard))).one()
            if row.status == "done":
                self._count(connection, row, -1)
            self._set(connection, shard.job, shard.number, status="pending", files=None, row_bad=0)

    def unlease(self, job: str, now: float) -> None:
        """No attempt of an earlier owner counts any more."""
        with self._store.owning(self._owner) as connection:
            connection.execute(
                SHARDS.update()
                .where(SHARDS.c.job == job, SHARDS.c.status == "leased")
                .values(status="pending")
            )
            connection.execute(
                ATTEMPTS.update()
                .where(
                    ATTEMPTS.c.job == job,
                    ATTEMPTS.c.ended_at.is_(None),
                    ATTEMPTS.c.owner_epoch != self._owner,
                )
                .values(ended_at=now, outcome="superseded")
            )

    # -- inside --------------------------------------------------------------------------------

    @staticmethod
    def _this(shard: StoredShard) -> tuple[Any, Any]:
        return SHARDS.c.job == shard.job, SHARDS.c.number == shard.number

    @staticmethod
    def _set(connection: sa.Connection, job: str, number: int, **values: Any) -> None:
        connection.execute(
            SHARDS.update().where(SHARDS.c.job == job, SHARDS.c.number == number).values(**values)
        )

    @staticmethod
    def _count(connection: sa.Connection, row: Any, sign: int) -> None:
        size_bytes = sum(file["size_bytes"] for file in json.loads(row.files))
        connection.execute(
            JOBS.update()
            .where(JOBS.c.id == row.job)
            .values(
                row_done=JOBS.c.row_done + sign * row.row_count,
                row_bad=JOBS.c.row_bad + sign * row.row_bad,
                shard_done=JOBS.c.shard_done + sign,
                output_bytes=JOBS.c.output_bytes + sign * size_bytes,
                compute_s=JOBS.c.compute_s + sign * row.compute_s,
            )
        )

    @staticmethod
    def _close(connection: sa.Connection, shard: StoredShard, now: float, outcome: str) -> None:
        connection.execute(
            ATTEMPTS.update()
            .where(
                ATTEMPTS.c.job == shard.job,
                ATTEMPTS.c.number == shard.number,
                ATTEMPTS.c.epoch == shard.epoch,
            )
            .values(ended_at=now, outcome=outcome[:256])
        )


def files_of(shard: StoredShard) -> list[PartFile]:
    """The files that a shard was reported with."""
    return [PartFile(**file) for file in json.loads(shard.files or "[]")]
