"""A submitted run on the cluster: `python -m lockstep.remote`, in the folder that was sent.

It is `lockstep train` with what a submission adds: the run's id, the cluster that it is on, its
secrets, and going on from a checkpoint where the run had been started before. A run that is done is
not run again. SIGTERM asks for a clean stop, as everywhere.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from cluster.secret_keeping import FORWARDED, drop_secrets, secrets_of
from lockstep import cli
from lockstep.submit import JOB_FILE, MANIFEST

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def main() -> None:
    """Train; ends with the exit status of `lockstep train`."""
    manifest = json.loads(Path(MANIFEST).read_text())
    run_id, folder, names = manifest["run_id"], Path(manifest["run_folder"]), manifest["secrets"]
    if is_done(folder):
        print(f"{run_id} is done: {folder}")
        return
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
    for path in sorted(sent.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
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


def arguments(run_id: str, folder: Path) -> list[str]:
    """Of `lockstep train`, for a run that writes to `folder`."""
    words = ["train", JOB_FILE, "--run-id", run_id, "--address", "auto"]
    return [*words, "--resume"] if (folder / "job.yaml").exists() else words


def is_done(folder: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(summary.get("status") == "done")


if __name__ == "__main__":
    main()
