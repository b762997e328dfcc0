"""A submitted run on the cluster: `python -m lockstep.remote`, in the folder that was sent.

It is `lockstep train` with what a submission adds: the run's id, the cluster that it is on, its
secrets, and going on from a checkpoint where the run had been started before. A run that is done is
not run again. SIGTERM asks for a clean stop, as everywhere.
"""

import json
import os
import sys
from pathlib import Path

from cluster.secret_keeping import FORWARDED, drop_secrets, secrets_of
from lockstep import cli
from lockstep.submit import JOB_FILE, MANIFEST


def main() -> None:
    """Train; ends with the exit status of `lockstep train`."""
    manifest = json.loads(Path(MANIFEST).read_text())
    run_id, folder, names = manifest["run_id"], Path(manifest["run_folder"]), manifest["secrets"]
    if is_done(folder):
        print(f"{run_id} is done: {folder}")
        return
    if names:
        os.environ.update(secrets_of(run_id))
        os.environ[FORWARDED] = ",".join(names)
    sys.argv = ["lockstep", *arguments(run_id, folder)]
    try:
        cli.main()
    finally:
        if names and not os.environ.get("LOCKSTEP_QUEUED"):
            drop_secrets(run_id)


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
