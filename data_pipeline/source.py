"""Parquet files as a table of blocks: what is there, told from the footers alone.

Owns the way from what a job calls its data (path, folder, glob, list) to files, columns and
blocks, and the errors on that way. A *block* is one row group of one file. Values are left to
`data_pipeline.scan` and `data_pipeline.reader`.
"""

import glob
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import did_you_mean
from configs.schema import Paths
from data_pipeline.errors import DataError

PARQUET_SUFFIXES = (".parquet", ".pq")

_FOOTER_THREADS = 16
_HERE = "the working directory"


@dataclass(frozen=True)
class Column:
    """Type of a column: the numpy name of its elements, and a row's shape before any reshaping.

    `size` is the number of elements of a row: 1 for a scalar, the length of a fixed-size list, or
    0 where only the values can tell (a list without fixed size). `shape` is that of a tensor, else
    empty.
    """

    name: str
    dtype: str
    size: int
    is_list: bool
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataFile:
    """One file and its blocks, as the footer has them."""

    path: str
    size_bytes: int
    modified_ns: int
    block_rows: tuple[int, ...]
    null_counts: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return sum(self.block_rows)


@dataclass(frozen=True)
class Source:
    """All files of one role (train, validation, test) and the columns that the job reads."""

    role: str
    files: tuple[DataFile, ...]
    columns: tuple[Column, ...]

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def block_rows(self) -> NDArray[np.int64]:
        """`(blocks,) int64`: rows of each block, files in order, row groups in order."""
        return np.asarray([rows for file in self.files for rows in file.block_rows], np.int64)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(file index, row group) of each block."""
        return [
            (index, group)
            for index, file in enumerate(self.files)
            for group in range(len(file.block_rows))
        ]


def open_source(role: str, paths: Paths, columns: Sequence[str]) -> Source:
    """Read the footers of all files of a role and check that the columns are there and agree.

    Raises DataError where a path, a column or a type cannot be used.
    """
    found = find_files(f"data.{role}", paths)
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        footers = list(threads.map(read_footer, found))
    first_path, first_schema = footers[0][0].path, footers[0][1]
    selected = tuple(_column(role, name, first_schema, first_path) for name in columns)
    for file, schema in footers[1:]:
        for column in selected:
            other = _column(role, column.name, schema, file.path)
            if other != column:
                raise DataError(
                    f"data.{role}: column {column.name!r} is {_describe(column)} in {first_path} "
                    f"but {_describe(other)} in {file.path}; one type in all files is allowed. "
                    "Convert the file, or leave it out."
                )
    files = tuple(_with_null_counts(file, columns) for file, _ in footers)
    source = Source(role, files, selected)
    if source.rows == 0:
        raise DataError(
            f"data.{role}: {len(files)} file(s) with no row at all; at least one row is needed. "
            f"Check what wrote {first_path}."
        )
    return source


def find_files(name: str, paths: Paths, suffixes: Sequence[str] = PARQUET_SUFFIXES) -> list[str]:
    """Files of a path, a folder (searched below), a glob, or a list of these, sorted.

    Args:
        name: What the error messages call the paths.
        paths: What to look for. Files that are named are taken as they are.
        suffixes: What counts in folders. Names with a leading dot or underscore never do, nor what
            is in folders with such names: unfinished outputs are called so.

    Raises:
        DataError: Nothing is found.
    """
    entries = [paths] if isinstance(paths, str) else list(paths)
    if not entries:
        raise DataError(f"{name} is an empty list; name at least one file.")
    files: dict[str, None] = {}
    for entry in entries:
        for path in _expand(name, entry, suffixes):
            files[path] = None
    return list(files)


def _expand(name: str, entry: str, suffixes: Sequence[str]) -> list[str]:
    if any(letter in entry for letter in "*?["):
        matches = sorted(path for path in glob.glob(entry, recursive=True) if Path(path).is_file())
        if not matches:
            raise DataError(
                f"{name}: {entry!r} matches no file. Check the pattern; it is relative to {_HERE}."
            )
        return matches
    path = Path(entry)
    if path.is_dir():
        matches = sorted(
            str(file)
            for file in path.rglob("*")
            if file.suffix.lower() in suffixes
            and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
            and file.is_file()
        )
        if not matches:
            allowed = ", ".join(f"*{suffix}" for suffix in suffixes)
            raise DataError(
                f"{name}: folder {entry!r} holds no data file ({allowed}). Name the folder that "
                "does."
            )
        return matches
    if not path.exists():
        names = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(
            f"{name}: no file or folder at {entry!r} (relative to {_HERE})."
            f"{did_you_mean(path.name, names)} Check the path; `lockstep example flights` writes "
            "the data of the examples."
        )
    return [entry]


def read_footer(path: str) -> tuple[DataFile, pa.Schema]:
    """Blocks and columns of a Parquet file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        stat = Path(path).stat()
        footer = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {error}. Parquet files are allowed; convert "
            "it, or take it out."
        ) from None
    rows = tuple(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    nulls: dict[str, int] = {}
    for group in range(footer.num_row_groups):
        for index in range(footer.num_columns):
            chunk = footer.row_group(group).column(index)
            statistics = chunk.statistics
            if statistics is not None and statistics.has_null_count:
                name = chunk.path_in_schema.split(".")[0]
                nulls[name] = nulls.get(name, 0) + statistics.null_count
    file = DataFile(path, stat.st_size, stat.st_mtime_ns, rows, nulls)
    return file, footer.schema.to_arrow_schema()


def _with_null_counts(file: DataFile, columns: Sequence[str]) -> DataFile:
    """The file with the null counts of the job's columns only."""
    nulls = {name: file.null_counts[name] for name in columns if file.null_counts.get(name)}
    return DataFile(file.path, file.size_bytes, file.modified_ns, file.block_rows, nulls)


def _column(role: str, name: str, schema: pa.Schema, path: str) -> Column:
    if name not in schema.names:
        raise DataError(
            f"data.{role}: no column {name!r} in {path}; it has {', '.join(schema.names)}."
            f"{did_you_mean(name, schema.names)}"
        )
    return describe_field(schema.field(name))


def describe_field(field: pa.Field) -> Column:
    """The type of a column of a table."""
    name, kind = field.name, field.type
    shape = tuple(kind.shape) if isinstance(kind, pa.FixedShapeTensorType) else ()
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    size, is_list = 1, False
    if pa.types.is_fixed_size_list(kind):
        size, is_list, kind = kind.list_size, True, kind.value_type
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        size, is_list, kind = 0, True, kind.value_type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return Column(name, str(np.dtype(kind.to_pandas_dtype())), size, is_list, shape)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return Column(name, "text", size, is_list)
    return Column(name, str(kind), size, is_list)


def _describe(column: Column) -> str:
    if not column.is_list:
        return column.dtype
    return f"lists of {column.size or 'any number of'} {column.dtype}"
