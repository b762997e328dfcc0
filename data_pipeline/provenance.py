"""Which bytes a model saw: a record of every data file, cheap enough to take of all of them.

A file in an object store is known by the store's own tag of its content (ETag), a local one by
size, time of change and a digest of its first and last pieces: the last holds a Parquet file's
footer, with the statistics of every column. A file that was changed in its middle alone, with size,
time and statistics kept, is not told from the one before.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from configs.stores import is_remote
from data_pipeline import storage
from data_pipeline.object_stores import failures_of
from data_pipeline.source import DataFile, Source
from data_pipeline.storage import FileState

_THREADS = 16
_FILES_LISTED = 1000
_PIECE_BYTES = 64 * 2**10


def provenance(files: Sequence[DataFile]) -> list[dict[str, Any]]:
    """A record of each file, in their order.

    Returns:
        `path`, `size_bytes`, `modified_ns`, `rows`, and `etag` (None where a store has none) or
        `ends_sha256`.

    Raises:
        ReadError: A file is not the planned one any more, or a store does not answer.
        DataError: A store refuses.
        OSError: A local file cannot be read.
    """
    states = [file.state for file in files]
    return [
        {**record, "rows": file.rows}
        for record, file in zip(provenance_of_states(states), files, strict=True)
    ]


def provenance_of_states(states: Sequence[FileState]) -> list[dict[str, Any]]:
    """As `provenance`, of files whose rows were not counted."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_record, states))


def provenance_of_sources(sources: Mapping[str, Source]) -> dict[str, Any]:
    """What a version's lineage says of its data: by role the files, as `listed` gives them."""
    return {role: listed(provenance(source.files)) for role, source in sources.items()}


def listed(records: list[dict[str, Any]]) -> list[dict[str, Any]] | dict[str, Any]:
    """Records of files; of more than a thousand their number, sums, and one digest of all.

    What a version says of itself is read whenever it is listed.
    """
    if len(records) <= _FILES_LISTED:
        return records
    return {
        "files": len(records),
        **({"rows": sum(r["rows"] for r in records)} if "rows" in records[0] else {}),
        "size_bytes": sum(record["size_bytes"] for record in records),
        "sha256": hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest(),
    }


def _record(state: FileState) -> dict[str, Any]:
    path, size_bytes = state.path, state.size_bytes
    record = {"path": path, "size_bytes": size_bytes, "modified_ns": state.modified_ns}
    with storage.open_file(path, state) as stream, failures_of(path):
        if is_remote(path):
            return {**record, "etag": _etag(stream.metadata())}
        digest = hashlib.sha256(stream.read(_PIECE_BYTES))
        stream.seek(max(0, size_bytes - _PIECE_BYTES))
        digest.update(stream.read())
        return {**record, "ends_sha256": digest.hexdigest()}


def _etag(metadata: dict[Any, Any] | None) -> str | None:
    for name, value in (metadata or {}).items():
        text = name.decode() if isinstance(name, bytes) else str(name)
        if text.lower() == "etag":
            tag = value.decode() if isinstance(value, bytes) else str(value)
            return tag.strip('"')
    return None
