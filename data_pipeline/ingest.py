"""Files of any format as Parquet: converted once, in parallel, and found again while unchanged.

Owns the place of what was converted: a folder of `data.ingest_dir` named by a hash of everything
its rows depend on (paths, sizes, times of change, the settings of the reader). So a changed source
is converted again, and an unchanged one is not even opened. Parquet is not converted but read in
place. How a format is read is left to `data_pipeline.formats`, how a folder appears whole to
`data_pipeline.converted`.
"""

import hashlib
import importlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.data import DataConfig
from configs.section import Paths
from data_pipeline.converted import (
    Converted,
    PartWriter,
    find_converted,
    home,
    new_folder,
    publish,
)
from data_pipeline.errors import DataError, ReadError
from data_pipeline.formats.kinds import FORMATS, PARQUET, find_of_one_kind
from data_pipeline.formats.pieces import Piece, Request
from data_pipeline.storage import FileState, absolute, stat, sync

SKIPPED_FILE = "skipped.ndjson"

Progress = Callable[[int, int], None]

# Another number makes all that was converted before count no more.
_VERSION = 1
_PART_BYTES = 16 * 2**20
_STAT_THREADS = 16


@dataclass(frozen=True)
class _Inputs:
    """The files of a role.

    Attributes:
        name: What error messages call them.
        kind: Their format.
        entries: What the job names.
        files: The files in order.
        labels: The file of the labels of images, if there is one.
    """

    name: str
    kind: str
    entries: tuple[str, ...]
    files: tuple[FileState, ...]
    labels: tuple[FileState, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def ingested(
    role: str,
    paths: Paths,
    data: DataConfig,
    progress: Progress | None = None,
    warned: Callable[[str], None] | None = None,
) -> Paths:
    """Parquet with the rows of a role's files, in the order of the files and of the rows in them.

    Blocks until it is there. Safe to call from several threads and processes at once: each
    converts, the first one's folder is used by all. Where it raises, nothing has changed.

    Args:
        role: train, validation or test.
        paths: What the job names for it.
        data: The job's data section.
        progress: Is called with bytes done and bytes in all, from any thread, one at a time.
        warned: Is told of lines that are left out.

    Returns:
        `paths` itself where the files are Parquet, else the converted files.

    Raises:
        DataError: The files are of no or of several formats, or cannot be read.
        ReadError: A file changed meanwhile, or storage failed.
        ConvertError: The converted files cannot be written.
    """
    kind, found = find_of_one_kind(f"data.{role}", paths, data)
    if kind == PARQUET:
        return paths
    inputs = _Inputs(
        f"data.{role}",
        kind,
        (paths,) if isinstance(paths, str) else tuple(paths),
        _states(found),
        _states([data.images.labels] if data.images and data.images.labels else []),
    )
    folder = _root(data) / f"{kind}-{_key(inputs, data)}"
    converted = find_converted(folder) or _convert(inputs, data, folder, progress)
    skipped = converted.record["skipped_rows"]
    if skipped and warned is not None:
        warned(
            f"{inputs.name}: {skipped} lines cannot be read and are left out (data.on_bad_rows: "
            f"skip); they are listed in {converted.folder / SKIPPED_FILE}."
        )
    return converted.paths


def _states(paths: Sequence[str]) -> tuple[FileState, ...]:
    try:
        with ThreadPoolExecutor(_STAT_THREADS) as threads:
            return tuple(threads.map(stat, paths))
    except OSError as error:
        raise DataError(f"cannot find a file out of {len(paths)}: {error}. Check it.") from None


def _root(data: DataConfig) -> Path:
    if data.ingest_dir is None:
        return home() / "ingested"
    if "://" in data.ingest_dir:
        raise DataError(
            f"data.ingest_dir={data.ingest_dir} is no folder; a local one, or one that is mounted "
            "on all hosts, is allowed. Set another one."
        )
    return Path(data.ingest_dir).expanduser().absolute()


def _key(inputs: _Inputs, data: DataConfig) -> str:
    """Sixteen hex digits of all that the converted rows depend on."""
    settings: dict[str, Any] = {}
    if inputs.kind in ("csv", "ndjson"):
        settings["on_bad_rows"] = data.on_bad_rows
    if inputs.kind == "csv":
        settings["kinds"] = sorted((f.name, f.kind) for f in data.features if f.kind is not None)
        settings["weight"] = data.weight
    if inputs.kind == "images" and data.images is not None:
        # The column `path` is relative to what the job names.
        settings = {**data.images.model_dump(), "entries": inputs.entries}
    state = [
        (absolute(file.path), file.size_bytes, file.modified_ns)
        for file in (*inputs.files, *inputs.labels)
    ]
    text = json.dumps([_VERSION, inputs.kind, settings, state])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Meter:
    """Adds up bytes from several threads; never says more than there are."""

    def __init__(self, all_bytes: int, progress: Progress | None) -> None:
        self._all_bytes = all_bytes
        self._progress = progress
        self._done = 0.0
        self._lock = threading.Lock()

    def add(self, size: float) -> None:
        with self._lock:
            self._done = min(self._done + size, self._all_bytes)
            if self._progress is not None:
                self._progress(int(self._done), self._all_bytes)

    def finish(self) -> None:
        self.add(self._all_bytes)


def _convert(
    inputs: _Inputs, data: DataConfig, folder: Path, progress: Progress | None
) -> Converted:
    """Read all files and write the folder."""
    form = FORMATS[inputs.kind]
    meter = _Meter(inputs.size_bytes * form.passes, progress)
    # TensorFlow, which reads images and TFRecord, takes seconds to import; most jobs need none of
    # it before their workers start.
    open_files = importlib.import_module(form.module).open_files
    with (
        ThreadPoolExecutor(os.cpu_count(), "ingest") as pool,
        ThreadPoolExecutor(os.cpu_count(), "ingest-inner") as inner,
        new_folder(folder.parent, folder.name) as partial,
    ):
        pieces = open_files(
            Request(inputs.name, inputs.entries, inputs.files, data, pool, inner, meter.add)
        )
        parts = _write_parts(partial, pieces, pool, meter)
        if not parts:
            raise DataError(
                f"{inputs.name}: {len(inputs.files)} file(s) with no row at all; at least one row "
                f"is needed. Check what wrote {inputs.files[0].path}."
            )
        facts = {
            "role": inputs.name,
            "kind": inputs.kind,
            "skipped_rows": _write_skipped(partial / SKIPPED_FILE, pieces),
            "files": [absolute(file.path) for file in inputs.files],
        }
        _check_unchanged((*inputs.files, *inputs.labels))
        meter.finish()
        return publish(partial, folder, parts, facts)


def _write_parts(
    partial: Path, pieces: Sequence[Piece], pool: ThreadPoolExecutor, meter: _Meter
) -> list[PartWriter]:
    """Write all pieces, several parts at a time; returns the parts with rows."""
    is_over = threading.Event()

    def write(number: int, group: Sequence[Piece]) -> PartWriter:
        with PartWriter(partial / f"part-{number:06d}.parquet") as part:
            for piece in group:
                for batch in _read(piece, meter):
                    if is_over.is_set():  # another part failed
                        return part
                    part.write(batch)
                part.end_source()
        return part

    tasks = [pool.submit(write, *numbered) for numbered in enumerate(_groups(pieces))]
    try:
        parts = [task.result() for task in tasks]
    finally:
        is_over.set()
        pool.shutdown(cancel_futures=True)
    return [part for part in parts if part.rows]


def _groups(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces that make a part: many small files become one."""
    group: list[Piece] = []
    size_bytes = 0
    for piece in pieces:
        group.append(piece)
        size_bytes += piece.size_bytes
        if size_bytes >= _PART_BYTES:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def _read(piece: Piece, meter: _Meter) -> Iterator[pa.RecordBatch]:
    try:
        for batch in piece.batches():
            yield batch
            if piece.rows:
                meter.add(piece.size_bytes * batch.num_rows / piece.rows)
    except (OSError, pa.ArrowException) as error:
        raise ReadError(
            f"cannot read {piece.files[0].path}: {error}. It was readable a moment ago; check the "
            "storage, then start again."
        ) from error
    if not piece.rows:
        meter.add(piece.size_bytes)


def _write_skipped(path: Path, pieces: Sequence[Piece]) -> int:
    """List the lines that are left out, if there are any; returns their number."""
    lines = [
        {"file": piece.files[0].path, "line": bad.line, "reason": bad.reason, "text": bad.text}
        for piece in pieces
        for bad in piece.bad_lines
    ]
    if lines:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sync(path)
    return len(lines)


def _check_unchanged(files: Sequence[FileState]) -> None:
    for before, now in zip(files, _states([file.path for file in files]), strict=True):
        if now != before:
            raise ReadError(
                f"{before.path} changed while it was read (size or time of change). Wait until "
                "nothing writes to it, then start again."
            )
