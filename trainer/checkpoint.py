"""The file of a checkpoint: arrays and plain values in HDF5, sealed with a digest. No TensorFlow.

Arrays are datasets, the rest is JSON in an attribute. HDF5 leaves the first 512 bytes (the user
block) to us: they hold the digest of all that follows. It is checked before HDF5 sees the file,
because its library can crash the process on a damaged one.

HDF5 fills files back and forth, so what it wrote can only be hashed in a second pass, and it copies
what it reads. So it lays out the frame alone: names and numbers. The arrays, nearly all of a file,
are put between from memory, in one pass, and are looked at where they lie when a file was read.
Whose checkpoint it is, and which is the newest, is `trainer.checkpoint_store`'s.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_pipeline import storage
from trainer.errors import CheckpointError

_FORMAT = 1
_HEADER_BYTES = 512  # the smallest user block of HDF5
_ALIGNMENT_BYTES = 64  # of large arrays in the file: a whole number of any element
_LARGE_BYTES = 4096  # to align all costs HDF5 three times as long: its own records count as well


@dataclass(frozen=True)
class PackedCheckpoint:
    """A checkpoint's file, ready to be written.

    Attributes:
        pieces: What follows each other in the file; arrays are not copied.
        size_bytes: Of all pieces.
        sha256: Digest of what follows the user block, as the user block says it.
    """

    pieces: list[bytes | memoryview]
    size_bytes: int
    sha256: str


def pack(arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> PackedCheckpoint:
    """Lay out a file and hash it; the arrays must not change until it is written.

    Raises:
        OSError, RuntimeError: HDF5 cannot hold this.
    """
    pieces: list[bytes | memoryview] = []
    with open(os.memfd_create("checkpoint"), "w+b") as frame:  # its holes take no memory
        placed = _write_frame(frame, arrays, meta)
        frame.seek(_HEADER_BYTES)
        for offset, array in sorted(placed, key=lambda item: item[0]):
            pieces.append(frame.read(offset - frame.tell()))
            pieces.append(array.reshape(-1).view(np.uint8).data)
            frame.seek(array.nbytes, os.SEEK_CUR)
        pieces.append(frame.read())
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    size_bytes = _HEADER_BYTES + sum(len(piece) for piece in pieces)
    header = _header(digest.hexdigest())
    return PackedCheckpoint([header, *pieces], size_bytes, digest.hexdigest())


def unpack(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any], str]:
    """Arrays, meta and digest of the bytes of a file; large arrays are read-only views of them.

    Raises:
        CheckpointError: What is wrong with them, as what could follow the name of the file.
    """
    digest = hashlib.sha256(memoryview(data)[_HEADER_BYTES:]).hexdigest()
    if data[:_HEADER_BYTES] != _header(digest):
        raise CheckpointError("is damaged: its digest does not fit its content.")
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with h5py.File(io.BytesIO(data), "r") as file:  # shares the bytes
            file.visititems(
                lambda key, item: (
                    arrays.__setitem__(key, _view(item, data))
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
            meta: dict[str, Any] = json.loads(str(file.attrs["meta"]))
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}") from error
    return arrays, meta, digest


def write_checkpoint(
    folder: Path, name: str, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
) -> Path:
    """Write `<folder>/<name>.h5` whole or not at all; returns its path.

    Raises:
        CheckpointError: Storage refuses it.
    """
    path = folder / f"{name}.h5"
    try:
        packed = pack(arrays, meta)
        storage.make_folder(str(folder))
        storage.write_whole(str(path), *packed.pieces)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}. Free the storage.") from error
    return path


def read_checkpoint(path: str | Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays (large ones read-only) and meta of a checkpoint, from a local path or a store.

    Raises:
        CheckpointError: Unreadable, or its digest does not fit.
        DataError: The store refuses.
        ReadError: The store does not answer.
    """
    try:
        data = storage.read_whole(str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        arrays, meta, _ = unpack(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    return arrays, meta


def _write_frame(
    frame: IO[bytes], arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
) -> list[tuple[int, NDArray[Any]]]:
    """Write all but the elements of arrays; returns where each array's elements belong."""
    placed = []
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(
        frame,
        "w",
        userblock_size=_HEADER_BYTES,
        alignment_threshold=_LARGE_BYTES,
        alignment_interval=_ALIGNMENT_BYTES,
    ) as file:
        for key, array in arrays.items():
            if not array.shape:  # h5py places these late in any case
                file.create_dataset(key, data=array)
                continue
            dataset = file.create_dataset(key, array.shape, array.dtype, dcpl=early)
            if array.nbytes:
                placed.append((dataset.id.get_offset(), np.ascontiguousarray(array)))
        file.attrs["meta"] = json.dumps(meta)
    return placed


def _view(dataset: h5py.Dataset, data: bytes) -> NDArray[Any]:
    """The elements of a dataset where they lie in the file."""
    shape, dtype = dataset.shape, dataset.dtype
    offset = dataset.id.get_offset()
    count = int(np.prod(shape))
    if not count or offset is None or dataset.id.get_storage_size() != count * dtype.itemsize:
        return np.asarray(dataset)
    found = np.frombuffer(data, dtype, count, offset).reshape(shape)
    return found if found.flags.aligned else found.copy()


def _header(digest: str) -> bytes:
    """What stands in front of content with this digest."""
    text = f"lockstep checkpoint, format {_FORMAT}\nsha256 of what follows: {digest}\n"
    return text.encode().ljust(_HEADER_BYTES, b"\0")
