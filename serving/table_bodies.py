"""Tables as bodies: Arrow streams and files, and Parquet, in; the predictions as a table, out.

Owns the reading of a stranger's table. Only the model's columns are decoded, and only where their
types are such as a model takes. Before a value of Parquet is decoded, the headers of all pages tell
how many there are and what they take (`serving.parquet_pages`). Bodies of Arrow with compressed
buffers are refused, as each of these may say itself how large it becomes: compress the body
(Content-Encoding) instead. Indices and offsets are checked before they are followed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.encoding import Category
from data_pipeline.errors import DataError
from data_pipeline.features import Array, InputColumn, feature_values, null_rows
from serving.bodies import ARROW_FILE, ARROW_STREAM, PARQUET
from serving.errors import InputError, RefusedRequest
from serving.parquet_pages import pages
from serving.predictor import Predictor

_FILE_START = b"ARROW1\0\0"
_MOST_PAGES = 100_000
_MOST_IN_FOOTER = 10_000  # columns, and row groups
_BLOCK_ROWS = 65_536
# Encodings whose values take no more than a page's header says: PLAIN, dictionaries, run lengths,
# bit packing, deltas of numbers, split streams. Delta encodings of texts say themselves how many
# and how long they are.
_ENCODINGS = {0, 2, 3, 4, 5, 8, 9}


def rows_of_table(
    predictor: Predictor, body: bytes, kind: str, most_rows: int, most_bytes: int
) -> Array:
    """Rows of the model from a body.

    Args:
        predictor: Whose columns are read.
        body: Whole.
        kind: Media type, one of `serving.bodies.TABLES`.
        most_rows: More are refused before they are decoded.
        most_bytes: A table that would take more in memory is refused before.

    Returns:
        `(rows, *input_shape) float32`.

    Raises:
        RefusedRequest: It is no such table, or too large.
        InputError: A column is missing, or not what it should be.
    """
    layout = predictor.signature.layout
    try:
        if kind == PARQUET:
            table = _read_parquet(body, layout.features, most_rows, most_bytes)
        else:
            table = _read_arrow(body, kind, layout.features, most_rows)
        _check_width(table.num_rows, layout.width, most_bytes)
        columns = {
            column.name: _values(column, table[column.name], most_bytes)
            for column in layout.features
            if column.name in table.column_names
        }
    except (pa.ArrowException, OSError, ValueError, IndexError, MemoryError) as error:
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


def _read_arrow(
    body: bytes, kind: str, features: Sequence[InputColumn], most_rows: int
) -> pa.Table:
    source = pa.py_buffer(body)
    if kind == ARROW_STREAM:
        _refuse_compressed(source)
        schema = pa.ipc.open_stream(source).schema
    else:
        _refuse_compressed(source.slice(len(_FILE_START)))  # a file is a stream between two marks
        schema = pa.ipc.open_file(source).schema
    wanted = [schema.names.index(column.name) for column in _checked(schema, features)]
    if not wanted:  # to the reader no field means every field
        raise InputError(
            f"no column {features[0].name!r}; received {', '.join(schema.names)[:200]}. Add the "
            "column."
        )
    options = pa.ipc.IpcReadOptions(included_fields=sorted(wanted), use_threads=False)
    if kind == ARROW_FILE:
        with pa.ipc.open_file(source, options=options) as reader:
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            return _gathered(batches, reader.schema, most_rows)
    with pa.ipc.open_stream(source, options=options) as reader:
        return _gathered(reader, reader.schema, most_rows)


def _checked(schema: pa.Schema, features: Sequence[InputColumn]) -> list[InputColumn]:
    """The model's columns that a table has, their types such as the model takes.

    Raises:
        InputError: A column comes twice, or is of another type.
    """
    found = [column for column in features if column.name in schema.names]
    for column in found:
        if schema.names.count(column.name) > 1:
            raise InputError(f"there are several columns {column.name!r}; one is allowed.")
        kind = schema.field(schema.names.index(column.name)).type
        allowed = "numbers" if column.encoding is None else "texts, whole numbers and moments"
        if not (_is_number(kind) if column.encoding is None else _is_raw(kind)):
            raise InputError(
                f"column {column.name!r} is of {str(kind)[:100]}; {allowed} are allowed."
            )
    return found


def _gathered(batches: Any, schema: pa.Schema, most_rows: int) -> pa.Table:
    kept = []
    rows = 0
    for batch in batches:
        rows += batch.num_rows
        if rows > most_rows:
            raise _too_many(rows, most_rows)
        batch.validate(full=True)  # indices, offsets and UTF-8: what follows trusts them
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


def _read_parquet(
    body: bytes, features: Sequence[InputColumn], most_rows: int, most_bytes: int
) -> pa.Table:
    with _open_parquet(body, []) as file:
        schema = file.schema_arrow
        found = _checked(schema, features)
        names = [column.name for column in found]
        texts = [n for n in names if _is_text(schema.field(n).type)]
        _check_pages(body, file.metadata, found, most_rows, most_bytes)
    # Repeated texts stay in their dictionary: decoded, a small body could fill the memory.
    batches: list[pa.RecordBatch] = []
    rows = 0
    with _open_parquet(body, texts) as file:
        for batch in file.iter_batches(_BLOCK_ROWS, columns=names, use_threads=False):
            rows += batch.num_rows
            if rows > most_rows:
                raise _too_many(rows, most_rows)
            batches.append(batch)
        return pa.Table.from_batches(batches, batches[0].schema if batches else schema)


def _open_parquet(body: bytes, texts: list[str]) -> pq.ParquetFile:
    return pq.ParquetFile(
        pa.BufferReader(body),
        read_dictionary=texts,
        thrift_container_size_limit=_MOST_IN_FOOTER,
        thrift_string_size_limit=len(body),
    )


def _check_pages(
    body: bytes,
    metadata: pq.FileMetaData,
    found: Sequence[InputColumn],
    most_rows: int,
    most_bytes: int,
) -> None:
    """Refuse a file whose pages hold more than its rows of these columns can, or too much.

    Raises:
        ValueError: The footer and the pages do not fit each other.
        RefusedRequest: It is too large.
    """
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    rows = sum(group.num_rows for group in groups)
    if rows > most_rows or metadata.num_rows > most_rows:
        raise _too_many(max(rows, metadata.num_rows), most_rows)
    _check_width(rows, sum(column.size for column in found), most_bytes)
    whole = memoryview(body)
    count = size = 0
    for column in found:
        place = _place_of(metadata, column.name)
        length = 1 if column.encoding is not None else max(1, column.size)
        for group in groups:
            values = 0
            for page in pages(whole, group.column(place)):
                count, size, values = count + 1, size + page.size_bytes, values + page.values
                if values > group.num_rows * length:
                    raise InputError(
                        f"column {column.name!r} has lists of other than {length} elements."
                    )
                if count > _MOST_PAGES:
                    raise ValueError(f"more than {_MOST_PAGES} pages; write larger ones")
                if page.encoding not in _ENCODINGS:
                    raise ValueError(
                        f"column {column.name!r} has the encoding {page.encoding}; PLAIN and "
                        "dictionaries are allowed"
                    )
                if size > most_bytes:
                    raise _too_large("the Parquet body", size, most_bytes)


def _check_width(rows: int, width: int, most_bytes: int) -> None:
    size = rows * width * np.dtype(np.float32).itemsize
    if size > most_bytes:
        raise _too_large(f"{rows} rows of this model", size, most_bytes)


def _place_of(metadata: pq.FileMetaData, name: str) -> int:
    """The only leaf below a column; the reader takes all whose path begins with its name."""
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    places = [i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]
    if len(places) != 1:
        raise ValueError(f"column {name!r} and another one cannot be told apart by their names")
    return places[0]


def _values(column: InputColumn, values: pa.ChunkedArray, most_bytes: int) -> Any:
    if column.encoding is not None:
        if pa.types.is_dictionary(values.type) and not isinstance(column.encoding, Category):
            size = sum(_unpacked_bytes(chunk) for chunk in values.chunks)
            if size > most_bytes:
                raise _too_large(f"column {column.name!r}", size, most_bytes)
        return values
    missing = null_rows(values) if values.null_count or _has_inner(values) else np.zeros(1, bool)
    if missing.any():
        row = int(np.argmax(missing))
        raise InputError(
            f"row {row}, column {column.name!r}: null or NaN; numbers are allowed. Fill the value "
            "in, or leave the row out."
        )
    try:
        with np.errstate(over="ignore"):  # infinity, which is refused with its row
            return feature_values(column, values)
    except DataError as error:
        raise InputError(f"column {column.name!r} has {error}") from None


def _unpacked_bytes(array: pa.DictionaryArray) -> int:
    """What a column of texts takes without its dictionary."""
    lengths = pc.binary_length(array.dictionary).fill_null(0).cast(pa.int64())
    return int(pc.sum(lengths.take(array.indices.drop_null())).as_py() or 0)


def _is_number(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def _is_raw(kind: pa.DataType) -> bool:
    """Whether a type is one of those that encodings take; each takes some of them."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return _is_text(kind) or bool(
        pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_temporal(kind)
        or pa.types.is_null(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _has_inner(values: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_nested(values.type))


def _too_large(what: str, size: int, most_bytes: int) -> RefusedRequest:
    return RefusedRequest(
        f"{what} would take {size} bytes or more; {most_bytes} are allowed. Send the rows in "
        "parts, or as a batch job.",
        413,
        "body_too_large",
    )


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
