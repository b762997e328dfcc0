"""Registered models as the front door deals with them: by reference, by path, as plain records.

Owns the answer to what MODEL means where a path and a reference are both allowed.
"""

import getpass
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.errors import UserError, did_you_mean
from registry.database import Database
from registry.errors import RegistryError
from registry.references import is_reference, parse_reference
from registry.store import AliasMove, ModelSummary, Registry, Version

_FILES = (".keras", ".h5", ".hdf5", ".pb")
_KERAS_FILES = ("model.keras", "trained_model.h5")


def open_registry() -> Registry:
    """The registry that the environment names; nothing is connected yet.

    LOCKSTEP_DATABASE and LOCKSTEP_ARTIFACTS say where; without them, both are in LOCKSTEP_HOME.
    """
    return Registry(Database())


def who() -> str:
    """Who acts, for the history: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def recorded(registry: Registry, reference: str) -> Version:
    """The version that a reference names, also one that was deleted, whose record is left."""
    wanted = parse_reference(reference)
    if wanted.number is None:
        return registry.resolve(reference)
    return registry.version(wanted.name, wanted.number)


def names_version(text: str) -> bool:
    """Whether a text is to be looked up in a registry: a reference, where no such path exists."""
    return _has_form(text) and not Path(text).exists()


def _has_form(text: str) -> bool:
    return is_reference(text) and not text.lower().endswith(_FILES)


def registered(text: str) -> Version | None:
    """The version that a text names; None where it is the path of a model.

    A path that exists is a path. What exists as a path and has a number or an alias in it is
    ambiguous, and refused.

    Raises:
        RegistryError: It has the form of a reference, and there is no such version.
    """
    path = Path(text)
    if not _has_form(text):
        return None
    if not path.exists():
        try:
            return open_registry().resolve(text)
        except RegistryError as error:
            near = did_you_mean(path.name, [other.name for other in path.parent.glob("*")])
            raise RegistryError(f"there is no path {text}.{near} As a reference: {error}") from None
    if "/" in text or "@" in text:
        raise UserError(
            f"received {text!r}, which is a path here and has the form of a registered version; "
            f"one meaning is needed. Write ./{text} for the path, or call the command in another "
            "folder for the version."
        )
    return None


def find_model(text: str) -> Path:
    """The local path of a model that is given as a path or as a reference.

    Raises:
        RegistryError: There is no such version.
        ArtifactFailure: Its artifact is damaged or cannot be read.
    """
    version = registered(text)
    return Path(text) if version is None else open_registry().fetch(version)


def keras_file(folder: Path, version: Version) -> Path:
    """The Keras file of a version's artifact, to go on training from.

    Raises:
        UserError: The artifact has none.
    """
    for name in _KERAS_FILES:
        if (folder / name).exists():
            return folder / name
    raise UserError(
        f"{version} holds no {' and no '.join(_KERAS_FILES)}; training goes on from one of them. "
        "Name another version."
    )


def version_record(version: Version) -> dict[str, Any]:
    """A version as JSON gives it."""
    record = asdict(version)
    first = {
        "name": record.pop("name"),
        "version": record.pop("number"),
        "aliases": list(record.pop("aliases")),
        "digest": record.pop("digest"),
        "artifact": record.pop("artifact"),
    }
    return {**first, **record}


def move_record(move: AliasMove) -> dict[str, Any]:
    """A move of an alias as JSON gives it."""
    return asdict(move)


def list_models(registry: Registry) -> list[dict[str, Any]]:
    """All models, with digest and artifact of the newest version of each."""
    return [_model_record(registry, summary) for summary in registry.models()]


def _model_record(registry: Registry, summary: ModelSummary) -> dict[str, Any]:
    newest = registry.version(summary.name, summary.newest) if summary.newest else None
    return {
        "name": summary.name,
        "version": summary.newest or None,
        "aliases": summary.aliases,
        "digest": newest and newest.digest,
        "artifact": newest and newest.artifact,
        "versions": summary.versions,
    }


def show_model(registry: Registry, name: str) -> dict[str, Any]:
    """A model: its champion or else its newest version, all versions, and the history."""
    versions = registry.versions(name)
    champions = [version for version in versions if "champion" in version.aliases]
    ready = [version for version in versions if version.state == "ready"]
    shown = (champions or ready[-1:] or versions[-1:])[0]
    return {
        **version_record(shown),
        "versions": [version_record(version) for version in versions],
        "history": [move_record(move) for move in registry.history(name)],
    }


def compare(versions: list[Version]) -> dict[str, Any]:
    """Versions beside each other.

    Returns:
        `versions`, their records; `metrics` by role and name, and `lineage` by field where they
        differ, each with a value a version, None where one has none.
    """
    metrics: dict[str, dict[str, list[float | None]]] = {}
    for role in _union(version.metrics for version in versions):
        of_role = [version.metrics.get(role, {}) for version in versions]
        metrics[role] = {name: [values.get(name) for values in of_role] for name in _union(of_role)}
    lineage = {}
    for field in _union(version.lineage for version in versions):
        values = [version.lineage.get(field) for version in versions]
        if field != "metrics" and any(value != values[0] for value in values):
            lineage[field] = values
    records = [version_record(version) for version in versions]
    return {"versions": records, "metrics": metrics, "lineage": lineage}


def _union(mappings: Any) -> list[str]:
    """Keys of all mappings, in the order in which they are met."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
