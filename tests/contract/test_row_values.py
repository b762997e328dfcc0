"""Models judged row by row: values against closed forms, metrics against Keras, slices, weights."""

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from data_pipeline.errors import DataError
from data_pipeline.naming import unlabelled_layout
from serving.model_file import LoadedModel
from serving.predictor import Predictor
from serving.row_values import JudgedRows, first_difference, judge_rows
from serving.signature import Signature

ROWS = 300
RANDOM = np.random.default_rng(5)
X = RANDOM.normal(0, 1, ROWS).astype("f4")
NOISE = RANDOM.normal(0, 0.5, ROWS).astype("f4")
WEIGHTS = RANDOM.uniform(0, 2, ROWS).astype("f4")
PLACES = np.array(["b", "a", "c"])[np.minimum(np.arange(ROWS) % 7, 2)]


def predictor(call: Any, outputs: int, label_dtype: str, has_weight: bool, **compiled: Any) -> Any:
    """A model that is a function of the column x, judged as `compiled` says."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(outputs)])
    model.compile(**compiled)
    record = model.get_compile_config()
    layout = unlabelled_layout([("x", ())])
    weight = "w" if has_weight else None
    layout = layout.__class__(layout.features, "y", label_dtype, 1, weight)
    signature = Signature(layout, (outputs,), record)
    return Predictor(LoadedModel(Path("model"), signature, call))


def judged(
    path: Path, labels: Any, call: Any, *, dtype: str = "float32", outputs: int = 1, **more: Any
) -> JudgedRows:
    has_weight = more.pop("has_weight", False)
    table = {"x": X, "y": labels, "w": WEIGHTS, "place": PLACES}
    pq.write_table(pa.table(table), path / "rows.parquet", row_group_size=90)
    model = predictor(call, outputs, dtype, has_weight, **more)
    return judge_rows(model, str(path / "rows.parquet"), {"place": 50})


def twice(rows: tf.Tensor) -> tf.Tensor:
    return 2.0 * rows


def test_values_of_rows_are_the_closed_forms(tmp_path: Path) -> None:
    found = judged(
        tmp_path,
        2 * X + NOISE,
        twice,
        loss="mse",
        metrics=["mae", keras.metrics.RootMeanSquaredError(), keras.metrics.R2Score(name="r2")],
    )
    np.testing.assert_allclose(found.rows["loss"].values, NOISE**2, atol=1e-5)
    np.testing.assert_allclose(found.rows["mae"].values, np.abs(NOISE), atol=1e-5)
    root = found.rows["root_mean_squared_error"]
    assert root.shape == "root"
    assert math.sqrt(root.values.mean()) == pytest.approx(
        found.metrics["root_mean_squared_error"], rel=1e-4
    )
    assert found.metrics["mae"] == pytest.approx(np.abs(NOISE).mean(), rel=1e-4)
    assert "r2" in found.metrics
    assert "r2" not in found.rows  # it is no mean over rows
    assert found.weights is None


def test_slices_are_judged_by_value_where_rows_suffice(tmp_path: Path) -> None:
    found = judged(tmp_path, 2 * X + NOISE, twice, loss="mse", metrics=["mae"])
    values, codes = found.groups["place"]
    assert values == ["a", "b", "c"]
    assert [values[code] for code in codes] == PLACES.tolist()
    assert set(found.slices["place"]) == {"c"}  # a and b have 43 rows each
    expected = np.abs(NOISE)[PLACES == "c"].mean()
    assert found.slices["place"]["c"]["mae"] == pytest.approx(expected, rel=1e-4)


def test_weights_count_as_in_keras(tmp_path: Path) -> None:
    found = judged(
        tmp_path,
        2 * X + NOISE,
        twice,
        loss="mse",
        metrics=["mae"],
        weighted_metrics=["mse"],
        has_weight=True,
    )
    loss, plain, weighted = (found.rows[name] for name in ("loss", "mae", "mse"))
    np.testing.assert_allclose(loss.values, WEIGHTS * NOISE**2, atol=1e-5)
    assert (loss.is_weighted, plain.is_weighted, weighted.is_weighted) == (False, False, True)
    assert found.weights is not None
    expected = np.average(NOISE**2, weights=WEIGHTS)
    assert np.average(weighted.values, weights=found.weights) == pytest.approx(expected, rel=1e-4)
    assert found.metrics["mse"] == pytest.approx(expected, rel=1e-4)


def test_accuracies_are_told_apart_by_shape(tmp_path: Path) -> None:
    is_up = (X + NOISE > 0).astype("i8")

    def share(rows: tf.Tensor) -> tf.Tensor:
        return tf.sigmoid(3.0 * rows)

    binary = judged(
        tmp_path,
        is_up,
        share,
        dtype="int64",
        loss="binary_crossentropy",
        metrics=["accuracy", keras.metrics.AUC(name="auc")],
    )
    np.testing.assert_array_equal(binary.rows["accuracy"].values, (X > 0) == is_up)
    assert set(binary.rows) == {"loss", "accuracy"}

    def shares(rows: tf.Tensor) -> tf.Tensor:
        return tf.concat([1 - share(rows), share(rows)], axis=1)

    sparse = judged(
        tmp_path,
        is_up,
        shares,
        dtype="int64",
        outputs=2,
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    np.testing.assert_array_equal(sparse.rows["accuracy"].values, (X > 0) == is_up)
    np.testing.assert_allclose(
        sparse.rows["loss"].values, binary.rows["loss"].values, rtol=1e-3, atol=1e-5
    )


def test_a_column_of_too_many_values_makes_no_slices(tmp_path: Path) -> None:
    rows = 1_500
    table = {"x": np.zeros(rows, "f4"), "y": np.zeros(rows, "f4"), "id": np.arange(rows)}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    model = predictor(twice, 1, "float32", False, loss="mse")
    with pytest.raises(DataError, match="'id' has 1,500 values"):
        judge_rows(model, str(tmp_path / "rows.parquet"), {"id": 1})
    with pytest.raises(DataError, match="no column 'place'"):
        judge_rows(model, str(tmp_path / "rows.parquet"), {"place": 1})


def test_formats_that_differ_are_found() -> None:
    ours = np.array([[1.0], [200.0], [3.0]], np.float32)
    assert first_difference("saved_model", ours, ours * 1.0005, 1e-3) == ""
    text = first_difference("saved_model", ours, ours + [[0], [0], [0.1]], 1e-3)
    assert text == "saved_model predicts 3.1 for row 2, model.keras 3"
    broken = np.array([[1.0], [np.nan], [3.0]], np.float32)
    text = first_difference("model.keras", broken, broken, 1e-3)
    assert text == "model.keras predicts what is not finite in 1 of 3 rows"
