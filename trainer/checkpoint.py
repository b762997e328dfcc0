"""Checkpoints on storage: whole or not at all, found again newest first. No TensorFlow.

A checkpoint is one .h5 file, `step-0000001234.h5`: arrays as datasets, the rest as JSON in an
attribute, a digest over both. It is written under a temporary name, synced, and renamed.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from trainer.errors import CheckpointError

_FORMAT = 1


def write_checkpoint(
    folder: Path, name: str, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
) -> Path:
    """Write `<folder>/<name>.h5` whole or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    path = folder / f"{name}.h5"
    text = json.dumps({"format": _FORMAT, **meta})
    try:
        with h5py.File(temporary, "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array)
            file.attrs["meta"] = text
            file.attrs["digest"] = _digest(arrays, text)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}. Free the storage.") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and meta of a checkpoint.

    Raises:
        CheckpointError: Unreadable, or its digest does not fit.
    """
    try:
        with h5py.File(path, "r") as file:
            arrays: dict[str, NDArray[Any]] = {}
            file.visititems(
                lambda key, item: (
                    arrays.__setitem__(key, np.asarray(item))
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
            text, digest = str(file.attrs["meta"]), str(file.attrs["digest"])
    except (OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if _digest(arrays, text) != digest:
        raise CheckpointError(f"{path} is damaged: its digest does not fit its content.")
    meta: dict[str, Any] = json.loads(text)
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
    """Delete all but the newest `keep`."""
    for path in sorted(folder.glob("step-*.h5"), reverse=True)[keep:]:
        path.unlink(missing_ok=True)


def checkpoint_name(step: int) -> str:
    """Names sort by step."""
    return f"step-{step:010d}"


def _digest(arrays: Mapping[str, NDArray[Any]], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key}:{array.dtype}:{array.shape}".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
