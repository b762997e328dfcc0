"""Loss and metrics of a model over labelled rows, the same for every format of the model.

Works from predictions alone, so that a SavedModel, which knows no loss, is judged by the loss and
the metrics that its signature has kept. Keras computes them: this file hands predictions and labels
to a Keras model that gives back what it is given.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from configs.section import Paths
from data_pipeline.errors import DataError
from data_pipeline.features import Array, class_numbers
from data_pipeline.tables import FileRows, Wanted, null_error, open_tables
from serving.errors import ModelFileError
from serving.predictor import Predictor
from serving.signature import Signature

OnNull = Literal["error", "drop"]
Progress = Callable[[int, int], None]


def evaluate_files(
    predictor: Predictor,
    data: Paths,
    *,
    label: str | None = None,
    on_null: OnNull = "error",
    progress: Progress | None = None,
) -> dict[str, float]:
    """Loss and compiled metrics over all rows of some files.

    The numbers are those of `model.evaluate` on the model's `.keras` file with the label and weight
    columns of its training, penalties on weights included, for all three formats. Two exceptions:
    penalties on activations are left out, as predictions do not tell them; and a loss with
    reduction "sum" depends, in Keras as here, on the rows of a batch, which are those of a table
    here, 65,536 at most.

    Args:
        predictor: The model.
        data: A file, a folder, a glob, or a list of these; Parquet or CSV.
        label: The label's column. None: the one of the training.
        on_null: What a null or NaN in an input, the label or the weight does: "error" or "drop".
        progress: Is called with rows done and rows in all.

    Returns:
        `loss` and each metric by its Keras name.

    Raises:
        DataError: The files cannot be read, or do not hold what is needed.
        ModelFileError: Nothing tells loss or label of the model, or Keras refuses them.
    """
    signature = predictor.signature
    label = label or signature.layout.label
    judge = judge_of(predictor)
    if not label:
        raise ModelFileError(
            f"{predictor.path} does not tell its label. Name the column with --label."
        )
    shapes = needed_columns(signature, label)
    tables = open_tables("data", data, shapes, max_rows=signature.table_rows)
    nulls: Counter[tuple[str, str]] = Counter()
    done = kept = 0
    for rows in tables:
        done += rows.table.num_rows
        masks = rows.null_masks(shapes)
        nulls.update({(name, rows.path): int(mask.sum()) for name, mask in masks.items()})
        if masks:
            rows = rows.where(~np.logical_or.reduce(list(masks.values())))
        if rows.table.num_rows and (on_null == "drop" or not nulls):
            kept += rows.table.num_rows
            _add(judge, predictor, rows, label)
        if progress is not None:
            progress(done, tables.rows)
    if nulls and on_null == "error":
        raise null_error("data", nulls, "drop")
    if not kept:
        raise DataError(
            f"data: --on-null drop leaves none of {tables.rows} rows; at least one without null or "
            "NaN is needed. Fill the values."
        )
    penalty = float((signature.compile or {}).get("weight_penalty") or 0.0)
    results: dict[str, Any] = judge.get_metrics_result()
    plain = {name: float(np.mean(np.asarray(value))) for name, value in results.items()}
    return {**plain, "loss": plain["loss"] + penalty}


def needed_columns(signature: Signature, label: str) -> Wanted:
    """Input columns, label and weight."""
    layout = signature.layout
    size = layout.label_size
    columns: dict[str, Any] = {**signature.inputs, label: () if size == 1 else (size,)}
    if layout.label_classes is not None:
        columns[label] = "string"
    return columns if layout.weight is None else {**columns, layout.weight: ()}


def _add(judge: keras.Model, predictor: Predictor, rows: FileRows, label: str) -> None:
    """Add rows without nulls to the judge's loss and metrics."""
    signature = predictor.signature
    layout = signature.layout
    columns = {name: rows.values(name, wanted) for name, wanted in signature.inputs.items()}
    try:
        predictions = predictor.predict(columns)
    except tf.errors.OpError as error:  # such as a number beyond an Embedding's
        raise ModelFileError(
            f"{predictor.path} cannot predict rows of {rows.path}: {reason_of(error)} Leave out "
            "rows that the model cannot know."
        ) from error
    labels = labels_of(rows, label, signature)
    weights = None
    if layout.weight is not None:
        weights = rows.array(layout.weight, (), "float32")
    take_batch(judge, predictor, label, predictions, labels, weights)


def take_batch(
    judge: keras.Model,
    predictor: Predictor,
    label: str,
    predictions: Array,
    labels: Array,
    weights: Array | None,
) -> None:
    """Add some rows to a judge's loss and metrics.

    Raises:
        ModelFileError: They do not fit.
    """
    try:
        judge.test_step((predictions, labels, weights))
    except (ValueError, TypeError, tf.errors.OpError) as error:
        raise ModelFileError(
            f"the loss and the metrics of {predictor.path} do not fit predictions of shape "
            f"{list(predictions.shape)} and labels {label!r} of shape {list(labels.shape)}: "
            f"{reason_of(error)} Name the label that the model was trained on."
        ) from error


def reason_of(error: Exception) -> str:
    """What Keras or TensorFlow said, as a sentence of bounded length.

    An error of a graph tells first where each of its nodes was made, the reason last.
    """
    text = str(error.message) if isinstance(error, tf.errors.OpError) else str(error)
    if text.startswith("Graph execution error"):
        text = text.partition("[[{{node")[0].strip().rpartition("\n")[2]
    text = " ".join(text.split())[:300]
    return text if text.endswith(".") else f"{text}."


def labels_of(rows: FileRows, label: str, signature: Signature) -> Array:
    """Labels in the type of the training: `(rows, label_size)`."""
    layout = signature.layout
    if layout.label_classes is not None:
        try:
            return class_numbers(rows.table[label], layout.label_classes).reshape(-1, 1)
        except DataError as error:
            raise DataError(f"{rows.path}: label {label!r} holds {error} Leave it out.") from None
    shape = (layout.label_size,)
    exact = rows.array(label, shape, "float64")
    if layout.label_dtype == "int64" and not np.array_equal(exact, np.trunc(exact)):
        raise DataError(
            f"{rows.path}: label {label!r} holds fractions; the model was trained on whole "
            "numbers. Name the right column."
        )
    return exact.astype(layout.label_dtype)


def judge_of(predictor: Predictor) -> keras.Model:
    """A Keras model with the loss and the metrics of the training that passes predictions on.

    Raises:
        ModelFileError: Nothing tells the loss, or Keras refuses it.
    """
    config = predictor.signature.compile
    if not config or config.get("loss") is None:
        raise ModelFileError(
            f"{predictor.path} does not tell the loss it was trained with. Evaluate an artifact of "
            "`lockstep train`, or save the model after model.compile."
        )
    predictions = keras.Input(predictor.signature.output_shape, dtype="float32")
    judge = keras.Model(predictions, predictions)
    try:
        judge.compile(
            loss=_built(keras.losses.deserialize, config["loss"]),
            loss_weights=_built(float, config.get("loss_weights")),
            metrics=_built(keras.metrics.deserialize, config.get("metrics")),
            weighted_metrics=_built(keras.metrics.deserialize, config.get("weighted_metrics")),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelFileError(
            f"the loss or a metric of {predictor.path} cannot be built ({reason}); those of Keras "
            "are allowed. Evaluate with Keras where your own classes are defined."
        ) from error
    return judge


def _built(make: Callable[[Any], Any], value: Any) -> Any:
    """Keras objects for what a compile record holds; names stay names.

    What is recorded by the name of the only output stands for that output.
    """
    if isinstance(value, list):
        return [_built(make, entry) for entry in value]
    if isinstance(value, dict) and "class_name" not in value:
        if len(value) != 1:
            raise ValueError(f"received several outputs: {', '.join(value)}")
        return _built(make, next(iter(value.values())))
    return make(value) if isinstance(value, dict | float | int) else value
