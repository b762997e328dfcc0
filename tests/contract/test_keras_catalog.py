"""The table of Keras's names and arguments against the Keras that is installed."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from configs.catalog import catalog

BUILD = """
import json
import os
import sys

import keras
from trainer.catalog import build_catalog

values = {"keras": keras.__version__, "catalog": build_catalog(), "names": {}}
for kind, table in values["catalog"].items():
    module = getattr(keras, kind, None) or keras.optimizers.schedules
    values["names"][kind] = [name for name in table["classes"] if hasattr(module, name)]
with open(sys.argv[1], "w") as file:
    json.dump(values, file)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the installed Keras gives, from a process of its own."""
    path = tmp_path_factory.mktemp("catalog") / "catalog.json"
    subprocess.run(
        [sys.executable, "-c", BUILD, str(path)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def test_the_table_is_that_of_the_installed_keras(installed):
    """When this fails after a change of the Keras version: make catalog."""
    assert catalog().keys() == installed["catalog"].keys()
    for kind, table in catalog().items():
        ours, theirs = table["classes"], installed["catalog"][kind]["classes"]
        assert ours.keys() == theirs.keys(), kind
        assert {name: ours[name] for name in ours if ours[name] != theirs[name]} == {}, kind
        assert table["aliases"] == installed["catalog"][kind]["aliases"], kind


def test_every_class_of_the_table_is_public(installed):
    for kind, table in catalog().items():
        assert installed["names"][kind] == list(table["classes"]), kind


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "required"),
    [
        ("layers", "Dense", {"units", "activation", "name"}, ["units"]),
        ("layers", "LSTM", {"units", "return_sequences", "dtype"}, ["units"]),
        ("losses", "Huber", {"delta", "reduction"}, []),
        ("metrics", "TopKCategoricalAccuracy", {"k", "name"}, []),
        ("optimizers", "Adam", {"learning_rate", "clipnorm", "loss_scale_factor"}, []),
        ("callbacks", "EarlyStopping", {"patience", "monitor"}, []),
        ("schedules", "CosineDecay", {"decay_steps"}, ["initial_learning_rate", "decay_steps"]),
    ],
)
def test_arguments_are_those_of_the_documentation(kind, name, arguments, required):
    entry = catalog()[kind]["classes"][name]
    assert arguments <= set(entry["arguments"])
    assert entry["required"] == required


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("losses", {"mse", "sparse_categorical_crossentropy"}),
        ("metrics", {"mae", "accuracy"}),
        ("optimizers", {"adam", "sgd"}),
    ],
)
def test_usual_short_names_are_known(kind, names):
    assert names <= set(catalog()[kind]["aliases"])
