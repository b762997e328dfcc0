"""Parquet files as a table of blocks: what is there, told from the footers alone.

Owns the way from what a job calls its data to files, columns and blocks, and the errors on that
way. A *block* is one row group of one file. Folders named `key=value` are columns too, one value a
file, where the job names them and the file has no such column. Values are left to
`data_pipeline.scan` and `data_pipeline.reader`, finding and opening to `data_pipeline.storage`.
"""

import functools
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import did_you_mean
from configs.section import Paths
from data_pipeline import storage
from data_pipeline.errors import DataError
from data_pipeline.object_stores import failures_of

PARQUET_SUFFIXES = (".parquet", ".pq")

_FOOTER_THREADS = 16
_KNOWN_SCHEMAS = 8
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")  # any of so many digits is an int64


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
    """One file and its blocks, as the footer has them.

    Attributes:
        path: A local path or a URI.
        size_bytes: Size when the footer was read.
        modified_ns: Time of the last change then, in ns since 1970.
        block_rows: Rows of each row group.
        null_counts: Nulls of the job's columns, where the footer tells and there are any; of lists
            it tells the elements.
        partitions: The job's columns that are names of folders, with their text; None for null.
    """

    path: str
    size_bytes: int
    modified_ns: int
    block_rows: tuple[int, ...]
    null_counts: dict[str, int] = field(default_factory=dict)
    partitions: tuple[tuple[str, str | None], ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return sum(self.block_rows)

    @property
    def state(self) -> storage.FileState:
        """What `storage.open_file` compares with what is there now."""
        return storage.FileState(self.path, self.size_bytes, self.modified_ns)


@dataclass(frozen=True)
class Source:
    """All files of one role (train, validation, test) and the columns that the job reads."""

    role: str
    files: tuple[DataFile, ...]
    columns: tuple[Column, ...]

    @functools.cached_property
    def rows(self) -> int:
        """Rows of all files."""
        return int(self.block_rows.sum())

    @functools.cached_property
    def block_rows(self) -> NDArray[np.int64]:
        """`(blocks,) int64`: rows of each block, files in order, row groups in order."""
        return np.fromiter((rows for file in self.files for rows in file.block_rows), np.int64)

    @functools.cached_property
    def blocks(self) -> NDArray[np.int32]:
        """`(blocks, 2) int32`: file index and row group of each block."""
        counts = np.fromiter((len(file.block_rows) for file in self.files), np.int64)
        first = np.cumsum(counts) - counts
        files = np.repeat(np.arange(len(counts)), counts)
        groups = np.arange(counts.sum()) - np.repeat(first, counts)
        return np.stack([files, groups], axis=1).astype(np.int32)


def open_source(role: str, paths: Paths, columns: Sequence[str]) -> Source:
    """Read the footers of all files of a role and check that the columns are there and agree.

    Raises:
        DataError: A path, a column or a type cannot be used, or a column holds no value at all.
        ReadError: A store does not answer.
    """
    found = storage.find(f"data.{role}", paths, PARQUET_SUFFIXES)
    footers = _Footers(columns)
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        opened = list(threads.map(footers.read, found))
    partitions = partition_columns(file for file, _ in opened)
    selected = _agreed_columns(role, columns, opened, partitions)
    source = Source(role, tuple(file for file, _ in opened), selected)
    if source.rows == 0:
        raise DataError(
            f"data.{role}: {len(found)} file(s) with no row at all; at least one row is needed. "
            f"Check what wrote {found[0]}."
        )
    _check_values(source)
    return source


def read_footer(path: str, names: Iterable[str]) -> tuple[DataFile, pa.Schema]:
    """Blocks and columns of a Parquet file; nulls are not counted.

    Args:
        path: The file.
        names: Columns that may be folders instead.

    Raises:
        DataError: It is no Parquet file, or the store refuses.
        ReadError: The store does not answer.
    """
    state, footer, schema = _footer(path)
    file = _data_file(state, footer)
    return replace(file, partitions=_partitions(path, names, schema.names)), schema


def partition_columns(files: Iterable[DataFile]) -> dict[str, Column]:
    """The columns that are names of folders: whole numbers if all values are, else text."""
    texts: dict[str, set[str]] = {}
    for file in files:
        for name, text in file.partitions:
            texts.setdefault(name, set()).update([] if text is None else [text])
    columns = {}
    for name, values in texts.items():
        is_number = all(_WHOLE_NUMBER.fullmatch(value) for value in values)
        columns[name] = Column(name, "int64" if is_number else "text", 1, False)
    return columns


def with_partitions(table: pa.Table, file: DataFile, columns: Sequence[Column]) -> pa.Table:
    """The rows of a block of `file` with its partition columns, one value each, appended.

    Args:
        table: The columns that the file itself holds.
        file: The file.
        columns: The wanted columns, of the types that they have in the source.
    """
    kinds = {column.name: column.dtype for column in columns} if file.partitions else {}
    for name, text in file.partitions:
        if name not in kinds:
            continue
        is_number = kinds[name] == "int64"
        value = int(text) if is_number and text is not None else text
        constant = pa.scalar(value, pa.int64() if is_number else pa.string())
        table = table.append_column(name, pa.repeat(constant, table.num_rows))
    return table


@dataclass(frozen=True, eq=False)
class _Selected:
    """The job's columns in files of one schema, and their places among the Parquet columns."""

    schema: pa.Schema
    columns: dict[str, Column]
    leaves: tuple[tuple[str, int], ...]


_Opened = tuple[DataFile, _Selected]


class _Footers:
    """Reads footers for the job's columns; safe to share between threads.

    The files of a source mostly have one schema; what follows from it is found once, not a file.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._known: list[_Selected] = []

    def read(self, path: str) -> _Opened:
        """One file, and what its schema has of the job's columns."""
        state, footer, schema = _footer(path)
        selected = self._select(footer, schema)
        nulls: dict[str, int] = {}
        for group in range(footer.num_row_groups if selected.leaves else 0):
            chunks = footer.row_group(group)
            for name, leaf in selected.leaves:
                statistics = chunks.column(leaf).statistics
                if statistics is not None and statistics.has_null_count and statistics.null_count:
                    nulls[name] = nulls.get(name, 0) + statistics.null_count
        file = _data_file(state, footer)
        partitions = _partitions(path, self._names, selected.columns)
        nulls |= {name: file.rows for name, text in partitions if text is None and file.rows}
        return replace(file, null_counts=nulls, partitions=partitions), selected

    def _select(self, footer: pq.FileMetaData, schema: pa.Schema) -> _Selected:
        for known in reversed(self._known[-_KNOWN_SCHEMAS:]):
            if known.schema.equals(schema):
                return known
        names = {name for name in self._names if name in schema.names}
        leaves = []
        for leaf in range(footer.num_columns if footer.num_row_groups else 0):
            path = footer.row_group(0).column(leaf).path_in_schema
            name = path if path in names else path.partition(".")[0]
            if name in names:
                leaves.append((name, leaf))
        columns = {name: describe_field(schema.field(name)) for name in names}
        selected = _Selected(schema, columns, tuple(leaves))
        if footer.num_row_groups:  # without one there are no leaves to be learned
            self._known.append(selected)
        return selected


def partitions_of(path: str) -> dict[str, str | None]:
    """Keys and values of the folders on a path that are named `key=value`; None for null.

    Hive, Spark and Arrow write `%` and two digits for letters that a name cannot have.
    """
    found: dict[str, str | None] = {}
    for name in path.split("/")[:-1]:
        key, equals, value = name.partition("=")
        if key and equals:
            found[unquote(key)] = None if value == _NULL_PARTITION else unquote(value)
    return found


def _partitions(
    path: str, names: Iterable[str], held: Container[str]
) -> tuple[tuple[str, str | None], ...]:
    """Those of the wanted columns that the file does not hold but its folders tell."""
    folders = partitions_of(path)
    return tuple((name, folders[name]) for name in names if name in folders and name not in held)


def _footer(path: str) -> tuple[storage.FileState, pq.FileMetaData, pa.Schema]:
    try:
        state = storage.stat(path)
        with storage.open_file(path) as opened, failures_of(path, is_reading=True):
            file = pq.ParquetFile(opened)
            # Never `metadata.schema`: it and the metadata hold each other, and until the garbage
            # collector finds them a thousand footers take a hundred megabytes.
            return state, file.metadata, file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {error}. Parquet files are allowed; convert "
            "it, or take it out."
        ) from None


def _data_file(state: storage.FileState, footer: pq.FileMetaData) -> DataFile:
    rows = tuple(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    return DataFile(state.path, state.size_bytes, state.modified_ns, rows)


def _agreed_columns(
    role: str, names: Sequence[str], opened: Sequence[_Opened], partitions: dict[str, Column]
) -> tuple[Column, ...]:
    """The job's columns, which are the same in all files."""
    agreed = _columns(role, names, opened[0], partitions)
    seen = set()
    for file, selected in opened:
        kind = (selected, tuple(name for name, _ in file.partitions))
        if kind in seen:
            continue
        seen.add(kind)
        others = _columns(role, names, (file, selected), partitions)
        for column, other in zip(agreed, others, strict=True):
            if other != column:
                raise DataError(
                    f"data.{role}: column {column.name!r} is {_describe(column)} in "
                    f"{opened[0][0].path} but {_describe(other)} in {file.path}; one type in all "
                    "files is allowed. Convert the file, or leave it out."
                )
    return agreed


def _columns(
    role: str, names: Sequence[str], opened: _Opened, partitions: dict[str, Column]
) -> tuple[Column, ...]:
    file, selected = opened
    folders = dict(file.partitions)
    for name in names:
        if name in selected.columns or name in folders:
            continue
        if name in partitions:
            raise DataError(
                f"data.{role}: column {name!r} is told by folders ({name}=...), but {file.path} is "
                "in none of them; all files have to be. Move the file, or leave it out."
            )
        known = [*selected.schema.names, *partitions_of(file.path)]
        raise DataError(
            f"data.{role}: no column {name!r} in {file.path}; it has {', '.join(known)}."
            f"{did_you_mean(name, known)}"
        )
    return tuple(selected.columns.get(name) or partitions[name] for name in names)


def _check_values(source: Source) -> None:
    """Raise DataError for a column that is null in all rows, as far as footers tell."""
    nulls: Counter[str] = Counter()
    for file in source.files:
        nulls.update(file.null_counts)
    for column in source.columns:
        # Of lists, footers count the elements.
        if column.dtype == "null" or (nulls[column.name] == source.rows and not column.is_list):
            raise DataError(
                f"data.{source.role}: column {column.name!r} is null in all {source.rows} rows of "
                f"{len(source.files)} file(s); values are needed. Name another column, or check "
                f"what wrote {source.files[0].path}."
            )


def describe_field(field: pa.Field) -> Column:
    """The type of a column of a table."""
    name, kind = field.name, field.type
    shape = tuple(kind.shape) if isinstance(kind, pa.FixedShapeTensorType) else ()
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
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
    if column.dtype == "null":
        return "null in all rows"
    if not column.is_list:
        return column.dtype
    return f"lists of {column.size or 'any number of'} {column.dtype}"
