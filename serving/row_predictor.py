"""Predictions for a chunk of rows of which some are bad, or turn out to be.

Every good row is predicted in a call of its whole chunk: bad ones lend their place to a copy of a
good one. So what a row gets depends neither on its neighbours' mistakes nor on how often its shard
was tried. Where the model refuses a chunk, halves of it are tried until the rows are found that it
refuses by themselves; then the chunk is predicted without them.
"""

from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.tables import FileRows
from serving.errors import InputError
from serving.row_errors import Chunk, RowError
from serving.signature import Signature

# What a model may raise for the values of a row, beside its `row_failures`.
RowFailure = tuple[type[Exception], ...]
_FAILURES: RowFailure = (InputError, DataError, ArithmeticError, ValueError)


class RowModel(Protocol):
    """What predicts rows: `serving.predictor.Predictor` is one."""

    signature: Signature
    batch_rows: tuple[int, ...]
    row_failures: RowFailure

    def predict(self, columns: Any) -> NDArray[np.float32]:
        """Predictions for rows given by columns, `(rows, *output_shape)`."""


def predict_chunk(model: RowModel, chunk: Chunk) -> tuple[NDArray[np.float32], Chunk]:
    """Predictions of a chunk.

    Args:
        model: The model.
        chunk: Rows, some of them marked as bad.

    Returns:
        `(rows, output_size) float32`, zeros for bad rows; and the chunk with those rows marked too
        that the model refused.

    Raises:
        What the model raises where it takes each row by itself, but not all of them together.
    """
    caught = (*_FAILURES, *model.row_failures)
    is_bad, errors = chunk.is_bad.copy(), list(chunk.errors)
    size = model.signature.output_size
    if not is_bad.all():
        try:
            return predict_good_rows(model, chunk.inputs, is_bad), chunk
        except caught:
            refused = _refused(model, chunk, np.flatnonzero(~is_bad), caught)
            if not refused:
                raise
        for row, error in refused.items():
            is_bad[row] = True
            column = getattr(error, "column", None)
            text = " ".join(str(error).split())[:500]
            errors.append(RowError(chunk.first_row + row, "prediction_failed", text, column))
        errors.sort(key=lambda error: error.row)
    marked = Chunk(chunk.first_row, chunk.inputs, chunk.kept, is_bad, errors)
    if is_bad.all():
        return np.zeros((chunk.rows, size), np.float32), marked
    return predict_good_rows(model, chunk.inputs, is_bad), marked


def predict_good_rows(
    model: RowModel, table: pa.Table, is_bad: NDArray[np.bool_], path: str = "input"
) -> NDArray[np.float32]:
    """Predictions of the rows of a table in one call, in which bad ones are copies of a good one.

    Args:
        model: The model.
        table: The model's columns.
        is_bad: `(rows,) bool`; at least one is false.
        path: What error messages call the table.

    Returns:
        `(rows, output_size) float32`, zeros for bad rows.
    """
    if is_bad.any():
        places = np.arange(len(is_bad))
        places[is_bad] = np.flatnonzero(~is_bad)[0]
        table = table.take(pa.array(places))
    values = model.predict(_columns(model, table, path)).reshape(len(is_bad), -1)
    if is_bad.any():
        values[is_bad] = 0.0
    return values


def _columns(model: RowModel, table: pa.Table, path: str = "input") -> dict[str, Any]:
    rows = FileRows(path, table)
    return {name: rows.values(name, wanted) for name, wanted in model.signature.inputs.items()}


def _refused(
    model: RowModel, chunk: Chunk, rows: NDArray[np.intp], caught: RowFailure
) -> dict[int, Exception]:
    """Rows that the model refuses by themselves, with what it raised."""
    found: dict[int, Exception] = {}
    waiting = [rows]
    while waiting:
        part = waiting.pop()
        try:
            model.predict(_columns(model, chunk.inputs.take(pa.array(part))))
        except caught as error:
            if len(part) == 1:
                found[int(part[0])] = error
            else:
                middle = len(part) // 2
                waiting += [part[middle:], part[:middle]]
    return found
