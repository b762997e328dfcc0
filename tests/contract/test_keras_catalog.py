"""The table of Keras's names and arguments against the Keras that is installed."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from configs.catalog import catalog
from configs.schema import CompileConfig
from trainer.metric_names import is_more_better, metric_names

BUILD = """
import inspect
import json
import os
import sys

import keras
from trainer.catalog import build_catalog

values = {"keras": keras.__version__, "catalog": build_catalog(), "names": {}, "metrics": {}}
for kind, table in values["catalog"].items():
    module = getattr(keras, kind, None) or keras.optimizers.schedules
    values["names"][kind] = [name for name in table["classes"] if hasattr(module, name)]
given = {"num_classes": 2, "target_class_ids": [0], "recall": 0.5, "precision": 0.5}
given |= {"sensitivity": 0.5, "specificity": 0.5, "fn": lambda y_true, y_pred: y_pred}
for name in values["catalog"]["metrics"]["classes"]:
    metric = getattr(keras.metrics, name)
    needed = {
        key: given[key]
        for key, argument in inspect.signature(metric.__init__).parameters.items()
        if argument.default is argument.empty and key in given
    }
    if "fn" not in needed:
        values["metrics"][name] = (metric(**needed).name, needed)
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


def test_every_metric_is_named_as_keras_names_it(installed: dict[str, Any]) -> None:
    named = installed["metrics"]
    assert len(named) > 30
    for kind, (name, needed) in named.items():
        config = CompileConfig.model_validate({"loss": "mse", "metrics": [{kind: needed}]})
        assert metric_names(config) == ["loss", name]
    more = {kind for kind, (name, _) in named.items() if is_more_better(name)}
    less = {kind for kind in named if kind.endswith(("Error", "entropy", "Hinge", "Divergence"))}
    assert not more & less
    assert {kind for kind in named if kind.endswith(("Accuracy", "IoU", "Score"))} <= more
