"""The run folder: `<runs_dir>/<job name>/<run_id>/`, one run, one job.

Owns its creation, and the question whether a job may go on in one that exists.
"""

import json
import os
import platform
import re
import secrets
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from configs.load import differing_fields, dump_job, job_digest, load_job
from configs.schema import Job
from data_pipeline.storage import absolute
from trainer.checkpoint_store import CheckpointStore, Origin
from trainer.errors import RunFolderError
from trainer.files import write_json, write_text
from trainer.payloads import PlannedData

_PACKAGES = ("lockstep", "tensorflow", "keras", "ray", "numpy", "pyarrow", "h5py")


@dataclass(frozen=True)
class RunFolder:
    """An opened run folder.

    Attributes:
        path: Absolute.
        run_id: Its name.
        checkpoints: Folder or URI of its checkpoints.
        is_resumed: Whether there are checkpoints of an earlier invocation, to go on from.
    """

    path: Path
    run_id: str
    checkpoints: str
    is_resumed: bool


def open_run_folder(job: Job, data: PlannedData, run_id: str | None, is_resume: bool) -> RunFolder:
    """Find or create the folder of a run.

    A new run gets a new id unless one is given. With `is_resume` the given run, or the newest of
    this job's name that has a checkpoint, is gone on with; a given one that ended before its first
    checkpoint begins anew.

    Raises:
        RunFolderError: The folder holds another job, or nothing to go on from.
    """
    if run_id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_id):
        raise RunFolderError(
            f"--run-id received {run_id!r}; letters, digits, '.', '_' and '-' are allowed, and a "
            "letter or digit first. Choose another name."
        )
    root = Path(job.runs_dir).absolute() / job.name
    if is_resume and run_id is None:
        run_id = _newest_run(job, root)
        if run_id is None:
            raise RunFolderError(
                f"--resume found no run with a checkpoint in {root}. Start one without --resume."
            )
    path = root / (run_id or _new_run_id())
    if is_resume and not path.exists() and not _has_checkpoint(job, path):
        raise RunFolderError(
            f"{path} does not exist; --resume goes on with a run that was started. Start it "
            "without --resume, or name another run with --run-id."
        )
    if path.exists():
        _check_same_job(path, job, is_resume)
        _check_same_rows(path, data)
    checkpoints = checkpoints_of(job, path)
    is_resumed = is_resume and _has_checkpoint(job, path)
    (path / "logs").mkdir(parents=True, exist_ok=True)
    write_text(path / "job.yaml", dump_job(job))
    write_json(path / "environment.json", environment())
    write_json(path / "data.json", {"digest": data.digest, "rows": data.plan.rows})
    return RunFolder(path, path.name, checkpoints, is_resumed)


def checkpoints_of(job: Job, path: Path) -> str:
    """Folder or URI that holds the checkpoints of a run."""
    uri = job.checkpoint.uri
    if uri is None:
        return str(path / "checkpoints")
    return absolute(f"{uri.rstrip('/')}/{job.name}/{path.name}")


def environment() -> dict[str, str | int | None]:
    """Versions and machine, for the record."""
    versions: dict[str, str | int | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        **versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def _check_same_job(path: Path, job: Job, is_resume: bool) -> None:
    saved = path / "job.yaml"
    if not saved.exists():
        return
    differing = differing_fields(load_job(saved), job)
    if differing:
        raise RunFolderError(
            f"{path} already holds another job; it differs in {', '.join(differing)}. Use another "
            "--run-id, or the job it was started with (epochs and cluster may change on --resume)."
        )
    if not is_resume:
        raise RunFolderError(
            f"{path} already holds a run of this job. Add --resume to go on with it, or use "
            "another --run-id."
        )


def _check_same_rows(path: Path, data: PlannedData) -> None:
    saved = path / "data.json"
    if not saved.exists():
        return
    earlier = json.loads(saved.read_text())
    if earlier["digest"] != data.digest:
        raise RunFolderError(
            f"{path} was started on other training rows: {earlier['rows']:,} then, "
            f"{data.plan.rows:,} now, or files of other sizes. Start a new run, or put the files "
            "back; a run goes on with the rows it began with."
        )


def _has_checkpoint(job: Job, path: Path) -> bool:
    return CheckpointStore(checkpoints_of(job, path), Origin(path.name, job_digest(job))).has_any()


def _newest_run(job: Job, root: Path) -> str | None:
    runs = [path for path in root.glob("*") if path.is_dir() and _has_checkpoint(job, path)]
    return max(runs, key=lambda path: path.stat().st_mtime).name if runs else None


def _new_run_id() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
