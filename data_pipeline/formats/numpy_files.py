"""NumPy arrays on disk as columns: `.npz`, one array a column, and `.npy`.

The `.npy` files of one folder are the columns of one table, each named by its file without the
suffix (`x.npy`, `y.npy`); an `.npz` file is a table by itself. The first axis counts rows. Arrays
are read a stretch of rows at a time; only those in Fortran order are held whole.
"""

import functools
import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.formats.pieces import (
    BATCH_BYTES,
    Piece,
    Request,
    fixed_lists,
    list_type,
    one_schema,
)
from data_pipeline.inputs import open_input
from data_pipeline.storage import FileState

_BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class _Array:
    """One array on disk, as its header has it."""

    name: str
    path: str
    member: str | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def open(self, stack: ExitStack) -> Any:
        """The array's bytes, from its header on."""
        file = stack.enter_context(open_input(self.path))
        if self.member is None:
            return file
        archive = stack.enter_context(zipfile.ZipFile(file))
        return stack.enter_context(archive.open(self.member))

    def stretches(self, rows: int) -> Iterator[NDArray[Any]]:
        """`(up to rows, ...)` of the array at a time, in order."""
        with ExitStack() as stack:
            file = self.open(stack)
            if self.is_fortran:
                whole = np.lib.format.read_array(file, allow_pickle=False)
                yield from (whole[at : at + rows] for at in range(0, self.shape[0], rows))
                return
            _header(file)
            for at in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - at)
                data = file.read(count * self.row_bytes)
                if len(data) < count * self.row_bytes:
                    raise EOFError(f"it ends within row {at + len(data) // self.row_bytes}")
                yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])


def open_files(request: Request) -> list[Piece]:
    """Read the headers of all arrays; a piece an `.npz` file or a folder of `.npy` files.

    Raises:
        DataError: A file is broken, an array is no column, rows differ in number, or columns
            differ between the pieces.
    """
    groups = _groups(request.files)
    tables = list(request.pool.map(functools.partial(_table, request.name), groups))
    found = [
        (files[0].path, pa.schema([(each.name, _column_type(each)) for each in arrays]))
        for files, arrays in zip(groups, tables, strict=True)
    ]
    schema = one_schema(request.name, found)
    pieces = [
        Piece(files, arrays[0].shape[0], functools.partial(_batches, arrays, schema))
        for files, arrays in zip(groups, tables, strict=True)
    ]
    return pieces


def _groups(files: Sequence[FileState]) -> list[tuple[FileState, ...]]:
    """Files that make a table together, in the order of their first ones."""
    groups: dict[str, list[FileState]] = {}
    for file in files:
        is_archive = file.path.lower().endswith(".npz")
        key = file.path if is_archive else str(PurePosixPath(file.path).parent)
        groups.setdefault(key, []).append(file)
    return [tuple(group) for group in groups.values()]


def _table(name: str, files: tuple[FileState, ...]) -> list[_Array]:
    """The columns of one table; all of the same number of rows."""
    arrays = [array for file in files for array in _arrays(file.path)]
    if not arrays:
        raise DataError(f"{name}: {files[0].path} holds no array; at least one is needed.")
    for array in arrays:
        if array.shape[:1] != arrays[0].shape[:1] or not array.shape:
            raise DataError(
                f"{name}: array {array.name!r} of {array.path} has shape {array.shape}, "
                f"{arrays[0].name!r} has {arrays[0].shape}; the same first axis, which counts "
                "rows, is needed. Cut the arrays to the same rows."
            )
    return arrays


def _arrays(path: str) -> list[_Array]:
    try:
        if not path.lower().endswith(".npz"):
            with open_input(path) as file:
                return [_Array(PurePosixPath(path).stem, path, None, *_header(file))]
        with open_input(path) as file, zipfile.ZipFile(file) as archive:
            arrays = []
            for member in archive.namelist():
                with archive.open(member) as opened:
                    name = member.removesuffix(".npy")
                    arrays.append(_Array(name, path, member, *_header(opened)))
            return arrays
    except _BROKEN as error:
        raise _broken(path, error) from None


def _header(file: Any) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Type, shape and order of an array; `file` stands at its data afterwards."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the format, which names fields of structures")
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects")
    return dtype, shape, is_fortran and len(shape) > 1


def _column_type(array: _Array) -> pa.DataType:
    try:
        return array_column(np.empty((0, *array.shape[1:]), array.dtype)).type
    except DataError as error:
        raise DataError(f"{array.path}: array {array.name!r} {error}") from None


def _batches(arrays: Sequence[_Array], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    by_name = {array.name: array for array in arrays}
    ordered = [by_name[name] for name in schema.names]
    rows = max(1, BATCH_BYTES // max(1, sum(array.row_bytes for array in ordered)))
    path = ordered[0].path
    try:
        for stretches in zip(*(array.stretches(rows) for array in ordered), strict=True):
            columns = [array_column(values) for values in stretches]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)
    except DataError as error:
        raise DataError(f"{path}: an array {error}") from None
    except _BROKEN as error:
        raise _broken(path, error) from None


def _broken(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path} is not a whole NumPy file: {error}. Arrays of numbers, text or times as "
        "numpy.save and numpy.savez write them are allowed; write it again, or leave it out."
    )


def array_column(values: NDArray[Any]) -> pa.Array:
    """An array as a column, one row for each index of the first axis.

    Two axes give fixed-size lists, more give tensors. Text of one axis is allowed, as an array of
    text or of Python's `str` and None.

    Raises:
        DataError: The values are of a type that has no columns; the message goes on after the
            array's name.
    """
    kind = values.dtype.kind
    if 0 in values.shape[1:]:
        raise DataError(f"has no element in a row, shape {values.shape}. Leave it out.")
    if kind in "UTOS":
        return _text_column(values)
    if kind not in "iufbM" or values.dtype.itemsize > 8:
        raise DataError(
            f"holds {values.dtype}; numbers of up to 64 bits, booleans, text and times are "
            "allowed. Convert it."
        )
    if kind == "M" and np.datetime_data(values.dtype)[0] not in ("D", "s", "ms", "us", "ns"):
        values = values.astype("datetime64[s]")
    flat = np.ascontiguousarray(values, values.dtype.newbyteorder("=")).reshape(-1)
    elements = pa.array(flat)
    shape = values.shape[1:]
    return fixed_lists(elements, list_type(elements.type, shape)) if shape else elements


def _text_column(values: NDArray[Any]) -> pa.Array:
    if values.ndim > 1:
        raise DataError(f"holds text in shape {values.shape}; one text a row is allowed.")
    if values.dtype.kind == "S":
        try:
            return pa.array(values.astype(object), pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:
            raise DataError("holds bytes that are not UTF-8; text is allowed.") from None
    elements = values.tolist()
    wrong = next((each for each in elements if not isinstance(each, str | None)), None)
    if wrong is not None:
        raise DataError(
            f"has dtype {values.dtype} and holds {type(wrong).__name__} {wrong!r:.50}; an array "
            "with a dtype of numbers, or of text only, is allowed. Convert it, such as with "
            "numpy.asarray(x, 'float32')."
        )
    return pa.array(elements, pa.string())
