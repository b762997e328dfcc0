"""A real artifact for batch jobs: the 9-32-128-1 network, untrained, and rows for it."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa

from serving.batch_worker import LOADER
from serving.predictor import load_predictor
from tests.support.artifacts import write_artifact
from tests.support.batches import Place

SLOW_LOADER = "tests.support.batch_models:load_slow"
SLOW_CALL_S = 2.0
FEATURES = tuple(f"x{n}" for n in range(9))


class SlowModel:
    """A model of which each call takes some seconds more, and gives the same."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.signature, self.batch_rows = model.signature, model.batch_rows
        self.row_failures = model.row_failures

    def predict(self, columns: Any) -> Any:
        time.sleep(SLOW_CALL_S if len(next(iter(columns.values()))) > 1 else 0.0)
        return self._model.predict(columns)


def load_slow(artifact: str) -> SlowModel:
    """What `serving.predictor` loads, slow."""
    return SlowModel(load_predictor(artifact))


def write_mlp(folder: Path) -> Path:
    """The artifact; the same weights each time."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.layers.Input((9,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    folder.mkdir(parents=True)
    model.save(folder / "model.keras")
    signature = {
        "inputs": [{"name": name, "shape": [None]} for name in FEATURES],
        "label": {"name": "y", "dtype": "float32", "shape": [None, 1]},
        "weight": None,
        "outputs": [{"name": "prediction", "shape": [None, 1]}],
    }
    files = {
        "model.keras": (folder / "model.keras").read_bytes(),
        "signature.json": json.dumps(signature).encode(),
    }
    return write_artifact(folder, files)


def mlp_rows(count: int) -> pa.Table:
    """An `id` and nine numbers a row."""
    generator = np.random.default_rng(3)
    columns = {name: generator.standard_normal(count, np.float32) for name in FEATURES}
    return pa.table({"id": pa.array(np.arange(count)), **columns})


def register_flights_like(place: Place, rows: int) -> pa.Table:
    """Registers the network as `mlp` and has the place use TensorFlow; rows for it."""
    version = place.registry.register("mlp", write_mlp(place.folder / "mlp"))
    place.registry.set_alias("mlp", "champion", version.number, who="test", why="test")
    place.config = replace(place.config, loader=LOADER)
    return mlp_rows(rows)
