"""From a finished run to a registered version, and from a registered version to a new run.

Owns what a version's lineage says beside what its artifact knows (the run, the job, every data
file, the metrics): the code that the command was called in, and the version that training began
from.
"""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import EnvironmentFailure, UserError
from configs.schema import Job
from lockstep.models import keras_file, open_registry, registered
from registry.artifacts import read_manifest
from registry.store import Version

_GIT_S = 20.0


@dataclass(frozen=True)
class Origin:
    """Where a run begins.

    Attributes:
        job: The job, with the path of a Keras file where it named a registered version.
        parent: That version, or None.
    """

    job: Job
    parent: Version | None = None


def origin_of(job: Job) -> Origin:
    """Resolve `model.file`, which may name a registered version.

    Raises:
        RegistryError: There is no such version; ArtifactFailure: it is damaged.
    """
    if job.model.file is None:
        return Origin(job)
    version = registered(job.model.file)
    if version is None:
        return Origin(job)
    file = keras_file(open_registry().fetch(version), version)
    model = job.model.model_copy(update={"file": str(file)})
    return Origin(job.model_copy(update={"model": model}), version)


class Registration:
    """What `export.register` asks for, from before a run starts until its artifact is registered.

    Args:
        origin: Of the run.

    Raises:
        EnvironmentFailure: The registry cannot be reached.
    """

    def __init__(self, origin: Origin) -> None:
        self._name = origin.job.export.register or origin.job.name
        self._parent = origin.parent
        self._registry = open_registry()
        self._registry.prepare()
        self._facts: dict[str, Any] = {
            "code": code_state(Path.cwd()),
            "parent": None if origin.parent is None else str(origin.parent),
        }

    def register(self, summary: Mapping[str, Any]) -> Version:
        """Register the artifact of a run that is done; of one run and weights, once.

        Args:
            summary: `summary.json` of the run.

        Raises:
            UserError, EnvironmentFailure: It was not registered; the message says how to.
        """
        key = run_key(summary)
        try:
            earlier = self._registry.keyed(self._name, key)
            return earlier or self._registered(summary["artifact"], key)
        except (UserError, EnvironmentFailure) as error:
            raise type(error)(
                f"the run is done, and its artifact {summary['artifact']} is whole, but it was not "
                f"registered: {error} Then: lockstep models register {summary['artifact']} "
                f"--name {self._name} --key {key}"
            ) from error

    def _registered(self, artifact: str, key: str) -> Version:
        parent = self._parent
        return self._registry.register(
            self._name,
            artifact,
            lineage={**read_manifest(Path(artifact)).lineage, **self._facts},
            parent=parent.number if parent is not None and parent.name == self._name else None,
            key=key,
        )


def run_key(summary: Mapping[str, Any]) -> str:
    """Names the registering of a run's weights; one that is resumed for more epochs has others."""
    return f"run/{summary['run_id']}/{summary['weights_sha256'][0][:16]}"


def code_state(folder: Path) -> dict[str, Any] | None:
    """The commit of the git tree that a folder belongs to, and whether files differ from it.

    Returns:
        `commit` and `is_dirty`; None where there is no such tree, or no git.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=normal", "--", ".")
    return {"commit": commit, "is_dirty": changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
