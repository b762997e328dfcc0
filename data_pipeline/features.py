"""From raw columns to the arrays a model trains on; the same code feeds training and prediction.

Owns the layout of the model's input: scalar features become one vector in the order of the job, a
single list feature keeps its shape, anything mixed is flattened and joined. Everything is float32;
labels keep whole numbers as int64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.schema import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.source import Column, Source

Array = NDArray[Any]


@dataclass(frozen=True)
class InputColumn:
    """One feature's place in a row of the model's input.

    Attributes:
        name: Column in the files.
        shape: Shape of one row's value; `()` for a scalar.
        offset: First element in the flat row.
        is_normalized: Whether statistics are computed for it.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    is_normalized: bool

    @property
    def size(self) -> int:
        """Elements of one row's value."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class InputLayout:
    """How features, label and weight lie in the arrays of a batch."""

    features: tuple[InputColumn, ...]
    label: str
    label_dtype: str
    label_size: int
    weight: str | None

    @property
    def width(self) -> int:
        """Elements of one flat row."""
        return sum(feature.size for feature in self.features)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row of the model's input."""
        if len(self.features) == 1 and self.features[0].shape:
            return self.features[0].shape
        return (self.width,)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory: input, label and weight."""
        return 4 * self.width + 8 * self.label_size + (4 if self.weight else 0)

    @property
    def channels(self) -> int:
        """Length of the last axis of the input, along which statistics are kept."""
        return self.input_shape[-1]


def input_layout(data: DataConfig, source: Source) -> InputLayout:
    """The layout that a job's `data` section describes, for the types found in the files.

    Raises DataError where a column's type or shape cannot be used.
    """
    columns = {column.name: column for column in source.columns}
    features, offset = [], 0
    for feature in data.features:
        shape = _feature_shape(feature.name, feature.shape, columns[feature.name])
        wanted = data.normalize if feature.normalize is None else feature.normalize
        features.append(InputColumn(feature.name, shape, offset, wanted))
        offset += features[-1].size
    label = columns[data.label]
    _check_number("data.label", label)
    if data.weight is not None:
        _check_number("data.weight", columns[data.weight])
    is_whole = np.dtype(label.dtype).kind in "iub"
    return InputLayout(
        features=tuple(features),
        label=data.label,
        label_dtype="int64" if is_whole else "float32",
        label_size=max(1, label.size),
        weight=data.weight,
    )


def _feature_shape(name: str, given: Sequence[int] | None, column: Column) -> tuple[int, ...]:
    _check_number("data.features", column)
    if not column.is_list:
        if given:
            raise DataError(
                f"data.features: column {name!r} holds one number a row, shape {list(given)} was "
                "given. Remove the shape."
            )
        return ()
    if given is None:
        if column.size == 0:
            raise DataError(
                f"data.features: column {name!r} holds lists without a fixed size. Give its shape, "
                f"such as {{name: {name}, shape: [24, 8]}}."
            )
        return (column.size,)
    if column.size and math.prod(given) != column.size:
        raise DataError(
            f"data.features: shape {list(given)} of column {name!r} has {math.prod(given)} "
            f"elements, its lists have {column.size}. Give a shape of {column.size} elements."
        )
    return tuple(given)


def _check_number(field: str, column: Column) -> None:
    try:
        kind = np.dtype(column.dtype).kind
    except TypeError:
        kind = "O"
    if kind not in "iufb":
        raise DataError(
            f"{field}: column {column.name!r} holds {column.dtype}; numbers, booleans and lists of "
            "them are allowed. Encode it as numbers, or name another column."
        )


def column_to_numpy(column: pa.ChunkedArray, size: int, dtype: str) -> Array:
    """Values of a column without nulls.

    Returns:
        `(rows,)` of `dtype` where `size` is 1, else `(rows, size)`.

    Raises:
        DataError: A list has another length than `size`.
    """
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_nested(array.type):
        values = np.asarray(array.flatten().to_numpy(zero_copy_only=False), dtype)
        if len(values) != len(array) * size:
            raise DataError(f"lists of other than {size} elements.")
        return values.reshape(len(array), size)
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype)


def null_rows(column: pa.ChunkedArray) -> Array:
    """`(rows,) bool`: True where the value is null or NaN, or a list holds one."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if not array.null_count and not _has_null_or_nan(array):
        return np.zeros(len(array), bool)
    is_null = np.asarray(pc.is_null(array, nan_is_null=not pa.types.is_nested(array.type)))
    if not pa.types.is_nested(array.type):
        return is_null
    inner = np.asarray(pc.is_null(array.flatten(), nan_is_null=True))
    if inner.any():
        parents = np.asarray(pc.list_parent_indices(array))
        is_null[parents[inner]] = True
    return is_null


def _has_null_or_nan(array: pa.Array) -> bool:
    """Whether there is one among the elements; far cheaper than to tell which."""
    if pa.types.is_nested(array.type):
        array = array.flatten()
    if array.null_count:
        return True
    if not pa.types.is_floating(array.type) or len(array) == 0:
        return False
    return bool(np.isnan(array.to_numpy().min()))  # a minimum is NaN where a value is


def assemble_rows(columns: Sequence[Array], layout: InputLayout) -> Array:
    """Join the feature columns of a table into the model's input.

    Args:
        columns: One array a feature, `(rows,)` or `(rows, size)`, in the layout's order.
        layout: Where each column goes.

    Returns:
        `(rows, *input_shape) float32`.
    """
    rows = len(columns[0])
    flat = np.empty((rows, layout.width), np.float32)
    for feature, values in zip(layout.features, columns, strict=True):
        flat[:, feature.offset : feature.offset + feature.size] = values.reshape(rows, -1)
    return flat.reshape(rows, *layout.input_shape)
