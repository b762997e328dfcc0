"""Batch jobs and their files as users see them: submitted, listed, told about, cancelled, fetched.

Owns what a request may say and what an answer holds. Works from the database and the files alone,
so that any number of processes may serve it; computing is the business of `serving.batch_runner`.
A user sees and touches only the own jobs and files; for everybody else's they are not there.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from configs.errors import EnvironmentFailure, UserError, did_you_mean
from configs.stores import is_remote
from registry.errors import DatabaseFailure, RegistryError
from registry.references import parse_reference
from serving.account_types import Account
from serving.batch_files import (
    BatchFiles,
    ServiceSettings,
    blocks_of_output,
    is_own,
    not_found,
)
from serving.batch_output import MANIFEST, SUCCESS, remove_output
from serving.batch_store import BatchStore, new_id
from serving.batch_tables import Job
from serving.batch_wire import BatchRequest, read_request
from serving.errors import BatchError, LocationError, QuotaExceeded
from serving.locations import check_location, resolved_folder
from serving.shard_leases import files_of

_LOG = logging.getLogger(__name__)
_KEY_LETTERS = 256
_DEDUPE_S = 120.0
_MANIFEST_BYTES = 2**26


class ModelNames(Protocol):
    """What is asked of the registry."""

    def resolve(self, reference: str) -> Any:
        """A version by `name/3`, `name@alias` or `name`."""

    def models(self) -> Any:
        """All models."""


class Grants(Protocol):
    """What is asked of the accounts."""

    def may_use(self, account: Account, model_name: str) -> bool:
        """Whether a user may predict with a model."""

    def allowed_inputs(self, user: str) -> list[str]:
        """Where a user's files may be."""

    def charge_rows(self, user: str, rows: int) -> None:
        """Count rows against the user's quota of the day."""


class BatchService:
    """Files and jobs. Safe to share between threads.

    Args:
        store: Where they are kept.
        models: The registry.
        accounts: The accounts.
        settings: Bounds.
        clock: Seconds since 1970.

    Attributes:
        files: The files of users.
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
        self.files = BatchFiles(store, settings, clock)

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
            BatchError: The request cannot be used, its key was used for another, or there is no
                such model for this user (404).
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
        # First of all: a repeated request has its job, whatever became of model, input and quotas.
        found = None
        if key is not None:
            found = self._store.keyed_job(account.user, key, digest)
        elif dedupe:
            found = self._store.recent_job(account.user, digest, now - _DEDUPE_S)
        if found is not None:
            return found, False
        version = self._version(account, request.model)
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
        if found is None or not is_own(account, found.user_name):
            raise not_found("batch", name)
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

    def model_names(self, account: Account) -> list[str]:
        """Models that the user may predict with."""
        names = [summary.name for summary in self._models.models()]
        return [name for name in names if self._accounts.may_use(account, name)]

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
        text = b"".join(self._blocks(job, MANIFEST, _MANIFEST_BYTES))
        try:
            manifest = json.loads(text)
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict):
            raise BatchError(
                f"the manifest of {name} is not as it was written. Submit the job again.",
                "damaged_output",
                status=409,
            )
        return manifest

    def delete_output(self, account: Account, name: str) -> Job:
        """Remove the output of an ended job; the job stays, without it. Idempotent.

        Raises:
            BatchError: There is no such job, or it has not ended (409).
        """
        job = self.job(account, name)
        if job.is_active:
            raise BatchError(f"{name} is {job.status}; cancel it first.", "no_output", status=409)
        self._remove_output(job)
        return self.job(account, name)

    def sweep(self) -> None:
        """Remove uploads and outputs whose time is over; those that cannot be, another time.

        Raises:
            DatabaseFailure: The database failed.
        """
        self.files.sweep()
        for job in self._store.expired_outputs(self._clock()):
            try:
                self._remove_output(job)
            except DatabaseFailure:
                raise
            except (OSError, EnvironmentFailure, UserError) as error:
                _LOG.warning("the output of %s cannot be removed: %s", job.id, error)

    def part(self, account: Account, name: str, part: str) -> Iterator[bytes]:
        """The bytes of one file of an output, as its manifest names it.

        Raises:
            BatchError: The manifest has no such file (404).
        """
        job = self.job(account, name)
        # Not by the manifest in the folder, which may be the user's to write to.
        shards = self._store.shards(job.id, "done")
        known = {file.name for shard in shards for file in files_of(shard)}
        known |= {MANIFEST} | ({SUCCESS} if job.status == "completed" else set())
        if job.is_active or part not in known:
            raise not_found("part", part)
        return self._blocks(job, part)

    # -- inside --------------------------------------------------------------------------------

    def _blocks(self, job: Job, name: str, most_bytes: float = math.inf) -> Iterator[bytes]:
        """The bytes of a file of an output, opened at once. Raises BatchError: there is none."""
        blocks = blocks_of_output(job.folder, name)
        try:
            first = next(blocks, b"")
        except (FileNotFoundError, LocationError):
            kind = ("output", job.id) if name == MANIFEST else ("part", name)
            raise not_found(*kind) from None
        return _bounded(itertools.chain([first], blocks), most_bytes)

    def _remove_output(self, job: Job) -> None:
        remove_output(job.folder)
        self._store.forget_output(job)

    def _version(self, account: Account, reference: str) -> Any:
        """A version for a user; for one without a grant the model is not there (404)."""
        try:
            wanted = parse_reference(reference)
            if self._accounts.may_use(account, wanted.name):
                return self._models.resolve(reference)
        except RegistryError:
            pass  # what it tells of other models is not for everybody
        raise BatchError(
            f"there is no model {reference[:100]!r}; NAME, NAME@ALIAS and NAME/NUMBER of a model "
            f"that you may use are allowed.{did_you_mean(reference, self.model_names(account))}",
            "not_found",
            status=404,
            column="model",
        )

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
            files = [self.files.one(account, name) for name in uploads]
            if any(file.job is not None for file in files):
                raise BatchError("an output is no input; upload it.", "invalid_request")
            return [file.path for file in files], True
        allowed = self._accounts.allowed_inputs(account.user)
        return [check_location(name, allowed) for name in names], False

    def _folder(self, account: Account, request: BatchRequest, job: str) -> str:
        if request.output is None:
            return own_outputs(self.settings.folder) + job
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


def own_outputs(folder: str) -> str:
    """What the folders of outputs begin with that a service keeps in its own folder.

    Without links, as `serving.output_folder` has it.
    """
    own = folder.rstrip("/")
    return f"{own if is_remote(own) else os.path.realpath(own)}/outputs/"


_COUNTS = ("row_total", "row_done", "row_bad", "shard_total", "shard_done", "output_bytes")


def _bounded(blocks: Iterator[bytes], most_bytes: float) -> Iterator[bytes]:
    """Blocks up to a bound, and nothing after it."""
    for block in blocks:
        most_bytes -= len(block)
        if most_bytes < 0:
            return
        yield block


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
