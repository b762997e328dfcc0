"""What lies in a folder of checkpoints: pairs of files, and what is wrong with a pair.

Lists, reads and checks; knows neither whose checkpoints are wanted nor which. Failures of a store
are passed on (DataError, ReadError): they say nothing of the checkpoint.
"""

from dataclasses import dataclass
from typing import Any

from data_pipeline import storage
from trainer.checkpoint import unpack
from trainer.checkpoint_manifest import (
    CheckpointName,
    Manifest,
    ManifestError,
    checkpoint_name,
    load_manifest,
    parse_name,
)
from trainer.errors import CheckpointError
from trainer.payloads import Arrays


@dataclass
class Slot:
    """The two files of a checkpoint, as far as the folder lists them.

    Attributes:
        name: What their names say.
        data: The .h5.
        manifest: The manifest.
    """

    name: CheckpointName
    data: storage.Entry | None = None
    manifest: storage.Entry | None = None

    @property
    def is_complete(self) -> bool:
        """Whether both are there, as files."""
        return all(entry is not None and entry.is_file for entry in (self.data, self.manifest))

    @property
    def has_folder(self) -> bool:
        """Whether a folder stands where a file belongs."""
        return any(entry is not None and not entry.is_file for entry in (self.data, self.manifest))

    @property
    def is_leftover(self) -> bool:
        """Whether a writer left its .h5 without a manifest; those of earlier versions are none."""
        has_data = self.data is not None and self.data.is_file
        return has_data and self.manifest is None and self.name.generation > 0


class DamagedError(Exception):
    """A checkpoint that cannot be used: a sentence that begins with the path of the bad file."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} {reason}.")


class ChangedError(Exception):
    """The folder is not as it was listed: a writer works there. Look again."""


def list_slots(uri: str, is_final: bool) -> list[Slot]:
    """The pairs in a folder, newest first: checkpoints to resume, or trained weights."""
    slots: dict[str, Slot] = {}
    for entry in storage.list_folder(uri):
        name = parse_name(entry.name)
        if name is None or name.is_final != is_final:
            continue
        slot = slots.setdefault(name.stem, Slot(name))
        if entry.name == name.data:
            slot.data = entry
        else:
            slot.manifest = entry
    return sorted(slots.values(), key=lambda slot: slot.name.order, reverse=True)


def read_manifest(uri: str, slot: Slot) -> Manifest:
    """The manifest of a pair, in order and of this pair.

    Raises:
        DamagedError: There is none, or it is not.
        ChangedError: There was one.
    """
    name, path = slot.name, f"{uri}/{slot.name.manifest}"
    if slot.manifest is None:
        raise DamagedError(
            f"{uri}/{name.data}",
            f"is without a manifest ({name.manifest}): its writer died, or an earlier version "
            "wrote it",
        )
    if not slot.manifest.is_file:
        raise DamagedError(path, "is a folder; a manifest belongs there")
    try:
        manifest = load_manifest(storage.read_whole(path))
    except ManifestError as error:
        raise DamagedError(path, str(error)) from None
    except FileNotFoundError:
        raise ChangedError from None
    except OSError as error:
        raise DamagedError(path, f"cannot be read: {error}") from error
    described = checkpoint_name(None if name.is_final else manifest.step, manifest.generation)
    if described.stem != name.stem or manifest.file != name.data:
        raise DamagedError(
            path,
            f"describes another file: {manifest.file}, of step {manifest.step} and generation "
            f"{manifest.generation}",
        )
    return manifest


def read_data(uri: str, slot: Slot, manifest: Manifest) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and meta of a pair, read once and equal to what was written.

    Raises:
        DamagedError: They are not there, or not what the manifest describes.
        ChangedError: They were there, or are now.
    """
    path, data = f"{uri}/{slot.name.data}", slot.data
    if data is None:
        if storage.exists(path) or not storage.exists(f"{uri}/{slot.name.manifest}"):
            raise ChangedError
        raise DamagedError(path, "is missing; its manifest is there")
    if not data.is_file:
        raise DamagedError(path, "is a folder; a file belongs there")
    if data.size_bytes != manifest.size_bytes:
        raise DamagedError(
            path, f"has {data.size_bytes} bytes; its manifest says {manifest.size_bytes}"
        )
    try:
        arrays, meta, sha256 = unpack(storage.read_whole(path))
    except CheckpointError as error:
        raise DamagedError(path, str(error).rstrip(".")) from error
    except FileNotFoundError:
        raise ChangedError from None
    except OSError as error:
        raise DamagedError(path, f"cannot be read: {error}") from error
    if sha256 != manifest.sha256:
        raise DamagedError(path, "is whole, but not the file that its manifest describes")
    return arrays, meta
