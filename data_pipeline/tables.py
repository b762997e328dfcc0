"""Rows of any files, in their order, as tables of bounded size: for prediction and evaluation.

Owns what is asked of such files (Parquet or CSV; the columns that a model needs, as numbers) and
the errors where it is not met, all of them before the first table comes out. Training reads by
blocks instead (`data_pipeline.blocks`).
"""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import did_you_mean
from configs.section import Paths
from configs.stores import is_remote, reason
from data_pipeline import storage
from data_pipeline.csv_text import CsvFile, CsvRules, open_csv, with_common_types
from data_pipeline.encoding import RawKind
from data_pipeline.errors import DataError, ReadError
from data_pipeline.features import Array, column_to_numpy, null_rows
from data_pipeline.source import (
    PARQUET_SUFFIXES,
    Column,
    DataFile,
    describe_field,
    partition_columns,
    read_footer,
    with_partitions,
)

TABLE_SUFFIXES = (*PARQUET_SUFFIXES, ".csv")
MAX_TABLE_ROWS = 65_536

_OPEN_THREADS = 16

Wanted = Mapping[str, tuple[int, ...] | RawKind]
"""Columns by name: numbers, told by the shape of one row's value (`()` for a single one), or
values that are encoded later."""


@dataclass(frozen=True)
class FileRows:
    """Some rows of one file, in order.

    Attributes:
        path: The file.
        table: At most as many rows as were asked for, and at least one.
    """

    path: str
    table: pa.Table

    def null_masks(self, columns: Wanted) -> dict[str, Array]:
        """`(rows,) bool` by column: where the value is null or NaN; only columns with such rows."""
        masks = {name: null_rows(self.table[name]) for name in columns}
        return {name: mask for name, mask in masks.items() if mask.any()}

    def where(self, chosen: Array) -> "FileRows":
        """The rows for which `chosen`, `(rows,) bool`, is true."""
        return FileRows(self.path, self.table.filter(pa.array(chosen)))

    def values(self, name: str, wanted: tuple[int, ...] | RawKind) -> Array | pa.ChunkedArray:
        """Values of a column as a predictor takes them, those without encoding without nulls."""
        if isinstance(wanted, str):
            return self.table[name]
        return self.array(name, wanted, "float32")

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        """Values of a column without nulls: `(rows, *shape)` of `dtype`.

        Raises:
            DataError: A list has another length than the shape.
        """
        try:
            values = column_to_numpy(self.table[name], math.prod(shape), dtype)
        except DataError as error:
            raise DataError(
                f"{self.path}: column {name!r} has {error} Correct the rows, or leave them out."
            ) from None
        return values.reshape(-1, *shape)


@dataclass(frozen=True)
class Tables:
    """Files that have been checked, ready to be read; each iteration reads them anew.

    Iteration blocks on storage and raises ReadError where a file cannot be read any more. Not to
    be shared between threads.

    Attributes:
        files: The files in order.
        max_rows: The most rows of a table.
        kept: Columns that come out, or None for all.
    """

    files: tuple["_ParquetFile | CsvFile", ...]
    max_rows: int
    kept: tuple[str, ...] | None

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the files."""
        return tuple(file.path for file in self.files)

    def __iter__(self) -> Iterator[FileRows]:
        """All rows, file by file."""
        for file in self.files:
            columns = file.schema.names if self.kept is None else self.kept
            for table in file.tables(columns):
                for start in range(0, table.num_rows, self.max_rows):
                    yield FileRows(file.path, table.slice(start, self.max_rows))


def open_tables(
    name: str,
    paths: Paths,
    columns: Wanted,
    keeps_all: bool = False,
    max_rows: int = MAX_TABLE_ROWS,
) -> Tables:
    """Find files and check that they hold the wanted columns.

    Parquet files are told by their footers; CSV files are read through once.

    Args:
        name: What the error messages call the files.
        paths: A file, a folder, a glob, or a list of these; .parquet, .pq and, local, .csv.
        columns: Columns that must be there.
        keeps_all: Give all columns of the files, not only these.
        max_rows: The most rows of a table.

    Raises:
        DataError: A file cannot be read, a column is missing or of another type, or there is no
            row at all.
    """
    found = storage.find(name, paths, TABLE_SUFFIXES)
    with ThreadPoolExecutor(_OPEN_THREADS) as threads:
        opened = list(threads.map(lambda path: _open_file(name, path, columns, max_rows), found))
    texts = iter(with_common_types([file for file in opened if isinstance(file, CsvFile)]))
    folders = partition_columns(file.footer for file in opened if isinstance(file, _ParquetFile))
    files = tuple(
        next(texts) if isinstance(file, CsvFile) else file.with_types(folders) for file in opened
    )
    for file in files:
        for column, wanted in columns.items():
            found_type = describe_field(file.schema.field(column))
            if isinstance(wanted, str):
                _check_raw(name, file.path, found_type, wanted)
            else:
                _check_type(name, file.path, found_type, wanted)
    tables = Tables(files, max_rows, None if keeps_all else tuple(columns))
    if tables.rows == 0:
        raise DataError(
            f"{name}: {len(found)} file(s) with no row at all; at least one row is needed. "
            f"Check what wrote {found[0]}."
        )
    return tables


def null_error(name: str, nulls: Mapping[tuple[str, str], int], alternative: str) -> DataError:
    """The error for rows with null or NaN, counted by (column, file)."""
    (column, path), rows = max(nulls.items(), key=lambda item: item[1])
    more = f" ({sum(nulls.values())} in all, in {len(nulls)} places)" if len(nulls) > 1 else ""
    return DataError(
        f"{name}: column {column!r} is null or NaN in {rows} rows of {path}{more}; rows "
        f"without are needed. Fill the values, or use --on-null {alternative}."
    )


@dataclass(frozen=True)
class _ParquetFile:
    footer: DataFile
    schema: pa.Schema
    batch_rows: int
    folders: tuple[Column, ...] = ()

    @property
    def path(self) -> str:
        return self.footer.path

    @property
    def rows(self) -> int:
        return self.footer.rows

    def with_types(self, folders: Mapping[str, Column]) -> "_ParquetFile":
        """The file with the columns that are names of folders, of the types common to all files."""
        mine = tuple(folders[name] for name, _ in self.footer.partitions)
        fields = [pa.field(c.name, pa.int64() if c.dtype == "int64" else pa.string()) for c in mine]
        return replace(self, schema=pa.schema([*self.schema, *fields]), folders=mine)

    def tables(self, columns: list[str] | tuple[str, ...]) -> Iterator[pa.Table]:
        try:
            with storage.open_file(self.path) as opened:
                file = pq.ParquetFile(opened, pre_buffer=is_remote(self.path))
                for batch in file.iter_batches(self.batch_rows, columns=list(columns)):
                    table = pa.Table.from_batches([batch])
                    yield with_partitions(table, self.footer, self.folders)
        except (OSError, pa.ArrowException) as error:
            raise ReadError(
                f"cannot read {self.path}: {reason(self.path, error)}. Its footer was readable; "
                "check the storage and what wrote the file, then start again."
            ) from error


def _open_file(name: str, path: str, columns: Wanted, max_rows: int) -> _ParquetFile | CsvFile:
    suffix = Path(path).suffix.lower()
    file: _ParquetFile | CsvFile
    folders: list[str] = []
    if suffix in PARQUET_SUFFIXES:
        footer, schema = read_footer(path, columns)
        file = _ParquetFile(footer, schema, max_rows)
        folders = [folder for folder, _ in footer.partitions]
    elif suffix == ".csv":
        numbers = [
            column
            for column, wanted in columns.items()
            if wanted == "int64" or (not isinstance(wanted, str) and math.prod(wanted) == 1)
        ]
        texts = [column for column, wanted in columns.items() if wanted == "string"]
        file = open_csv(path, CsvRules(numbers, texts=texts))
    else:
        raise DataError(
            f"{name}: {path} ends with {suffix or 'no suffix'}; {', '.join(TABLE_SUFFIXES)} are "
            "allowed. Convert the file, or leave it out."
        )
    _check_names(name, path, [*file.schema.names, *folders], columns)
    return file


def _check_names(name: str, path: str, names: list[str], columns: Wanted) -> None:
    twice = sorted({column for column in names if names.count(column) > 1})
    if twice:
        raise DataError(
            f"{name}: {path} has more than one column {twice[0]!r}; each name once is allowed. "
            "Rename or remove a column."
        )
    missing = [column for column in columns if column not in names]
    if missing:
        first = missing[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{name}: no column {first!r}{more} in {path}; it has {', '.join(names)}."
            f"{did_you_mean(first, names)} Rename the column, or add it."
        )


def _check_raw(name: str, path: str, column: Column, wanted: RawKind) -> None:
    is_text, is_time = column.dtype == "text", column.dtype.startswith(("timestamp", "date"))
    is_whole = _number_kind(column.dtype) in ("i", "u", "b")
    fits = {
        "string": is_text or is_whole,
        "int64": is_whole,
        "timestamp[us]": is_text or is_time or is_whole,
    }
    if column.is_list or not fits[wanted]:
        raise DataError(
            f"{name}: column {column.name!r} of {path} holds "
            f"{'lists of ' if column.is_list else ''}{column.dtype}; {wanted} is needed. Convert "
            "the column."
        )


def _check_type(name: str, path: str, column: Column, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    fits = column.size in (0, size) if column.is_list else size == 1
    if fits and _number_kind(column.dtype) in ("i", "u", "f", "b"):
        return
    lists = f"lists of {column.size or 'any number of'} "
    received = f"{lists if column.is_list else ''}{column.dtype}"
    allowed = "numbers or booleans are" if size == 1 else f"lists of {size} numbers are"
    remedy = "Encode it as numbers" if fits else "Change the column"
    if not column.is_list and size > 1 and path.lower().endswith(".csv"):
        remedy = "CSV has no lists: write the data as Parquet"
    raise DataError(
        f"{name}: column {column.name!r} of {path} holds {received}; {allowed} allowed. {remedy}."
    )


def _number_kind(dtype: str) -> str:
    """Numpy's letter for a kind of numbers, "O" for anything else."""
    try:
        return np.dtype(dtype).kind
    except TypeError:
        return "O"
