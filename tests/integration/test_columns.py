"""Columns that hold no plain numbers, from files to predictions, on two workers."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import lockstep
from data_pipeline.errors import DataError
from serving.evaluation import evaluate_files
from serving.files import predict_files
from serving.predictor import load_predictor

ROWS = 400
START = dt.datetime(2023, 12, 30)
FEATURES = [
    "number",
    "carrier",
    {"name": "gate", "kind": "categorical", "encoding": "embedding", "embedding_size": 3},
    {"name": "remark", "kind": "text", "sequence_length": 4, "vocabulary_size": 6},
    {"name": "tail", "kind": "text", "encoding": "embedding", "embedding_size": 2},
    {"name": "time", "parts": ["month", "hour", "year"]},
]


def rows_of(rows: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    carriers = rng.choice(["UA", "B6", "DL", "007"], rows)
    words = rng.choice(["late", "early", "on time", "storm!", "gate change"], (rows, 2))
    late = (carriers == "UA") * 3.0 + (words == "storm!").any(axis=1) * 5.0
    return pa.table(
        {
            "number": rng.normal(3, 2, rows).astype("f4"),
            "carrier": pa.array(carriers.tolist()),
            "gate": pa.array(rng.integers(-2, 9, rows), pa.int16()),
            "remark": [" ".join(pair) for pair in words],
            "tail": [f"N{number}" for number in rng.integers(0, 30, rows)],
            "time": pa.array(
                [START + dt.timedelta(hours=int(hour)) for hour in rng.integers(0, 900, rows)],
                pa.timestamp("us"),
            ),
            "y": (late + rng.normal(0, 0.1, rows)).astype("f4"),
            "row_id": np.arange(rows),
        }
    )


def make_job(data: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "columns",
        "model": {
            "layers": [{"Dense": {"units": 8, "activation": "tanh"}}, {"Dense": {"units": 1}}]
        },
        "compile": {"optimizer": {"SGD": {"learning_rate": 0.05}}, "loss": "mse"},
        "data": {
            "train": str(data / "train.parquet"),
            "test": str(data / "test.parquet"),
            "features": FEATURES,
            "label": "y",
            "normalize": True,
        },
        "train": {"epochs": 4, "global_batch_size": 37, "seed": 5},
        "cluster": {"workers": 2},
        "runs_dir": str(runs),
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    pq.write_table(rows_of(ROWS, 0), folder / "train.parquet", row_group_size=50)
    pq.write_table(rows_of(90, 1), folder / "test.parquet", row_group_size=50)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return lockstep.train(make_job(folder, folder / "runs"))


def strange_rows() -> pa.Table:
    """Test rows, and some with values that no training row has."""
    table = rows_of(6, 2)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["carrier"][0] = "never seen"
    columns["gate"][1] = 999
    columns["remark"][2] = "words nobody wrote"
    columns["tail"][3] = ""
    columns["time"][4] = dt.datetime(1969, 2, 28, 23, 59, 59)
    return pa.table(columns, schema=table.schema)


def by_saved_model(artifact: Path, table: pa.Table) -> np.ndarray:
    """Predictions of the SavedModel alone, from raw columns."""
    serve = tf.saved_model.load(str(artifact / "saved_model")).signatures["serving_default"]
    raw = {
        "number": tf.constant(table["number"].to_numpy()),
        "carrier": tf.constant(table["carrier"].to_pylist()),
        "gate": tf.constant(table["gate"].to_numpy().astype("i8")),
        "remark": tf.constant(table["remark"].to_pylist()),
        "tail": tf.constant(table["tail"].to_pylist()),
        "time": tf.constant(table["time"].cast(pa.int64()).to_numpy()),
    }
    predicted: np.ndarray = serve(**raw)["prediction"].numpy()
    return predicted


def test_training_learns_from_them(run):
    assert run.metrics["test"]["loss"] < 0.5 * run.metrics["constant"]["loss"]


@pytest.mark.long
def test_one_worker_gives_the_same(run, folder):
    alone = lockstep.train(make_job(folder, folder / "alone", cluster={"workers": 1}))
    ours, theirs = run.model().get_weights(), alone.model().get_weights()
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=4e-5)
    assert run.metrics["test"]["loss"] == pytest.approx(alone.metrics["test"]["loss"], abs=4e-5)


def test_every_format_predicts_from_raw_rows(run):
    table = strange_rows()
    expected = by_saved_model(run.artifact, table)
    columns = {name: table[name] for name in table.column_names}
    for name in ("model.keras", "trained_model.h5", "saved_model"):
        predictor = load_predictor(run.artifact / name)
        np.testing.assert_allclose(predictor.predict(columns), expected, atol=1e-5, err_msg=name)
        plain = {name: np.asarray(table[name]) for name in table.column_names}
        np.testing.assert_allclose(predictor.predict(plain), expected, atol=1e-5, err_msg=name)


def test_the_signature_tells_raw_columns(run):
    signature = json.loads((run.artifact / "signature.json").read_text())
    dtypes = {entry["name"]: entry["dtype"] for entry in signature["inputs"]}
    assert dtypes == {
        "number": "float32",
        "carrier": "string",
        "gate": "int64",
        "remark": "string",
        "tail": "string",
        "time": "timestamp[us]",
    }


def test_files_are_predicted_and_judged(run, folder, tmp_path):
    predictor = load_predictor(run.artifact)
    judged = evaluate_files(predictor, str(folder / "test.parquet"))
    assert judged["loss"] == pytest.approx(run.metrics["test"]["loss"], abs=4e-5)
    table = strange_rows()
    pacsv.write_csv(table, tmp_path / "rows.csv")
    predict_files(predictor, str(tmp_path / "rows.csv"), tmp_path / "out")
    predicted = pq.read_table(tmp_path / "out")["prediction"].to_numpy()
    np.testing.assert_allclose(predicted, by_saved_model(run.artifact, table)[:, 0], atol=1e-5)


@pytest.mark.long
def test_going_on_keeps_the_vocabulary_of_the_model(run, folder, tmp_path):
    table = rows_of(60, 3)
    only_new = table.set_column(1, "carrier", pa.array(["ZZ"] * 60))
    pq.write_table(only_new, tmp_path / "train.parquet")
    pq.write_table(rows_of(20, 4), tmp_path / "test.parquet")
    model = {"file": str(run.artifact / "model.keras")}
    job = make_job(tmp_path, tmp_path / "runs", model=model)
    again = lockstep.train({**job, "train": {**job["train"], "epochs": 1}})
    first, second = (
        json.loads((artifact / "signature.json").read_text())["inputs"]
        for artifact in (run.artifact, again.artifact)
    )
    assert first == second
    job["data"]["features"] = [FEATURES[0], "carrier"]
    job["data"]["features"][1] = {"name": "carrier", "vocabulary_size": 3}
    with pytest.raises(DataError, match="'carrier' is read as"):
        lockstep.train(job)


@pytest.mark.long
def test_classes_may_be_texts(folder, tmp_path):
    table = rows_of(ROWS, 0)
    named = table.append_column(
        "kind", pa.array(np.where(table["y"].to_numpy() > 2, "late", "fine").tolist())
    )
    pq.write_table(named, tmp_path / "train.parquet", row_group_size=50)
    pq.write_table(named.slice(0, 90), tmp_path / "test.parquet")
    job = make_job(
        tmp_path,
        tmp_path / "runs",
        model={"layers": [{"Dense": {"units": 2, "activation": "softmax"}}]},
        compile={
            "optimizer": "adam",
            "loss": "sparse_categorical_crossentropy",
            "metrics": ["accuracy"],
        },
    )
    job["data"]["label"] = "kind"
    run = lockstep.train(job)
    judged = evaluate_files(load_predictor(run.artifact), str(tmp_path / "test.parquet"))
    assert judged["accuracy"] == pytest.approx(run.metrics["test"]["accuracy"], abs=1e-6)
    signature = json.loads((run.artifact / "signature.json").read_text())
    assert signature["label"]["classes"] == ["fine", "late"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_keras_file_needs_keras_alone(run):
    model = keras.saving.load_model(run.artifact / "model.keras")
    assert model.input_shape == (None, 1 + 1 + 1 + 4 + 64 + 5)
