"""One version of a model, ready to predict: raw columns in, predictions out.

Owns the compiled function and the sizes of the batches that it is called with. It is traced once,
for any number of rows, and then sees a few sizes only, so that kernels chosen for a shape are found
again. Rows that fill a batch up never reach the caller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf
from numpy.typing import NDArray

from configs.errors import did_you_mean
from data_pipeline.errors import DataError
from data_pipeline.features import Array, InputColumn, assemble_rows, feature_values
from serving.errors import InputError
from serving.model_file import LoadedModel, load_model
from serving.signature import Signature

_BATCH_ROWS = (1, 8, 64, 512, 4_096, 32_768, 65_536)
_BATCH_BYTES = 4 * 2**20


def load_predictor(path: str | Path, features: Sequence[str] = ()) -> "Predictor":
    """Load a model of any format to predict with.

    Args:
        path: An artifact folder, a `.keras` or `.h5` file, or a SavedModel folder.
        features: The input columns in order, for a model that comes without `signature.json`.

    Raises:
        ModelFileError: The model cannot be loaded, or nothing tells its columns.
    """
    return Predictor(load_model(path, features))


class Predictor:
    """A loaded model.

    Nothing is compiled before the first prediction. Safe to share between threads. A row's
    prediction may differ in the last bits with the number of rows that are predicted together.

    Args:
        model: The model.
        max_batch_rows: The most rows in one call of the model. None: as many as fit 4 MiB of
            input, at least 8 and at most 65,536.

    Attributes:
        path: Where the model was loaded from.
        signature: What it takes and gives.
        batch_rows: The sizes that it is called with, ascending.
        row_failures: What TensorFlow raises for values that a model cannot compute with, such as
            an index outside of an embedding.
    """

    row_failures: tuple[type[Exception], ...] = (tf.errors.InvalidArgumentError,)

    def __init__(self, model: LoadedModel, max_batch_rows: int | None = None) -> None:
        self.path = model.path
        self.signature: Signature = model.signature
        self._model = model
        most = max_batch_rows or max(8, _BATCH_BYTES // (4 * model.signature.layout.width))
        self.batch_rows = tuple(rows for rows in _BATCH_ROWS if rows <= most)

    def predict(self, columns: Mapping[str, Any]) -> NDArray[np.float32]:
        """Predictions for rows that are given by raw columns.

        Blocks until all are computed.

        Args:
            columns: For each input column of the signature the values of all rows: `(rows,)`,
                `(rows, *shape)` or `(rows, size)` of numbers or booleans; for a category or a text
                strings, for a timestamp moments (Arrow, numpy datetime64, ISO 8601, or
                microseconds since 1970), None for an unknown one. Others are ignored.

        Returns:
            `(rows, *output_shape) float32`.

        Raises:
            InputError: A column is missing, of another shape, or not what it should be.
        """
        return self.predict_rows(self.rows(columns))

    def rows(self, columns: Mapping[str, Any]) -> Array:
        """Rows of the model's input, checked, from raw columns; what `predict` does first.

        Args:
            columns: As for `predict`.

        Returns:
            `(rows, *input_shape) float32`.

        Raises:
            InputError: A column is missing, of another shape, or not what it should be.
        """
        return assemble_rows(self._checked(columns), self.signature.layout)

    def predict_rows(self, inputs: Array) -> NDArray[np.float32]:
        """Predictions for rows that `rows` made, of any number of callers together.

        Args:
            inputs: `(rows, *input_shape) float32`.

        Returns:
            `(rows, *output_shape) float32`.

        Raises:
            InputError: The model does not give one prediction for each row.
        """
        rows = len(inputs)
        if rows in self.batch_rows:
            return self._run(inputs, rows)
        out = np.empty((rows, *self.signature.output_shape), np.float32)
        start = 0
        for count, size in split_rows(rows, self.batch_rows):
            out[start : start + count] = self._run(inputs[start : start + count], size)
            start += count
        return out

    def judged_by(self, record: Mapping[str, Any] | None) -> "Predictor":
        """The same model, to be judged by another loss and other metrics.

        Args:
            record: As `Signature.compile` has it.
        """
        signature = replace(self.signature, compile=record)
        return Predictor(replace(self._model, signature=signature), self.batch_rows[-1])

    @cached_property
    def _compiled(self) -> Any:
        spec = tf.TensorSpec((None, *self.signature.layout.input_shape), tf.float32)
        return tf.function(self._model.call).get_concrete_function(spec)

    def _run(self, inputs: Array, size: int) -> NDArray[np.float32]:
        count = len(inputs)
        if count < size:
            padded = np.zeros((size, *inputs.shape[1:]), np.float32)
            padded[:count] = inputs
            inputs = padded
        predicted: NDArray[np.float32] = self._compiled(tf.constant(inputs)).numpy()
        if predicted.shape != (size, *self.signature.output_shape):
            raise InputError(
                f"{self.path} gave predictions of shape {list(predicted.shape)} for {size} rows; "
                f"the signature says {list(self.signature.output_shape)} a row. Use a model that "
                "gives one prediction for each row."
            )
        return predicted[:count]

    def _checked(self, columns: Mapping[str, Any]) -> list[Array]:
        arrays: list[Array] = []
        for column in self.signature.layout.features:
            if column.name not in columns:
                raise InputError(
                    f"no column {column.name!r}; received {', '.join(columns) or 'no columns'}, "
                    f"the model takes {', '.join(self.signature.inputs)}."
                    f"{did_you_mean(column.name, columns)} Add the column."
                )
            if column.encoding is not None:
                values = _encoded(column, columns[column.name])
            else:
                values = _numbers(column.name, columns[column.name])
            rows = len(arrays[0]) if arrays else len(values)
            if values.shape not in {
                (rows, *column.shape),
                (rows, column.size),
                *([(rows,)] if column.size == 1 else []),
            }:
                raise InputError(
                    f"column {column.name!r} has shape {list(values.shape)}; "
                    f"{[rows, *column.shape]} is allowed: one value of shape {list(column.shape)} "
                    f"for each of {rows} rows. Reshape it."
                )
            arrays.append(values)
        return arrays


def split_rows(rows: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Cut rows into calls of allowed sizes, as (rows, size of the call) in order.

    A call is filled to a quarter at least, so padding costs little for any number of rows; there
    are at most a handful of calls more than the fewest possible.

    Args:
        rows: How many there are.
        sizes: Allowed sizes, ascending, the first one 1.
    """
    calls: list[tuple[int, int]] = []
    while rows:
        size = next((size for size in sizes if size >= rows), sizes[-1])
        if 4 * rows < size:
            size = max(smaller for smaller in sizes if smaller <= rows)
        calls.append((min(rows, size), size))
        rows -= calls[-1][0]
    return calls


def _encoded(column: InputColumn, values: Any) -> Array:
    """Numbers of raw values: `(rows,)` or `(rows, size) float32`."""
    try:
        if not isinstance(values, pa.ChunkedArray):
            array = np.asarray(values)
            if array.dtype.kind == "M":
                array = array.astype("datetime64[us]")
            plain = array.reshape(len(array)) if array.ndim else array.reshape(1)
            values = pa.chunked_array([pa.array(plain, from_pandas=True)])
        return feature_values(column, values)
    except (pa.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"column {column.name!r} has {reason} One value of "
            f"{column.encoding and column.encoding.raw_dtype} for each row is allowed. Convert it.",
            column.name,
        ) from None
    except DataError as error:
        raise InputError(f"column {column.name!r} has {error}", column.name) from None


def _numbers(name: str, values: Any) -> Array:
    try:
        array = np.asarray(values)
        if array.dtype.kind in "iufb" and array.ndim > 0:
            return array.astype(np.float32, copy=False)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    received = "values of different shapes" if array.ndim == 0 else f"values of {array.dtype}"
    raise InputError(
        f"column {name!r} has {received}; an array of numbers or booleans with one value for each "
        "row is allowed. Convert it."
    )
