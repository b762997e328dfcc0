"""Checkpoints on storage: whole or not at all, found again newest first. No TensorFlow.

A checkpoint is one .h5 file, `step-0000001234.h5`: arrays as datasets, the rest as JSON in an
attribute. It is written under a temporary name, synced, and renamed. HDF5 leaves the first 512
bytes (the user block) to us: they hold the digest of all that follows. It is checked before HDF5
sees the file, because its library can crash the process on a damaged one.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_pipeline.storage import sync
from trainer.errors import CheckpointError

_FORMAT = 1
_HEADER_BYTES = 512  # the smallest user block of HDF5


def write_checkpoint(
    folder: Path, name: str, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
) -> Path:
    """Write `<folder>/<name>.h5` whole or not at all; returns its path.

    Raises:
        CheckpointError: Storage refuses it.
    """
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    path = folder / f"{name}.h5"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w", userblock_size=_HEADER_BYTES) as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array)
            file.attrs["meta"] = json.dumps(meta)
        _seal(temporary)
        os.replace(temporary, path)
        sync(folder)
    except (OSError, RuntimeError) as error:  # h5py raises RuntimeError where storage is full
        raise CheckpointError(f"cannot write {path}: {error}. Free the storage.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and meta of a checkpoint.

    Raises:
        CheckpointError: Unreadable, or its digest does not fit.
    """
    try:
        if not _is_whole(path):
            raise CheckpointError(f"{path} is damaged: its digest does not fit its content.")
        arrays: dict[str, NDArray[Any]] = {}
        with h5py.File(path, "r") as file:
            file.visititems(
                lambda key, item: (
                    arrays.__setitem__(key, np.asarray(item))
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
            meta: dict[str, Any] = json.loads(str(file.attrs["meta"]))
    except (OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return arrays, meta


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what was wrong with those that were skipped."""
    skipped = []
    for path in sorted(folder.glob("step-*.h5"), reverse=True):
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return path, skipped
    return None, skipped


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the `keep` that were written last.

    Steps do not tell: after a damaged checkpoint the run goes on from an earlier one, and what it
    then writes has smaller steps than the damaged file.
    """
    by_age = sorted(
        folder.glob("step-*.h5"),
        key=lambda path: (path.stat().st_mtime_ns, path.name),
        reverse=True,
    )
    for path in by_age[keep:]:
        path.unlink(missing_ok=True)


def checkpoint_name(step: int) -> str:
    """Names sort by step."""
    return f"step-{step:010d}"


def _seal(path: Path) -> None:
    """Write the digest in front of the content, and sync."""
    with path.open("r+b") as file:
        file.seek(_HEADER_BYTES)
        header = _header(file)
        file.seek(0)
        file.write(header)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(_HEADER_BYTES) == _header(file)


def _header(file: BufferedReader | BufferedRandom) -> bytes:
    """What stands in front of the content that `file` is about to read."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    text = f"lockstep checkpoint, format {_FORMAT}\nsha256 of what follows: {digest}\n"
    return text.encode().ljust(_HEADER_BYTES, b"\0")
