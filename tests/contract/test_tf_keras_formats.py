"""What tf.keras writes in each of its formats is rebuilt, and predicts the same.

tf_keras is Keras 2 on the installed TensorFlow.
"""

import json
import zipfile

import numpy as np
import pytest
import tf_keras

from trainer.legacy.archive import is_old_archive, read_old_archive
from trainer.legacy.file import is_old_h5, read_old_h5
from trainer.legacy.network import rebuild
from trainer.legacy.saved_model import read_old_saved_model
from trainer.legacy.training import compile_as_before

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
layers = tf_keras.layers


def nested_model():
    """Nested models, two of a kind, frozen layers, wrappers, several branches."""
    inner = tf_keras.Sequential(
        [layers.Input((6,)), layers.Dense(5), layers.BatchNormalization(), layers.Dense(4)]
    )
    inner.layers[0].trainable = False
    row = layers.Input((6,), name="row")
    x = layers.Reshape((4, 1))(inner(row))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.TimeDistributed(layers.Dense(3, activation="hard_sigmoid"))(x)
    x = layers.Add()([x, layers.Dense(3)(x)])
    x = layers.GRU(4, recurrent_activation="hard_sigmoid")(x)
    x = layers.LayerNormalization()(layers.LeakyReLU(0.2)(x))
    return tf_keras.Model(row, layers.Dense(2)(x))


@pytest.fixture(scope="module")
def model():
    built = nested_model()
    random = np.random.default_rng(0)
    for layer in built.layers:
        layer.set_weights([random.uniform(0.1, 0.9, w.shape) for w in layer.get_weights()])
    built.compile("adam", "mse", metrics=["mae"])
    return built


def read_h5(model, folder):
    model.save(folder / "m.h5")
    assert is_old_h5(folder / "m.h5")
    return read_old_h5(folder / "m.h5")


def read_archive(model, folder):
    model.save(folder / "m.keras")
    with zipfile.ZipFile(folder / "m.keras") as archive:
        archive.extractall(folder / "m")
    config = json.loads((folder / "m" / "config.json").read_text())
    metadata = json.loads((folder / "m" / "metadata.json").read_text())
    assert is_old_archive(metadata)
    return read_old_archive(config, metadata, folder / "m" / "model.weights.h5")


def read_saved_model(model, folder):
    model.save(folder / "saved", save_format="tf")
    return read_old_saved_model(folder / "saved")


@pytest.mark.parametrize(
    "read", [read_h5, read_archive, pytest.param(read_saved_model, marks=pytest.mark.long)]
)
def test_every_format_is_rebuilt(model, tmp_path, read):
    old = read(model, tmp_path)
    rebuilt, notes = rebuild(old)
    rows = np.random.default_rng(1).uniform(-1, 1, (5, 6)).astype(np.float32)
    wanted = np.asarray(model(rows, training=False))
    assert np.abs(np.asarray(rebuilt(rows, training=False)) - wanted).max() < 1e-5
    compile_as_before(rebuilt, old, notes.append)
    assert type(rebuilt.optimizer).__name__ == "Adam"
    frozen = sum(np.prod(v.shape) for v in rebuilt.non_trainable_weights)
    assert frozen == 6 * 5 + 5 + 2 * 5  # the first inner Dense layer, and the moving averages


def test_a_saved_model_is_rebuilt_with_nested_layers(tmp_path):
    inner = tf_keras.Sequential(
        [layers.Input((4,)), layers.Dense(3), layers.BatchNormalization(), layers.Dense(3)]
    )
    model = tf_keras.Sequential(
        [layers.Input((4,)), inner, layers.BatchNormalization(), layers.Dense(2)]
    )
    random = np.random.default_rng(0)
    for layer in model.layers:
        layer.set_weights([random.uniform(0.1, 0.9, w.shape) for w in layer.get_weights()])
    rebuilt, _ = rebuild(read_saved_model(model, tmp_path))
    rows = random.uniform(-1, 1, (5, 4)).astype(np.float32)
    wanted = np.asarray(model(rows, training=False))
    assert np.abs(np.asarray(rebuilt(rows, training=False)) - wanted).max() < 1e-5
