"""What is known before any process starts: whether data, outputs and loss fit together."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from configs.load import load_job
from data_pipeline.errors import DataError
from tests.support.parquet import Rows, write_parquet
from trainer.errors import ModelError
from trainer.preflight import open_sources, plan_data

SPARSE = "sparse_categorical_crossentropy"
IMAGE = [{"name": "image", "shape": [4, 4, 1]}]
WINDOW = [{"name": "window", "shape": [3, 2]}]


def lists(values: Any, kind: Any = None, size: int = -1) -> pa.Array:
    return pa.array(values, pa.list_(kind or pa.float32(), size))


def data(folder: Path, **columns: Any) -> Rows:
    """Six rows with every kind of column; `columns` replace or add some."""
    rows = {
        "x": [float(row) for row in range(6)],
        "image": lists([[0.5] * 16] * 6, size=16),
        "window": lists([[0.5] * 6] * 6, size=6),
        "value": [0.5] * 6,
        "pair": lists([[0.0, 1.0]] * 6, size=2),
        "three": lists([[0.0, 1.0, 0.0]] * 6, size=3),
        "class": [0, 1, 2, 2, 1, 0],
        "classes": lists([[0, 1, 2]] * 6, pa.int64(), size=3),
        **columns,
    }
    write_parquet(folder / "1.parquet", rows)
    return rows


def job(
    folder: Path, layers: list[Any], loss: Any, label: str, features: Any = ("x",), **changes: Any
) -> Any:
    return load_job(
        {
            "name": "check",
            "model": {"layers": layers},
            "compile": {"loss": loss},
            "data": {
                "train": str(folder),
                "features": list(features),
                "label": label,
                **changes,
            },
            "train": {"epochs": 1, "global_batch_size": 4, "seed": 3},
        }
    )


def check(*arguments: Any, **changes: Any) -> Any:
    checked = job(*arguments, **changes)
    return plan_data(checked, *open_sources(checked))


def dense(units: int) -> dict[str, Any]:
    return {"Dense": {"units": units}}


@pytest.mark.parametrize(
    ("layers", "loss", "label", "features"),
    [
        ([dense(8), dense(1)], "mse", "value", ["x"]),
        ([dense(1)], {"MeanSquaredError": {}}, "value", ["x"]),
        ([dense(2)], "mae", "pair", ["x"]),
        ([dense(3), "Softmax"], "categorical_crossentropy", "three", ["x"]),
        ([dense(3), {"Activation": {"activation": "softmax"}}], SPARSE, "class", ["x"]),
        ([dense(30)], SPARSE, "class", ["x"]),
        (["Flatten", dense(1)], "mse", "value", IMAGE),
        (["GlobalAveragePooling2D", dense(3)], SPARSE, "class", IMAGE),
        ([{"LSTM": {"units": 4}}, dense(1), {"Rescaling": {"scale": 2.0}}], "mse", "value", WINDOW),
        ([dense(5), "Flatten"], "mse", "value", ["x"]),  # no Dense at the end: the probe asks
    ],
)
def test_outputs_that_fit(tmp_path, layers, loss, label, features):
    data(tmp_path)
    check(tmp_path, layers, loss, label, features)


@pytest.mark.parametrize(
    ("layers", "label"),
    [
        ([{"LSTM": {"units": 4, "return_sequences": True}}, dense(1)], "three"),
        ([{"Bidirectional": {"layer": {"LSTM": {"units": 4}}}}, dense(3)], "three"),
        ([dense(1)], "three"),
        (["my.layers:Sequences", dense(1)], "three"),
    ],
)
def test_an_output_for_each_time_step_is_not_taken_for_a_single_one(tmp_path, layers, label):
    """Keras compares outputs of (rows, steps, 1) with labels of (rows, steps)."""
    data(tmp_path)
    check(tmp_path, layers, "mse", label, WINDOW)


@pytest.mark.parametrize(
    ("layers", "loss", "label", "message"),
    [
        (
            [dense(1)],
            "mse",
            "pair",
            "the last layer gives 1 outputs, the label 'pair' has 2 value(s) a row; "
            "compile.loss=mse compares them one by one. Set the last layer's units to 2.",
        ),
        (
            [dense(3), {"Dropout": {"rate": 0.1}}, "ReLU"],
            {"BinaryCrossentropy": {"from_logits": True}},
            "class",
            "the last layer gives 3 outputs, the label 'class' has 1 value(s) a row; "
            "compile.loss=binarycrossentropy compares them one by one. Set the last layer's units "
            "to 1.",
        ),
        (
            [dense(3)],
            "categorical_crossentropy",
            "class",
            "compile.loss=categorical_crossentropy needs 3 values a row in the label 'class'; it "
            "has 1. Use sparse_categorical_crossentropy for class numbers.",
        ),
        (
            [dense(3)],
            SPARSE,
            "value",
            "compile.loss=sparse_categorical_crossentropy needs a label of whole class numbers; "
            "'value' holds float32. Convert the label, or use a regression loss such as mse.",
        ),
        (
            [dense(1)],
            {"SparseCategoricalCrossentropy": {}},
            "class",
            "compile.loss=sparsecategoricalcrossentropy needs an output for each class; the last "
            "layer has 1. Set its units to the number of classes.",
        ),
    ],
)
def test_outputs_that_do_not_fit(tmp_path, layers, loss, label, message):
    data(tmp_path)
    with pytest.raises(ModelError) as error:
        open_sources(job(tmp_path, layers, loss, label))
    assert str(error.value) == message
    assert error.value.exit_status == 2


def test_a_class_beyond_the_outputs(tmp_path):
    data(tmp_path)
    with pytest.raises(DataError) as error:
        check(tmp_path, [dense(2)], SPARSE, "class")
    assert str(error.value) == (
        "data.train: label 'class' holds class 2, the last layer has outputs for 0 to 1. Set its "
        "units to 3 or more."
    )


def test_a_negative_class(tmp_path):
    data(tmp_path, **{"class": [0, 1, -1, 2, 0, 1]})
    with pytest.raises(DataError) as error:
        check(tmp_path, [dense(3)], SPARSE, "class")
    assert str(error.value) == (
        "data.train: label 'class' holds class -1; class numbers count from 0. Shift them."
    )


def test_classes_of_other_roles_are_checked_too(tmp_path):
    data(tmp_path / "train")
    data(tmp_path / "test", **{"class": [0, 1, 2, 3, 1, 0]})
    with pytest.raises(DataError, match=r"^data\.test: label 'class' holds class 3, the last"):
        check(tmp_path / "train", [dense(3)], SPARSE, "class", test=str(tmp_path / "test"))


@pytest.mark.parametrize("highest", [99_999, 100_000, 149_999])
def test_many_classes_are_allowed(tmp_path, highest):
    data(tmp_path, **{"class": [0, 1, highest, 2, 0, 1]})
    check(tmp_path, [dense(150_000)], SPARSE, "class")
    with pytest.raises(DataError, match=f"holds class {highest}, the last layer has outputs for"):
        check(tmp_path, [dense(highest)], SPARSE, "class")


def test_a_class_for_each_time_step(tmp_path):
    data(tmp_path)
    check(tmp_path, [dense(3)], SPARSE, "classes", WINDOW)
    with pytest.raises(DataError, match="holds class 2, the last layer has outputs for 0 to 1"):
        check(tmp_path, [dense(2)], SPARSE, "classes", WINDOW)


def test_a_class_that_the_loss_ignores_may_lie_outside(tmp_path):
    data(tmp_path, **{"class": [0, 1, -1, 2, 255, 1]})
    loss = {"SparseCategoricalCrossentropy": {"ignore_class": -1}}
    check(tmp_path, [dense(3)], loss, "class")


def test_nulls_that_the_footers_know_are_told_without_reading_rows(tmp_path, monkeypatch):
    data(tmp_path / "1")
    path = write_parquet(tmp_path / "2" / "1.parquet", {"x": [1.0, None, None], "value": [0.0] * 3})
    monkeypatch.setattr("trainer.preflight.scan", lambda *_: pytest.fail("rows were read"))
    changes = {"validation": str(tmp_path / "2")}
    with pytest.raises(DataError) as error:
        check(tmp_path / "1", [dense(1)], "mse", "value", **changes)
    assert str(error.value) == (
        f"data.validation: column 'x' is null or NaN in 2 rows of {path}; data.on_null: error "
        "allows none. Clean the data, or set data.on_null: drop or zero."
    )


def test_nulls_in_lists_are_counted_by_row_not_by_element(tmp_path):
    pixels = [[0.5] * 16] * 4 + [[None] * 16, [None] + [0.5] * 15]
    data(tmp_path, image=lists(pixels, size=16))
    with pytest.raises(DataError, match="'image' is null or NaN in 2 rows of "):
        check(tmp_path, ["Flatten", dense(1)], "mse", "value", IMAGE)


def test_roles_must_agree_in_types(tmp_path):
    data(tmp_path / "train")
    path = write_parquet(tmp_path / "test" / "1.parquet", {"x": [1, 2], "value": [0.0, 1.0]})
    with pytest.raises(DataError) as error:
        open_sources(
            job(tmp_path / "train", [dense(1)], "mse", "value", test=str(tmp_path / "test"))
        )
    assert str(error.value) == (
        "column 'x' holds float64 in data.train but int64 in data.test; one type is allowed. "
        f"Convert {path}."
    )


def test_the_plan_is_what_the_job_says_of_the_rows_that_stay(tmp_path):
    data(tmp_path, x=[0.0, None, 2.0, 3.0, float("nan"), 5.0])
    planned = check(
        *(tmp_path, [dense(1)], "mse", "value"),
        **{"on_null": "drop", "shuffle": "full", "virtual_shards": 5, "normalize": True},
    )
    plan = planned.plan
    assert plan.block_rows.tolist() == [3, 1]
    assert (plan.rows, plan.steps_per_epoch, plan.virtual_shards) == (4, 1, 5)
    assert (plan.shuffle, plan.seed, plan.global_batch_size) == ("full", 3, 4)
    assert planned.statistics is not None
    np.testing.assert_allclose(planned.statistics.mean, [2.5])
    assert planned.sources.keys() == planned.scans.keys() == {"train"}


def test_the_window_is_the_jobs_or_chosen(tmp_path):
    data(tmp_path)
    arguments = (tmp_path, [dense(1)], "mse", "value")
    assert check(*arguments).plan.window_rows == 65_536
    assert check(*arguments, window_rows=3).plan.window_rows == 3


def test_other_formats_are_converted_before_they_are_opened(tmp_path):
    lines = [f"{row},{row % 3}" for row in range(30)]
    lines[4] += ",surplus"
    (tmp_path / "rows.csv").write_text("x,class\n" + "".join(line + "\n" for line in lines))
    checked = job(
        tmp_path / "rows.csv",
        [dense(3)],
        SPARSE,
        "class",
        on_bad_rows="skip",
        ingest_dir=str(tmp_path / "converted"),
    )
    told: list[Any] = []
    warnings: list[str] = []
    sources, layout = open_sources(checked, lambda *each: told.append(each), warnings.append)
    planned = plan_data(checked, sources, layout)
    assert planned.plan.rows == 29
    assert layout.label_dtype == "int64"
    assert told[-1][0] == "train"
    assert told[-1][1] == told[-1][2] > 0
    (warning,) = warnings
    assert "1 lines cannot be read and are left out" in warning
