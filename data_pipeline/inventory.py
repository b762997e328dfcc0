"""Which files there are, and what tells one from a later one of the same name.

Owns the question "what is new" for folders that grow: a file is new where it was not there, or is
not the same any more. Files that are gone make nothing new.
"""

import functools
import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from configs.data import DataConfig
from configs.section import Paths
from data_pipeline import storage
from data_pipeline.errors import DataError
from data_pipeline.formats.kinds import PARQUET, find_of_one_kind
from data_pipeline.object_stores import failures_of
from data_pipeline.source import PARQUET_SUFFIXES

_THREADS = 16
_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Identity:
    """What tells a file from a later one.

    Attributes:
        size_bytes: Its size.
        modified_ns: Time of its last change; 0 where that is not known.
        sha256: Digest of its bytes; None where they were not read.
    """

    size_bytes: int
    modified_ns: int = 0
    sha256: str | None = None

    def is_same(self, other: "Identity") -> bool:
        """Whether both are of one content, as far as is known of them."""
        if self.size_bytes != other.size_bytes:
            return False
        if self.sha256 is not None and other.sha256 is not None:
            return self.sha256 == other.sha256
        return 0 in (self.modified_ns, other.modified_ns) or self.modified_ns == other.modified_ns


Inventory = Mapping[str, Identity]
"""Files by their path."""


def take_inventory(
    name: str, paths: Paths, data: DataConfig, is_hashed: bool, known: Inventory
) -> dict[str, Identity]:
    """All data files of some paths, sorted by path.

    Args:
        name: What errors call the paths.
        paths: A file, a folder, a glob, or a list of these.
        data: Says the format.
        is_hashed: Read the bytes, unless size and time are those of `known`.
        known: An earlier inventory.

    Raises:
        DataError: There is no file, or a store refuses.
        ReadError: A store does not answer, or a file cannot be read.
    """
    kind, found = find_of_one_kind(name, paths, data)
    if kind == PARQUET and not found:  # it was stated, so that names need not be looked at
        found = storage.find(name, paths, PARQUET_SUFFIXES)
    files = sorted({storage.absolute(path) for path in found})
    look = functools.partial(_identity, name, is_hashed, known)
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(files, threads.map(look, files), strict=True))


def new_files(now: Inventory, before: Inventory) -> list[str]:
    """Files that were not there before, or are not the same any more; in order."""
    return [
        path
        for path, identity in now.items()
        if path not in before or not identity.is_same(before[path])
    ]


def inventory_record(inventory: Inventory) -> dict[str, list[Any]]:
    """The inventory as plain values."""
    return {path: [i.size_bytes, i.modified_ns, i.sha256] for path, i in inventory.items()}


def read_inventory(record: Mapping[str, list[Any]]) -> dict[str, Identity]:
    """The inventory that `inventory_record` has recorded."""
    return {path: Identity(*values) for path, values in record.items()}


def file_sha256(path: str) -> str:
    """Digest of a file's bytes, in hex.

    Raises:
        OSError: A local file cannot be read.
        ReadError: A store does not answer.
    """
    digest = hashlib.sha256()
    with storage.open_file(path) as file, failures_of(path, is_reading=True):
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _identity(name: str, is_hashed: bool, earlier: Inventory, path: str) -> Identity:
    known = earlier.get(path)
    try:
        state = storage.stat(path)
        identity = Identity(state.size_bytes, state.modified_ns)
        if not is_hashed:
            return identity
        is_known = known is not None and replace(known, sha256=None) == identity
        if is_known and known is not None and known.sha256 is not None:
            return known
        return replace(identity, sha256=file_sha256(path))
    except OSError as error:
        raise DataError(
            f"{name}: {path} cannot be read: {error}. Files that stay are allowed; write a file "
            "under another name first, and rename it when it is whole."
        ) from None
