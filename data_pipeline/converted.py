"""Folders of Parquet that Lockstep wrote itself: whole or not at all, found again by their name.

A folder is written under a hidden name beside its place; its record, which lists the parts, comes
last; then it is renamed. Who finds the place taken uses what is there. What a process that was
killed left behind is hidden, has no meaning, and is removed when it is old.
"""

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import ConvertError
from data_pipeline.storage import sync

RECORD_FILE = "_ingest.json"

_FORMAT = "lockstep-converted-1"
_GROUP_ROWS = 16_384
_GROUP_BYTES = 32 * 2**20
_PARTIAL = ".partial"
_LEFTOVER_AGE_S = 86_400.0
_RENAME_TRIES = 5


def home() -> Path:
    """LOCKSTEP_HOME, where Lockstep keeps what it can make again: `~/.lockstep` by default."""
    return Path(os.environ.get("LOCKSTEP_HOME") or "~/.lockstep").expanduser().absolute()


@dataclass(frozen=True)
class Converted:
    """A whole folder.

    Attributes:
        folder: Where it is.
        record: What its record says.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def paths(self) -> list[str]:
        """The Parquet files in order."""
        return [str(self.folder / part["name"]) for part in self.record["parts"]]


def find_converted(folder: Path) -> Converted | None:
    """The folder as it was written, or None where there is none or a part of it is gone."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
        if record["format"] != _FORMAT:
            return None
        for part in record["parts"]:
            if (folder / part["name"]).stat().st_size != part["size_bytes"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Converted(folder, record)


@contextmanager
def new_folder(place: Path, name: str = "new") -> Iterator[Path]:
    """A hidden folder in `place` to write into, which vanishes at the end unless published.

    Raises:
        ConvertError: It cannot be made, or storage failed inside the block.
    """
    partial = place / f".{name}.{uuid.uuid4().hex[:8]}{_PARTIAL}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place)
        partial.mkdir()
        yield partial
    except OSError as error:
        raise ConvertError(
            f"cannot write below {place}: {error}. Nothing of it counts; check the storage and its "
            "free space, or set data.ingest_dir or LOCKSTEP_HOME to another place."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(
    partial: Path, folder: Path, parts: list["PartWriter"], facts: Mapping[str, Any]
) -> Converted:
    """Give a finished folder its name; where another process was faster, take its folder.

    Args:
        partial: What `new_folder` gave, all files written and synced.
        folder: Its place.
        parts: Its Parquet files in order.
        facts: What the record says besides.

    Raises OSError.
    """
    record = {
        "format": _FORMAT,
        **facts,
        "rows": sum(part.rows for part in parts),
        "parts": [
            {"name": part.path.name, "rows": part.rows, "size_bytes": part.path.stat().st_size}
            for part in parts
        ],
    }
    path = partial / RECORD_FILE
    path.write_text(json.dumps(record, indent=1) + "\n")
    sync(path)
    sync(partial)
    for _ in range(_RENAME_TRIES):
        try:
            partial.rename(folder)
            sync(folder.parent)
            return Converted(folder, record)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        winner = find_converted(folder)
        if winner is not None:
            return winner
        # A folder without a part of it, or of an older version, makes way in one step.
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
        with suppress(FileNotFoundError):
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    raise OSError(errno.EBUSY, "other processes write it again and again", str(folder))


def _remove_leftovers(place: Path) -> None:
    """Take away what processes that were killed have left a day ago or earlier."""
    for partial in place.glob(f".*{_PARTIAL}"):
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            if time.time() - newest > _LEFTOVER_AGE_S:
                shutil.rmtree(partial, ignore_errors=True)


class PartWriter:
    """One Parquet file in row groups of at most 16k rows and about 32 MiB; a context.

    Small source files share a row group; large ones begin their own, so that their blocks, and
    with them the order of training, are those of a Parquet file with as many rows a group. The
    same batches give the same file. One without rows is not written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_rows = 0
        self._waiting_bytes = 0.0

    def __enter__(self) -> "PartWriter":
        """Itself; the file is opened by the first rows."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close the file; after an error without what waits."""
        if kind is not None:
            self._waiting = []
        self.close()

    def close(self) -> None:
        """Write what waits, and sync the file."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
            sync(self.path)

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        sizes = _row_bytes(batch)
        start = 0
        while start < batch.num_rows:
            room = _GROUP_ROWS - self._waiting_rows
            fitting = int((_GROUP_BYTES - self._waiting_bytes) // sizes) if sizes else room
            count = max(1, min(room, fitting, batch.num_rows - start))
            self._waiting.append(batch.slice(start, count))
            self._waiting_rows += count
            self._waiting_bytes += count * sizes
            start += count
            if self._waiting_rows >= _GROUP_ROWS or self._waiting_bytes + sizes > _GROUP_BYTES:
                self._flush()

    def end_source(self) -> None:
        """A source file is at its end: what waits becomes a row group, if it is enough."""
        if self._waiting_rows >= _GROUP_ROWS // 4:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = pa.Table.from_batches(self._waiting)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, table.schema)
        self._writer.write_table(table, row_group_size=table.num_rows)
        self.rows += table.num_rows
        self._waiting, self._waiting_rows, self._waiting_bytes = [], 0, 0.0


def _row_bytes(batch: pa.RecordBatch) -> float:
    size_bytes: int = batch.nbytes
    rows: int = batch.num_rows
    return size_bytes / max(1, rows)
