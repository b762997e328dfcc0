"""Arrow IPC, both the file format (also Feather version 2) and the stream.

Batches keep their types; dictionaries become plain values, so that all files agree.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from data_pipeline.errors import DataError
from data_pipeline.formats.pieces import Piece, Request, conformed, one_schema
from data_pipeline.inputs import open_input
from data_pipeline.storage import FileState

_FILE_MAGIC = b"ARROW1"
_FEATHER_1_MAGIC = b"FEA1"


def open_files(request: Request) -> list[Piece]:
    """Read the schema of each file; a piece a file.

    Raises:
        DataError: A file is no Arrow IPC, or its schema is another than the first one's.
    """
    schemas = list(request.pool.map(_schema, request.files))
    found = [(file.path, schema) for file, schema in zip(request.files, schemas, strict=True)]
    schema = one_schema(request.name, found)
    pieces = [
        Piece((file,), None, functools.partial(_batches, file, schema)) for file in request.files
    ]
    return pieces


def _schema(file: FileState) -> pa.Schema:
    with _reader(file) as reader:
        return pa.schema([(field.name, _plain(field.type)) for field in reader.schema])


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return pa.string() if kind == pa.string_view() else kind


def _batches(file: FileState, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with _reader(file) as reader:
        if isinstance(reader, pa.RecordBatchStreamReader):
            for batch in reader:
                yield conformed(batch, schema)
        else:
            for index in range(reader.num_record_batches):
                yield conformed(reader.get_batch(index), schema)


@contextmanager
def _reader(file: FileState) -> Iterator[Any]:
    try:
        with open_input(file.path) as opened:
            magic = opened.read(len(_FILE_MAGIC))
            opened.seek(0)
            if magic.startswith(_FEATHER_1_MAGIC):
                raise DataError(
                    f"{file.path} is Feather version 1; version 2 and Arrow IPC are allowed. Write "
                    "it again with a newer pyarrow."
                )
            open_ipc = pa.ipc.open_file if magic == _FILE_MAGIC else pa.ipc.open_stream
            with open_ipc(opened) as reader:
                yield reader
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file.path} is not a whole Arrow IPC file or stream: {error}. It may be truncated; "
            "write it again, or leave it out."
        ) from None
