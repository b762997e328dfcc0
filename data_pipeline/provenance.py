"""Which bytes a model saw: a record of every data file, cheap enough to take of all of them.

A file in an object store is known by the store's own tag of its content (ETag), a local one by
size, time of change and a digest of its first and last pieces: the last holds a Parquet file's
footer, with the statistics of every column. A file that was changed in its middle alone, with size,
time and statistics kept, is not told from the one before.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from configs.stores import is_remote
from data_pipeline import storage
from data_pipeline.object_stores import failures_of
from data_pipeline.source import DataFile

_THREADS = 16
_PIECE_BYTES = 64 * 2**10


def provenance(files: Sequence[DataFile]) -> list[dict[str, Any]]:
    """A record of each file, in their order.

    Returns:
        `path`, `size_bytes`, `rows`, `modified_ns`, and `etag` (None where a store has none) or
        `ends_sha256`.

    Raises:
        ReadError: A file is not the planned one any more, or a store does not answer.
        DataError: A store refuses.
        OSError: A local file cannot be read.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_record, files))


def _record(file: DataFile) -> dict[str, Any]:
    record = {
        "path": file.path,
        "size_bytes": file.size_bytes,
        "rows": file.rows,
        "modified_ns": file.modified_ns,
    }
    with storage.open_file(file.path, file.state) as stream, failures_of(file.path):
        if is_remote(file.path):
            return {**record, "etag": _etag(stream.metadata())}
        digest = hashlib.sha256(stream.read(_PIECE_BYTES))
        stream.seek(max(0, file.size_bytes - _PIECE_BYTES))
        digest.update(stream.read())
        return {**record, "ends_sha256": digest.hexdigest()}


def _etag(metadata: dict[Any, Any] | None) -> str | None:
    for name, value in (metadata or {}).items():
        text = name.decode() if isinstance(name, bytes) else str(name)
        if text.lower() == "etag":
            tag = value.decode() if isinstance(value, bytes) else str(value)
            return tag.strip('"')
    return None
