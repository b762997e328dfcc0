"""Engine A: plain Keras 3 `fit` in this process. And what both engines start from and compare.

An outcome is a flat mapping: `history/NAME/EPOCH`, `evaluate/FIT/NAME`, `weights/FIT/INDEX` and
`predictions/FIT`, each an array or a number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from configs.load import load_job
from configs.schema import Job
from tests.contract.parity.cases import MODELS, Case
from tests.support.orders import row_order
from trainer.learner import all_classes
from trainer.model import build_model
from trainer.payloads import PlannedData
from trainer.preflight import open_sources, plan_data

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A case with its files written and planned.

    Attributes:
        case: The row of the table.
        job: For the epochs of one fit.
        data: Its planned data; the evaluation rows are in the role "validation".
    """

    case: Case
    job: Job
    data: PlannedData


def prepare(case: Case, folder: Path) -> Prepared:
    """Write a case's rows and plan them."""
    rng = np.random.default_rng(1337)
    train = case.draw(rng, case.rows)
    _write(folder / "train", train, case.files)
    _write(folder / "evaluation", case.draw(rng, case.evaluation_rows), 1)
    features = [name for name in train if name not in ("y", "w")]
    values = {
        "name": "parity",
        "model": {"builder": f"{MODELS}:{case.model}", "arguments": case.arguments},
        "compile": {
            "optimizer": case.optimizer,
            "loss": case.loss,
            "metrics": list(case.metrics),
        },
        "data": {
            "train": str(folder / "train"),
            "validation": str(folder / "evaluation"),
            "features": [
                {"name": name, "shape": case.shapes[name]} if name in case.shapes else name
                for name in features
            ],
            "label": "y",
        },
        "train": {"epochs": case.epochs, "global_batch_size": case.batch, "seed": 1337},
        "runs_dir": str(folder / "runs"),
    }
    if "data.shuffle" not in case.overrides and case.group not in ("sizes", "exactly once"):
        values["data"]["shuffle"] = "none"  # as the reference has it
    overrides = [f"{name}={_yaml(value)}" for name, value in case.overrides.items()]
    job = load_job(values, overrides)
    sources, layout = open_sources(job)
    return Prepared(case, job, plan_data(job, sources, layout))


def run_plain(prepared: Prepared) -> Outcome:
    """Engine A."""
    case, job, data = prepared.case, prepared.job, prepared.data
    keras.utils.clear_session()
    model = build_model(job, data.layout, data.statistics)
    train = _read(prepared, "train")
    rows = _read(prepared, "validation")
    outcome: Outcome = {}
    for fit in range(1, case.fits + 1):
        first = (fit - 1) * case.epochs
        history = model.fit(
            _batches(prepared, train, first),
            epochs=case.epochs,
            steps_per_epoch=data.plan.steps_per_epoch,
            validation_data=rows if case.validates else None,
            validation_batch_size=case.batch,
            class_weight=all_classes(job.train.class_weight, data),
            shuffle=False,
            verbose=0,
        )
        for name, values in history.history.items():
            for epoch, value in enumerate(values):
                outcome[f"history/{name}/{first + epoch}"] = value
        weights = rows[2] if len(rows) > 2 else None
        results = model.evaluate(
            *rows[:2], batch_size=case.batch, sample_weight=weights, verbose=0, return_dict=True
        )
        outcome |= {f"evaluate/{fit}/{name}": value for name, value in results.items()}
        outcome |= {f"weights/{fit}/{i}": w for i, w in enumerate(model.get_weights())}
        outcome[f"predictions/{fit}"] = model.predict(rows[0], batch_size=1024, verbose=0)
    return outcome


def greatest_difference(ours: Outcome, theirs: Outcome) -> tuple[float, str]:
    """The least d for which |a - b| <= d + d * |b| everywhere, and where it is needed.

    Infinite where one has what the other has not, or a NaN.
    """
    if ours.keys() != theirs.keys():
        return np.inf, f"only one has {sorted(ours.keys() ^ theirs.keys())}"
    greatest, place = 0.0, ""
    for key, value in theirs.items():
        b = np.asarray(value, np.float64)
        a = np.asarray(ours[key], np.float64)
        if a.shape != b.shape:
            return np.inf, f"{key} has shapes {a.shape} and {b.shape}"
        if not a.size:
            continue
        found = float(np.max(np.abs(a - b) / (1 + np.abs(b))))
        if not np.isfinite(found):
            return np.inf, key
        if found > greatest:
            greatest, place = found, key
    return greatest, place


def _batches(prepared: Prepared, train: Any, first_epoch: int) -> tf.data.Dataset:
    """The global batches of a worker-free run, epoch by epoch, spelt out row by row."""
    plan = prepared.data.plan

    def batches() -> Iterator[Any]:
        for epoch in range(first_epoch, first_epoch + prepared.case.epochs):
            order = row_order(plan, epoch)
            for start in range(0, plan.rows, plan.global_batch_size):
                chosen = order[start : start + plan.global_batch_size]
                yield tuple(array[chosen] for array in train)

    signature = tuple(tf.TensorSpec((None, *array.shape[1:]), array.dtype) for array in train)
    return tf.data.Dataset.from_generator(batches, output_signature=signature)


def _read(prepared: Prepared, role: str) -> tuple[Any, ...]:
    """Inputs, labels and, where the job weighs rows, weights, as arrays in file order."""
    layout, source = prepared.data.layout, prepared.data.sources[role]
    table = pa.concat_tables([pq.read_table(file.path) for file in source.files])

    def column(name: str) -> Any:
        array = table[name].combine_chunks()
        if pa.types.is_nested(array.type):
            return np.asarray(array.flatten()).reshape(len(array), -1)
        return np.asarray(array).reshape(len(array), -1)

    inputs = np.concatenate([column(feature.name) for feature in layout.features], axis=1)
    arrays: tuple[Any, ...] = (
        inputs.reshape(-1, *layout.input_shape).astype("f4"),
        column(layout.label).astype(layout.label_dtype),
    )
    if layout.weight is not None:
        arrays += (column(layout.weight)[:, 0].astype("f4"),)
    return arrays


def _write(folder: Path, columns: dict[str, Any], files: int) -> None:
    folder.mkdir(parents=True)
    rows = len(columns["y"])
    for index in range(files):
        part = slice(index * rows // files, (index + 1) * rows // files)
        table = pa.table({name: _column(values[part]) for name, values in columns.items()})
        pq.write_table(table, folder / f"{index}.parquet", row_group_size=997)


def _column(values: Any) -> Any:
    if values.ndim == 1:
        return values
    return pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])


def _yaml(value: Any) -> str:
    return str(value) if not isinstance(value, bool) else str(value).lower()
