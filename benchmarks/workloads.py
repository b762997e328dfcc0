"""Models and synthetic rows that benchmarks train on. No TensorFlow: peers build what they need.

A workload is described once, in the words of a job file, and written once as Parquet; every peer
reads the same files and builds the same layers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_BLOCK_ROWS = 16_000


@dataclass(frozen=True)
class Workload:
    """A model and the shape of its rows.

    Attributes:
        name: Of the folder with its rows.
        layers: As `model.layers` of a job.
        compile: As `compile` of a job.
        columns: Scalar columns; 0 where a row is one list column "x" of shape `shape`.
        shape: Of one row of the model's input.
        classes: Number of classes; 0 for a regression.
    """

    name: str
    layers: tuple[dict[str, dict[str, Any]], ...]
    compile: dict[str, Any]
    columns: int
    shape: tuple[int, ...]
    classes: int

    @property
    def features(self) -> list[Any]:
        """As `data.features` of a job."""
        if self.columns:
            return [f"x{index}" for index in range(self.columns)]
        return [{"name": "x", "shape": list(self.shape)}]

    def write(self, folder: Path, rows: int) -> None:
        """Write `rows` synthetic rows as `folder/rows.parquet`."""
        generator = np.random.default_rng(7)
        values = generator.normal(size=(rows, int(np.prod(self.shape)))).astype(np.float32)
        columns: dict[str, Any] = {}
        if self.columns:
            columns = {f"x{index}": values[:, index] for index in range(self.columns)}
        else:
            columns["x"] = pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
        if self.classes:
            columns["y"] = generator.integers(0, self.classes, rows)
        else:
            columns["y"] = values @ generator.normal(size=values.shape[1]).astype(np.float32)
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=_BLOCK_ROWS)

    def read(self, folder: Path) -> tuple[Any, Any]:
        """Inputs `(rows, *shape) float32` and labels `(rows,)` of what `write` wrote."""
        table = pq.read_table(folder / "rows.parquet").combine_chunks()
        if self.columns:
            names = self.features
            inputs = np.stack([table[name].to_numpy() for name in names], axis=1)
        else:
            flat = table["x"].combine_chunks().flatten().to_numpy()
            inputs = flat.reshape(len(table), *self.shape)
        return inputs, table["y"].to_numpy()


_REGRESSION = {"optimizer": "adam", "loss": "mse", "metrics": ["mae"]}
_CLASSIFICATION = {
    "optimizer": "adam",
    "loss": "sparse_categorical_crossentropy",
    "metrics": ["accuracy"],
}

FLIGHTS = Workload(
    "flights",
    (
        {"Dense": {"units": 32, "activation": "relu"}},
        {"Dense": {"units": 128, "activation": "relu"}},
        {"Dense": {"units": 1}},
    ),
    _REGRESSION,
    columns=9,
    shape=(9,),
    classes=0,
)
CNN = Workload(
    "cnn",
    (
        {"Conv2D": {"filters": 32, "kernel_size": 3, "activation": "relu"}},
        {"MaxPooling2D": {}},
        {"Conv2D": {"filters": 64, "kernel_size": 3, "activation": "relu"}},
        {"MaxPooling2D": {}},
        {"Flatten": {}},
        {"Dense": {"units": 64, "activation": "relu"}},
        {"Dense": {"units": 10, "activation": "softmax"}},
    ),
    _CLASSIFICATION,
    columns=0,
    shape=(28, 28, 1),
    classes=10,
)
LSTM = Workload(
    "lstm",
    ({"LSTM": {"units": 64}}, {"Dense": {"units": 1}}),
    _REGRESSION,
    columns=0,
    shape=(24, 8),
    classes=0,
)
MLP = Workload(
    "mlp",
    (
        {"Dense": {"units": 512, "activation": "relu"}},
        {"Dense": {"units": 512, "activation": "relu"}},
        {"Dense": {"units": 10, "activation": "softmax"}},
    ),
    _CLASSIFICATION,
    columns=0,
    shape=(784,),
    classes=10,
)
WORKLOADS = {workload.name: workload for workload in (FLIGHTS, CNN, LSTM, MLP)}
