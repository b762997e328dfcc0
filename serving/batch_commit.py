"""What makes the output of a job: the sole committer of parts, and the end of jobs.

Works for the owner of the dispatching, in its thread. Every step may be the last before a crash,
and every step may be done again: reports are recorded before files are renamed, files renamed
before shards count, the manifest written before `_SUCCESS`, and that before the job is completed.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from configs.errors import EnvironmentFailure, UserError
from registry.errors import DatabaseFailure
from serving import output_folder
from serving.batch_output import (
    PartFile,
    commit_file,
    file_digest,
    prepare_folder,
    sweep_attempts,
    write_manifest,
)
from serving.batch_store import BatchStore
from serving.batch_tables import ACTIVE, Job, StoredFile, StoredShard
from serving.errors import OwnershipLost
from serving.shard_leases import ShardLeases, files_of

_PACKAGES = ("lockstep", "tensorflow", "tensorflow-cpu", "keras", "pyarrow", "numpy")
_CONCATENATED = ("csv", "ndjson", "openai")
STORAGE_ERRORS = (OSError, EnvironmentFailure, UserError)
FATAL = (OwnershipLost, DatabaseFailure)
"""What ends an ownership; all else is the matter of one job. Caught before STORAGE_ERRORS."""


class Committer:
    """Commits shards and ends jobs.

    Args:
        store: Files and jobs.
        owner: Epoch of the owner.
        keep: Is called between long steps; renews the ownership, or raises OwnershipLost.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        store: BatchStore,
        owner: int,
        keep: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.leases = ShardLeases(store, owner)
        self._store, self._owner = store, owner
        self._keep, self._clock = keep, clock

    def commit(
        self, job: Job, shard: StoredShard, files: Sequence[PartFile], bad: int, compute_s: float
    ) -> bool:
        """Make an attempt's files the shard's; False where the attempt is superseded.

        Raises:
            OwnershipLost: There is a newer owner.
            OSError, EnvironmentFailure, UserError: Storage fails; the shard is reported still.
        """
        if not self.leases.report(shard, files, bad, compute_s):
            return False
        self._keep()
        for file in files:
            commit_file(job.folder, file, shard.epoch)
        self.leases.done(shard, self._clock())
        return True

    def reconcile(self, job: Job) -> None:
        """Bring shards and files together again after an owner has died.

        Leased shards wait anew: what their attempts write under older epochs never counts. Of
        reported ones the files are looked for, under their own names or the attempt's, and hashed.
        Done ones whose files are gone wait anew too.

        Raises:
            OwnershipLost: There is a newer owner.
        """
        self.leases.unlease(job.id, self._clock())
        prepare_folder(job.folder)
        sizes = {
            f"{name}/{entry.name}": entry.size_bytes
            for name in ("parts", "errors")
            for entry in output_folder.list_folder(job.folder, name)
        }
        for shard in self._store.shards(job.id, "reported", "done"):
            self._keep()
            files = files_of(shard)
            if shard.status == "reported":
                if all(self._recovered(job, file, shard.epoch) for file in files):
                    self.leases.done(shard, self._clock())
                else:
                    now = self._clock()
                    self.leases.give_back(shard, now, "superseded", is_failure=False)
            elif any(sizes.get(file.name) != file.size_bytes for file in files):
                self.leases.reopen(shard)

    def finish(self, job: Job, status: str, problems: Sequence[dict[str, Any]]) -> None:
        """End a job: its manifest, `_SUCCESS` where it is complete, and its last state.

        Raises:
            OwnershipLost: There is a newer owner.
            OSError, EnvironmentFailure, UserError: Storage fails; the job is not ended yet.
        """
        now = self._clock()
        is_complete = status == "completed"
        sources: Sequence[str] = ACTIVE
        if is_complete:
            if not self._store.move(
                self._owner, job.id, ("in_progress", "finalizing"), "finalizing", finalizing_at=now
            ):
                return
            sources = ("finalizing",)
        values: dict[str, Any] = {f"{status}_at": now, "problems": json.dumps(list(problems))}
        values |= {"position": None, "eta_s": None}
        kept_s = json.loads(job.request).get("output_expires_after_s")
        values["output_expires_at"] = None if kept_s is None else now + kept_s
        if job.plan is not None:
            shards = self._store.shards(job.id, "done")
            sweep_attempts(job.folder)
            self._keep()
            manifest = _manifest(job, shards, status, now)
            write_manifest(job.folder, manifest, is_complete=is_complete)
            values |= self._output_files(job, shards, now)
        self._keep()
        self._store.move(self._owner, job.id, sources, status, **values)

    def fail(self, job: Job, problems: Sequence[dict[str, Any]]) -> None:
        """End a job whose output cannot even be closed. Raises OwnershipLost."""
        values = {"failed_at": self._clock(), "problems": json.dumps(list(problems))}
        self._store.move(self._owner, job.id, ACTIVE, "failed", eta_s=None, **values)

    def _recovered(self, job: Job, file: PartFile, epoch: int) -> bool:
        """Whether a reported file has its own name, or could be given it."""
        wanted = (file.size_bytes, file.sha256)
        if file_digest(job.folder, file.name) == wanted:
            return True
        if file_digest(job.folder, file.attempt(epoch)) != wanted:
            return False
        commit_file(job.folder, file, epoch)
        return True

    def _output_files(
        self, job: Job, shards: Sequence[StoredShard], now: float
    ) -> dict[str, str | None]:
        """Files of all predictions and of all errors, where parts can follow each other as one."""
        plan = json.loads(job.plan or "{}")
        names: dict[str, str | None] = {}
        for field, is_errors in (("output_file", False), ("error_file", True)):
            parts = [f for s in shards for f in files_of(s) if f.is_errors == is_errors]
            is_text = plan["output_format"] in _CONCATENATED
            if not is_text or not any(part.rows for part in parts):
                continue
            digest = hashlib.sha256(f"{job.id}/{field}".encode()).hexdigest()
            name = f"file-{digest[:24]}"
            names[field] = name
            if self._store.file(name) is None:
                suffix = "jsonl" if plan["output_format"] != "csv" or is_errors else "csv"
                self._store.add_file(
                    StoredFile(
                        id=name,
                        user_name=job.user_name,
                        purpose="batch_output",
                        name=f"{job.id}_{field.removesuffix('_file')}.{suffix}",
                        path="",
                        size_bytes=sum(part.size_bytes for part in parts),
                        sha256="",
                        job=job.id,
                        created_at=now,
                        expires_at=None,  # with the output that it is made of
                    )
                )
        return names


def _manifest(job: Job, shards: Sequence[StoredShard], status: str, now: float) -> dict[str, Any]:
    plan = json.loads(job.plan or "{}")
    source = plan["source"]
    files = [file for shard in shards for file in files_of(shard)]
    rows, bad = sum(s.row_count for s in shards), sum(s.row_bad for s in shards)
    inputs = [
        {**file, "digest": digest}
        for file, digest in zip(source["files"], plan["digests"], strict=True)
    ]
    return {
        "format": "lockstep-batch-1",
        "job": job.id,
        "status": status,
        "is_complete": status == "completed",
        "has_good_rows": rows > bad,
        "model": {"name": job.model, "version": job.version, "digest": job.digest},
        "inputs": inputs,
        "input_format": source["format"],
        "output_format": plan["output_format"],
        "columns": {"kept": list(source["kept"]), "prediction": plan["column"]},
        "prediction_shape": plan["output_shape"],
        "rows": {"total": job.row_total, "done": rows, "bad": bad},
        "parts": [_entry(file) for file in files if not file.is_errors],
        "errors": [_entry(file) for file in files if file.is_errors],
        "versions": _versions(),
        "created_at": job.created_at,
        "finished_at": now,
    }


def _entry(file: PartFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "rows": file.rows,
        "size_bytes": file.size_bytes,
        "sha256": file.sha256,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
