"""Import of model files as users do it: to an artifact that predicts, evaluates and trains on."""

import asyncio
import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from lockstep import cli
from lockstep.importing import ImportOptions, import_file
from registry.database import Database
from registry.store import Registry
from serving.evaluation import evaluate_files
from serving.files import predict_files
from serving.predictor import load_predictor
from tests.support.service import running_service
from trainer.errors import ImportRefused
from trainer.import_worker import import_file as import_here
from trainer.importing import ImportFailure, ImportRequest

LEGACY = Path(__file__).parents[1] / "data" / "legacy_models"
NAMES = sorted(path.stem for path in LEGACY.glob("*.h5"))


def imported(root, path, name, options):
    """What an import into a registry of the test's own told."""
    database = Database(f"sqlite:///{root / 'registry.db'}")
    try:
        return import_file(Registry(database, str(root / "artifacts")), path, name, options)
    finally:
        database.close()


def rows_file(path, rows, label=None):
    """A Parquet file with one column of lists, and maybe labels."""
    columns = {"image": pa.array(rows.reshape(len(rows), -1).tolist(), pa.list_(pa.float32()))}
    if label is not None:
        kind = pa.float32() if label.ndim == 1 else pa.list_(pa.float32(), label.shape[1])
        columns["target"] = pa.array(label.tolist(), kind)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def theano(tmp_path_factory):
    """A model that Keras wrote on Theano, imported; and what Keras predicted with it."""
    root = tmp_path_factory.mktemp("imported")
    path = LEGACY / "keras2.3.1_theano_conv2d.h5"
    options = ImportOptions(features=["image"], label="target", alias="champion")
    record = imported(root, path, "old", options)
    return record, np.load(path.with_suffix(".npz"))


def test_the_record_says_what_became_of_the_file(theano):
    record, _ = theano
    assert {"name": "old", "version": 1, "aliases": ["champion"], "can_train": True}.items() <= (
        record.items()
    )
    assert record["format"] == "h5 of Keras 2.3.1 (theano)"
    assert any("turned around" in warning for warning in record["warnings"])
    artifact = Path(record["artifact"])
    assert {path.name for path in artifact.iterdir()} == {
        *("model.keras", "trained_model.h5", "saved_model", "signature.json", "manifest.json"),
    }
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["digest"] == record["digest"]
    assert manifest["lineage"]["imported"]["file"] == "keras2.3.1_theano_conv2d.h5"


@pytest.mark.parametrize("form", ["model.keras", "trained_model.h5", "saved_model"])
def test_every_form_of_the_artifact_predicts_as_recorded(theano, tmp_path, form):
    record, recorded = theano
    data = rows_file(tmp_path / "rows.parquet", recorded["x"])
    predictor = load_predictor(Path(record["artifact"]) / form)
    predict_files(predictor, [str(data)], tmp_path / "out", on_null="error")
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    got = np.array(pa.concat_tables(map(pq.read_table, parts))["prediction"].to_pylist())
    assert np.abs(got.reshape(recorded["predictions"].shape) - recorded["predictions"]).max() < 1e-5


def test_it_evaluates_by_the_loss_of_before_and_trains_on(theano, tmp_path):
    record, recorded = theano
    targets = np.zeros_like(recorded["predictions"])
    data = rows_file(tmp_path / "rows.parquet", recorded["x"], targets)
    results = evaluate_files(load_predictor(record["artifact"]), [str(data)])
    assert results["loss"] == pytest.approx(float((recorded["predictions"] ** 2).mean()), rel=1e-4)
    model = keras.saving.load_model(Path(record["artifact"]) / "model.keras")
    before = model.get_weights()
    model.fit(recorded["x"], targets, verbose=0)
    changed = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert all(changed)


def request(path, folder, **changes):
    return ImportRequest(str(path), str(folder / "artifact"), **changes)


def imported_here(tmp_path, path, **changes):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return import_here(request(path, tmp_path, **changes), scratch)


def model_with_lambda():
    inputs = keras.layers.Input((3,))
    return keras.Model(inputs, keras.layers.Lambda(lambda x: 2 * x)(inputs))


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.filterwarnings("ignore")
def test_a_lambda_is_refused_and_with_trust_only_serves(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    model_with_lambda().save(path)
    with pytest.raises(ImportRefused, match="Lambda, which runs a function"):
        imported_here(tmp_path, path)
    shutil.rmtree(tmp_path / "scratch")
    answer = imported_here(tmp_path, path, is_trusted=True)
    assert not answer["can_train"]
    artifact = tmp_path / "artifact"
    assert not (artifact / "model.keras").exists()
    assert load_predictor(artifact).signature.layout.width == 3


def test_a_model_of_keras_3_keeps_its_weights(tmp_path):
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    model.save(tmp_path / "m.keras")
    answer = imported_here(tmp_path, tmp_path / "m.keras", features=("a", "b"), label="y")
    assert answer["can_train"]
    assert answer["warnings"] == ["the optimizer begins anew; the file holds no state that fits it"]
    again = keras.saving.load_model(tmp_path / "artifact" / "model.keras")
    assert np.array_equal(again.get_weights()[0], model.get_weights()[0])
    signature = json.loads((tmp_path / "artifact" / "signature.json").read_text())
    assert [entry["name"] for entry in signature["inputs"]] == ["a", "b"]
    assert signature["label"]["name"] == "y"


def test_a_saved_model_of_tensorflow_alone_predicts_only(tmp_path):
    module = tf.Module()
    module.f = tf.function(lambda x: 3 * x, input_signature=[tf.TensorSpec((None, 2), tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.f)
    answer = imported_here(tmp_path, tmp_path / "m", features=("a", "b"))
    assert not answer["can_train"]
    assert "to predict only" in answer["warnings"][0]
    pq.write_table(pa.table({"a": [1.0, 2.0], "b": [5.0, 7.0]}), tmp_path / "rows.parquet")
    predictor = load_predictor(tmp_path / "artifact")
    predict_files(predictor, [str(tmp_path / "rows.parquet")], tmp_path / "out", on_null="error")
    (part,) = (tmp_path / "out").glob("*.parquet")
    assert pq.read_table(part)["prediction"].to_pylist() == [[3.0, 15.0], [6.0, 21.0]]


def test_axes_of_any_length_need_a_shape(tmp_path):
    model = keras.Sequential([keras.layers.Input((None, 2)), keras.layers.LSTM(3)])
    model.save(tmp_path / "m.keras")
    with pytest.raises(ImportRefused, match="--input-shape"):
        imported_here(tmp_path, tmp_path / "m.keras")
    shutil.rmtree(tmp_path / "scratch")
    imported_here(tmp_path, tmp_path / "m.keras", input_shape=(5, 2))
    signature = json.loads((tmp_path / "artifact" / "signature.json").read_text())
    assert signature["model_input"]["shape"] == [None, 5, 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x04\x95", "is a pickle"),
        (b"#!/bin/sh", "no model file does"),
        (b"PK\x03\x04cut", "no whole .keras archive"),
        (b"\x89HDF\r\n\x1a\ncut", "cannot be read"),
        (b"", "no model file does"),
    ],
)
def test_files_that_are_no_models_are_refused(tmp_path, content, reason):
    (tmp_path / "m.keras").write_bytes(content)
    with pytest.raises(ImportRefused, match=reason):
        imported_here(tmp_path, tmp_path / "m.keras")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A registry of the test's own, as commands find it."""
    for variable in ("LOCKSTEP_DATABASE", "LOCKSTEP_ARTIFACTS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def models_import(*arguments):
    cli.app(["models", "import", *map(str, arguments)], standalone_mode=False)


def test_the_command_makes_a_version_with_an_alias(home, capsys):
    path = LEGACY / "keras2.3.1_tensorflow_dense.h5"
    models_import(
        *(path, "--name", "old", "--features", "image", "--label", "target", "--json"),
        *("--alias", "champion", "--timeout-s", "200", "--memory-mb", "5000"),
    )
    record = json.loads(capsys.readouterr().out)
    assert (record["name"], record["version"], record["aliases"]) == ("old", 1, ["champion"])
    assert (record["format"], record["can_train"]) == ("h5 of Keras 2.3.1 (tensorflow)", True)
    database = Database()
    registry = Registry(database)
    version = registry.resolve("old@champion")
    assert (version.digest, version.artifact) == (record["digest"], record["artifact"])
    assert version.description == "imported from keras2.3.1_tensorflow_dense.h5"
    assert version.lineage["imported"]["file"] == path.name
    assert registry.verify(version) == []
    database.close()
    signature = json.loads((Path(record["artifact"]) / "signature.json").read_text())
    assert signature["label"]["name"] == "target"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_command_refuses_code_and_takes_it_with_trust(home, tmp_path, capsys):
    path = tmp_path / "m.keras"
    model_with_lambda().save(path)
    with pytest.raises(ImportRefused, match=r"Lambda, which runs a function.*--trust"):
        models_import(path, "--name", "own")
    database = Database()
    assert Registry(database).models() == []
    models_import(path, "--name", "own", "--trust")
    printed = capsys.readouterr().out
    assert printed.startswith("own/1  ")
    assert "note: imported to predict only" in printed
    (version,) = Registry(database).versions("own")
    assert f"artifact: {version.artifact}" in printed
    assert version.aliases == ()
    database.close()


def test_the_command_ends_what_takes_too_long_and_registers_nothing(home):
    with pytest.raises(ImportFailure, match=r"took more than 0.01 s.*--timeout-s") as told:
        models_import(LEGACY / f"{NAMES[0]}.h5", "--name", "old", "--timeout-s", "0.01")
    assert told.value.exit_status == 3
    database = Database()
    assert Registry(database).models() == []
    database.close()


def test_an_imported_model_answers_over_http(tmp_path):
    path = LEGACY / "keras2.3.1_theano_dense.h5"
    recorded = np.load(path.with_suffix(".npz"))
    rows = recorded["x"].reshape(len(recorded["x"]), -1)

    async def scenario():
        async with running_service(tmp_path, load=load_predictor) as service:
            options = ImportOptions(features=["image"], alias="champion")
            await asyncio.to_thread(import_file, service.registry, path, "old", options)
            await service.moved("old", 1)
            body = {"instances": [{"image": row} for row in rows.tolist()]}
            return await service.client.post("/v1/models/old:predict", json=body)

    answer = asyncio.run(scenario())
    assert answer.status_code == 200, answer.text
    predicted = np.array(answer.json()["predictions"]).reshape(recorded["predictions"].shape)
    assert np.abs(predicted - recorded["predictions"]).max() < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_each_legacy_model_evaluates_by_its_own_loss(tmp_path, name):
    path = LEGACY / f"{name}.h5"
    recorded = np.load(path.with_suffix(".npz"))
    options = ImportOptions(features=["image"], label="target")
    record = imported(tmp_path, path, "old", options)
    targets = np.full_like(recorded["predictions"], 0.25)
    flat = targets if targets.shape[1] > 1 else targets[:, 0]
    data = rows_file(tmp_path / "rows.parquet", recorded["x"], flat)
    results = evaluate_files(load_predictor(record["artifact"]), [str(data)])
    expected = float(((recorded["predictions"] - 0.25) ** 2).mean())
    assert results["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_each_legacy_model_goes_on_training_with_lockstep(tmp_path, name):
    import lockstep

    path = LEGACY / f"{name}.h5"
    recorded = np.load(path.with_suffix(".npz"))
    options = ImportOptions(features=["image"])
    record = imported(tmp_path, path, "old", options)
    rows = np.concatenate([recorded["x"]] * 8)
    targets = np.concatenate([recorded["predictions"]] * 8) + 1
    targets = targets if targets.shape[1] > 1 else targets[:, 0]
    data = rows_file(tmp_path / "rows.parquet", rows, targets)
    run = lockstep.train(
        {
            "name": "onward",
            "model": {"file": str(Path(record["artifact"]) / "model.keras")},
            "data": {
                **{"train": str(data), "validation": str(data), "test": str(data)},
                "features": [{"name": "image", "shape": list(recorded["x"].shape[1:])}],
                "label": "target",
            },
            "train": {"epochs": 2, "global_batch_size": 16},
            "cluster": {"workers": 2},
            "runs_dir": str(tmp_path / "runs"),
        }
    )
    losses = run.history["loss"]
    assert losses[-1] < losses[0] < 1.5
