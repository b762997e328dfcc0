"""Rows of a shard as the model takes them, a call's worth at a time; bad rows with their reason.

Owns what makes a single row unusable: no value where the model needs one, a text among numbers, a
list of another length, a line that is not what its format says. Such a row is marked and told, and
never keeps its neighbours from being predicted. Files that changed since the job was planned, or
that cannot be read at all, are no matter of rows: they raise.
"""

import csv
import io
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.stores import is_remote, reason
from data_pipeline import storage
from data_pipeline.csv_text import MISSING
from data_pipeline.errors import ReadError
from data_pipeline.features import null_rows
from data_pipeline.source import Column, DataFile, partitions_of, with_partitions
from data_pipeline.tables import Wanted
from serving.errors import BatchError
from serving.line_rows import json_rows
from serving.locations import opened
from serving.row_errors import Chunk, Marks
from serving.shards import Piece, Shard, split_records

_ROWS_AT_ONCE = 2**16
_BYTES_AT_ONCE = 64 * 2**20
_FAR_BYTES = 2**30  # of a row group that is fetched at once, as each request takes its time
_TEXT = pa.string()
_MISSING = pa.array(MISSING)
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|^[+-]?(inf|infinity)$"
_TRUTH = {"true": "1", "false": "0", "True": "1", "False": "0", "TRUE": "1", "FALSE": "0"}


@dataclass(frozen=True)
class RowSource:
    """Where the rows of a job come from, as its plan has recorded it; plain values.

    Attributes:
        format: parquet, csv, ndjson, or openai for lines of OpenAI's batch files.
        files: Files with size and time of change at planning.
        allowed: Where the user's files may be; None for files of the service's own.
        wanted: The model's input columns.
        kept: Columns that are joined to the output, with their types by Arrow's names, or json.
        names: All columns of CSV files, by file.
        partitions: Columns that are names of folders: int64 or text.
        call_rows: Rows of a call of the model, and so of a chunk.
    """

    format: str
    files: tuple[storage.FileState, ...]
    allowed: tuple[str, ...] | None
    wanted: Wanted
    kept: dict[str, str] = field(default_factory=dict)
    names: tuple[tuple[str, ...], ...] = ()
    partitions: dict[str, str] = field(default_factory=dict)
    call_rows: int = 1

    @property
    def columns(self) -> list[str]:
        """All columns that are read."""
        return list(dict.fromkeys([*self.wanted, *self.kept]))

    def as_record(self) -> dict[str, Any]:
        """As JSON, for `read_source`."""
        return asdict(self)


def read_wanted(kind: Any) -> Any:
    """A shape or kind of `Wanted`, from JSON."""
    return kind if isinstance(kind, str) else tuple(kind)


def read_source(record: dict[str, Any]) -> RowSource:
    """What `RowSource.as_record` wrote."""
    allowed = record["allowed"]
    wanted: dict[str, Any] = record["wanted"]
    return RowSource(
        format=record["format"],
        files=tuple(storage.FileState(**file) for file in record["files"]),
        allowed=None if allowed is None else tuple(allowed),
        wanted={name: read_wanted(kind) for name, kind in wanted.items()},
        kept=record["kept"],
        names=tuple(map(tuple, record["names"])),
        partitions=record["partitions"],
        call_rows=record["call_rows"],
    )


def read_chunks(source: RowSource, shard: Shard) -> Iterator[Chunk]:
    """The rows of a shard in order, `source.call_rows` at a time; the last chunk may have fewer.

    Raises:
        LocationError: A file is not in the user's locations any more.
        ReadError: Storage failed, or a file changed since the job was planned.
        DataError: The store refuses.
    """
    row = shard.first_row
    if source.format == "parquet":
        for table in _rechunked(_parquet_tables(source, shard.pieces), source.call_rows):
            yield _columnar(source, table, row)
            row += table.num_rows
        return
    for texts in grouped_text(source, shard.pieces, source.call_rows):
        chunks = [_text_chunk(source, file, text, starts, row) for file, text, starts in texts]
        chunk = chunks[0] if len(chunks) == 1 else Chunk.joined(chunks, row)
        yield chunk
        row += chunk.rows


# -- Parquet ---------------------------------------------------------------------------------------


def _parquet_tables(source: RowSource, pieces: Sequence[Piece]) -> Iterator[pa.Table]:
    columns = [Column(name, kind, 1, False) for name, kind in source.partitions.items()]
    for piece in pieces:
        state = source.files[piece.file]
        try:
            with opened(state.path, source.allowed, state) as file:
                for table in _row_range(source, file, state, piece):
                    told = folder_values(state, source.partitions)
                    yield with_partitions(table, told, columns) if told.partitions else table
        except (OSError, pa.ArrowException) as error:
            raise ReadError(
                f"cannot read {state.path}: {reason(state.path, error)}. It was readable when the "
                "job was planned; check the storage, then submit the job again."
            ) from error


def folder_values(state: storage.FileState, partitions: dict[str, str]) -> DataFile:
    """A file with those of its folders' names that are columns of the job."""
    told = partitions_of(state.path)
    mine = tuple((name, told[name]) for name in partitions if name in told)
    return DataFile(state.path, state.size_bytes, state.modified_ns, (), partitions=mine)


def _row_range(
    source: RowSource, file: Any, state: storage.FileState, piece: Piece
) -> Iterator[pa.Table]:
    """Rows `start` to `stop` of a Parquet file, some at a time."""
    parquet = pq.ParquetFile(file)
    metadata = parquet.metadata
    held = set(parquet.schema_arrow.names)
    columns = [name for name in source.columns if name in held]
    groups: list[int] = []
    begin = first = 0
    for group in range(metadata.num_row_groups):
        end = begin + metadata.row_group(group).num_rows
        if begin < piece.stop and end > piece.start:
            first = first if groups else begin
            groups.append(group)
        begin = end
    row = first
    row_bytes = max([1.0, *(group_row_bytes(metadata, group, columns) for group in groups)])
    rows_at_once = max(1, min(_ROWS_AT_ONCE, int(_BYTES_AT_ONCE / row_bytes)))
    largest = max([0, *(metadata.row_group(group).total_byte_size for group in groups)])
    is_far = is_remote(state.path)
    if largest > (_FAR_BYTES if is_far else _BYTES_AT_ONCE):  # by pages, not whole columns
        buffer_bytes = max(2**16, min(2**20, _BYTES_AT_ONCE // max(1, len(columns))))
        parquet = pq.ParquetFile(file, metadata=metadata, buffer_size=buffer_bytes)
    elif is_far:
        parquet = pq.ParquetFile(file, metadata=metadata, pre_buffer=True)
    for batch in parquet.iter_batches(
        rows_at_once, row_groups=groups, columns=columns, use_threads=False
    ):
        start, stop = max(piece.start - row, 0), min(piece.stop - row, batch.num_rows)
        row += batch.num_rows
        if stop > start:
            yield pa.Table.from_batches([batch.slice(start, stop - start)])
        if row >= piece.stop:
            return


def group_row_bytes(metadata: pq.FileMetaData, group: int, columns: Collection[str]) -> float:
    """About the memory that a row of some columns of a row group takes."""
    found = metadata.row_group(group)
    rows = max(1, found.num_rows)
    whole = found.total_byte_size / rows + 8.0 * found.num_columns
    if whole * _ROWS_AT_ONCE <= _BYTES_AT_ONCE:
        return float(whole)  # of all columns, which is fast to tell
    parts = [found.column(number) for number in range(found.num_columns)]
    ours = [part for part in parts if _is_part_of(part.path_in_schema, columns)]
    ours_bytes = sum(part.total_uncompressed_size for part in ours)
    return float(ours_bytes / rows + 8.0 * len(ours))


def _is_part_of(path: str, columns: Collection[str]) -> bool:
    """Whether a path of Parquet's is a column or is inside of one; names may have dots."""
    if path in columns:
        return True
    steps = path.split(".")
    return any(".".join(steps[:count]) in columns for count in range(1, len(steps)))


def _rechunked(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        if held and table.schema != held[0].schema:
            table = table.select(held[0].column_names).cast(held[0].schema)
        held.append(table)
        count += table.num_rows
        while count >= rows:
            whole = pa.concat_tables(held) if len(held) > 1 else held[0]
            yield whole.slice(0, rows)
            rest = whole.slice(rows)
            held, count = ([rest], rest.num_rows) if rest.num_rows else ([], 0)
    if count:
        yield pa.concat_tables(held)


def _columnar(source: RowSource, table: pa.Table, first_row: int) -> Chunk:
    """A chunk of columns that have their types already."""
    marks = Marks(table.num_rows, first_row)
    for name, wanted in source.wanted.items():
        column = table[name]
        marks.mark(null_rows(column), "missing_value", f"{name!r} has no value", name)
        size = 1 if isinstance(wanted, str) else math.prod(wanted)
        kind = column.type
        if size > 1 and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            lengths = np.asarray(pc.fill_null(pc.list_value_length(column), size))
            text = f"{name!r} has a list of another length than {size}"
            marks.mark(lengths != size, "wrong_shape", text, name)
    kept = table.select(list(source.kept)).replace_schema_metadata(None)
    return marks.chunk(table.select(list(source.wanted)), kept)


# -- text ------------------------------------------------------------------------------------------

_Text = tuple[int, bytes, NDArray[np.int64]]  # file, records, where each begins


def grouped_text(source: RowSource, pieces: Sequence[Piece], rows: int) -> Iterator[list[_Text]]:
    """Records, so many at a time; a group may have parts of several files."""
    group: list[_Text] = []
    count = 0
    for piece in pieces:
        text = _bytes_of(source, piece)
        records = split_records(text, source.format == "csv")
        if len(records.starts) != piece.rows:
            raise BatchError(
                f"{source.files[piece.file].path} has {len(records.starts)} rows where "
                f"{piece.rows} were planned. It changed; submit the job again.",
                "input_changed",
            )
        done = 0
        while done < piece.rows:
            until = min(piece.rows, done + rows - count)
            begin, end = int(records.starts[done]), int(records.ends[until - 1])
            group.append((piece.file, text[begin:end], records.starts[done:until] - begin))
            count, done = count + until - done, until
            if count == rows:
                yield group
                group, count = [], 0
    if group:
        yield group


def _bytes_of(source: RowSource, piece: Piece) -> bytes:
    state = source.files[piece.file]
    try:
        with opened(state.path, source.allowed, state) as file:
            file.seek(piece.start)
            return bytes(file.read(piece.stop - piece.start))
    except OSError as error:
        raise ReadError(
            f"cannot read {state.path}: {reason(state.path, error)}. It was readable when the job "
            "was planned; check the storage, then submit the job again."
        ) from error


def _text_chunk(
    source: RowSource, file: int, text: bytes, starts: NDArray[np.int64], first_row: int
) -> Chunk:
    if source.format == "csv":
        return _csv_chunk(source, source.names[file], text, starts, first_row)
    lines = [text[a:b] for a, b in _spans(starts, len(text))]
    is_enveloped = source.format == "openai"
    return json_rows(text, lines, source.wanted, source.kept, first_row, is_enveloped)


def _spans(starts: NDArray[np.int64], end: int) -> Iterator[tuple[int, int]]:
    bounds = [*starts.tolist(), end]
    return zip(bounds, bounds[1:], strict=False)


def _csv_chunk(
    source: RowSource,
    names: Sequence[str],
    text: bytes,
    starts: NDArray[np.int64],
    first_row: int,
) -> Chunk:
    marks = Marks(len(starts), first_row)
    needed = source.columns
    table = parsed_csv(names, needed, text, len(starts))
    if table is None:
        table = csv_by_lines(names, needed, text, starts, marks)
    inputs = {
        name: _csv_values(table[name], wanted, name, marks)
        for name, wanted in source.wanted.items()
    }
    kept = {
        name: typed_text(table[name].combine_chunks(), kind) for name, kind in source.kept.items()
    }
    return marks.chunk(pa.table(inputs), pa.table(kept))


def parsed_csv(names: Sequence[str], needed: list[str], text: bytes, rows: int) -> pa.Table | None:
    """All rows as text, or None where one of them is not like the others."""
    bad: list[pacsv.InvalidRow] = []

    def refuse(row: pacsv.InvalidRow) -> str:
        bad.append(row)
        return "skip"

    try:
        table = pacsv.read_csv(
            pa.BufferReader(text),
            read_options=pacsv.ReadOptions(
                column_names=list(names), use_threads=False, block_size=len(text) + 1
            ),
            parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(names, _TEXT), include_columns=needed
            ),
        )
    except pa.ArrowException:
        return None
    return None if bad or table.num_rows != rows else table


def csv_by_lines(
    names: Sequence[str],
    needed: list[str],
    text: bytes,
    starts: NDArray[np.int64],
    marks: Marks,
) -> pa.Table:
    """Row for row as text; nulls where a row is marked as none."""
    places = [list(names).index(name) for name in needed]
    columns: list[list[str | None]] = [[] for _ in needed]
    for index, (begin, end) in enumerate(_spans(starts, len(text))):
        values: list[str] | None = None
        try:
            line = text[begin:end].decode()
            read = csv.reader(io.StringIO(line, newline=""), strict=True)
            rows = [row for row in read if row]  # blank lines may follow
            if len(rows) == 1 and len(rows[0]) == len(names):
                values = rows[0]
            else:
                count = len(rows[0]) if rows else 0
                marks.mark_row(
                    index, "malformed_row", f"{count} values; the file has {len(names)} columns"
                )
        except (UnicodeDecodeError, csv.Error) as error:
            marks.mark_row(index, "malformed_row", f"not a row of CSV in UTF-8: {error}")
        for column, place in zip(columns, places, strict=True):
            column.append(None if values is None else values[place])
    return pa.table({n: pa.array(c, _TEXT) for n, c in zip(needed, columns, strict=True)})


def _csv_values(
    column: pa.ChunkedArray, wanted: tuple[int, ...] | str, name: str, marks: Marks
) -> pa.Array:
    """Text of a column in what the model takes; what cannot be is marked."""
    text = column.combine_chunks()
    if wanted == "string":
        marks.mark(np.asarray(pc.is_null(text)), "missing_value", f"{name!r} has no value", name)
        return text
    trimmed = pc.utf8_trim_whitespace(text)
    is_missing = pc.or_kleene(pc.is_null(trimmed), pc.is_in(trimmed, _MISSING))
    marks.mark(np.asarray(is_missing), "missing_value", f"{name!r} has no value", name)
    values = pc.if_else(is_missing, pa.scalar(None, _TEXT), trimmed)
    if wanted == "timestamp[us]":
        return values
    kind = pa.int64() if wanted == "int64" else pa.float64()
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        pass
    for word, digit in _TRUTH.items():
        values = pc.if_else(pc.equal(values, word), digit, values)
    pattern = r"^[+-]?\d{1,18}$" if wanted == "int64" else _NUMBER
    fits = pc.fill_null(pc.match_substring_regex(values, pattern, ignore_case=True), True)
    marks.mark(~np.asarray(fits), "not_a_number", f"{name!r} is no number", name)
    return pc.if_else(fits, values, pa.scalar(None, _TEXT)).cast(kind)


def typed_text(text: pa.Array, kind: str) -> pa.Array:
    """A column of text that goes to the output, in the type that the plan found for it."""
    if kind == "string":
        return text
    trimmed = pc.utf8_trim_whitespace(text)
    values = pc.if_else(pc.is_in(trimmed, _MISSING), pa.scalar(None, _TEXT), trimmed)
    return values.cast({"int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}[kind])
