"""Rows in JSON: TensorFlow Serving's `instances` (row by row) and `inputs` (column by column).

Owns the way from parsed JSON to the model's rows, and the wording of what is wrong with a value:
the row and the column. The usual request, objects of plain numbers, takes a short way; all others
are looked at value by value.
"""

import base64
import binascii
from typing import Any

import numpy as np

from configs.errors import did_you_mean
from data_pipeline.features import Array, InputColumn
from serving.errors import InputError
from serving.predictor import Predictor

_MISSING = object()
_NUMBERS = (int, float)  # bool is an int


class RowParser:
    """Rows of one model from JSON. Safe to share between threads.

    Args:
        predictor: Whose rows they become.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._columns = predictor.signature.layout.features
        self._names = [column.name for column in self._columns]
        self._is_plain = all(
            column.encoding is None and column.shape == () for column in self._columns
        )

    def instances(self, instances: Any) -> Array:
        """Rows of a list of objects by column; of values, for a model of one column or of numbers.

        Returns:
            `(rows, *input_shape) float32`.

        Raises:
            InputError: A value is missing or not what it should be.
        """
        if not isinstance(instances, list) or not instances:
            raise InputError(
                "instances must be a list of one row or more, each an object of "
                f"{', '.join(self._names[:50])}."
            )
        if self._is_plain:
            rows = self._plain(instances)
            if rows is not None:
                return rows
        if isinstance(instances[0], dict):
            return self._from_columns(self._turned(instances))
        if len(self._columns) == 1:
            return self._from_columns({self._names[0]: instances})
        return self._from_columns(self._by_position(instances))

    def inputs(self, inputs: Any) -> Array:
        """Rows of an object of columns; of a bare column, for a model of one.

        Returns:
            `(rows, *input_shape) float32`.

        Raises:
            InputError: A column is missing, or a value is not what it should be.
        """
        if not isinstance(inputs, dict):
            if len(self._columns) != 1:
                raise InputError(
                    f"inputs must be an object with a list for each of {', '.join(self._names)}."
                )
            inputs = {self._names[0]: inputs}
        return self._from_columns(inputs)

    def _plain(self, instances: list[Any]) -> Array | None:
        """Rows of plain numbers, or None where something is not as usual."""
        try:
            if isinstance(instances[0], dict):
                names = self._names
                values = np.array([[row[name] for name in names] for row in instances])
            else:
                values = np.array(instances)
                if values.ndim == 1 and len(self._names) == 1:
                    values = values.reshape(-1, 1)
        except (KeyError, TypeError, ValueError, OverflowError, IndexError):
            return None
        if values.dtype.kind not in "iufb" or values.shape != (len(instances), len(self._names)):
            return None
        rows: Array = _float32(values)
        return rows

    def _turned(self, instances: list[Any]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in self._names}
        for index, row in enumerate(instances):
            if not isinstance(row, dict):
                raise InputError(f"row {index}: received {_shown(row)}; an object is allowed.")
            for name, values in columns.items():
                value = row.get(name, _MISSING)
                if value is _MISSING:
                    raise InputError(
                        f"row {index}: no column {name!r}; the model takes "
                        f"{', '.join(self._names)}.{did_you_mean(name, row)} Add it."
                    )
                values.append(value)
        return columns

    def _by_position(self, instances: list[Any]) -> dict[str, list[Any]]:
        width = len(self._names)
        for index, row in enumerate(instances):
            if not isinstance(row, list) or len(row) != width:
                raise InputError(
                    f"row {index}: received {_shown(row)}; an object of {', '.join(self._names)}, "
                    f"or a list of {width} values in this order, is allowed."
                )
        return {
            name: [row[position] for row in instances] for position, name in enumerate(self._names)
        }

    def _from_columns(self, columns: dict[str, Any]) -> Array:
        found: dict[str, Any] = dict.fromkeys(columns)  # with unknown names, for the message
        rows: int | None = None
        for column in self._columns:
            values = columns.get(column.name, _MISSING)
            if values is _MISSING:
                break  # the predictor tells which and what is near
            if not isinstance(values, list):
                raise InputError(
                    f"column {column.name!r}: received {_shown(values)}; a list with one value "
                    "for each row is allowed."
                )
            if rows is not None and len(values) != rows:
                raise InputError(
                    f"column {column.name!r} has {len(values)} values, {self._names[0]!r} has "
                    f"{rows}; the same number in each is allowed."
                )
            rows = len(values)
            found[column.name] = column_values(column, values)
        if rows == 0:
            raise InputError("received no rows; one or more are allowed.")
        return self._predictor.rows(found)


def column_values(column: InputColumn, values: list[Any]) -> Any:
    """The values of a column as the predictor takes them.

    Args:
        column: What is wanted.
        values: One JSON value for each row.

    Raises:
        InputError: With the first row whose value is not what it should be.
    """
    if column.encoding is not None:
        kinds = {"string": (str, dict), "int64": (int,), "timestamp[us]": (str, int)}
        allowed = kinds[column.encoding.raw_dtype]
        for row, value in enumerate(values):
            if value is not None and not isinstance(value, allowed):
                raise _wrong(column, row, value, f"{column.encoding.raw_dtype} or null")
        if column.encoding.raw_dtype == "string":
            return np.array([_text(column, row, v) for row, v in enumerate(values)], object)
        return np.array(values, object)
    try:
        array = np.array(values)
    except (ValueError, OverflowError, TypeError):
        array = np.array(None)
    if array.dtype.kind in "iufb" and array.ndim:
        return _float32(array)
    for row, value in enumerate(values):
        if not _is_numbers(value, len(column.shape)):
            wanted = f"numbers of shape {list(column.shape)}" if column.shape else "a number"
            raise _wrong(column, row, value, wanted)
    if column.shape == ():
        return _float32(np.array([float(value) for value in values]))
    raise InputError(
        f"column {column.name!r} holds lists of different lengths; values of shape "
        f"{list(column.shape)} are allowed."
    )


def _float32(values: Array) -> Array:
    with np.errstate(over="ignore"):  # too large becomes infinity, which is refused with its row
        return values.astype(np.float32)


def _is_numbers(value: Any, depth: int) -> bool:
    if depth == 0:
        return isinstance(value, _NUMBERS) and abs(value) < 1e300 or value != value
    return isinstance(value, list) and all(_is_numbers(inner, depth - 1) for inner in value)


def _text(column: InputColumn, row: int, value: Any) -> str | None:
    if not isinstance(value, dict):
        text: str | None = value
        return text
    try:
        (encoded,) = value.values()
        if set(value) == {"b64"} and isinstance(encoded, str):
            return base64.b64decode(encoded, validate=True).decode()
    except (ValueError, binascii.Error):
        pass
    raise _wrong(column, row, value, 'a string, or {"b64": ...} of UTF-8')


def _wrong(column: InputColumn, row: int, value: Any, allowed: str) -> InputError:
    return InputError(
        f"row {row}, column {column.name!r}: received {_shown(value)}; {allowed} is allowed."
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if value is None:
        return "null"
    text = str(value) if isinstance(value, bool) else repr(value)[:60]
    return text.lower() if isinstance(value, bool) else text
