"""The output of a batch job: parts that appear whole under the names of their shards.

    OUTPUT/parts/part-00017.parquet      predictions of shard 17, in the order of its rows
    OUTPUT/errors/part-00017.parquet     its rows without prediction, where there are any
    OUTPUT/manifest.json                 what the job was, and every part with its SHA-256
    OUTPUT/_SUCCESS                      written last; without it the output is not complete

A predictor writes an attempt under a hidden name that holds the attempt's epoch, and syncs it; the
dispatcher alone gives it the part's own name. What a superseded attempt writes is never seen.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.stores import is_remote
from data_pipeline import storage
from serving import output_folder
from serving.batch_plan import ROW_COLUMN
from serving.errors import LocationError
from serving.line_rows import CUSTOM_ID
from serving.openai_lines import answer_line, error_line
from serving.row_errors import Chunk, error_table

MANIFEST, SUCCESS = "manifest.json", "_SUCCESS"
_ATTEMPTS = ("parts/.tmp", "errors/.tmp")
_GROUP_ROWS = 2**20
_GROUP_BYTES = 64 * 2**20
_SUFFIXES = {"parquet": ".parquet", "csv": ".csv", "ndjson": ".ndjson", "openai": ".jsonl"}


@dataclass(frozen=True)
class OutputSpec:
    """How a job's output is written; plain values.

    Attributes:
        folder: A local folder or a URI.
        format: parquet, csv, ndjson or openai.
        column: Name of the predictions.
        fills_null: Bad rows stand in the output with a null, not in the error files alone.
        job: Name of the job, for lines that hold it.
    """

    folder: str
    format: str
    column: str
    fills_null: bool
    job: str


@dataclass(frozen=True)
class PartFile:
    """One file of an output.

    Attributes:
        name: Below the output's folder.
        rows: Rows in it.
        size_bytes: Its size.
        sha256: Of its bytes.
        is_errors: It is an error file.
    """

    name: str
    rows: int
    size_bytes: int
    sha256: str
    is_errors: bool = False

    def attempt(self, epoch: int) -> str:
        """The hidden name under which an attempt writes it."""
        folder, _, name = self.name.rpartition("/")
        stem, suffix = os.path.splitext(name)
        return f"{folder}/.tmp/{stem}.{epoch}{suffix}"


class PartWriter:
    """Writes the files of one attempt at a shard.

    Args:
        spec: The job's output.
        shard: Number of the shard.
        epoch: Of the attempt.
    """

    def __init__(self, spec: OutputSpec, shard: int, epoch: int) -> None:
        self._spec, self._epoch = spec, epoch
        name = f"part-{shard:05d}{_SUFFIXES[spec.format]}"
        errors = name if spec.format in ("parquet", "openai") else f"part-{shard:05d}.ndjson"
        self._parts = _File(spec, f"parts/{name}", epoch)
        self._errors = _File(spec, f"errors/{errors}", epoch, is_errors=True)
        self._held: list[pa.Table] = []
        self._parquet: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None

    def write(self, chunk: Chunk, values: NDArray[np.float32]) -> None:
        """Rows with their predictions, `(rows, output_size)`, in order."""
        spec = self._spec
        if chunk.errors:
            self._write_errors(chunk)
        if spec.format == "openai":
            self._parts.write("".join(_answers(spec.job, chunk, values)).encode())
            self._parts.rows += int((~chunk.is_bad).sum())
            return
        table = _table(spec, chunk, values)
        self._parts.rows += table.num_rows
        if spec.format == "parquet":
            self._held.append(table)
            rows = sum(held.num_rows for held in self._held)
            if rows >= _GROUP_ROWS or sum(held.nbytes for held in self._held) >= _GROUP_BYTES:
                self._write_group()
        elif spec.format == "csv":
            is_first = self._schema is None
            self._schema = table.schema
            self._parts.write(_csv_text(_flat(table, spec.column), is_first))
        else:
            self._parts.write(_json_text(table, chunk.kept.schema))

    def finish(self) -> list[PartFile]:
        """Sync everything under the attempt's names; the files that there are.

        Raises:
            OSError: The disk fails.
            DataError: The store refuses.
            ReadError: The store does not answer.
        """
        if self._spec.format == "parquet":
            self._write_group()
            if self._parquet is not None:
                self._parquet.close()
        files = [self._parts.finish()]
        if self._errors.rows:
            files.append(self._errors.finish())
        return files

    def discard(self) -> None:
        """Leave nothing of a failed attempt."""
        self._parts.discard()
        self._errors.discard()

    def _write_group(self) -> None:
        if not self._held:
            return
        table = pa.concat_tables(self._held)
        self._held = []
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(
                self._parts.sink(), table.schema, **_parquet_options(table.schema, self._spec)
            )
        self._parquet.write_table(table, row_group_size=_GROUP_ROWS)

    def _write_errors(self, chunk: Chunk) -> None:
        self._errors.rows += len(chunk.errors)
        if self._spec.format == "parquet":
            self._errors.tables.append(error_table(chunk.errors))
        elif self._spec.format == "openai":
            names = chunk.kept[CUSTOM_ID]
            self._errors.write("".join(_refusals(self._spec.job, chunk, names)).encode())
        else:
            lines = (json.dumps(asdict(error)) + "\n" for error in chunk.errors)
            self._errors.write("".join(lines).encode())


class _File:
    """One file of an attempt, hashed while it is written."""

    def __init__(self, spec: OutputSpec, name: str, epoch: int, is_errors: bool = False) -> None:
        self._part = PartFile(name, 0, 0, "", is_errors)
        self._folder, self._name = spec.folder.rstrip("/"), self._part.attempt(epoch)
        self._sink: _HashedSink | None = None
        self.rows = 0
        self.tables: list[pa.Table] = []

    def sink(self) -> "_HashedSink":
        if self._sink is None:
            is_object = is_remote(self._folder)
            self._sink = _HashedSink(
                None if is_object else output_folder.new_file(self._folder, self._name)
            )
        return self._sink

    def write(self, data: bytes) -> None:
        self.sink().write(data)

    def finish(self) -> PartFile:
        if self.tables:
            pq.write_table(pa.concat_tables(self.tables), self.sink())
        sink = self.sink()
        size_bytes, digest = sink.finish(f"{self._folder}/{self._name}")
        return PartFile(self._part.name, self.rows, size_bytes, digest, self._part.is_errors)

    def discard(self) -> None:
        if self._sink is not None:
            self._sink.close()
            if not is_remote(self._folder):
                output_folder.remove(self._folder, self._name)


class _HashedSink(io.RawIOBase):
    """A file, or memory where it is to become an object, that knows the hash of its bytes."""

    def __init__(self, file: IO[bytes] | None) -> None:
        super().__init__()
        self._file: Any = io.BytesIO() if file is None else file
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self._is_finished = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._size_bytes += len(view)
        written = 0
        while written < len(view):  # a raw file may take a part only
            written += self._file.write(view[written:])
        return len(view)

    def tell(self) -> int:
        return self._size_bytes

    def close(self) -> None:
        pass  # pyarrow closes what it has written to; `finish` is what ends the file

    def finish(self, path: str) -> tuple[int, str]:
        """Sync, or put the object; size and SHA-256."""
        if isinstance(self._file, io.BytesIO):
            storage.write_whole(path, self._file.getbuffer())
        else:
            os.fsync(self._file.fileno())
            self._file.close()
        self._is_finished = True
        return self._size_bytes, self._digest.hexdigest()


def commit_file(folder: str, file: PartFile, epoch: int) -> None:
    """Give an attempt's file its own name; whole, and at once. Idempotent.

    Raises:
        FileNotFoundError: The attempt's file is not there.
        LocationError: There is a link where a folder was.
        OSError: The disk fails.
        DataError: The store refuses.
        ReadError: The store does not answer.
    """
    output_folder.rename(folder, file.attempt(epoch), file.name)


def file_digest(folder: str, name: str) -> tuple[int, str] | None:
    """Size and SHA-256 of a file of an output; None where there is none."""
    try:
        with output_folder.opened(folder, name) as file:
            digest, size_bytes = hashlib.sha256(), 0
            while block := file.read(8 * 2**20):
                digest.update(block)
                size_bytes += len(block)
    except (FileNotFoundError, LocationError):
        return None  # what is there instead is not ours
    return size_bytes, digest.hexdigest()


def prepare_folder(folder: str) -> None:
    """Make the folders of an output. Raises as `commit_file`."""
    for name in _ATTEMPTS:
        output_folder.make_folder(folder, name)


def sweep_attempts(folder: str) -> None:
    """Remove what superseded attempts have left, and the empty folder of errors."""
    for name in _ATTEMPTS:
        for entry in output_folder.list_folder(folder, name):
            output_folder.remove(folder, f"{name}/{entry.name}")
    for name in (*_ATTEMPTS, "errors"):
        output_folder.remove_empty(folder, name)  # unless there are errors


def write_manifest(folder: str, manifest: Mapping[str, Any], *, is_complete: bool) -> None:
    """Write the manifest and, for a complete output, `_SUCCESS` after it."""
    text = json.dumps(manifest, indent=2) + "\n"
    output_folder.write_whole(folder, MANIFEST, text.encode())
    if is_complete:
        output_folder.write_whole(folder, SUCCESS, b"\n")


def remove_output(folder: str) -> None:
    """Remove an output: first what says that it is one, then all that it names. Idempotent.

    Raises:
        LocationError: A link leads to it now.
        OSError: The disk fails.
        DataError: The store refuses.
        ReadError: The store does not answer.
    """
    if not is_remote(folder):
        with contextlib.suppress(IsADirectoryError, PermissionError):  # the user's: goes below
            output_folder.remove(folder, SUCCESS)
        output_folder.remove_tree(folder)
        return
    output_folder.remove(folder, SUCCESS)
    for name in ("parts", "errors"):
        for entry in output_folder.list_folder(folder, name):
            output_folder.remove(folder, f"{name}/{entry.name}")
    output_folder.remove(folder, MANIFEST)


def _table(spec: OutputSpec, chunk: Chunk, values: NDArray[np.float32]) -> pa.Table:
    """Row number, kept columns and predictions."""
    mask = chunk.is_bad if chunk.is_bad.any() else None
    if values.shape[1] == 1:
        column = pa.array(values[:, 0], mask=mask)
    else:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        nulls = None if mask is None else pa.array(mask)
        column = pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=nulls)
    rows = pa.array(np.arange(chunk.first_row, chunk.first_row + chunk.rows))
    arrays = [rows, *chunk.kept.columns, column]
    table = pa.table(arrays, [ROW_COLUMN, *chunk.kept.column_names, spec.column])
    if mask is None or spec.fills_null:
        return table
    return table.filter(pa.array(~mask))


def _parquet_options(schema: pa.Schema, spec: OutputSpec) -> dict[str, Any]:
    """Counting numbers as differences; dictionaries for texts only, where they pay."""
    texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_boolean(f.type)]
    return {
        "use_dictionary": texts,
        "column_encoding": {ROW_COLUMN: "DELTA_BINARY_PACKED"},
        "compression": "snappy",
        "write_statistics": [name for name in schema.names if name != spec.column],
    }


def _flat(table: pa.Table, column: str) -> pa.Table:
    """Lists as columns of their own: CSV has no lists."""
    values = table[column]
    if not pa.types.is_fixed_size_list(values.type):
        return table
    size = values.type.list_size
    flat = values.combine_chunks()
    for index in range(size):
        element = pa.compute.list_element(flat, index)
        table = table.append_column(f"{column}_{index}", element)
    return table.drop_columns(column)


def _csv_text(table: pa.Table, has_header: bool) -> bytes:
    out = io.BytesIO()
    pacsv.write_csv(table, out, pacsv.WriteOptions(include_header=has_header))
    return out.getvalue()


def _json_text(table: pa.Table, kept: pa.Schema) -> bytes:
    nested = [field.name for field in kept if (field.metadata or {}).get(b"kind") == b"json"]
    lines = []
    for row in table.to_pylist():
        for name in nested:
            row[name] = None if row[name] is None else json.loads(row[name])
        lines.append(json.dumps(row, default=str) + "\n")
    return "".join(lines).encode()


def _answers(job: str, chunk: Chunk, values: NDArray[np.float32]) -> list[str]:
    names = chunk.kept[CUSTOM_ID].to_pylist()
    lines = []
    for index in np.flatnonzero(~chunk.is_bad).tolist():
        row = values[index]
        value = float(row[0]) if len(row) == 1 else [float(number) for number in row]
        lines.append(answer_line(job, chunk.first_row + index, names[index], value) + "\n")
    return lines


def _refusals(job: str, chunk: Chunk, names: pa.ChunkedArray) -> list[str]:
    return [
        error_line(job, e.row, names[e.row - chunk.first_row].as_py(), e.code, e.message) + "\n"
        for e in chunk.errors
    ]
