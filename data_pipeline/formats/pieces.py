"""What every format gives: pieces of rows in their order, all with one schema.

A format's module has one entry, `open_files(request) -> list[Piece]`: it finds the schema that
holds the rows of all files, and fails before anything is written where there is none.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.data import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.storage import FileState

BATCH_BYTES = 4 * 2**20
"""About the size of what is read at once."""


@dataclass(frozen=True)
class BadLine:
    """A line of a text file that is left out.

    Attributes:
        line: Its number, from 1.
        reason: What is wrong with it.
        text: The line, shortened.
    """

    line: int
    reason: str
    text: str


@dataclass(frozen=True)
class Piece:
    """Rows that are read one after the other.

    Attributes:
        files: Where they are.
        rows: How many, or None where only reading tells.
        batches: Reads them anew, in batches of bounded size with the schema of all pieces.
        bad_lines: Lines that `batches` leaves out.
    """

    files: tuple[FileState, ...]
    rows: int | None
    batches: Callable[[], Iterator[pa.RecordBatch]]
    bad_lines: tuple[BadLine, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Request:
    """What a format's module is asked.

    Attributes:
        name: What error messages call the files, such as data.train.
        entries: What the job names: files, folders, globs.
        files: The files in order; at least one.
        data: The job's data section.
        pool: Threads for work on several files, in `open_files` only.
        inner: Threads for work inside a piece. Tasks of neither must wait for tasks of the same.
        advance: Is told of bytes that were read, from any thread.
    """

    name: str
    entries: tuple[str, ...]
    files: tuple[FileState, ...]
    data: DataConfig
    pool: Executor
    inner: Executor
    advance: Callable[[int], None]


def one_schema(name: str, found: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """The schema of all files, in the order of the first one's columns.

    A column without any value in a file (type null) has the type that it has elsewhere.

    Args:
        name: What error messages call the files.
        found: Path and schema of each.

    Raises:
        DataError: A column is missing, or of another type, in some file.
    """
    first_path, first = found[0]
    types: dict[str, tuple[pa.DataType, str]] = {}
    for path, schema in found:
        _check_names(name, first_path, first, path, schema)
        for field in schema:
            kind, where = types.setdefault(field.name, (field.type, path))
            if pa.types.is_null(kind):
                types[field.name] = (field.type, path)
            elif kind != field.type and not pa.types.is_null(field.type):
                raise DataError(
                    f"{name}: column {field.name!r} is {kind} in {where} but {field.type} in "
                    f"{path}; one type in all files is allowed. Convert the file, or leave it out."
                )
    kinds = {column: kind for column, (kind, _) in types.items()}
    return pa.schema(
        [
            (column, pa.float64() if pa.types.is_null(kinds[column]) else kinds[column])
            for column in first.names
        ]
    )


def _check_names(
    name: str, first_path: str, first: pa.Schema, path: str, schema: pa.Schema
) -> None:
    twice = [column for column in schema.names if schema.names.count(column) > 1]
    if twice:
        raise DataError(
            f"{name}: {path} has more than one column {twice[0]!r}; each name once is allowed. "
            "Rename or remove a column."
        )
    if set(schema.names) == set(first.names):
        return
    missing = [column for column in first.names if column not in schema.names]
    has, lacks = (first_path, path) if missing else (path, first_path)
    column = (missing or [column for column in schema.names if column not in first.names])[0]
    raise DataError(
        f"{name}: column {column!r} is in {has} but not in {lacks}; the same columns in all files "
        "are allowed. Convert the file, or leave it out."
    )


def conformed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of a schema out of a batch, in the schema's order and types."""
    arrays = []
    for field in schema:
        array = batch.column(batch.schema.get_field_index(field.name))
        arrays.append(array if array.type == field.type else array.cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def spread(values: pa.Array, is_present: NDArray[np.bool_]) -> pa.Array:
    """`values` at the rows where `is_present`, `(rows,) bool`, is true, and null elsewhere."""
    if is_present.all():
        return values
    places = np.where(is_present, np.cumsum(is_present) - 1, 0)
    return values.take(pa.array(places, mask=~is_present))


def fixed_lists(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """The elements of all rows, flat, as a column of fixed-size lists or tensors of `kind`."""
    if isinstance(kind, pa.BaseExtensionType):
        lists = pa.FixedSizeListArray.from_arrays(values, kind.storage_type.list_size)
        return pa.ExtensionArray.from_storage(kind, lists)
    return pa.FixedSizeListArray.from_arrays(values, kind.list_size)


def list_type(element: pa.DataType, shape: Sequence[int]) -> pa.DataType:
    """The type of columns whose rows have a shape: a tensor where it has several axes."""
    if not shape:
        return element
    if len(shape) == 1:
        return pa.list_(element, shape[0])
    return pa.fixed_shape_tensor(element, list(shape))
