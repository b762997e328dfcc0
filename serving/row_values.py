"""A model judged row by row: metrics over all rows and slices, and each row's part in them.

Keras computes the metrics; a row's values come from the Keras function behind a loss or a metric.
They count only where their mean is what Keras gives for the metric on these very rows, so that a
metric which is no mean over rows (AUC, F1) is never taken for one.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import keras
import numpy as np
import pyarrow as pa
import tensorflow as tf
from numpy.typing import NDArray

from configs.catalog import ROW_FUNCTIONS
from configs.pipeline import MAX_SLICES
from data_pipeline.errors import DataError
from data_pipeline.tables import open_tables
from serving.errors import ModelFileError
from serving.evaluation import judge_of, labels_of, needed_columns, take_batch
from serving.predictor import Predictor

_BATCH_ROWS = 65_536
_TOLERANCE = 1e-3

Values = NDArray[np.float64]


@dataclass(frozen=True)
class RowMetric:
    """Each row's part in a metric.

    Attributes:
        values: `(rows,)`.
        is_weighted: Whether the metric is their mean weighted by the rows' weights.
        shape: Whether it is their mean, or the root of it.
    """

    values: Values
    is_weighted: bool
    shape: Literal["mean", "root"]


@dataclass(frozen=True)
class JudgedRows:
    """A model on some rows.

    Attributes:
        predictions: `(rows, *output_shape) float32`.
        metrics: By Keras's names, without penalties on weights.
        slices: The same by column and value, for values with enough rows.
        rows: Metrics that are means over rows.
        weights: `(rows,)`, or None.
        groups: By column: its values as texts, and `(rows,)` the index of each row's.
    """

    predictions: NDArray[np.float32]
    metrics: dict[str, float]
    slices: dict[str, dict[str, dict[str, float]]]
    rows: dict[str, RowMetric]
    weights: NDArray[np.float32] | None
    groups: dict[str, tuple[list[str], NDArray[np.int32]]] = field(default_factory=dict)


def judge_rows(
    predictor: Predictor, path: str, slice_rows: Mapping[str, int], label: str = ""
) -> JudgedRows:
    """Predict and judge all rows of a file. Takes memory for labels and predictions of all rows.

    Args:
        predictor: The model.
        path: A Parquet file; its rows are complete.
        slice_rows: Columns to slice by, each with the fewest rows of a value that is judged.
        label: The label's column; empty: the model's own.

    Raises:
        DataError: A column is missing, or a row cannot be judged.
        ModelFileError: Nothing tells the loss, or it does not fit.
    """
    label = label or predictor.signature.layout.label
    read = _Rows(predictor, path, label, list(slice_rows))
    judge = judge_of(predictor)
    everything = np.arange(len(read.labels))
    metrics = _metrics(judge, predictor, label, read, everything)
    groups = {column: _groups(column, read.columns[column]) for column in slice_rows}
    slices = {
        column: {
            value: _metrics(judge, predictor, label, read, rows)
            for code, value in enumerate(values)
            if len(rows := np.flatnonzero(codes == code)) >= slice_rows[column]
        }
        for column, (values, codes) in groups.items()
    }
    config = predictor.signature.compile or {}
    found = {
        name: row
        for name, entry in _entries(config)
        if name in metrics and (row := _row_metric(entry, config, read, metrics[name], name))
    }
    return JudgedRows(read.predictions, metrics, slices, found, read.weights, groups)


class _Rows:
    """Predictions, labels, weights and other columns of all rows of a file."""

    def __init__(self, predictor: Predictor, path: str, label: str, others: Sequence[str]) -> None:
        signature = predictor.signature
        wanted = needed_columns(signature, label)
        tables = open_tables("evaluation", path, wanted, True, signature.table_rows)
        weight = signature.layout.weight
        predictions, labels, weights = [], [], []
        parts: dict[str, list[pa.ChunkedArray]] = {name: [] for name in others}
        for rows in tables:
            columns = {name: rows.values(name, each) for name, each in signature.inputs.items()}
            predictions.append(predictor.predict(columns))
            labels.append(labels_of(rows, label, signature))
            if weight is not None:
                weights.append(rows.array(weight, (), "float32"))
            for name in others:
                if name not in rows.table.column_names:
                    raise DataError(f"evaluation: no column {name!r} in {path} to slice by.")
                parts[name].append(rows.table[name])
        self.predictions: NDArray[np.float32] = np.concatenate(predictions)
        self.labels = np.concatenate(labels)
        self.weights = np.concatenate(weights) if weights else None
        self.columns = {
            name: pa.chunked_array([chunk for part in found for chunk in part.chunks])
            for name, found in parts.items()
        }


def _metrics(
    judge: keras.Model, predictor: Predictor, label: str, read: _Rows, rows: NDArray[np.int64]
) -> dict[str, float]:
    """Loss and metrics of some rows by their indices, as Keras gives them."""
    judge.reset_metrics()
    for start in range(0, len(rows), _BATCH_ROWS):
        part = rows[start : start + _BATCH_ROWS]
        weights = None if read.weights is None else read.weights[part]
        take_batch(judge, predictor, label, read.predictions[part], read.labels[part], weights)
    results = judge.get_metrics_result()
    return {name: float(np.mean(np.asarray(value))) for name, value in results.items()}


def _groups(column: str, values: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int32]]:
    texts = np.array(["null" if value is None else str(value) for value in values.to_pylist()])
    names, codes = np.unique(texts, return_inverse=True)
    if len(names) > MAX_SLICES:
        raise DataError(
            f"gate.slices: column {column!r} has {len(names):,} values; {MAX_SLICES:,} or fewer "
            "make slices. Name a column with fewer, such as a class of the value."
        )
    return names.tolist(), codes.astype(np.int32)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Loss and metrics by the names of their results."""
    yield "loss", config.get("loss")
    for kind in ("metrics", "weighted_metrics"):
        for entry in _flat(config.get(kind)):
            yield (entry if isinstance(entry, str) else entry["config"].get("name", "")), entry


def _flat(value: Any) -> Iterator[Any]:
    """Entries of lists in lists, and of mappings by output."""
    if isinstance(value, dict) and "class_name" not in value:
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _flat(entry)
    elif value is not None:
        yield value


def _row_metric(
    entry: Any, config: Mapping[str, Any], read: _Rows, expected: float, name: str
) -> RowMetric | None:
    """Each row's part, where the mean of all of them is the metric."""
    (entry,) = [*_flat(entry)][:1] or [None]
    function = _function(entry, read)
    if function is None or not math.isfinite(expected):
        return None
    parts = [
        np.asarray(function(tf.constant(read.labels[at]), tf.constant(read.predictions[at])))
        for start in range(0, len(read.labels), _BATCH_ROWS)
        for at in [slice(start, start + _BATCH_ROWS)]
    ]
    values = np.concatenate([part.reshape(len(part), -1) for part in parts]).astype(np.float64)
    values = values.mean(axis=1)
    if name == "loss":
        factors = [*_flat(config.get("loss_weights"))]
        values = values * (float(factors[0]) if factors else 1.0)
    is_root = isinstance(entry, dict) and entry["class_name"] == "RootMeanSquaredError"
    for candidate in _weightings(values, read.weights, "root" if is_root else "mean"):
        if math.isclose(_mean(candidate, read.weights), expected, rel_tol=_TOLERANCE, abs_tol=1e-7):
            return candidate
    return None


def _weightings(
    values: Values, weights: NDArray[np.float32] | None, shape: Literal["mean", "root"]
) -> Iterator[RowMetric]:
    """The ways in which weights may count: Keras's loss divides by rows, its metrics by weights."""
    if weights is not None:
        yield RowMetric(values * weights, False, shape)
        yield RowMetric(values, True, shape)
    yield RowMetric(values, False, shape)


def _mean(metric: RowMetric, weights: NDArray[np.float32] | None) -> float:
    mean = float(np.average(metric.values, weights=weights if metric.is_weighted else None))
    return math.sqrt(mean) if metric.shape == "root" else mean


def _function(entry: Any, read: _Rows) -> Callable[[Any, Any], Any] | None:
    """From labels and predictions to a value a row; None where there is no such function."""
    if entry in ("accuracy", "acc"):
        name, arguments = _accuracy(read), {}
    elif isinstance(entry, str):
        return _named(entry)
    elif isinstance(entry, dict):
        name = ROW_FUNCTIONS.get(str(entry.get("class_name")), "")
        arguments = dict(entry.get("config") or {})
    else:
        return None
    function = _named(name)
    if function is None:
        return None
    known = inspect.signature(function).parameters
    chosen = {key: value for key, value in arguments.items() if key in known}
    return lambda labels, predictions: function(labels, predictions, **chosen)


def _named(name: str) -> Callable[[Any, Any], Any] | None:
    found = getattr(keras.metrics, name, None) or getattr(keras.losses, name, None)
    if found is None and name:
        try:
            found = keras.losses.get(name)
        except ValueError:
            return None
    return found if inspect.isfunction(found) else None


def _accuracy(read: _Rows) -> str:
    """Which one Keras means, by the shapes."""
    if read.predictions.shape[-1] == 1:
        return "binary_accuracy"
    is_one_hot = read.labels.shape[-1] == read.predictions.shape[-1]
    return "categorical_accuracy" if is_one_hot else "sparse_categorical_accuracy"


def first_difference(
    name: str, ours: NDArray[np.float32], theirs: NDArray[np.float32], tolerance: float
) -> str:
    """How predictions of two formats differ by more than a tolerance, or nothing.

    Args:
        name: What the sentence calls `theirs`.
        ours: `(rows, ...)`.
        theirs: The same of the other format.
        tolerance: In parts of the value, or of 1 for smaller ones.
    """
    if not np.isfinite(theirs).all():
        rows = int((~np.isfinite(theirs.reshape(len(theirs), -1)).all(axis=1)).sum())
        return f"{name} predicts what is not finite in {rows} of {len(theirs)} rows"
    if ours.shape != theirs.shape:
        raise ModelFileError(f"{name} gives predictions of another shape.")
    apart = np.abs(ours - theirs) / np.maximum(np.abs(ours), 1.0)
    if not np.isfinite(ours).all() or apart.size == 0 or apart.max() <= tolerance:
        return ""
    row = int(apart.reshape(len(apart), -1).max(axis=1).argmax())
    return (
        f"{name} predicts {theirs[row].ravel()[0]:.6g} for row {row}, model.keras "
        f"{ours[row].ravel()[0]:.6g}"
    )
