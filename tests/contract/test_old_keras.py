"""Models that Keras 1 and 2 wrote, on both backends, predict as they did then.

`tests/data/old_keras` holds files of Keras 1.2.2 and 2.3.1, on Theano 1.0.5 and on TensorFlow 1.15,
with random weights; beside each lie rows and what that Keras predicted for them.
"""

from pathlib import Path

import numpy as np
import pytest

from trainer.legacy.file import read_old_h5
from trainer.legacy.network import rebuild

DATA = Path(__file__).parents[1] / "data"
FILES = sorted([*DATA.glob("legacy_models/*.h5"), *DATA.glob("old_keras/*.h5")])


def is_long(path):
    """Most of TensorFlow's files wait for the long run: tf.keras is tried in all formats too."""
    return (
        "_tensorflow_" in path.stem
        and path.parent.name == "old_keras"
        and (
            not path.stem.endswith(
                ("lstm_cpu", "nested", "nested_frozen", "local2", "merge_cos", "two")
            )
        )
    )


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.long] if is_long(path) else [])
        for path in FILES
    ],
)
def test_predictions_are_those_of_the_old_keras(path):
    recorded = np.load(path.with_suffix(".npz"))
    model, _ = rebuild(read_old_h5(path))
    rows = recorded["x"]
    if len(model.inputs) > 1:
        widths = np.cumsum([tensor.shape[-1] for tensor in model.inputs])[:-1]
        rows = np.split(rows, widths, axis=1)
    got = np.asarray(model(rows, training=False))
    assert got.shape == recorded["predictions"].shape
    assert np.abs(got - recorded["predictions"]).max() <= 1e-5


def test_there_are_files_to_try():
    assert len(FILES) > 30
