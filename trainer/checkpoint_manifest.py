"""The manifest of a checkpoint: the small file whose presence makes the large one count.

Owns the names of both, what the manifest says, and how damage in it is told. A manifest is JSON
and holds a digest of the rest of itself.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

FINAL = "final"

_FORMAT = 1
_PACKAGES = ("keras", "tensorflow")
_NAME = re.compile(r"(?P<stem>(?:step-(?P<step>\d{10})|final)(?:-g(?P<generation>\d{6,}))?)\.")


@dataclass(frozen=True)
class CheckpointName:
    """What the names of a checkpoint's two files say.

    Attributes:
        generation: Of the writer; 0 where the name has none, as in earlier versions.
        step: None for the trained weights.
        stem: The names without their endings.
    """

    generation: int
    step: int | None
    stem: str

    @property
    def order(self) -> tuple[int, int]:
        """Later is newer: what a later generation wrote supersedes all that was before it."""
        return self.generation, self.step or 0

    @property
    def is_final(self) -> bool:
        """Whether these are the trained weights."""
        return self.step is None

    @property
    def data(self) -> str:
        """Name of the .h5."""
        return f"{self.stem}.h5"

    @property
    def manifest(self) -> str:
        """Name of the manifest."""
        return f"{self.stem}.json"


def checkpoint_name(step: int | None, generation: int) -> CheckpointName:
    """The name of a checkpoint, or with None of the trained weights; unique to its writer."""
    place = FINAL if step is None else f"step-{step:010d}"
    return CheckpointName(generation, step, f"{place}-g{generation:06d}")


def parse_name(file: str) -> CheckpointName | None:
    """The checkpoint that a file belongs to, by the file's name."""
    match = _NAME.match(file)
    if match is None or file not in (f"{match['stem']}.h5", f"{match['stem']}.json"):
        return None
    step = None if match["step"] is None else int(match["step"])
    return CheckpointName(int(match["generation"] or 0), step, match["stem"])


class ManifestError(Exception):
    """What is wrong with a manifest, as what could follow its name."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without opening it.

    Attributes:
        run_id: The run that wrote it.
        job: Digest of the job.
        step: Optimizer updates completed.
        generation: Of the gang that wrote it.
        kind: Why it was written, such as `step`; `final` for the trained weights.
        file: Name of the .h5.
        size_bytes: Of the .h5.
        sha256: Digest of the .h5 behind its first 512 bytes, which hold the same.
        metrics: Finite ones at this step.
        time: Seconds since 1970.
        versions: Of Keras and TensorFlow.
    """

    run_id: str
    job: str
    step: int
    generation: int
    kind: str
    file: str
    size_bytes: int
    sha256: str
    metrics: dict[str, float]
    time: float
    versions: dict[str, str]

    def dump(self) -> bytes:
        """As JSON that `load_manifest` reads back to an equal one."""
        values = {"format": _FORMAT, **asdict(self)}
        return json.dumps({**values, "digest": _digest(values)}, indent=2).encode() + b"\n"


def load_manifest(data: bytes) -> Manifest:
    """The manifest of these bytes.

    Raises:
        ManifestError: They are not JSON, of another version, or changed.
    """
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ManifestError(f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ManifestError(f"holds {type(values).__name__} where a mapping belongs")
    found = values.get("format")
    if found != _FORMAT:
        raise ManifestError(f"is of format {found!r}; format {_FORMAT} is understood")
    if values.pop("digest", None) != _digest(values):
        raise ManifestError("is damaged: its digest does not fit its content")
    del values["format"]
    try:
        return Manifest(**values)
    except TypeError as error:
        raise ManifestError(f"has other fields than a manifest: {error}") from None


@functools.cache
def package_versions() -> dict[str, str]:
    """Of Keras and TensorFlow, as far as they are installed; they are not imported."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
