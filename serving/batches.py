"""Batch jobs and their files as users see them: submitted, listed, told about, cancelled, fetched.

Owns what a request may say and what an answer holds. Works from the database and the files alone,
so that any number of processes may serve it; computing is the business of `serving.batch_runner`.
A user sees and touches only the own jobs and files; for everybody else's they are not there.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline import storage
from data_pipeline.object_stores import is_remote
from serving.account_types import Account
from serving.batch_output import MANIFEST, SUCCESS
from serving.batch_plan import FORMATS
from serving.batch_store import BatchStore, new_id
from serving.batch_tables import Job, StoredFile
from serving.errors import BatchError, QuotaExceeded
from serving.locations import check_location, resolved_folder
from serving.shard_leases import files_of

_DAY_S = 86_400
_KEY_LETTERS = 256
_BLOCK_BYTES = 2**20
_DEDUPE_S = 120.0


class BatchRequest(BaseModel):
    """What `POST /v1/batches` takes.

    Attributes:
        model: `name`, `name@alias` or `name/3`; resolved to a version now, whatever moves later.
        input: A file that was uploaded (`file-...`), or paths and URIs of Parquet, CSV or NDJSON.
        output: Folder or URI that receives the output. None: the service keeps it.
        output_format: `parquet`, or `input` for the input's own.
        keep: `keys` for the columns that the model does not take, `all`, or names.
        column: Name of the column of predictions.
        on_error: What a bad row does: `quarantine` leaves it to the error files, `null_fill` gives
            it a null in the output too, `fail_fast` fails the job.
        max_error_rate: Share of bad rows, from 0 to 1, above which the job fails.
        priority: Among the own jobs, from -100 to 100; higher goes first.
        window_s: Seconds after which the job is given up, 60 to 30 days.
        output_expires_after_s: Seconds after its end that the service keeps the output. None: until
            it is deleted.
        shard_rows: Rows of a shard. None: about two seconds' worth.
        metadata: Up to 16 texts of the user's, by names of up to 64 letters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, max_length=300)
    input: str | list[str]
    output: str | None = None
    output_format: Literal["parquet", "input"] = "parquet"
    keep: Literal["keys", "all"] | list[str] = "keys"
    column: str = Field("prediction", min_length=1, max_length=200)
    on_error: Literal["quarantine", "null_fill", "fail_fast"] = "quarantine"
    max_error_rate: float = Field(1.0, ge=0.0, le=1.0)
    priority: int = Field(0, ge=-100, le=100)
    window_s: int = Field(_DAY_S, ge=60, le=30 * _DAY_S)
    output_expires_after_s: int | None = Field(None, ge=60, le=365 * _DAY_S)
    shard_rows: int | None = Field(None, ge=1, le=2**22)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)


class ModelNames(Protocol):
    """What is asked of the registry."""

    def resolve(self, reference: str) -> Any:
        """A version by `name/3`, `name@alias` or `name`."""


class Grants(Protocol):
    """What is asked of the accounts."""

    def may_use(self, account: Account, model_name: str) -> bool:
        """Whether a user may predict with a model."""

    def allowed_inputs(self, user: str) -> list[str]:
        """Where a user's files may be."""

    def charge_rows(self, user: str, rows: int) -> None:
        """Count rows against the user's quota of the day."""


@dataclass(frozen=True)
class ServiceSettings:
    """Bounds of the service.

    Attributes:
        folder: Local folder or URI of what the service keeps; uploads are always local.
        outputs: Folders and URIs below which users may have outputs, `{user}` standing for the
            user's name; none by default.
        max_upload_bytes: Of one file.
        upload_expires_s: How long an upload is kept; the user may say less or more.
    """

    folder: str
    outputs: tuple[str, ...] = ()
    max_upload_bytes: int = 2 * 2**30
    upload_expires_s: float = 30.0 * _DAY_S


class BatchService:
    """Files and jobs. Safe to share between threads.

    Args:
        store: Where they are kept.
        models: The registry.
        accounts: The accounts.
        settings: Bounds.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        store: BatchStore,
        models: ModelNames,
        accounts: Grants,
        settings: ServiceSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._models, self._accounts = store, models, accounts
        self.settings, self._clock = settings, clock

    # -- files ---------------------------------------------------------------------------------

    def upload(
        self,
        account: Account,
        name: str,
        blocks: Iterable[bytes],
        *,
        purpose: str = "batch",
        expires_after_s: float | None = None,
    ) -> StoredFile:
        """Keep a file of a user; it is there whole, or not at all.

        Args:
            account: Whose.
            name: What the user calls it; its end tells the format.
            blocks: The bytes.
            purpose: `batch` is allowed.
            expires_after_s: When it is removed.

        Raises:
            BatchError: The name or purpose is not allowed, or it is too large (413).
            QuotaExceeded: The user has too many bytes stored.
        """
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in FORMATS or len(name) > 256 or not name.isprintable():
            raise BatchError(
                f"received a file called {name[:100]!r}; names of up to 256 letters that end with "
                f"{', '.join(FORMATS)} are allowed. Rename it.",
                "unknown_format",
                column="file",
            )
        if purpose != "batch":
            raise BatchError(
                f"received purpose {purpose[:50]!r}; batch is allowed.",
                "invalid_purpose",
                column="purpose",
            )
        most = account.quotas.bytes
        if most is not None and self._store.stored_bytes(account.user) >= most:
            raise QuotaExceeded(
                f"{most:,} bytes are stored, as many as are allowed. Delete files.", "bytes", 3600.0
            )
        name_id, now = new_id("file"), self._clock()
        folder = Path(self.settings.folder, "files")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name_id}{suffix}"
        digest, size_bytes = hashlib.sha256(), 0
        with storage.new_file(str(path)) as out:
            for block in blocks:
                size_bytes += len(block)
                if size_bytes > self.settings.max_upload_bytes:
                    raise BatchError(
                        f"more than {self.settings.max_upload_bytes:,} bytes; fewer are allowed in "
                        "an upload. Give the URI of a file in a store instead.",
                        "file_too_large",
                        status=413,
                    )
                digest.update(block)
                out.write(block)
        kept_s = self.settings.upload_expires_s if expires_after_s is None else expires_after_s
        file = StoredFile(
            id=name_id,
            user_name=account.user,
            purpose=purpose,
            name=os.path.basename(name),
            path=str(path),
            size_bytes=size_bytes,
            sha256=digest.hexdigest(),
            job=None,
            created_at=now,
            expires_at=now + kept_s,
        )
        try:
            self._store.add_file(file, most)
        except QuotaExceeded:
            path.unlink(missing_ok=True)
            raise
        return file

    def file(self, account: Account, name: str) -> StoredFile:
        """A file of the user's own. Raises BatchError (404) where there is none."""
        found = self._store.file(name) if name.startswith("file-") else None
        if found is None or not _is_own(account, found.user_name):
            raise _not_found("file", name)
        return found

    def files(
        self,
        account: Account,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> tuple[list[StoredFile], bool]:
        """Own files, newest first, and whether there are more."""
        if after is not None:
            self.file(account, after)
        found = self._store.files(account.user, purpose, after, limit + 1)
        return found[:limit], len(found) > limit

    def content(self, account: Account, name: str) -> Iterator[bytes]:
        """The bytes of a file; of an output, its parts one after the other."""
        file = self.file(account, name)
        if file.job is None:
            return _blocks(file.path)
        job = self.job(account, file.job)
        is_errors = name == job.error_file
        parts = [
            f"{job.folder}/{part.name}"
            for shard in self._store.shards(job.id, "done")
            for part in files_of(shard)
            if part.is_errors == is_errors
        ]
        return (block for part in parts for block in _blocks(part))

    def delete_file(self, account: Account, name: str) -> None:
        """Remove a file of the user's own. Jobs that still read it fail."""
        file = self.file(account, name)
        self._store.remove_file(file.id)
        if file.path:
            Path(file.path).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove files whose time is over."""
        for file in self._store.expired_files(self._clock()):
            self._store.remove_file(file.id)
            if file.path:
                Path(file.path).unlink(missing_ok=True)

    # -- jobs ----------------------------------------------------------------------------------

    def submit(
        self, account: Account, values: dict[str, Any], key: str | None = None
    ) -> tuple[Job, bool]:
        """Take a job in.

        Args:
            account: Whose.
            values: What `BatchRequest` takes.
            key: The request's idempotency key: the same key and request give the same job.

        Returns:
            The job, and whether it is new.

        Raises:
            BatchError: The request cannot be used, or its key was used for another.
            RegistryError: There is no such model.
            LocationError: An input or the output is not where the user's files may be.
            QuotaExceeded: The user has too much waiting, predicted or stored.
        """
        request = read_request(values)
        return self.take(account, request, {"format": None}, key)

    def take(
        self,
        account: Account,
        request: BatchRequest,
        more: dict[str, Any],
        key: str | None,
        dedupe: bool = False,
    ) -> tuple[Job, bool]:
        """As `submit`; `more` is added to what is planned, `dedupe` finds a repeated request."""
        if key is not None and not (0 < len(key) <= _KEY_LETTERS and key.isprintable()):
            raise BatchError(
                f"Idempotency-Key has {len(key)} letters; 1 to {_KEY_LETTERS} printed ones are "
                "allowed.",
                "invalid_idempotency_key",
                status=400,
            )
        digest = _hash({**request.model_dump(mode="json"), **more})
        now = self._clock()
        if dedupe and key is None:
            found = self._store.recent_job(account.user, digest, now - _DEDUPE_S)
            if found is not None:
                return found, False
        version = self._models.resolve(request.model)
        if not self._accounts.may_use(account, version.name):
            raise _not_found("model", version.name)
        inputs, is_upload = self._inputs(account, request)
        self._check_quotas(account)
        name = new_id("batch")
        plan = {
            "inputs": inputs,
            "keep": request.keep,
            "column": request.column,
            "output_format": None if request.output_format == "input" else request.output_format,
            "shard_rows": request.shard_rows,
            **more,
        }
        kept = request.model_dump(mode="json") | {"plan": plan, "is_upload": is_upload}
        job = Job(
            id=name,
            user_name=account.user,
            idempotency_key=key,
            request_hash=digest,
            request=json.dumps(kept),
            model=version.name,
            version=version.number,
            digest=version.digest,
            priority=request.priority,
            status="validating",
            folder=self._folder(account, request, name),
            plan=None,
            problems="[]",
            **dict.fromkeys(_COUNTS, 0),
            compute_s=0.0,
            position=None,
            eta_s=None,
            output_file=None,
            error_file=None,
            created_at=now,
            expires_at=now + request.window_s,
        )
        return self._store.add_job(job, account.quotas.queued_jobs)

    def job(self, account: Account, name: str) -> Job:
        """A job of the user's own. Raises BatchError (404) where there is none."""
        found = self._store.job(name) if name.startswith("batch_") else None
        if found is None or not _is_own(account, found.user_name):
            raise _not_found("batch", name)
        return found

    def jobs(
        self, account: Account, after: str | None = None, limit: int = 20, everybody: bool = False
    ) -> tuple[list[Job], bool]:
        """Own jobs, newest first, and whether there are more; an admin may ask for everybody's."""
        if after is not None:
            self.job(account, after)
        user = None if everybody and account.role == "admin" else account.user
        found = self._store.jobs(user, after, limit + 1)
        return found[:limit], len(found) > limit

    def cancel(self, account: Account, name: str) -> Job:
        """Have a job of the user's own cancelled; what was committed stays. Idempotent."""
        job = self.job(account, name)
        return self._store.ask_to_cancel(job.id, self._clock()) or job

    def output(self, account: Account, name: str) -> dict[str, Any]:
        """The manifest of an ended job; None for its entries where there is none (yet).

        Raises:
            BatchError: There is no such job, or it has no output yet (409).
        """
        job = self.job(account, name)
        if job.is_active or job.plan is None:
            raise BatchError(
                f"{name} is {job.status}; an output is there when it has ended. Ask again later.",
                "no_output",
                status=409,
            )
        manifest: dict[str, Any] = json.loads(storage.read_whole(f"{job.folder}/{MANIFEST}"))
        return manifest

    def part(self, account: Account, name: str, part: str) -> Iterator[bytes]:
        """The bytes of one file of an output, as its manifest names it.

        Raises:
            BatchError: The manifest has no such file (404).
        """
        manifest = self.output(account, name)
        known = {entry["name"] for entry in [*manifest["parts"], *manifest["errors"]]}
        known |= {MANIFEST} | ({SUCCESS} if manifest["is_complete"] else set())
        if part not in known:
            raise _not_found("part", part)
        return _blocks(f"{self.job(account, name).folder}/{part}")

    # -- inside --------------------------------------------------------------------------------

    def _inputs(self, account: Account, request: BatchRequest) -> tuple[list[str], bool]:
        names = [request.input] if isinstance(request.input, str) else list(request.input)
        if not 0 < len(names) <= 1000:
            raise BatchError(
                f"input names {len(names)} files; 1 to 1000 are allowed, more by a glob or folder.",
                "invalid_request",
                column="input",
            )
        uploads = [name for name in names if name.startswith("file-")]
        if uploads and len(uploads) < len(names):
            raise BatchError(
                "input names uploads and other files; one kind is allowed in a job.",
                "invalid_request",
                column="input",
            )
        if uploads:
            files = [self.file(account, name) for name in uploads]
            if any(file.job is not None for file in files):
                raise BatchError("an output is no input; upload it.", "invalid_request")
            return [file.path for file in files], True
        allowed = self._accounts.allowed_inputs(account.user)
        return [check_location(name, allowed) for name in names], False

    def _folder(self, account: Account, request: BatchRequest, job: str) -> str:
        if request.output is None:
            return f"{self.settings.folder.rstrip('/')}/outputs/{job}"
        allowed = [place.replace("{user}", account.user) for place in self.settings.outputs]
        # A folder of its own: two jobs never write to the same place.
        return f"{resolved_folder(request.output, allowed).rstrip('/')}/{job}"

    def _check_quotas(self, account: Account) -> None:
        self._accounts.charge_rows(account.user, 0)
        most = account.quotas.bytes
        if most is not None and self._store.stored_bytes(account.user) > most:
            raise QuotaExceeded(
                f"more than {most:,} bytes are stored. Delete files and outputs.", "bytes", 3600.0
            )


_COUNTS = ("row_total", "row_done", "row_bad", "shard_total", "shard_done", "output_bytes")


def read_request(values: dict[str, Any]) -> BatchRequest:
    """A checked request.

    Raises:
        BatchError: It has unknown fields, or values that are not allowed; the first one is named.
    """
    try:
        request = BatchRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "request"
        raise BatchError(
            f"{field}: {first['msg']}. Correct the field.", "invalid_request", column=field
        ) from None
    for name, value in request.metadata.items():
        if len(name) > 64 or len(value) > 512:
            raise BatchError(
                "metadata has names of more than 64 or values of more than 512 letters.",
                "invalid_request",
                column="metadata",
            )
    return request


def describe_job(job: Job) -> dict[str, Any]:
    """A job as `/v1/batches` tells it: a superset of OpenAI's batch object."""
    request = json.loads(job.request)
    plan = json.loads(job.plan or "{}")
    problems = json.loads(job.problems)
    good = job.row_done - job.row_bad
    input_names = request["input"]
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": request["plan"].get("url") or "/v1/batches",
        "model": {"name": job.model, "version": job.version, "digest": job.digest},
        "input": input_names,
        "input_file_id": input_names if isinstance(input_names, str) else input_names[0],
        "completion_window": request.get("completion_window") or f"{request['window_s']}s",
        "status": job.status,
        "errors": {"object": "list", "data": problems} if problems else None,
        "output": job.folder if is_remote(job.folder) or request["output"] else None,
        "output_file_id": job.output_file,
        "error_file_id": job.error_file,
        "created_at": int(job.created_at),
        "expires_at": int(job.expires_at),
        **{f"{state}_at": _whole(getattr(job, f"{state}_at")) for state in _STATES},
        "request_counts": {"total": job.row_total, "completed": good, "failed": job.row_bad},
        "progress": job.row_done / job.row_total if job.row_total else 0.0,
        "has_good_rows": good > 0,
        "position": job.position,
        "eta_s": job.eta_s,
        "shards": {"total": job.shard_total, "done": job.shard_done},
        "output_bytes": job.output_bytes,
        "compute_s": round(job.compute_s, 3),
        "output_format": plan.get("output_format"),
        "priority": job.priority,
        "metadata": request["metadata"] or None,
    }


_STATES = (
    *("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"),
)


def describe_file(file: StoredFile) -> dict[str, Any]:
    """A file as OpenAI's API tells it, and its hash."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at),
        "expires_at": _whole(file.expires_at),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "sha256": file.sha256 or None,
    }


def _whole(at: float | None) -> int | None:
    return None if at is None else int(at)


def _is_own(account: Account, user: str) -> bool:
    return account.role == "admin" or account.user == user


def _not_found(kind: str, name: str) -> BatchError:
    return BatchError(f"there is no {kind} {name[:100]!r}.", "not_found", status=404)


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _blocks(path: str) -> Iterator[bytes]:
    with storage.open_file(path) as file:
        while block := file.read(_BLOCK_BYTES):
            yield bytes(block)
