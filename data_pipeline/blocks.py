"""Decoded blocks: one row group of one file as arrays, checked, and kept while memory allows.

Owns reading (one open file a thread: a `ParquetFile` must not be read by two) and what a null or
NaN does (`data.on_null`). Everything above works on arrays without nulls.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.stores import is_remote, reason
from data_pipeline import storage
from data_pipeline.encoding import Category
from data_pipeline.errors import DataError, ReadError
from data_pipeline.features import (
    Array,
    InputColumn,
    InputLayout,
    class_numbers,
    column_to_numpy,
    feature_values,
    null_rows,
)
from data_pipeline.source import Source, with_partitions

OnNull = Literal["error", "drop", "zero"]


@dataclass(frozen=True)
class Block:
    """Rows of one row group, without nulls.

    Attributes:
        features: One array a feature, `(rows,)` or `(rows, size)`, in the layout's order; float32,
            or uint8 where a list of bytes has no nulls.
        label: `(rows, label_size)`.
        weight: `(rows,) float32`, or None.
        nulls: Rows with a null or NaN, by column, before the policy was applied.
    """

    features: tuple[Array, ...]
    label: Array
    weight: Array | None
    nulls: dict[str, int]

    @property
    def rows(self) -> int:
        """Rows that are left after the policy."""
        return len(self.label)

    @property
    def size_bytes(self) -> int:
        """Memory of all arrays."""
        weight = 0 if self.weight is None else self.weight.nbytes
        return sum(array.nbytes for array in self.features) + self.label.nbytes + weight


class TableReader:
    """Reads some columns of the blocks of one source as they stand; safe to share between threads.

    Args:
        source: The files.
        columns: Columns to read.
        dictionaries: Those of them whose strings come as dictionaries, each value once.
    """

    def __init__(
        self, source: Source, columns: Sequence[str], dictionaries: Sequence[str] = ()
    ) -> None:
        self._source = source
        self._columns = list(columns)
        self._dictionaries = list(dictionaries)
        self._blocks = source.blocks
        self._open = threading.local()

    def place(self, block: int) -> str:
        """File and number of a block, for messages."""
        index, group = self._blocks[block]
        return f"{self._source.files[index].path}, block {group}"

    def read(self, block: int) -> pa.Table:
        """The rows of a block.

        Raises:
            ReadError: The file cannot be read, or is not the one that was planned.
        """
        index, group = self._blocks[block]
        file = self._source.files[index]
        try:
            # Whoever wants several blocks at a time reads them on threads of its own.
            table = self._parquet_file(index).read_row_group(
                group, columns=self._columns, use_threads=False
            )
        except (OSError, pa.ArrowException) as error:
            raise ReadError(
                f"cannot read block {group} of {file.path}: {reason(file.path, error)}. The file "
                "was readable when the run was planned; check the storage, then resume."
            ) from error
        if table.num_rows != file.block_rows[group]:
            raise ReadError(
                f"block {group} of {file.path} has {table.num_rows} rows, planned were "
                f"{file.block_rows[group]}: the file changed. Start a new run."
            )
        return with_partitions(table, file, self._source.columns)

    def _parquet_file(self, index: int) -> pq.ParquetFile:
        """This thread's open file; only the last one is kept open."""
        if getattr(self._open, "index", None) != index:
            file = self._source.files[index]
            opened = storage.open_file(file.path, file.state)
            folders = dict(file.partitions)
            self._open.file = pq.ParquetFile(
                opened,
                # A store answers few large requests sooner than many small ones.
                pre_buffer=is_remote(file.path),
                read_dictionary=[name for name in self._dictionaries if name not in folders],
            )
            self._open.index = index
        current: pq.ParquetFile = self._open.file
        return current


class BlockReader:
    """Reads blocks of one source; safe to share between threads.

    Blocks are kept, least recently used out first, up to `cache_bytes`.

    Attributes:
        decoded_blocks: How often a block was read from its file.
    """

    def __init__(
        self, source: Source, layout: InputLayout, on_null: OnNull, cache_bytes: int = 0
    ) -> None:
        texts = [name for name, code in layout.encodings.items() if isinstance(code, Category)]
        self._tables = TableReader(source, layout.columns, texts)
        self._layout = layout
        self._on_null = on_null
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[int, Block] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self.decoded_blocks = 0

    def read(self, block: int) -> Block:
        """The block with this number, from memory or from its file.

        Raises:
            ReadError: The file cannot be read, or is not the one that was planned.
            DataError: Values cannot be used.
        """
        with self._lock:
            if block in self._cached:
                self._cached.move_to_end(block)
                return self._cached[block]
        decoded = self._decode(block)
        with self._lock:
            self.decoded_blocks += 1
            if block not in self._cached and decoded.size_bytes <= self._cache_bytes:
                self._cached[block] = decoded
                self._cached_bytes += decoded.size_bytes
                while self._cached_bytes > self._cache_bytes:
                    _, oldest = self._cached.popitem(last=False)
                    self._cached_bytes -= oldest.size_bytes
        return decoded

    def _decode(self, number: int) -> Block:
        table = self._tables.read(number)
        try:
            return self._to_block(table)
        except DataError as error:
            raise DataError(f"{self._tables.place(number)}: {error}") from None

    def _to_block(self, table: pa.Table) -> Block:
        layout = self._layout
        if self._on_null == "zero":
            masks = {name: null_rows(table[name]) for name in table.column_names}
            nulls = {name: int(mask.sum()) for name, mask in masks.items() if mask.any()}
        else:  # under "error" the scan stops, with the counts
            masks = {}
            table, nulls = without_nulls(table)
        features = []
        for feature in layout.features:
            if feature.encoding is not None:  # a null is encoded, too
                values = _encoded(feature, table[feature.name])
            else:
                dtype = _feature_dtype(table, feature.name, masks)
                values = _filled(table, feature.name, feature.size, dtype, masks)
            features.append(values)
        if layout.label_classes is not None:
            label = _classes(layout, table[layout.label])
        else:
            label = _filled(table, layout.label, layout.label_size, layout.label_dtype, masks)
        weight = None
        if layout.weight is not None:
            weight = _filled(table, layout.weight, 1, "float32", masks)
        label = label.reshape(len(label), layout.label_size)
        return Block(tuple(features), label, weight, nulls)


def without_nulls(table: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """The rows of a table without null or NaN, and the number of the others by column."""
    masks = {name: null_rows(table[name]) for name in table.column_names}
    nulls = {name: int(mask.sum()) for name, mask in masks.items() if mask.any()}
    if nulls:
        table = table.filter(pa.array(~np.logical_or.reduce(list(masks.values()))))
    return table, nulls


def _encoded(feature: InputColumn, column: pa.ChunkedArray) -> Array:
    try:
        return feature_values(feature, column)
    except DataError as error:
        raise DataError(f"column {feature.name!r} has {error}") from None


def _classes(layout: InputLayout, column: pa.ChunkedArray) -> Array:
    """Class numbers of a label of texts; a null, which the scan refuses, is the first class."""
    known = layout.label_classes or ()
    try:
        return class_numbers(column.fill_null(known[0]) if column.null_count else column, known)
    except DataError as error:
        raise DataError(
            f"label {layout.label!r} holds {error} Train on rows of this class, or leave it out."
        ) from None


def _feature_dtype(table: pa.Table, name: str, masks: dict[str, Array]) -> str:
    """Lists of bytes, such as images, stay bytes while rows are read and shuffled."""
    kind = table[name].type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    is_bytes = pa.types.is_nested(kind) and pa.types.is_uint8(kind.value_type)
    return "uint8" if is_bytes and not (name in masks and masks[name].any()) else "float32"


def _filled(table: pa.Table, name: str, size: int, dtype: str, masks: dict[str, Array]) -> Array:
    """Values of a column in which nulls and NaN count as zero.

    The policies "error" and "drop" have taken the rows with such values out.
    """
    column = table[name]
    if column.null_count:
        kind = column.type
        if pa.types.is_nested(kind):
            raise DataError(
                f"column {name!r} has lists that are null as a whole; data.on_null: zero can fill "
                "numbers in a list only. Set data.on_null: drop, or fill them."
            )
        column = column.fill_null(False if pa.types.is_boolean(kind) else 0)
    try:
        values = column_to_numpy(column, size, dtype)
    except DataError as error:
        raise DataError(
            f"column {name!r} has {error} Correct the rows, or leave them out."
        ) from None
    if values.dtype.kind == "f" and name in masks and masks[name].any():
        values = np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=-np.inf)
    return values
