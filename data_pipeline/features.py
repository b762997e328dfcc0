"""From raw columns to the arrays a model trains on; the same code feeds training and prediction.

Owns the layout of the model's input: scalar features become one vector in the order of the job, a
single list feature keeps its shape, anything mixed is flattened and joined. Everything is float32;
labels keep whole numbers as int64. Columns that hold no plain numbers are encoded on the way
(`data_pipeline.encoding`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.data import DataConfig, FeatureConfig, check_settings
from data_pipeline.encoding import Encoding, Timestamp, encoding_of
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
        encoding: How the column becomes numbers; None where it holds numbers. `shape` is that of
            the encoded value.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    is_normalized: bool
    encoding: Encoding | None = None

    @property
    def size(self) -> int:
        """Elements of one row's value."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class InputLayout:
    """How features, label and weight lie in the arrays of a batch.

    Attributes:
        features: The input columns in order.
        label: The label's column.
        label_dtype: "int64" for whole numbers and classes, else "float32".
        label_size: Numbers of a row's label.
        weight: The weight's column, or None.
        label_classes: Where the label is text: its values, sorted; class k is the k-th one. Empty
            before they were learned; None for a label of numbers.
    """

    features: tuple[InputColumn, ...]
    label: str
    label_dtype: str
    label_size: int
    weight: str | None
    label_classes: tuple[str, ...] | None = None

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

    @property
    def columns(self) -> list[str]:
        """Columns of the files that make a row: features, label, weight."""
        extra = [self.label] if self.weight is None else [self.label, self.weight]
        return [feature.name for feature in self.features] + extra

    @property
    def is_learned(self) -> bool:
        """Whether vocabularies and classes are known, or there are none."""
        return self.label_classes != () and all(
            isinstance(encoding, Timestamp) or encoding.vocabulary is not None
            for encoding in self.encodings.values()
        )

    @property
    def encodings(self) -> dict[str, Encoding]:
        """Encodings by the name of their column."""
        return {
            feature.name: feature.encoding
            for feature in self.features
            if feature.encoding is not None
        }

    def with_encodings(self, encodings: Mapping[str, Encoding]) -> "InputLayout":
        """The layout with other encodings of the same shapes, by the name of their column."""
        features = tuple(
            replace(feature, encoding=encodings.get(feature.name, feature.encoding))
            for feature in self.features
        )
        return replace(self, features=features)


def input_layout(data: DataConfig, source: Source) -> InputLayout:
    """The layout that a job's `data` section describes, for the types found in the files.

    Raises DataError where a column's type or shape cannot be used.
    """
    columns = {column.name: column for column in source.columns}
    features: list[InputColumn] = []
    offset = 0
    for feature in data.features:
        features.append(_input_column(feature, columns[feature.name], data.normalize, offset))
        offset += features[-1].size
    label = columns[data.label]
    is_class = label.dtype == "text" and not label.is_list
    if not is_class:
        _check_number("data.label", label)
    if data.weight is not None:
        _check_number("data.weight", columns[data.weight])
    is_whole = is_class or np.dtype(label.dtype).kind in "iub"
    return InputLayout(
        features=tuple(features),
        label=data.label,
        label_dtype="int64" if is_whole else "float32",
        label_size=max(1, label.size),
        weight=data.weight,
        label_classes=() if is_class else None,
    )


def _input_column(
    feature: FeatureConfig, column: Column, normalizes: bool, offset: int
) -> InputColumn:
    kind = feature.kind or _usual_kind(column)
    try:
        check_settings(feature, kind)
    except ValueError as error:
        raise DataError(f"data.features: {error}") from None
    _check_kind(kind, column)
    encoding = encoding_of(feature, kind, column.dtype == "text")
    wanted = normalizes if feature.normalize is None else feature.normalize
    if encoding is None:
        shape = _feature_shape(feature.name, feature.shape, column)
        return InputColumn(feature.name, shape, offset, wanted)
    is_normalized = wanted and isinstance(encoding, Timestamp)
    return InputColumn(feature.name, encoding.shape, offset, is_normalized, encoding)


def _usual_kind(column: Column) -> str:
    """The kind of a column that the job does not tell."""
    if column.dtype == "text" and not column.is_list:
        return "categorical"
    if column.dtype.startswith(("timestamp", "date")):
        return "timestamp"
    return "numeric"


def _check_kind(kind: str, column: Column) -> None:
    """Whether a column can be read as a kind; numbers are checked with their shape."""
    if kind == "numeric":
        return
    allowed = {
        "categorical": "strings, whole numbers and booleans",
        "text": "strings",
        "timestamp": "timestamps, dates, ISO 8601 strings and whole microseconds since 1970",
    }
    is_text = column.dtype == "text"
    is_whole = _number_kind(column) in ("i", "u", "b")
    fits = {
        "categorical": is_text or is_whole,
        "text": is_text,
        "timestamp": is_text
        or column.dtype.startswith(("timestamp", "date"))
        or _number_kind(column) in ("i", "u"),
    }
    if column.is_list or not fits[kind]:
        held = f"lists of {column.dtype}" if column.is_list else column.dtype
        raise DataError(
            f"data.features: column {column.name!r} holds {held}; {allowed[kind]} are allowed for "
            f"kind: {kind}. Set another kind, or convert the column."
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
        return column.shape or (column.size,)
    if column.size and math.prod(given) != column.size:
        raise DataError(
            f"data.features: shape {list(given)} of column {name!r} has {math.prod(given)} "
            f"elements, its lists have {column.size}. Give a shape of {column.size} elements."
        )
    return tuple(given)


def _number_kind(column: Column) -> str:
    """Numpy's letter for the kind of a column's elements, "O" where they are no numbers."""
    try:
        return np.dtype(column.dtype).kind
    except TypeError:
        return "O"


def _check_number(field: str, column: Column) -> None:
    kind = _number_kind(column)
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


def feature_values(feature: InputColumn, column: pa.ChunkedArray) -> Array:
    """Numbers of a feature: `(rows,) float32`, or `(rows, size)` where a row has several.

    Args:
        feature: The feature.
        column: Its values; without nulls where it has no encoding.

    Raises:
        DataError: A list has another length than the feature, or a text is no moment in time.
    """
    if feature.encoding is None:
        return column_to_numpy(column, feature.size, "float32")
    return feature.encoding.encode(column)


def class_numbers(column: pa.ChunkedArray, classes: Sequence[str]) -> Array:
    """Class numbers of a label of texts, without nulls: `(rows,) int64`.

    Raises:
        DataError: A value is no class.
    """
    known = pa.array(classes, pa.string())
    texts = column.cast(pa.string())
    found = pc.index_in(texts, value_set=known)
    if found.null_count:
        unknown = texts.filter(pc.is_null(found))[0].as_py()
        raise DataError(
            f"the class {unknown!r}, which no training row has; {', '.join(classes[:20])} are "
            "allowed."
        )
    return np.asarray(found.to_numpy(), np.int64)


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
        place = slice(feature.offset, feature.offset + feature.size)
        flat[:, place] = values.reshape(rows, feature.size)
    return flat.reshape(rows, *layout.input_shape)
