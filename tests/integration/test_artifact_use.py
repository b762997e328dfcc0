"""A trained model in use: every format predicts and is judged as plain Keras does it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data_pipeline.errors import DataError
from data_pipeline.features import InputColumn, InputLayout
from serving import files
from serving.errors import InputError, ModelFileError, OutputError
from serving.evaluation import evaluate_files
from serving.files import predict_files
from serving.predictor import Predictor, load_predictor, split_rows
from trainer.export import write_artifact

# Keras 3.15 hands TensorFlow's tensors to NumPy 2 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROWS = 1_000
FORMATS = ("model.keras", "trained_model.h5", "saved_model")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """A model as it was before it was written, its artifact, and rows in the artifact's terms."""

    model: keras.Model
    artifact: Path
    table: pa.Table
    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None

    @cached_property
    def expected(self) -> np.ndarray:
        return self.model.predict(self.inputs, batch_size=128, verbose=0)

    @cached_property
    def predictors(self) -> dict[str, Predictor]:
        return {name: load_predictor(self.artifact / name) for name in FORMATS}

    @property
    def predictor(self) -> Predictor:
        return self.predictors["model.keras"]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return {
            name: np.array(self.table[name].to_pylist(), np.float32).reshape(-1, *shape)
            for name, shape in self.predictor.signature.inputs.items()
        }


@pytest.fixture(scope="module")
def vector(tmp_path_factory) -> Case:
    """Three columns, one number out, everything that can weigh on a loss."""
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(1)
    inputs = random.normal([5.0, -3.0, 40.0], [2.0, 9.0, 0.1], (ROWS, 3)).astype(np.float32)
    inputs[:, 1] = np.round(inputs[:, 1])
    labels = random.normal(0, 2, (ROWS, 1)).astype(np.float32)
    weights = random.uniform(0, 3, ROWS).astype(np.float32)
    normalization = keras.layers.Normalization(mean=inputs.mean(0), variance=inputs.var(0))
    model = keras.Sequential(
        [
            keras.layers.Input((3,)),
            normalization,
            keras.layers.Dense(
                16, activation="relu", kernel_regularizer=keras.regularizers.L2(0.1)
            ),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        "adam",
        loss=keras.losses.LogCosh(),
        loss_weights=1.5,
        metrics=["mae", keras.metrics.RootMeanSquaredError()],
        weighted_metrics=[keras.metrics.MeanSquaredError(name="weighted")],
    )
    model.train_on_batch(inputs, labels)
    names = ("speed", "whole", "narrow")
    layout = InputLayout(
        tuple(InputColumn(name, (), index, True) for index, name in enumerate(names)),
        *("late", "float32", 1, "weight"),
    )
    artifact = tmp_path_factory.mktemp("vector") / "artifact"
    write_artifact(artifact, model, layout, {}, has_h5=True, has_saved_model=True)
    columns: dict[str, Any] = {"row_id": np.arange(ROWS), "weight": weights, "late": labels[:, 0]}
    columns |= {name: inputs[:, index] for index, name in enumerate(names)}
    columns["whole"] = columns["whole"].astype(np.int64)
    columns["carrier"] = ["AA", "B6", None, "007"] * (ROWS // 4)
    return Case(model, artifact, pa.table(columns), inputs, labels, weights)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Case:
    """A column of lists, shares of three classes out."""
    keras.utils.set_random_seed(2)
    random = np.random.default_rng(2)
    inputs = random.random((ROWS, 4, 4, 1), np.float32)
    labels = random.integers(0, 3, (ROWS, 1))
    model = keras.Sequential(
        [
            keras.layers.Input((4, 4, 1)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.train_on_batch(inputs, labels)
    feature = InputColumn("pixels", (4, 4, 1), 0, False)
    layout = InputLayout((feature,), "digit", "int64", 1, None)
    artifact = tmp_path_factory.mktemp("image") / "artifact"
    write_artifact(artifact, model, layout, {}, has_h5=True, has_saved_model=True)
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(inputs.reshape(-1)), 16)
    table = pa.table({"row_id": np.arange(ROWS), "pixels": pixels, "digit": labels[:, 0]})
    return Case(model, artifact, table, inputs, labels, None)


@pytest.fixture(params=["vector", "image"])
def case(request) -> Case:
    return request.getfixturevalue(request.param)


def written(path: Path, table: pa.Table) -> str:
    (pacsv.write_csv if path.suffix == ".csv" else pq.write_table)(table, path)
    return str(path)


def predicted(folder: Path) -> np.ndarray:
    """Predictions in an output folder, read as anybody would read it."""
    return np.array(pq.read_table(folder)["prediction"].to_pylist(), np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_predicts_what_keras_predicts(case, name):
    predictions = case.predictors[name].predict(case.columns)
    assert predictions.dtype == np.float32
    np.testing.assert_allclose(predictions, case.expected, rtol=0, atol=1e-5)


def test_an_artifact_folder_stands_for_its_keras_file(vector):
    assert load_predictor(vector.artifact).path == vector.artifact / "model.keras"


def test_the_saved_model_takes_raw_columns_without_our_code(case):
    serve = tf.saved_model.load(str(case.artifact / "saved_model")).signatures["serving_default"]
    raw = {name: tf.constant(values) for name, values in case.columns.items()}
    predictions = serve(**raw)["prediction"].numpy()
    np.testing.assert_allclose(predictions, case.expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 2, 9, 130, 999])
def test_any_number_of_rows_gets_as_many_predictions(vector, rows):
    some = {name: values[:rows] for name, values in vector.columns.items()}
    predictions = vector.predictor.predict(some)
    assert predictions.shape == (rows, 1)
    np.testing.assert_allclose(predictions, vector.expected[:rows], rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300_000), st.integers(4, 7))
def test_calls_hold_all_rows_and_little_else(rows, count):
    sizes = (1, 8, 64, 512, 4_096, 32_768, 65_536)[:count]
    calls = split_rows(rows, sizes)
    assert sum(held for held, _ in calls) == rows
    assert all(size in sizes and size / 4 <= held <= size for held, size in calls)
    assert len(calls) <= rows // sizes[-1] + 8 * len(sizes)


def test_the_model_is_traced_once_and_sees_few_sizes(vector):
    seen = []
    model = vector.predictor._model

    def call(rows: tf.Tensor) -> tf.Tensor:
        seen.append(rows.shape)
        tf.py_function(lambda size: seen.append(int(size)), [tf.shape(rows)[0]], [])
        return model.call(rows)

    predictor = Predictor(type(model)(model.path, model.signature, call), max_batch_rows=64)
    for rows in range(1, 200, 9):
        predictor.predict({name: values[:rows] for name, values in vector.columns.items()})
    assert seen[0].as_list() == [None, 3]
    assert set(seen[1:]) == {1, 8, 64}


def test_a_row_may_come_flat_or_in_its_shape(image):
    flat = {"pixels": image.columns["pixels"].reshape(-1, 16)[:5], "unknown": ["text"] * 5}
    np.testing.assert_allclose(image.predictor.predict(flat), image.expected[:5], rtol=0, atol=1e-5)


BAD_COLUMNS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"sped": [1.0]}, "no column 'speed'.* Did you mean 'sped'"),
    "text": ({"speed": ["fast"], "whole": [1], "narrow": [1]}, "'speed' has values of <U4"),
    "lengths": ({"speed": [1.0], "whole": [1, 2], "narrow": [1]}, r"'whole' has shape \[2\]"),
    "ragged": ({"speed": [[1.0], []], "whole": [1], "narrow": [1]}, "values of different shapes"),
    "shape": ({"speed": [1], "whole": [[1, 2]], "narrow": [1]}, r"'whole' has shape \[1, 2\]"),
    "one row without its axis": ({"speed": 1.0, "whole": 1, "narrow": 1}, "'speed'"),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_columns_are_named(vector, name):
    columns, message = BAD_COLUMNS[name]
    with pytest.raises(InputError, match=message):
        vector.predictor.predict(columns)


def test_every_row_comes_out_once_in_order_with_all_its_columns(vector, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PART_ROWS", 60_000)
    many = pa.concat_tables([vector.table] * 70)
    many = many.set_column(0, "row_id", pa.array(np.arange(len(many))))
    (tmp_path / "in").mkdir()
    for index, (start, stop) in enumerate(((0, 66_001), (66_001, 66_002), (66_002, 70_000))):
        pq.write_table(many.slice(start, stop - start), tmp_path / "in" / f"{index}.parquet")
    seen = []
    summary = predict_files(
        vector.predictor,
        str(tmp_path / "in"),
        tmp_path / "out",
        progress=lambda done, rows: seen.append((done, rows)),
    )
    assert (summary.rows, summary.files, summary.parts, summary.null_rows) == (70_000, 3, 2, 0)
    assert seen[-1] == (70_000, 70_000)
    back = pq.read_table(tmp_path / "out")
    assert back.drop_columns("prediction").equals(many)
    assert back.schema.field("prediction").type == pa.float32()
    expected = np.tile(vector.expected[:, 0], 70)
    np.testing.assert_allclose(back["prediction"].to_numpy(), expected, rtol=0, atol=1e-5)
    record = json.loads((tmp_path / "out" / files.RECORD_FILE).read_text())
    assert record["rows"] == sum(part["rows"] for part in record["parts"]) == 70_000


def test_lists_go_in_and_lists_come_out(image, tmp_path):
    fixed = image.table
    variable = fixed.set_column(1, "pixels", fixed["pixels"].cast(pa.list_(pa.float64())))
    for name, table in (("fixed", fixed), ("variable", variable)):
        path = written(tmp_path / f"{name}.parquet", table)
        predict_files(image.predictor, path, tmp_path / name)
        kind = pq.read_schema(tmp_path / name / "part-00000.parquet").field("prediction").type
        assert (kind.list_size, kind.value_type) == (3, pa.float32())
        np.testing.assert_allclose(predicted(tmp_path / name), image.expected, rtol=0, atol=1e-5)


def test_csv_gives_what_parquet_gives(vector, tmp_path):
    table = vector.table.drop_columns("carrier")
    for suffix in ("parquet", "csv"):
        path = written(tmp_path / f"x.{suffix}", table)
        predict_files(vector.predictor, path, tmp_path / suffix)
    first, second = (pq.read_table(tmp_path / suffix) for suffix in ("parquet", "csv"))
    assert second["row_id"].to_pylist() == list(range(ROWS))
    assert first.column_names == second.column_names
    for name in first.column_names:
        np.testing.assert_array_equal(
            first[name].to_numpy().astype(np.float32), second[name].to_numpy().astype(np.float32)
        )


def with_nulls(table: pa.Table, name: str) -> pa.Table:
    """Rows 3 and 700 are null and 500 is NaN in column `name`."""
    values = table[name].to_pylist()
    is_list = isinstance(values[0], list)
    values[3] = [*values[3][:-1], None] if is_list else None
    values[500] = [float("nan"), *values[500][1:]] if is_list else float("nan")
    values[700] = None
    kind = table.schema.field(name).type if is_list else pa.float32()
    index = table.column_names.index(name)
    return table.set_column(index, name, pa.array(values, kind))


def test_a_row_with_a_null_gets_null_and_the_others_their_prediction(case, tmp_path):
    name = list(case.columns)[0]
    path = written(tmp_path / "x.parquet", with_nulls(case.table, name))
    summary = predict_files(case.predictor, path, tmp_path / "out", on_null="null")
    assert (summary.rows, summary.null_rows) == (ROWS, 3)
    predictions = pq.read_table(tmp_path / "out")["prediction"].to_pylist()
    assert [row for row, value in enumerate(predictions) if value is None] == [3, 500, 700]
    kept = np.setdiff1d(np.arange(ROWS), [3, 500, 700])
    values = np.array([predictions[row] for row in kept], np.float32).reshape(len(kept), -1)
    np.testing.assert_allclose(values, case.expected[kept], rtol=0, atol=1e-5)


def test_rows_that_are_all_null_are_rows_still(vector, tmp_path):
    empty = vector.table.slice(0, 9).set_column(3, "speed", pa.array([None] * 9, pa.float32()))
    path = written(tmp_path / "x.parquet", empty)
    assert predict_files(vector.predictor, path, tmp_path / "out", on_null="null").null_rows == 9


BadInput = Callable[[pa.Table, Path], str]


def _clash(table: pa.Table, folder: Path) -> str:
    return written(folder / "x.parquet", table.rename_columns({"carrier": "prediction"}))


def _text(table: pa.Table, folder: Path) -> str:
    text = pa.array([str(value) for value in table["speed"].to_pylist()])
    return written(folder / "x.parquet", table.set_column(3, "speed", text))


def _missing(table: pa.Table, folder: Path) -> str:
    return written(folder / "x.parquet", table.rename_columns({"narrow": "narow"}))


def _ragged(table: pa.Table, folder: Path) -> str:
    path = Path(written(folder / "x.csv", table.drop_columns("carrier")))
    path.write_text(path.read_text() + "1,2,3\n")
    return str(path)


def _damaged(table: pa.Table, folder: Path) -> str:
    path = Path(written(folder / "x.parquet", table))
    path.write_bytes(path.read_bytes()[: ROWS * 4])
    return str(path)


BAD_INPUTS: dict[str, tuple[BadInput, str]] = {
    "null": (
        lambda table, folder: written(folder / "x.parquet", with_nulls(table, "speed")),
        r"'speed' is null or NaN in 3 rows of .*x\.parquet; .*--on-null null",
    ),
    "column of the predictions": (_clash, "has a column 'prediction' already"),
    "text": (_text, r"column 'speed' of .*x\.parquet holds text"),
    "missing": (_missing, "no column 'narrow' in .* Did you mean 'narow'"),
    "ragged": (_ragged, rf"x\.csv, line {ROWS + 2}: 3 values"),
    "damaged": (_damaged, "not a readable Parquet file"),
    "no rows": (lambda t, folder: written(folder / "x.parquet", t.slice(0, 0)), "no row at all"),
    "nothing there": (lambda t, folder: str(folder / "*.parquet"), "matches no file"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named_and_leaves_nothing(vector, tmp_path, name):
    make, message = BAD_INPUTS[name]
    inputs = make(vector.table, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=message):
        predict_files(vector.predictor, inputs, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_is_replaced_whole_or_not_at_all(vector, tmp_path, monkeypatch):
    path = written(tmp_path / "x.parquet", vector.table)
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    predict_files(vector.predictor, path, out)
    first = {entry.name: entry.read_bytes() for entry in out.iterdir()}

    class Broken:
        signature, path = vector.predictor.signature, vector.predictor.path

        def predict(self, columns: Any) -> Any:
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        predict_files(Broken(), path, out)
    assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == first
    small = written(tmp_path / "small.parquet", vector.table.slice(0, 5))
    predict_files(vector.predictor, small, out)
    assert len(predicted(out)) == 5
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_what_is_no_earlier_output_is_left_alone(vector, tmp_path):
    path = written(tmp_path / "x.parquet", vector.table)
    predict_files(vector.predictor, path, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    written(tmp_path / "other" / "part-00000.parquet", vector.table)
    for name in ("out", "other"):
        with pytest.raises(OutputError, match=f"{name} holds .*; a new folder, an empty one"):
            predict_files(vector.predictor, path, tmp_path / name)
    with pytest.raises(OutputError, match="is a file; a folder is needed"):
        predict_files(vector.predictor, path, path)
    with pytest.raises(OutputError, match="holds the input"):
        predict_files(vector.predictor, path, tmp_path)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_judged_as_keras_judges_the_model(case, tmp_path, name):
    path = written(tmp_path / "x.parquet", case.table)
    loaded = keras.saving.load_model(case.artifact / "model.keras")
    expected = loaded.evaluate(
        case.inputs, case.labels, 32, 0, sample_weight=case.weights, return_dict=True
    )
    results = evaluate_files(case.predictors[name], path)
    assert set(results) == set(expected)
    for metric, value in expected.items():
        assert results[metric] == pytest.approx(value, rel=1e-5), metric


def test_evaluation_counts_each_row_once_over_several_tables(vector, tmp_path):
    table = pa.concat_tables([vector.table] * 67 + [vector.table.slice(0, 1)])
    results = evaluate_files(vector.predictor, written(tmp_path / "x.parquet", table))
    repeated = [np.concatenate([a] * 67 + [a[:1]]) for a in (vector.inputs, vector.labels)]
    weights = np.concatenate([vector.weights] * 67 + [vector.weights[:1]])
    expected = vector.model.evaluate(*repeated, 1_000, 0, sample_weight=weights, return_dict=True)
    assert results == pytest.approx(expected, rel=1e-5)


def test_evaluation_refuses_or_drops_rows_with_nulls(vector, tmp_path):
    path = written(tmp_path / "x.parquet", with_nulls(vector.table, "late"))
    with pytest.raises(DataError, match=r"'late' is null or NaN in 3 rows of .*--on-null drop"):
        evaluate_files(vector.predictor, path)
    kept = np.setdiff1d(np.arange(ROWS), [3, 500, 700])
    whole = evaluate_files(
        vector.predictor, written(tmp_path / "kept.parquet", vector.table.take(kept))
    )
    assert evaluate_files(vector.predictor, path, on_null="drop") == pytest.approx(whole, rel=1e-6)
    three = with_nulls(vector.table, "late").take([3, 500, 700])
    with pytest.raises(DataError, match="drop leaves none of 3 rows"):
        evaluate_files(vector.predictor, written(tmp_path / "three.parquet", three), on_null="drop")


def test_evaluation_names_a_label_that_does_not_fit(image, vector, tmp_path):
    path = written(
        tmp_path / "x.parquet", image.table.append_column("half", pa.array([0.5] * ROWS))
    )
    with pytest.raises(DataError, match="label 'half' holds fractions"):
        evaluate_files(image.predictor, path, label="half")
    with pytest.raises(DataError, match="no column 'digits' in .* Did you mean 'digit'"):
        evaluate_files(image.predictor, path, label="digits")
    unweighted = written(tmp_path / "y.parquet", vector.table.drop_columns("weight"))
    with pytest.raises(DataError, match="no column 'weight'"):
        evaluate_files(vector.predictor, unweighted)


def test_a_model_file_alone_needs_its_columns_named(vector, image, tmp_path):
    data = written(tmp_path / "x.parquet", vector.table)
    expected = vector.model.evaluate(vector.inputs, vector.labels, verbose=0, return_dict=True)
    for name in ("model.keras", "trained_model.h5"):
        alone = Path(shutil.copy(vector.artifact / name, tmp_path))
        with pytest.raises(ModelFileError, match=r"3 columns of numbers or a column of lists of 3"):
            load_predictor(alone)
        with pytest.raises(ModelFileError, match="names 2 columns"):
            load_predictor(alone, ["speed", "whole"])
        predictor = load_predictor(alone, ["speed", "whole", "narrow"])
        np.testing.assert_allclose(
            predictor.predict(vector.columns), vector.expected, rtol=0, atol=1e-5
        )
        with pytest.raises(ModelFileError, match="does not tell its label"):
            evaluate_files(predictor, data)
        results = evaluate_files(predictor, data, label="late")
        assert results == pytest.approx(expected, rel=1e-5)
    alone = Path(shutil.copytree(vector.artifact / "saved_model", tmp_path / "saved_model"))
    predictor = load_predictor(alone)
    np.testing.assert_allclose(
        predictor.predict(vector.columns), vector.expected, rtol=0, atol=1e-5
    )
    with pytest.raises(ModelFileError, match="does not tell the loss"):
        evaluate_files(predictor, data, label="late")
    image.model.export(tmp_path / "exported", verbose=False)
    predictor = load_predictor(tmp_path / "exported", ["pixels"])
    np.testing.assert_allclose(predictor.predict(image.columns), image.expected, rtol=0, atol=1e-5)


def _lambda_model(folder: Path) -> Path:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Lambda(lambda x: x * 2)])
    model.save(folder / "model.keras")
    return folder / "model.keras"


def _old_h5(folder: Path) -> Path:
    with h5py.File(folder / "old.h5", "w") as file:
        file.attrs["keras_version"], file.attrs["model_config"] = "2.3.1", "{}"
    return folder / "old.h5"


def _weights(folder: Path) -> Path:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    model.save_weights(folder / "model.weights.h5")
    return folder / "model.weights.h5"


def _garbage(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x89HDF nothing" * 9)
        return path.parent if path.suffix == ".pb" else path

    return make


def _run_folder(folder: Path) -> Path:
    (folder / "artifact").mkdir()
    return folder


def _two_outputs(folder: Path) -> Path:
    rows = keras.Input((3,))
    outputs = [keras.layers.Dense(1)(rows), keras.layers.Dense(2)(rows)]
    keras.Model(rows, outputs).save(folder / "model.keras")
    return folder / "model.keras"


def _fixed_batch(folder: Path) -> Path:
    keras.Sequential([keras.layers.Input((3,), 32), keras.layers.Dense(1)]).save(
        folder / "model.keras"
    )
    return folder / "model.keras"


BAD_MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda folder: folder / "nothing.keras", "no model at"),
    "not a model": (lambda folder: Path(__file__), "is not a model file; an artifact folder"),
    "run folder": (_run_folder, "holds artifact; .* Give .*artifact"),
    "runs code": (_lambda_model, "cannot load .*without Lambda layers"),
    "old": (_old_h5, "was written by Keras 2.3.1; .*lockstep models import"),
    "weights": (_weights, "holds weights without a model"),
    "damaged .keras": (_garbage("model.keras"), "cannot load"),
    "damaged .h5": (_garbage("model.h5"), "cannot load"),
    "damaged SavedModel": (_garbage("model/saved_model.pb"), "cannot load"),
    "two outputs": (_two_outputs, "a model with one output is allowed"),
    "fixed batch": (_fixed_batch, "takes 32 rows at a time"),
}


@pytest.mark.filterwarnings("ignore:.*compiled:UserWarning")
@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_named(tmp_path, name):
    make, message = BAD_MODELS[name]
    with pytest.raises(ModelFileError, match=message):
        load_predictor(make(tmp_path), ["a", "b", "c"] if make not in (_run_folder,) else ())


def test_a_signature_of_another_model_is_refused(vector, image, tmp_path):
    for name in FORMATS:
        source = vector.artifact / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
        shutil.copy(image.artifact / "signature.json", tmp_path)
        with pytest.raises(ModelFileError, match="they belong to different models"):
            load_predictor(tmp_path / name)
    (tmp_path / "signature.json").write_text('{"inputs": []}')
    with pytest.raises(ModelFileError, match="is not a signature that `lockstep train` wrote"):
        load_predictor(tmp_path)
    with pytest.raises(UserError, match="--features has no effect"):
        load_predictor(vector.artifact, ["speed"])


NEW_PROCESS = """
import sys
import numpy as np
from serving.predictor import load_predictor
with np.load(sys.argv[2]) as columns:
    np.save(sys.argv[3], load_predictor(sys.argv[1]).predict(columns))
banned = {name.partition(".")[0] for name in sys.modules} & {"trainer", "ray"}
sys.exit(f"imported {banned}" if banned else 0)
"""


def test_a_new_process_predicts_the_same_without_trainer_or_ray(vector, tmp_path):
    np.savez(tmp_path / "in.npz", **vector.columns)
    arguments = [str(vector.artifact), str(tmp_path / "in.npz"), str(tmp_path / "out.npy")]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, *arguments],
        cwd=ROOT,
        env=environment,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), vector.expected, rtol=0, atol=1e-5)
