"""Tables of batch jobs: files, jobs, shards, attempts, and who owns the dispatching.

JSON is kept as text; times are seconds since 1970.
"""

from dataclasses import dataclass

import sqlalchemy as sa

from registry.database import Component

_tables = sa.MetaData()

FILES = sa.Table(
    "batch_files",
    _tables,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("user_name", sa.String(64), nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("name", sa.String(256), nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("job", sa.String(40)),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Index("batch_files_of_user", "user_name", "created_at"),
)

JOBS = sa.Table(
    "batch_jobs",
    _tables,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("user_name", sa.String(64), nullable=False),
    sa.Column("idempotency_key", sa.String(256)),
    sa.Column("request_hash", sa.String(64), nullable=False),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("model", sa.String(256), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(128), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("plan", sa.Text),
    sa.Column("problems", sa.Text, nullable=False),
    sa.Column("row_total", sa.BigInteger, nullable=False),
    sa.Column("row_done", sa.BigInteger, nullable=False),
    sa.Column("row_bad", sa.BigInteger, nullable=False),
    sa.Column("shard_total", sa.Integer, nullable=False),
    sa.Column("shard_done", sa.Integer, nullable=False),
    sa.Column("output_bytes", sa.BigInteger, nullable=False),
    sa.Column("compute_s", sa.Double, nullable=False),
    sa.Column("position", sa.Integer),
    sa.Column("eta_s", sa.Double),
    sa.Column("output_file", sa.String(40)),
    sa.Column("error_file", sa.String(40)),
    sa.Column("output_expires_at", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Column("in_progress_at", sa.Double),
    sa.Column("finalizing_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("failed_at", sa.Double),
    sa.Column("expired_at", sa.Double),
    sa.Column("cancelling_at", sa.Double),
    sa.Column("cancelled_at", sa.Double),
    sa.Index("batch_jobs_of_user", "user_name", "created_at"),
    sa.Index("batch_jobs_by_status", "status"),
    sa.Index("batch_jobs_by_expiry", "output_expires_at"),
    sa.UniqueConstraint("user_name", "idempotency_key"),
)

SHARDS = sa.Table(
    "batch_shards",
    _tables,
    sa.Column("job", sa.String(40), sa.ForeignKey(JOBS.c.id), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("row_count", sa.BigInteger, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("row_bad", sa.BigInteger, nullable=False),
    sa.Column("files", sa.Text),
    sa.Column("compute_s", sa.Double, nullable=False),
)

ATTEMPTS = sa.Table(
    "batch_attempts",
    _tables,
    sa.Column("job", sa.String(40), sa.ForeignKey(JOBS.c.id), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("epoch", sa.Integer, primary_key=True),
    sa.Column("station", sa.Integer, nullable=False),
    sa.Column("owner_epoch", sa.Integer, nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double),
    sa.Column("outcome", sa.String(256)),
)

OWNERS = sa.Table(
    "batch_owners",
    _tables,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("holder", sa.String(256), nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)

COMPONENT = Component("batches", _tables)

ACTIVE = ("validating", "in_progress", "finalizing", "cancelling")
"""What a job may still leave; all other states are final."""


@dataclass(frozen=True)
class StoredFile:
    """A file that was uploaded, or that is the output of a job.

    Attributes:
        id: Its name in the service.
        user_name: Whose it is.
        purpose: `batch` for an upload, `batch_output` for an output.
        name: What the user calls it.
        path: Where the bytes are; empty for an output, which is the parts of `job`.
        size_bytes: Its size.
        sha256: Of its bytes; empty for an output.
        job: Of which job it is an output.
        created_at: When.
        expires_at: When it is removed; None: when the user says so.
    """

    id: str
    user_name: str
    purpose: str
    name: str
    path: str
    size_bytes: int
    sha256: str
    job: str | None
    created_at: float
    expires_at: float | None


@dataclass(frozen=True)
class Job:
    """A batch job as it is now; the fields are the table's columns.

    Attributes:
        id: Its name in the service.
        user_name: Whose it is.
        idempotency_key: What the user gave to have it made once.
        request_hash: Tells one request from another.
        request: What was asked for, as JSON.
        model: Name of the model.
        version: Its version, as it was when the job was submitted.
        digest: Of that version.
        priority: Among the user's jobs; higher goes first.
        status: As in OpenAI's batches.
        folder: The output's folder or URI.
        plan: What was decided when it was validated, as JSON.
        problems: What is wrong with it, as JSON.
        row_total: Rows of the input.
        row_done: Rows of committed shards, bad ones included.
        row_bad: Bad rows among them.
        shard_total: Shards.
        shard_done: Committed ones.
        output_bytes: Bytes of committed files.
        compute_s: Seconds of compute that it was charged with.
        position: Jobs of the same user that go before it.
        eta_s: Seconds until it is done, as estimated a moment ago.
        output_file: File with its predictions, where they can be had as one.
        error_file: File with its bad rows, likewise.
        output_expires_at: When its output is removed; None: when the user says so, or was already.
        created_at: When it was submitted; the other times are those of states.
        expires_at: When it is given up.
    """

    id: str
    user_name: str
    idempotency_key: str | None
    request_hash: str
    request: str
    model: str
    version: int
    digest: str
    priority: int
    status: str
    folder: str
    plan: str | None
    problems: str
    row_total: int
    row_done: int
    row_bad: int
    shard_total: int
    shard_done: int
    output_bytes: int
    compute_s: float
    position: int | None
    eta_s: float | None
    output_file: str | None
    error_file: str | None
    created_at: float
    expires_at: float
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    output_expires_at: float | None = None

    @property
    def is_active(self) -> bool:
        """Whether it may still change."""
        return self.status in ACTIVE


@dataclass(frozen=True)
class StoredShard:
    """A shard as it is now.

    Attributes:
        job: Of which job.
        number: Its number.
        record: What `Shard.as_record` gave, as JSON.
        row_count: Its rows.
        status: pending, leased, reported (computed, not yet under its own name) or done.
        epoch: Of the newest attempt; 0 before the first.
        failures: Attempts that were lost or failed.
        row_bad: Bad rows, once reported.
        files: Its files, as JSON, once reported.
        compute_s: Seconds it took.
    """

    job: str
    number: int
    record: str
    row_count: int
    status: str
    epoch: int
    failures: int
    row_bad: int
    files: str | None
    compute_s: float
