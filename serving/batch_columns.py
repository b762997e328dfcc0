"""Columns of text inputs: their names, and the types that hold all of their values."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from configs.errors import did_you_mean
from data_pipeline.csv_text import MISSING
from data_pipeline.tables import Wanted
from serving.batch_rows import RowSource, csv_by_lines, grouped_text, parsed_csv
from serving.errors import BatchError
from serving.line_rows import fits_int64, parsed_line
from serving.locations import opened
from serving.row_errors import Marks
from serving.shards import Shard, header_of

_TEXT = pa.string()
_MISSING = pa.array(MISSING)
_BLOCK_ROWS = 2**16
_KINDS = {pa.int64(): "int64", pa.float64(): "double", pa.bool_(): "bool"}

# Digits that are a name rather than an amount: 007, or more of them than a float64 can tell apart.
_CODE = r"^[+-]?(0[0-9]|[0-9]{16})"


def kept_columns(
    keep: str | tuple[str, ...], names: Sequence[str], wanted: Wanted
) -> tuple[str, ...]:
    """The columns that are joined to the output.

    Raises:
        BatchError: One is named that is not there.
    """
    unique = tuple(dict.fromkeys(names))
    if keep == "all":
        return unique
    if keep == "keys":
        return tuple(name for name in unique if name not in wanted)
    for name in keep:
        if name not in unique:
            raise BatchError(
                f"keep names the column {name!r}; the input has {', '.join(unique)}."
                f"{did_you_mean(name, unique)} Correct the name.",
                "missing_column",
                column=name,
            )
    return tuple(dict.fromkeys(keep))


def csv_names(source: RowSource, begins: list[int]) -> Iterator[tuple[str, ...]]:
    """Names of the columns of each CSV file; `begins` is told where the rows begin."""
    for state in source.files:
        with opened(state.path, source.allowed, state) as file:
            header, begin = header_of(file)
        try:
            names = next(csv.reader(io.StringIO(header.decode(), newline="")))
        except (UnicodeDecodeError, csv.Error) as error:
            raise BatchError(
                f"{state.path} has no line of names in UTF-8 ({error}). Convert the file.",
                "unreadable_file",
                line=1,
            ) from None
        begins.append(begin)
        yield tuple(names)


def text_types(source: RowSource, cut: Sequence[Shard], kept: Sequence[str]) -> dict[str, str]:
    """For columns of CSV the narrowest of whole numbers, numbers and truth values, else text.

    Reads all rows once.
    """
    possible = {name: list(_KINDS) for name in kept}
    for shard in cut if kept else ():
        for texts in grouped_text(source, shard.pieces, _BLOCK_ROWS):
            for file, text, starts in texts:
                table = parsed_csv(source.names[file], list(kept), text, len(starts))
                if table is None:  # a bad row is among them: the others decide
                    names, marks = source.names[file], Marks(len(starts), 0)
                    table = csv_by_lines(names, list(kept), text, starts, marks)
                for name in kept:
                    values = table[name].combine_chunks()
                    possible[name] = [k for k in possible[name] if _fits(values, k)]
    return {name: _KINDS[kinds[0]] if kinds else "string" for name, kinds in possible.items()}


def _fits(text: pa.Array, kind: pa.DataType) -> bool:
    trimmed = pc.utf8_trim_whitespace(text)
    values = pc.if_else(pc.is_in(trimmed, _MISSING), pa.scalar(None, _TEXT), trimmed)
    try:
        values.slice(0, 16).cast(kind)  # a cast fails as slowly as it succeeds
        cast = values.cast(kind)
    except pa.ArrowInvalid:
        return False
    if pa.types.is_integer(kind):
        return bool(pc.all(pc.equal(cast.cast(_TEXT), values)).as_py() is not False)
    if pa.types.is_floating(kind):
        return not pc.any(pc.match_substring_regex(values, _CODE)).as_py()
    return True


def json_columns(source: RowSource, cut: Sequence[Shard]) -> dict[str, str]:
    """Names and types of all columns of NDJSON; json for those of several types, or nested.

    Reads all rows once.
    """
    found: dict[str, str] = {}
    for shard in cut:
        for texts in grouped_text(source, shard.pieces, _BLOCK_ROWS):
            for _, text, _ in texts:
                for name, kind in _block_types(text).items():
                    found[name] = _common(found.get(name, ""), kind)
    return {name: kind or "json" for name, kind in found.items()}


def _block_types(text: bytes) -> dict[str, str]:
    try:
        table = pajson.read_json(
            pa.BufferReader(text),
            read_options=pajson.ReadOptions(use_threads=False, block_size=len(text) + 1),
        )
    except pa.ArrowException:
        return _line_types(text)
    return {field.name: _arrow_kind(field.type) for field in table.schema}


def _arrow_kind(kind: pa.DataType) -> str:
    if pa.types.is_null(kind):
        return ""
    if pa.types.is_timestamp(kind) or pa.types.is_string(kind):
        return "string"
    return _KINDS.get(kind, "json")


def _line_types(text: bytes) -> dict[str, str]:
    kinds: dict[type, str] = {bool: "bool", int: "int64", float: "double", str: "string"}
    found: dict[str, str] = {}
    for line in text.split(b"\n"):
        try:
            row: Any = parsed_line(line) if line.strip() else None
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            for name, value in row.items():
                kind = "" if value is None else kinds.get(type(value), "json")
                if kind == "int64" and not fits_int64(value):
                    kind = "json"
                found[name] = _common(found.get(name, ""), kind)
    return found


def _common(first: str, second: str) -> str:
    if first == second or not second:
        return first
    if not first:
        return second
    return "double" if {first, second} == {"int64", "double"} else "json"
