"""Small jobs on synthetic rows, and plain Keras as the reference for them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = {"train": 1003, "validation": 211, "test": 157}
FEATURES = ["a", "b", "c"]


def write_rows(folder: Path, rows: int, seed: int) -> Path:
    """Rows with a `row_id`, three features, a label `y`, a class `k` and a weight `w`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {name: rng.normal(2, 3, rows).astype("f4") for name in FEATURES}
    signal = columns["a"] - 2 * columns["b"] + 0.5 * columns["c"] * columns["a"]
    columns["y"] = (signal + rng.normal(0, 0.1, rows)).astype("f4")
    columns["k"] = (signal > 0).astype("i8")
    columns["w"] = rng.uniform(0.2, 2.0, rows).astype("f4")
    columns["row_id"] = np.arange(rows, dtype="i8")
    half = rows // 2
    for name, part in (("0.parquet", slice(0, half)), ("1.parquet", slice(half, rows))):
        table = pa.table({key: values[part] for key, values in columns.items()})
        pq.write_table(table, folder / name, row_group_size=97)
    return folder


def write_data(root: Path) -> Path:
    """Train, validation and test rows below `root`."""
    for seed, (role, rows) in enumerate(ROWS.items()):
        write_rows(root / role, rows, seed)
    return root


def make_job(data: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """A regression job; `changes` are dotted fields with '__' for the dots."""
    job: dict[str, Any] = {
        "name": "small",
        "model": {
            "layers": [{"Dense": {"units": 8, "activation": "tanh"}}, {"Dense": {"units": 1}}]
        },
        "compile": {"optimizer": "adam", "loss": "mse", "metrics": ["mae"]},
        "data": {
            "train": str(data / "train"),
            "validation": str(data / "validation"),
            "test": str(data / "test"),
            "features": FEATURES,
            "label": "y",
            "normalize": True,
        },
        "train": {"epochs": 2, "global_batch_size": 64, "seed": 3},
        "cluster": {"workers": 2},
        "runs_dir": str(runs),
    }
    for name, value in changes.items():
        *sections, field = name.split("__")
        target = job
        for section in sections:
            target = target.setdefault(section, {})
        target[field] = value
    return job


def store_of(run: Any) -> Any:
    """The checkpoints of a run."""
    from configs.load import job_digest, load_job
    from trainer.checkpoint_store import CheckpointStore, Origin
    from trainer.run_folder import checkpoints_of

    job = load_job(run.folder / "job.yaml")
    origin = Origin(run.folder.name, job_digest(job))
    return CheckpointStore(checkpoints_of(job, run.folder), origin)


def final_weights(run: Any) -> dict[str, np.ndarray]:
    """The weights that a run ended with, by name."""
    found, damaged = store_of(run).final()
    assert found is not None, damaged
    return found.arrays


def assert_same_bits(first: Any, second: Any) -> None:
    """Two runs ended with the same weights."""
    ours, theirs = final_weights(first), final_weights(second)
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not np.array_equal(ours[key], theirs[key])]
    assert different == []
