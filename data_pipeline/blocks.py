"""Decoded blocks: one row group of one file as arrays, checked, and kept while memory allows.

Owns reading (one open file a thread: a `ParquetFile` must not be read by two) and what a null or
NaN does (`data.on_null`). Everything above works on arrays without nulls.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError, ReadError
from data_pipeline.features import Array, InputLayout, column_to_numpy, null_rows
from data_pipeline.source import Source

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


class BlockReader:
    """Reads blocks of one source; safe to share between threads.

    Blocks are kept, least recently used out first, up to `cache_bytes`.

    Attributes:
        decoded_blocks: How often a block was read from its file.
    """

    def __init__(
        self, source: Source, layout: InputLayout, on_null: OnNull, cache_bytes: int = 0
    ) -> None:
        self._source = source
        self._layout = layout
        self._on_null = on_null
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[int, Block] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self.decoded_blocks = 0
        self._open = threading.local()
        self._blocks = source.blocks

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
        index, group = self._blocks[number]
        file = self._source.files[index]
        layout = self._layout
        names = [feature.name for feature in layout.features] + [layout.label]
        if layout.weight is not None:
            names.append(layout.weight)
        try:
            # Whoever wants several blocks at a time reads them on threads of its own.
            table = self._parquet_file(index).read_row_group(
                group, columns=names, use_threads=False
            )
        except (OSError, pa.ArrowException) as error:
            raise ReadError(
                f"cannot read block {group} of {file.path}: {error}. The file was readable when "
                "the run was planned; check the storage, then resume."
            ) from error
        if table.num_rows != file.block_rows[group]:
            raise ReadError(
                f"block {group} of {file.path} has {table.num_rows} rows, planned were "
                f"{file.block_rows[group]}: the file changed. Start a new run."
            )
        try:
            return self._to_block(table)
        except DataError as error:
            raise DataError(f"{file.path}, block {group}: {error}") from None

    def _parquet_file(self, index: int) -> pq.ParquetFile:
        """This thread's open file; only the last one is kept open."""
        if getattr(self._open, "index", None) != index:
            file = self._source.files[index]
            stat = Path(file.path).stat()
            if (stat.st_size, stat.st_mtime_ns) != (file.size_bytes, file.modified_ns):
                raise ReadError(
                    f"{file.path} changed since the run was planned (size or time of change). "
                    "Start a new run."
                )
            self._open.file = pq.ParquetFile(file.path, pre_buffer=False)
            self._open.index = index
        opened: pq.ParquetFile = self._open.file
        return opened

    def _to_block(self, table: pa.Table) -> Block:
        layout = self._layout
        masks = {name: null_rows(table[name]) for name in table.column_names}
        nulls = {name: int(mask.sum()) for name, mask in masks.items() if mask.any()}
        if nulls and self._on_null != "zero":  # under "error" the scan stops, with the counts
            table = table.filter(pa.array(~np.logical_or.reduce(list(masks.values()))))
            masks = {}
        features = []
        for feature in layout.features:
            dtype = _feature_dtype(table, feature.name, masks)
            values = _filled(table, feature.name, feature.size, dtype, masks)
            features.append(values)
        label = _filled(table, layout.label, layout.label_size, layout.label_dtype, masks)
        weight = None
        if layout.weight is not None:
            weight = _filled(table, layout.weight, 1, "float32", masks)
        label = label.reshape(len(label), layout.label_size)
        return Block(tuple(features), label, weight, nulls)


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
