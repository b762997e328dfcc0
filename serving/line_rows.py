"""Lines of JSON as rows: plain objects of columns, or requests of OpenAI's batch files.

Whole blocks are parsed by Arrow where all lines are as they should be; else each line is looked at
by itself, so that a bad one is told and the others are used.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.json as pajson

from data_pipeline.encoding import RawKind
from data_pipeline.tables import Wanted
from serving.row_errors import Chunk, Marks

_KINDS = {
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
    "json": pa.string(),
}
_RAW = {"string": pa.string(), "int64": pa.int64(), "timestamp[us]": pa.string()}
CUSTOM_ID = "custom_id"

Row = dict[str, Any]
Kind = tuple[int, ...] | RawKind


class _BadValueError(Exception):
    """A value that its column cannot hold: code and message."""


def json_rows(
    text: bytes,
    lines: Sequence[bytes],
    wanted: Wanted,
    kept: dict[str, str],
    first_row: int,
    is_enveloped: bool = False,
) -> Chunk:
    """Rows of lines.

    Args:
        text: All lines in one.
        lines: The same, one by one.
        wanted: The model's columns.
        kept: Columns that are joined to the output, and their types.
        first_row: Number in the job of the first line.
        is_enveloped: The lines are requests of OpenAI's batch files.
    """
    if not is_enveloped and "json" not in kept.values():
        chunk = _parsed(text, len(lines), wanted, kept, first_row)
        if chunk is not None:
            return chunk
    marks = Marks(len(lines), first_row)
    rows = [_row_of(line, index, marks, is_enveloped) for index, line in enumerate(lines)]
    inputs = {name: _column(rows, name, kind, marks) for name, kind in wanted.items()}
    joined = [_kept_column(rows, name, kind) for name, kind in kept.items()]
    return marks.chunk(pa.table(inputs), pa.table(joined, schema=_kept_schema(kept)))


def _parsed(
    text: bytes, count: int, wanted: Wanted, kept: dict[str, str], first_row: int
) -> Chunk | None:
    """All lines at once; None where one of them is not like the others, or has no value."""
    fields = {name: _raw_type(kind) for name, kind in wanted.items()}
    for name, kind in kept.items():
        if fields.setdefault(name, _KINDS[kind]) != _KINDS[kind]:
            return None
    try:
        table = pajson.read_json(
            pa.BufferReader(text),
            read_options=pajson.ReadOptions(use_threads=False, block_size=len(text) + 1),
            parse_options=pajson.ParseOptions(
                explicit_schema=pa.schema(list(fields.items())), unexpected_field_behavior="ignore"
            ),
        )
        if table.num_rows != count or any(table[name].null_count for name in wanted):
            return None
        for name, shape in wanted.items():
            if pa.types.is_list(fields[name]) and not isinstance(shape, str):
                lengths = table[name].combine_chunks().value_lengths()
                if lengths.unique().to_pylist() != [math.prod(shape)]:
                    return None
                if table[name].combine_chunks().flatten().null_count:
                    return None
    except pa.ArrowException:
        return None
    return Marks(count, first_row).chunk(table.select(list(wanted)), table.select(list(kept)))


def _raw_type(kind: Kind) -> pa.DataType:
    if isinstance(kind, str):
        return _RAW[kind]
    # Nested lists are left to the slow way; one of them is told apart by its length.
    return pa.float64() if math.prod(kind) == 1 and not kind else pa.list_(pa.float64())


def _row_of(line: bytes, index: int, marks: Marks, is_enveloped: bool) -> Row:
    try:
        value = parsed_line(line)
    except (ValueError, RecursionError) as error:
        marks.mark_row(index, "invalid_json_line", f"not JSON: {str(error)[:200]}")
        return {}
    if not isinstance(value, dict):
        text = f"{type(value).__name__} instead of an object"
        marks.mark_row(index, "invalid_json_line", text)
        return {}
    if not is_enveloped:
        return dict(value)
    row, message = request_row(value)
    if message:
        marks.mark_row(index, "invalid_request", message)
    return {**row, CUSTOM_ID: value.get(CUSTOM_ID)}


def parsed_line(line: bytes) -> Any:
    """The value in a line of JSON, whose texts are Unicode.

    Raises:
        ValueError: It is not JSON, not UTF-8, or has half of a surrogate pair, as no column can.
        RecursionError: It is too deep.
    """
    value = json.loads(line)
    if b"\\u" in line:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def request_row(request: Row) -> tuple[Row, str]:
    """The columns in a request of OpenAI's batch files, and what is wrong with it, or nothing.

    A body holds one row: `{"instances": [{...}]}`, `{"inputs": {...}}`, or the columns themselves.
    """
    body = request.get("body")
    if not isinstance(body, dict):
        return {}, "no body; an object is needed"
    row: Any = body
    if "instances" in body:
        instances = body["instances"]
        if not isinstance(instances, list) or len(instances) != 1:
            return {}, "instances holds other than one row; one row a line is allowed"
        row = instances[0]
    elif isinstance(body.get("inputs"), dict):
        row = body["inputs"]
    if not isinstance(row, dict):
        return {}, "the row is no object with the model's columns"
    return row, ""


def _column(rows: Sequence[Row], name: str, kind: Kind, marks: Marks) -> pa.Array:
    """Values of a column; where one cannot be had, its row is marked and None stands there."""
    values: list[Any] = []
    for index, row in enumerate(rows):
        value = None
        if not marks.is_bad[index]:
            try:
                value = _value(row.get(name), kind)
            except _BadValueError as error:
                code, text = error.args
                marks.mark_row(index, code, f"{name!r} {text}", name)
        values.append(value)
    if isinstance(kind, str):
        return pa.array(values, _RAW[kind])
    return pa.array(values, pa.list_(pa.float64()) if kind else pa.float64())


def _value(value: Any, kind: Kind) -> Any:
    if value is None:
        raise _BadValueError("missing_value", "has no value")
    if kind in ("string", "timestamp[us]"):
        if isinstance(value, str):
            return value
        if isinstance(value, int):
            return str(value)
        raise _BadValueError("wrong_type", f"is {type(value).__name__}; a text is needed")
    if kind == "int64":
        if isinstance(value, int) and fits_int64(value):
            return int(value)
        raise _BadValueError("wrong_type", f"is {type(value).__name__}; a whole number is needed")
    if isinstance(kind, str) or not kind:
        return _number(value)
    flat = list(_flat(value))
    if len(flat) != math.prod(kind):
        raise _BadValueError("wrong_shape", f"has {len(flat)} numbers; the shape is {list(kind)}")
    return flat


def fits_int64(value: int) -> bool:
    """Whether a column of whole numbers can hold a value."""
    return -(2**63) <= value < 2**63


def _flat(value: Any, depth: int = 0) -> Any:
    if isinstance(value, list) and depth < 16:
        for element in value:
            yield from _flat(element, depth + 1)
    else:
        yield _number(value)


def _number(value: Any) -> float:
    if value is None:
        raise _BadValueError("missing_value", "has no value")
    if not isinstance(value, int | float):
        raise _BadValueError("not_a_number", f"is {type(value).__name__}; a number is needed")
    try:
        number = float(value)
    except OverflowError:
        raise _BadValueError("not_a_number", "is too large") from None
    if math.isnan(number):
        raise _BadValueError("missing_value", "is NaN")
    return number


def _kept_schema(kept: dict[str, str]) -> pa.Schema:
    """Types of kept columns; those of JSON text are marked as such."""
    notes = {name: {"kind": "json"} if kind == "json" else None for name, kind in kept.items()}
    return pa.schema([pa.field(n, _KINDS[kind], metadata=notes[n]) for n, kind in kept.items()])


def _kept_column(rows: Sequence[Row], name: str, kind: str) -> pa.Array:
    found = [row.get(name) for row in rows]
    if kind == "json":
        return pa.array([None if v is None else json.dumps(v) for v in found], pa.string())
    return pa.array([_kept_value(value, kind) for value in found], _KINDS[kind])


_TYPES: dict[str, Any] = {"int64": int, "double": (int, float), "bool": bool, "string": str}


def _kept_value(value: Any, kind: str) -> Any:
    """A value of a kept column as its type has it; None where it has not."""
    if not isinstance(value, _TYPES[kind]) or (kind == "int64" and not fits_int64(value)):
        return None
    try:
        return float(value) if kind == "double" else value
    except OverflowError:
        return None
