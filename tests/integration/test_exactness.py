"""Rows, time and randomness across real workers: each row once, one decision, drawn masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lockstep
from lockstep.api import TrainOptions
from lockstep.follow import SilentListener
from tests.support.jobs import make_job, store_of
from tests.support.plain_keras import fit_plain

pytestmark = pytest.mark.usefixtures("ray_session")

OWN_LAYERS = """
import os
import keras
import numpy as np
import tensorflow as tf

def append(folder, ids):
    with open(f"{folder}/{os.getpid()}.bin", "ab") as file:
        file.write(np.asarray(ids, "f4").tobytes())
    return np.float32(0)

@keras.saving.register_keras_serializable("tests")
class Witness(keras.layers.Layer):
    '''Writes the first column of every row that it is shown in training, and passes on the rest.'''

    def __init__(self, folder, **settings):
        super().__init__(**settings)
        self.folder = folder

    def get_config(self):
        return {**super().get_config(), "folder": self.folder}

    def call(self, inputs, training=False):
        if training:
            ids = inputs[:, 0]
            nothing = tf.numpy_function(
                lambda ids: append(self.folder, ids), [ids], tf.float32, stateful=True)
            with tf.control_dependencies([nothing]):
                return tf.identity(inputs[:, 1:])
        return inputs[:, 1:]

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] - 1)

def build(path):
    return keras.Sequential([Witness(path), keras.layers.Dense(4, activation="tanh"),
                             keras.layers.Dense(1)])
"""


def test_each_row_is_shown_to_one_worker_once_an_epoch(tmp_path: Path) -> None:
    """10,007 rows, a prime, in batches of 64 on three workers, witnessed by the layer itself."""
    rows, epochs = 10_007, 2
    rng = np.random.default_rng(5)
    columns = {"row_id": np.arange(rows, dtype="f4"), "a": rng.normal(size=rows).astype("f4")}
    columns["y"] = np.sin(columns["a"])
    (tmp_path / "train").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "train" / "0.parquet", row_group_size=1000)
    code = tmp_path / "witness.py"
    code.write_text(OWN_LAYERS)

    def job(name: str) -> dict[str, Any]:
        seen = tmp_path / name
        seen.mkdir()
        return make_job(
            tmp_path,
            tmp_path / "runs",
            model={"builder": f"{code}:build", "arguments": {"path": str(seen)}},
            data__features=["row_id", "a"],
            data__normalize=False,
            data__validation=None,
            data__test=None,
            train__epochs=epochs,
            cluster__workers=3,
            export={"h5": False, "saved_model": False},
        )

    _, history = fit_plain(job("plain"))
    run = lockstep.train(job("three"))
    files = sorted((tmp_path / "three").iterdir())
    assert len(files) == 3
    seen = [np.fromfile(file, "f4").astype("i8") for file in files]
    every = np.concatenate(seen)
    assert len(every) == epochs * rows
    np.testing.assert_array_equal(np.bincount(every, minlength=rows), np.full(rows, epochs))
    for ids in seen:  # the first half of what a worker saw is its first epoch
        first = ids[: len(ids) // 2 + 1]
        assert np.bincount(first, minlength=rows).max() <= 2
    assert run.summary["rows_seen"] == epochs * rows
    np.testing.assert_allclose(run.history["loss"], history.history["loss"], rtol=4e-5)


@pytest.mark.long
def test_a_time_budget_ends_all_ranks_at_one_step_and_can_be_raised(
    rows: Path, tmp_path: Path
) -> None:
    job = make_job(rows, tmp_path, train__epochs=6, train__max_time_s=0.05)
    run = lockstep.train(job)
    assert run.summary["status"] == "done"
    assert run.summary["ended_by"] == "train.max_time_s"
    assert len(set(run.summary["weights_sha256"])) == 1
    assert 0 < run.summary["steps"] < 6 * 16
    assert "test" in run.metrics
    assert run.artifact.exists()
    del job["train"]["max_time_s"]
    further = lockstep.train(job, options=TrainOptions(is_resume=True))
    assert further.folder == run.folder
    assert further.summary["steps"] == 6 * 16
    assert further.summary["ended_by"] is None


class Warned(SilentListener):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warned(self, warning: str) -> None:
        self.texts.append(warning)


def dropout_job(rows: Path, runs: Path, workers: int) -> dict[str, Any]:
    layers = [
        {"Dense": {"units": 8, "activation": "tanh"}},
        {"Dropout": {"rate": 0.5}},
        {"Dense": {"units": 1}},
    ]
    return make_job(rows, runs, model__layers=layers, cluster__workers=workers, train__epochs=1)


@pytest.mark.long
def test_dropout_masks_differ_between_ranks_and_come_again(rows: Path, tmp_path: Path) -> None:
    listener = Warned()
    first = lockstep.train(dropout_job(rows, tmp_path / "a", 2), listener=listener)
    second = lockstep.train(dropout_job(rows, tmp_path / "b", 2))
    assert first.summary["weights_sha256"] == second.summary["weights_sha256"]
    assert any("random layers (dropout)" in text for text in listener.texts)
    newest, _ = store_of(first).newest()
    assert newest is not None
    seeds = newest.arrays["ranks/seeds"]
    assert seeds.shape[0] == 2
    assert not np.array_equal(seeds[0], seeds[1])


@pytest.mark.long
def test_plain_normalization_is_named_before_training(rows: Path, tmp_path: Path) -> None:
    listener = Warned()
    layers = [{"Dense": {"units": 4}}, "BatchNormalization", {"Dense": {"units": 1}}]
    job = make_job(rows, tmp_path, model__layers=layers, train__epochs=1)
    lockstep.train(job, listener=listener)
    assert any("BatchNormalization (batch_normalization)" in text for text in listener.texts)


OWN_STEP = """
import keras

class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, inputs):
        return self.dense(inputs)

    def train_step(self, data):
        return {"loss": 0.0}
"""


def test_a_train_step_of_the_models_own_is_refused(rows: Path, tmp_path: Path) -> None:
    code = tmp_path / "own.py"
    code.write_text(OWN_STEP)
    job = make_job(rows, tmp_path, model={"builder": f"{code}:Own"}, data__normalize=False)
    with pytest.raises(lockstep.UserError, match="Own brings a train_step of its own"):
        lockstep.train(job)


TWO_INPUTS = """
import keras

def build():
    a = keras.layers.Input((1,), name="a")
    pair = keras.layers.Input((2,), name="pair")
    hidden = keras.layers.Dense(4, activation="tanh")(keras.layers.Concatenate()([a, pair]))
    model = keras.Model({"a": a, "pair": pair}, keras.layers.Dense(1)(hidden))
    model.compile("adam", "mse", metrics=["mae"])
    return model
"""


@pytest.mark.long
def test_a_model_of_several_inputs_gets_the_features_of_their_names(tmp_path: Path) -> None:
    from serving.predictor import load_predictor

    rng = np.random.default_rng(3)
    pair = rng.normal(size=(300, 2)).astype("f4")
    columns: dict[str, Any] = {"a": rng.normal(size=300).astype("f4")}
    columns["pair"] = pa.FixedSizeListArray.from_arrays(pair.ravel(), 2)
    columns["y"] = columns["a"] * pair[:, 0]
    (tmp_path / "train").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "train" / "0.parquet")
    code = tmp_path / "two.py"
    code.write_text(TWO_INPUTS)
    job = make_job(
        tmp_path,
        tmp_path / "runs",
        model={"builder": f"{code}:build"},
        compile=None,
        data__features=["pair", "a"],  # in another order than the model's
        data__normalize=False,
        data__validation=None,
        data__test=None,
    )
    plain, _ = fit_plain(job)
    run = lockstep.train(job)
    flat = np.concatenate([pair, columns["a"][:, None]], axis=1)
    expected = plain.predict(flat, verbose=0)
    np.testing.assert_allclose(run.model().predict(flat, verbose=0), expected, atol=4e-5)
    for path in (run.artifact, run.artifact / "saved_model"):
        found = load_predictor(path, []).predict({"pair": pair, "a": columns["a"]})
        np.testing.assert_allclose(found, expected, atol=4e-5)
    job["data"]["features"] = ["pair"]
    with pytest.raises(lockstep.UserError, match=r"the model has inputs a, pair; data.features"):
        lockstep.train(job)
