"""Tables as bodies: Arrow streams and files, and Parquet, in; the predictions as a table, out.

Owns the reading of a stranger's table. Only the model's columns are decoded; rows are counted from
the metadata before anything is. Bodies of Arrow with compressed buffers are refused, as each of
these may say itself how large it becomes: compress the body (Content-Encoding) instead.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.features import Array, InputColumn, feature_values, null_rows
from serving.bodies import ARROW_FILE, ARROW_STREAM, PARQUET
from serving.errors import InputError, RefusedRequest
from serving.predictor import Predictor

_FILE_START = b"ARROW1\0\0"
_INFLATION = 64  # the most that dictionaries and run lengths are believed to save


def rows_of_table(predictor: Predictor, body: bytes, kind: str, most_rows: int) -> Array:
    """Rows of the model from a body.

    Args:
        predictor: Whose columns are read.
        body: Whole.
        kind: Media type, one of `serving.bodies.TABLES`.
        most_rows: More are refused before they are decoded.

    Returns:
        `(rows, *input_shape) float32`.

    Raises:
        RefusedRequest: It is no such table, or too large.
        InputError: A column is missing, or not what it should be.
    """
    layout = predictor.signature.layout
    names = [column.name for column in layout.features]
    try:
        if kind == PARQUET:
            texts = {column.name for column in layout.features if column.encoding is not None}
            table = _read_parquet(body, names, texts, most_rows)
        else:
            table = _read_arrow(body, kind, names, most_rows)
        columns = {
            column.name: _values(column, table[column.name])
            for column in layout.features
            if column.name in table.column_names
        }
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedRequest(f"the body is not {kind} that can be read ({reason}).") from None
    if table.num_rows == 0:
        raise InputError("received no rows; one or more are allowed.")
    return predictor.rows(columns)


def table_of(values: Array, name: str, kind: str) -> bytes:
    """Predictions as a table of one column: numbers, or lists of fixed size."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    size = int(np.prod(values.shape[1:]))
    column = flat if size == 1 else pa.FixedSizeListArray.from_arrays(flat, size)
    table = pa.table({name: column})
    sink = pa.BufferOutputStream()
    if kind == PARQUET:
        pq.write_table(table, sink)
    else:
        open_writer = pa.ipc.new_file if kind == ARROW_FILE else pa.ipc.new_stream
        with open_writer(sink, table.schema) as writer:
            writer.write_table(table)
    return bytes(sink.getvalue())


def _read_arrow(body: bytes, kind: str, names: list[str], most_rows: int) -> pa.Table:
    source = pa.py_buffer(body)
    if kind == ARROW_STREAM:
        _refuse_compressed(source)
        schema = pa.ipc.open_stream(source).schema
    else:
        _refuse_compressed(source.slice(len(_FILE_START)))  # a file is a stream between two marks
        schema = pa.ipc.open_file(source).schema
    wanted = sorted({schema.get_field_index(name) for name in names} - {-1})
    options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
    if kind == ARROW_FILE:
        with pa.ipc.open_file(source, options=options) as reader:
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            return _gathered(batches, reader.schema, most_rows)
    with pa.ipc.open_stream(source, options=options) as reader:
        return _gathered(reader, reader.schema, most_rows)


def _gathered(batches: Any, schema: pa.Schema, most_rows: int) -> pa.Table:
    kept = []
    rows = 0
    for batch in batches:
        rows += batch.num_rows
        if rows > most_rows:
            raise _too_many(rows, most_rows)
        batch.validate()
        kept.append(batch)
    return pa.Table.from_batches(kept, kept[0].schema if kept else schema)


def _refuse_compressed(source: pa.Buffer) -> None:
    reader = pa.ipc.MessageReader.open_stream(source)
    for message in reader:
        if message.type == "record batch" and _is_compressed(bytes(message.metadata)):
            raise RefusedRequest(
                "the buffers of this Arrow body are compressed; plain ones are allowed. Write "
                "it without compression, and compress the whole body with Content-Encoding: gzip."
            )


def _read_parquet(body: bytes, names: list[str], encoded: set[str], most_rows: int) -> pa.Table:
    with pq.ParquetFile(pa.BufferReader(body)) as file:
        rows = file.metadata.num_rows
        if rows > most_rows:
            raise _too_many(rows, most_rows)
        schema = file.schema_arrow
        wanted = [name for name in names if name in schema.names]
        texts = [n for n in wanted if n in encoded and _is_text(schema.field(n).type)]
        groups = range(file.metadata.num_row_groups)
        size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
        if size > _INFLATION * len(body) + 2**20:
            raise RefusedRequest(
                f"the Parquet body of {len(body)} bytes becomes {size}; {_INFLATION} times its "
                "length is allowed. Send it in parts.",
                413,
                "body_too_large",
            )
    # Repeated texts stay in their dictionary: decoded, a small body could fill the memory.
    with pq.ParquetFile(pa.BufferReader(body), read_dictionary=texts) as file:
        return file.read(columns=wanted, use_threads=False)


def _values(column: InputColumn, values: pa.ChunkedArray) -> Any:
    if column.encoding is not None:
        return values
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise InputError(f"column {column.name!r} is of {values.type}; numbers are allowed.")
    missing = null_rows(values) if values.null_count or _has_inner(values) else np.zeros(1, bool)
    if missing.any():
        row = int(np.argmax(missing))
        raise InputError(
            f"row {row}, column {column.name!r}: null or NaN; numbers are allowed. Fill the value "
            "in, or leave the row out."
        )
    try:
        return feature_values(column, values)
    except DataError as error:
        raise InputError(f"column {column.name!r} has {error}") from None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _has_inner(values: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_nested(values.type))


def _too_many(rows: int, most_rows: int) -> RefusedRequest:
    return RefusedRequest(
        f"received {rows} rows or more; {most_rows} in one request are allowed. Send them in "
        "parts, or as a batch job.",
        413,
        "too_many_rows",
    )


def _is_compressed(metadata: bytes) -> bool:
    """Whether the header of a record batch names a compression.

    A flatbuffer: Message{version, header_type, header, bodyLength}, in which the header is
    RecordBatch{length, nodes, buffers, compression}; absent fields have no offset in the vtable.
    """

    def number(at: int, width: int, is_signed: bool = False) -> int:
        return int.from_bytes(metadata[at : at + width], "little", signed=is_signed)

    def field(table: int, index: int) -> int:
        vtable = table - number(table, 4, True)
        at = 4 + 2 * index
        return number(vtable + at, 2) if at < number(vtable, 2) else 0

    message = number(0, 4)
    place = message + field(message, 2)
    return field(place + number(place, 4), 3) != 0
