"""A submitted run on the cluster: `python -m lockstep.remote`, in the folder that was sent.

It is `lockstep train` with what a submission adds: the run's id, the cluster that it is on, its
secrets, and going on from a checkpoint where the run had been started before. A run that is done is
not run again. SIGTERM asks for a clean stop, as everywhere.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cluster.look import versions
from cluster.secret_keeping import FORWARDED, drop_secrets, secrets_of
from configs.errors import UserError
from lockstep import cli
from lockstep.submit import JOB_FILE, MANIFEST, SUBMISSION, VERSIONS

_VERDICTS = (2, 3)  # the user's mistake, retries exhausted: the same again ends in the same way
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def main() -> None:
    """Train; ends with the exit status of `lockstep train`."""
    manifest = json.loads(Path(MANIFEST).read_text())
    folder = Path(manifest["run_folder"])
    if is_done(folder):
        print(f"{manifest['run_id']} is done: {folder}")
        return
    # The queue counts attempts itself.
    told = None if os.environ.get("LOCKSTEP_QUEUED") else Verdict(folder, manifest)
    if told is not None and (status := told.status()):
        print(
            f"{manifest['run_id']} ended with status {status} in an earlier attempt, whose log "
            "says why; trying again would not mend it. Submit it anew to have it go on.",
            file=sys.stderr,
        )
        sys.exit(status)
    try:
        check_versions(manifest.get(VERSIONS) or {}, versions())
        _train(manifest, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _end(told, error.exit_status)
    except SystemExit as error:
        _end(told, error.code)


def _end(told: "Verdict | None", status: Any) -> NoReturn:
    if told is not None and status in _VERDICTS:
        told.keep(status)
    sys.exit(status)


def _train(manifest: dict[str, Any], folder: Path) -> None:
    run_id, names = manifest["run_id"], manifest["secrets"]
    os.environ.update(settle(Path.cwd(), folder / "code", dict(os.environ)))
    os.chdir(folder / "code")
    if names:
        os.environ.update(secrets_of(run_id))
    os.environ[FORWARDED] = ",".join([*names, "PYTHONPATH"])
    sys.argv = ["lockstep", *arguments(run_id, folder)]
    try:
        cli.main()
    finally:
        if names and not os.environ.get("LOCKSTEP_QUEUED"):
            drop_secrets(run_id)


class Verdict:
    """The end of a submission that no further attempt can mend, kept in the run's folder.

    Kubernetes makes a new cluster for each attempt, whatever the one before died of. A new
    submission is judged anew.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._path = folder / "verdict.json"
        self._submission = manifest.get(SUBMISSION, "")

    def status(self) -> int:
        """The exit status that was kept for this submission; 0 where there is none."""
        try:
            kept = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return 0
        return int(kept["status"]) if kept.get(SUBMISSION) == self._submission else 0

    def keep(self, status: int) -> None:
        """Keep it, if the folder can be written to."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps({SUBMISSION: self._submission, "status": status}))
            new.replace(self._path)


def check_versions(wanted: Mapping[str, str | None], here: Mapping[str, str | None]) -> None:
    """Compare the submitter's versions with those here; none are wanted with --any-version.

    Raises:
        UserError: They differ.
    """
    differing = [
        f"{name} {version or 'none'} where it was submitted, {here.get(name) or 'none'} here"
        for name, version in wanted.items()
        if here.get(name) != version
    ]
    if differing:
        raise UserError(
            f"versions differ: {'; '.join(differing)}; the same ones are needed for the same "
            "numbers. Use an image with the submitter's, or submit with --any-version."
        )


def settle(sent: Path, code: Path, environment: dict[str, str]) -> dict[str, str]:
    """Keep what was sent with the run, where all its workers see it; returns what this changes.

    Ray's own copy is not one to rely on: where several nodes share a machine, each removes it and
    unpacks it anew, under the feet of who is in it.

    Args:
        sent: Ray's copy.
        code: Receives the files; those of an earlier attempt are replaced one by one.
        environment: As Ray has set it up for this process.

    Returns:
        Variables: PYTHONPATH with the new folder for the old, and Ray's job without the old.
    """
    for path in _files(sent):
        target = code / path.relative_to(sent)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f".{target.name}.new")
        shutil.copyfile(path, new)
        new.replace(target)
    old = environment.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(code), *(path for path in old if path and Path(path) != sent)]
    changes = {"PYTHONPATH": os.pathsep.join(paths)}
    if _RAY_JOB in environment:
        ray_job = {**json.loads(environment[_RAY_JOB]), "runtime_env": {}}
        changes[_RAY_JOB] = json.dumps(ray_job)
    return changes


def _files(sent: Path) -> Iterator[Path]:
    """All that was sent. Volumes of Kubernetes link to it through `..data`, folders too."""
    for place, folders, names in os.walk(sent, followlinks=True):
        folders[:] = [one for one in folders if one != "__pycache__" and not one.startswith("..")]
        yield from (Path(place, name) for name in names if not name.startswith(".."))


def arguments(run_id: str, folder: Path) -> list[str]:
    """Of `lockstep train`, for a run that writes to `folder`."""
    words = ["train", JOB_FILE, "--run-id", run_id, "--address", "auto"]
    return [*words, "--resume"] if (folder / "job.yaml").exists() else words


def is_done(folder: Path) -> bool:
    """Whether the run in a folder has ended, with its model registered where it asks for that."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        job = yaml.safe_load((folder / "job.yaml").read_text()) or {}
    except (OSError, ValueError):
        return False
    is_registered = "version" in summary or not (job.get("export") or {}).get("register")
    return bool(summary.get("status") == "done") and is_registered


if __name__ == "__main__":
    main()
