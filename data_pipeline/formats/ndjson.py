"""NDJSON: one JSON object a line, typed over all lines of all files.

A file is read twice, as CSV is: once for the types, once for the rows. Blocks of whole lines are
parsed by Arrow; only blocks that it refuses are looked at line by line, to name or leave out the
bad ones. A key that a line lacks is null, and NaN, which Python writes, is a number. Lists of one
length in all rows become fixed-size lists, nested ones tensors.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from data_pipeline.errors import DataError
from data_pipeline.formats.pieces import (
    BATCH_BYTES,
    BadLine,
    Piece,
    Request,
    fixed_lists,
    list_type,
    spread,
)
from data_pipeline.inputs import open_input
from data_pipeline.storage import FileState

_LONGEST_LINE_BYTES = 256 * 2**20
_SHOWN_LETTERS = 1_000

Shape = tuple[int, ...]


@dataclass
class _Columns:
    """What is known so far of the columns: types, and the shape of their rows.

    A shape is None where rows differ, and missing where there is no row with a value yet.
    """

    types: dict[str, pa.DataType] = field(default_factory=dict)
    shapes: dict[str, Shape | None] = field(default_factory=dict)

    def add(self, name: str, kind: pa.DataType, shape: Shape | None, has_rows: bool) -> bool:
        """Take in one more part of a column; False where no type holds both."""
        common = _common_type(self.types.get(name, pa.null()), kind)
        if common is None:
            return False
        self.types[name] = common
        if has_rows:
            self.shapes[name] = shape if self.shapes.get(name, shape) == shape else None
        return True


@dataclass(frozen=True)
class _Read:
    """One file after the first pass."""

    columns: _Columns
    rows: int
    bad_lines: tuple[BadLine, ...]


def open_files(request: Request) -> list[Piece]:
    """Read all files once for the types of their columns; a piece a file.

    Raises:
        DataError: A line is no JSON object, or a column's values have no common type.
    """
    skips = request.data.on_bad_rows == "skip"
    reads = list(
        request.pool.map(lambda file: _first_pass(file, skips, request.advance), request.files)
    )
    columns = _Columns()
    for file, read in zip(request.files, reads, strict=True):
        for name, kind in read.columns.types.items():
            shape = read.columns.shapes.get(name)
            if not columns.add(name, kind, shape, name in read.columns.shapes):
                raise _conflict(request.name, name, columns.types[name], kind, file.path)
    parsed = pa.schema([(name, _without_null(kind)) for name, kind in columns.types.items()])
    schema = pa.schema([(each.name, _final_type(each.type, columns, each.name)) for each in parsed])
    pieces = [
        Piece(
            (file,),
            read.rows,
            functools.partial(_second_pass, file, parsed, schema, read.bad_lines),
            read.bad_lines,
        )
        for file, read in zip(request.files, reads, strict=True)
    ]
    return pieces


def _first_pass(file: FileState, skips: bool, advance: Callable[[int], None]) -> _Read:
    columns, rows, bad_lines = _Columns(), 0, []
    for first_line, block in _blocks(file.path):
        try:
            table = _parsed(block)
        except pa.ArrowInvalid as error:
            good, bad = _split(block, first_line)
            if bad and not skips:
                raise DataError(
                    f"{file.path}, line {bad[0].line}: {bad[0].reason}. One JSON object a line is "
                    "allowed. Correct the line, or set data.on_bad_rows: skip."
                ) from None
            bad_lines += bad
            table = _parsed_good(file.path, first_line, good, error if not bad else None)
        rows += table.num_rows
        for name in table.column_names:
            values = table[name].combine_chunks().drop_null()
            if not columns.add(name, table[name].type, _row_shape(values), len(values) > 0):
                where = f"{file.path} near line {first_line}"
                raise _conflict("data", name, columns.types[name], table[name].type, where)
        advance(len(block))
    return _Read(columns, rows, tuple(bad_lines))


def _second_pass(
    file: FileState, parsed: pa.Schema, schema: pa.Schema, bad_lines: tuple[BadLine, ...]
) -> Iterator[pa.RecordBatch]:
    bad = {line.line for line in bad_lines}
    for first_line, block in _blocks(file.path):
        if bad:
            lines = enumerate(block.split(b"\n"), first_line)
            block = b"\n".join(line for number, line in lines if number not in bad)
        try:
            table = _parsed(block, parsed)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{file.path}, near line {first_line}: {error}. All lines were readable a moment "
                "ago; check that nothing writes to the file."
            ) from None
        arrays = [_finished(table[each.name].combine_chunks(), each.type) for each in schema]
        if table.num_rows:
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _blocks(path: str) -> Iterator[tuple[int, bytes]]:
    """Whole lines, about four megabytes at a time, and the number of the first one."""
    try:
        with open_input(path) as file:
            yield from _whole_lines(path, file)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error}. It may be truncated; write it again, or leave it out."
        ) from None


def _whole_lines(path: str, file: Any) -> Iterator[tuple[int, bytes]]:
    line, waiting_bytes = 1, 0
    parts: list[bytes] = []
    chunk = file.read(BATCH_BYTES).removeprefix(b"\xef\xbb\xbf")
    while chunk:
        cut = chunk.rfind(b"\n") + 1
        if cut:
            block = b"".join([*parts, chunk[:cut]])
            yield line, block
            line += block.count(b"\n")
            parts, waiting_bytes = [], 0
        parts.append(chunk[cut:])
        waiting_bytes += len(chunk) - cut
        if waiting_bytes > _LONGEST_LINE_BYTES:
            raise DataError(
                f"{path}, line {line}: no end within {_LONGEST_LINE_BYTES >> 20} MiB; one JSON "
                "object a line is allowed. Write each row on a line of its own."
            )
        chunk = file.read(BATCH_BYTES)
    if waiting_bytes:
        yield line, b"".join(parts)


def _parsed(block: bytes, schema: pa.Schema | None = None) -> pa.Table:
    if not block.strip():
        return pa.table({} if schema is None else schema.empty_table())
    try:
        block.decode()
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(str(error)) from None
    return pajson.read_json(
        pa.BufferReader(block),
        # One block: where Arrow cuts it itself, its parts must agree on types.
        read_options=pajson.ReadOptions(use_threads=False, block_size=len(block) + 1),
        parse_options=pajson.ParseOptions(explicit_schema=schema),
    )


def _parsed_good(
    path: str, first_line: int, lines: list[bytes], error: pa.ArrowInvalid | None
) -> pa.Table:
    """Lines that are JSON objects each; what is left to go wrong is their types."""
    try:
        if error is not None:
            raise error
        return _parsed(b"\n".join(lines))
    except pa.ArrowInvalid as refused:
        last = first_line + len(lines) - 1
        raise DataError(
            f"{path}, lines {first_line} to {last}: {refused}. One type a column is allowed. "
            "Convert the values, or leave the column out."
        ) from None


def _split(block: bytes, first_line: int) -> tuple[list[bytes], list[BadLine]]:
    """Good lines, and bad ones with the reason."""
    good, bad = [], []
    for number, line in enumerate(block.split(b"\n"), first_line):
        reason = _what_is_wrong(line) if line.strip() else None
        if reason is None:
            good.append(line)
        else:
            text = line[:_SHOWN_LETTERS].decode(errors="replace").rstrip("\r")
            bad.append(BadLine(number, reason, text))
    return good, bad


def _what_is_wrong(line: bytes) -> str | None:
    try:
        value = json.loads(line.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError:
        return "not text in UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except ValueError as error:
        return f"not JSON: {error}"
    return None if isinstance(value, dict) else f"{type(value).__name__} instead of an object"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found


def _common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """The narrowest type for the values of both; None where there is none."""
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if {first, second} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(first) and pa.types.is_list(second):
        inner = _common_type(first.value_type, second.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(first) and pa.types.is_struct(second):
        return _common_struct(first, second)
    is_text = [pa.types.is_string(kind) or pa.types.is_timestamp(kind) for kind in (first, second)]
    if all(is_text):
        both_times = pa.types.is_timestamp(first) and pa.types.is_timestamp(second)
        return pa.timestamp("ns") if both_times else pa.string()
    return None


def _common_struct(first: pa.StructType, second: pa.StructType) -> pa.DataType | None:
    kinds: dict[str, pa.DataType] = {each.name: each.type for each in first}
    for each in second:
        common = _common_type(kinds.get(each.name, pa.null()), each.type)
        if common is None:
            return None
        kinds[each.name] = common
    return pa.struct(list(kinds.items()))


def _without_null(kind: pa.DataType) -> pa.DataType:
    """The type with float64 where no value was seen."""
    if pa.types.is_null(kind):
        return pa.float64()
    return pa.list_(_without_null(kind.value_type)) if pa.types.is_list(kind) else kind


def _row_shape(values: pa.Array) -> Shape | None:
    """The shape of each value: `()` for scalars, None for lists of several lengths or of nulls."""
    if not pa.types.is_list(values.type):
        return ()
    if values.null_count or not len(values):
        return None
    extremes: Mapping[str, int] = pc.min_max(pc.list_value_length(values)).as_py()
    if extremes["min"] != extremes["max"] or extremes["min"] == 0:
        return None
    inner = _row_shape(values.flatten())
    return None if inner is None else (extremes["min"], *inner)


def _final_type(kind: pa.DataType, columns: _Columns, name: str) -> pa.DataType:
    shape, element = columns.shapes.get(name), kind
    while pa.types.is_list(element):
        element = element.value_type
    is_number = pa.types.is_primitive(element)
    if not shape or (len(shape) > 1 and not is_number):
        return kind
    return list_type(element, shape)


def _finished(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """A column as parsed, as fixed-size lists where these were found."""
    if array.type == kind:
        return array
    is_present = np.asarray(pc.is_valid(array))
    values = array.drop_null()
    while pa.types.is_list(values.type):
        values = values.flatten()
    return spread(fixed_lists(values, kind), is_present)


def _conflict(
    name: str, column: str, first: pa.DataType, second: pa.DataType, where: str
) -> DataError:
    return DataError(
        f"{name}: column {column!r} holds {first} at first but {second} in {where}; one type is "
        "allowed. Convert the values, or leave the file out."
    )
