"""A job whose every kind of state shows in its result, and the verdict on a disturbed run of it."""

import io
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cluster.faults import FaultPlan
from tests.support.jobs import ROWS, assert_same_bits, make_job

OWN_CODE = Path(__file__).with_name("seen_rows.py")
EPOCHS = 6
BOUNDS = {"stall_after_s": 6.0, "max_failures": 3}
"""Real failures, which the plan did not ask for, are few; a false stall would be one."""


def chaos_job(rows: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """Adam, dropout, validation, and callbacks that decide by what they remember."""
    best = {"filepath": "best.keras", "monitor": "val_loss", "save_best_only": True}
    plateau = {"monitor": "val_loss", "factor": 0.5, "patience": 1, "min_delta": 500.0}
    job = make_job(
        rows,
        runs,
        model__layers=[
            {"Dense": {"units": 8, "activation": "tanh"}},
            {"Dropout": {"rate": 0.2}},
            {"Dense": {"units": 1}},
        ],
        compile__optimizer={"Adam": {"learning_rate": 1.0}},
        compile__metrics=["mae", f"{OWN_CODE}:Seen"],
        data__label="row_id",
        train__epochs=EPOCHS,
        train__steps_per_execution=2,
        train__callbacks=[
            {"EarlyStopping": {"monitor": "val_loss", "patience": 4, "min_delta": 1.0}},
            {"ReduceLROnPlateau": plateau},
            {"ModelCheckpoint": best},
            {"CSVLogger": {"filename": "log.csv"}},
            {f"{OWN_CODE}:Slow": {"seconds": 0.3}},  # time to answer in before all is over
        ],
        checkpoint={"every_steps": 8, "snapshot_every_s": 0.1},
        export={"h5": False, "saved_model": False},
    )
    job["cluster"] = {"workers": 2, **BOUNDS}
    for name, value in changes.items():
        *sections, field = name.split("__")
        target = job
        for section in sections:
            target = target[section]
        target[field] = value
    return job


def events_of(folder: Path, name: str | None = None) -> list[dict[str, Any]]:
    """What a run told, or one kind of it; nothing before it began to."""
    path = folder / "events.jsonl"
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]  # the last line may be half written
    told = [json.loads(line) for line in whole.splitlines()]
    return [event for event in told if name in (None, event["event"])]


def assert_fired(run: Any, plan: str) -> None:
    """Each fault of the plan was put in, as often as it says and at the rank that it names.

    Ranks that one fault hits together count once.
    """
    told = {(event["generation"], event["fault"]) for event in events_of(run.folder, "chaos")}
    fired = Counter(fault for _, fault in told)
    for fault in FaultPlan.parse(plan).faults:
        assert fired[str(fault)] == fault.times, f"{fault}: {fired}"
    for event in events_of(run.folder, "chaos"):
        target = event["fault"].partition("@")[0].partition(":")[2]
        assert target in ("", "any", "other", "all", str(event["rank"])), event


def assert_each_row_once(run: Any) -> None:
    """In every epoch of the result, and in every validation."""
    epochs = len(run.history["loss"])
    assert run.history["once"] == [ROWS["train"]] * epochs
    assert run.history["more_than_once"] == [0] * epochs
    assert run.history["val_once"] == [ROWS["validation"]] * epochs
    assert run.history["val_more_than_once"] == [0] * epochs
    assert run.summary["rows_seen"] == epochs * ROWS["train"]


def assert_untouched(run: Any, undisturbed: Any) -> None:
    """The run ended as if nothing had happened: weights, history, and files of its callbacks."""
    assert run.summary["status"] == "done"
    assert run.summary["ended_by"] == undisturbed.summary["ended_by"]
    assert (run.artifact / "manifest.json").exists()
    assert_each_row_once(run)
    assert run.history == undisturbed.history
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line)["epoch"] for line in lines]
    assert epochs == list(range(len(run.history["loss"])))
    assert run.summary["metrics"] == undisturbed.summary["metrics"]
    ours, theirs = (one.folder / "log.csv" for one in (run, undisturbed))
    assert ours.read_text() == theirs.read_text()
    best, their_best = (model_weights(one.folder / "best.keras") for one in (run, undisturbed))
    assert best.keys() == their_best.keys()
    assert [name for name in best if not np.array_equal(best[name], their_best[name])] == []
    assert_same_bits(run, undisturbed)


def model_weights(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .keras file, of the optimizer too."""
    arrays: dict[str, np.ndarray] = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    with zipfile.ZipFile(path) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content) as file:
        file.visititems(collect)
    return arrays
