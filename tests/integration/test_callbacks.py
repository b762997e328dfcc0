"""Callbacks on several workers: what they are shown, what they write, and what they decide."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import lockstep
from lockstep.api import TrainOptions
from tests.support.jobs import ROWS, make_job
from tests.support.plain_keras import fit_plain

pytestmark = pytest.mark.usefixtures("ray_session")
TOLERANCE = 4e-5

RECORDER = """
import json, os, keras

HOOKS = [
    "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end",
    "on_train_batch_begin", "on_train_batch_end",
    "on_test_begin", "on_test_end", "on_test_batch_begin", "on_test_batch_end",
]

def hook(name):
    def call(self, *arguments, logs=None):
        *numbers, logs = arguments if arguments and isinstance(arguments[-1], dict) else (
            *arguments, logs)
        entry = [name, [int(n) for n in numbers if n is not None], dict(logs or {}), os.getpid()]
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\\n")
    return call

class Recorder(keras.callbacks.Callback):
    def __init__(self, path):
        super().__init__()
        self.path = path

for name in HOOKS:
    setattr(Recorder, name, hook(name))

class StopInside(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations.numpy() >= 20:
            self.model.stop_training = True

class FailOnce(keras.callbacks.Callback):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_begin(self, epoch, logs=None):
        with open(self.path, "a") as file:
            file.write(f"{epoch}\\n")
        if epoch == 2 and open(self.path).read().count("2") == 1:
            raise RuntimeError("interrupted at epoch 2")
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "recorders.py"
    path.write_text(RECORDER)
    return path


def entries(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_hooks_numbers_and_logs_are_those_of_fit(rows: Path, tmp_path: Path, code: Path) -> None:
    """One step a call on both sides: the same methods, in the same order, with the same logs."""

    def job(name: str) -> dict[str, Any]:
        return make_job(
            rows,
            tmp_path / name,
            train__steps_per_execution=1,
            train__callbacks=[
                {f"{code}:Recorder": {"path": str(tmp_path / f"{name}.jsonl")}},
                {"ReduceLROnPlateau": {"patience": 0, "min_delta": 100}},
            ],
        )

    fit_plain(job("plain"))
    lockstep.train(job("two"))
    plain, two = entries(tmp_path / "plain.jsonl"), entries(tmp_path / "two.jsonl")
    assert [entry[:2] for entry in two] == [entry[:2] for entry in plain]
    assert {entry[0] for entry in two} == {
        *("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end"),
        *("on_train_batch_begin", "on_train_batch_end", "on_test_begin", "on_test_end"),
        *("on_test_batch_begin", "on_test_batch_end"),
    }
    for ours, theirs in zip(two, plain, strict=True):
        assert ours[2].keys() == theirs[2].keys(), ours[0]
        for name, value in theirs[2].items():
            assert ours[2][name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), ours[0]
    assert len({entry[3] for entry in two}) == 1  # one rank calls them


@pytest.fixture(scope="module")
def written(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> lockstep.Run:
    """A run of two workers with every callback of Keras that writes files."""
    callbacks: list[Any] = [
        {"ModelCheckpoint": {"filepath": "full.h5"}},
        {"ModelCheckpoint": {"filepath": "full.keras"}},
        {
            "ModelCheckpoint": {
                "filepath": "each-{epoch:02d}.weights.h5",
                "save_weights_only": True,
            }
        },
        {
            "ModelCheckpoint": {
                "filepath": "best.weights.h5",
                "save_weights_only": True,
                "save_best_only": True,
                "monitor": "val_mae",
            }
        },
        {"TensorBoard": {"log_dir": "board"}},
        {"CSVLogger": {"filename": "log.csv"}},
        {"EarlyStopping": {"monitor": "val_mae", "min_delta": 10.0, "patience": 2}},
    ]
    job = make_job(
        rows, tmp_path_factory.mktemp("written"), train__epochs=50, train__callbacks=callbacks
    )
    return lockstep.train(job)


def test_early_stopping_ends_all_ranks(written: lockstep.Run) -> None:
    assert 1 < len(written.history["loss"]) < 50
    assert written.summary["ended_by"] == "a callback"
    assert len(set(written.summary["weights_sha256"])) == 1


@pytest.mark.parametrize("name", ["full.h5", "full.keras"])
def test_a_whole_model_is_saved_once(written: lockstep.Run, name: str) -> None:
    saved = keras.saving.load_model(written.folder / name, compile=False)
    for ours, theirs in zip(saved.get_weights(), written.model().get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_are_saved_each_epoch_and_at_the_best(written: lockstep.Run) -> None:
    epochs = len(written.history["loss"])
    names = sorted(path.name for path in written.folder.glob("each-*.weights.h5"))
    assert names == [f"each-{epoch:02d}.weights.h5" for epoch in range(1, epochs + 1)]
    model = written.model()
    last = model.get_weights()
    model.load_weights(written.folder / names[-1])
    for ours, theirs in zip(model.get_weights(), last, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    best = int(np.argmin(written.history["val_mae"])) + 1
    model.load_weights(written.folder / "best.weights.h5")
    of_best = model.get_weights()
    model.load_weights(written.folder / f"each-{best:02d}.weights.h5")
    for ours, theirs in zip(of_best, model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_nothing_but_the_named_files_is_left(written: lockstep.Run) -> None:
    names = {path.name for path in written.folder.iterdir() if not path.name.startswith("each-")}
    assert names == {
        *("job.yaml", "data.json", "environment.json", "events.jsonl", "metrics.jsonl", "logs"),
        *("tensorboard", "checkpoints", "artifact", "report.html", "summary.json"),
        *("owner.lock", "generation.json", "account.json"),
        *("full.h5", "full.keras", "best.weights.h5", "board", "log.csv"),
    }


def test_one_rank_writes_tensorboard_and_csv(written: lockstep.Run) -> None:
    for role in ("train", "validation"):
        assert len(list((written.folder / "board" / role).glob("events.*"))) == 1
    lines = (written.folder / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + len(written.history["loss"])


@pytest.mark.long
def test_stop_training_inside_an_epoch_stops_all_at_one_step(
    rows: Path, tmp_path: Path, code: Path
) -> None:
    job = make_job(
        rows,
        tmp_path,
        train__epochs=5,
        train__steps_per_execution=5,
        train__callbacks=[f"{code}:StopInside"],
        cluster__workers=3,
    )
    run = lockstep.train(job)
    assert run.summary["steps"] == 21  # 16 an epoch, then one call of five
    assert len(set(run.summary["weights_sha256"])) == 1
    assert run.summary["ended_by"] == "a callback"
    assert "test" in run.metrics


@pytest.mark.long
def test_a_run_that_a_callback_interrupted_resumes_where_it_was(
    rows: Path, tmp_path: Path, code: Path
) -> None:
    epochs = tmp_path / "epochs.txt"
    job = make_job(
        rows,
        tmp_path,
        train__epochs=4,
        train__callbacks=[{f"{code}:FailOnce": {"path": str(epochs)}}],
    )
    with pytest.raises(lockstep.UserError, match="interrupted at epoch 2"):
        lockstep.train(job)
    run = lockstep.train(job, options=TrainOptions(is_resume=True))
    assert epochs.read_text().split() == ["0", "1", "2", "2", "3"]
    assert run.summary["rows_seen"] == 4 * ROWS["train"]
    left = list((run.folder / "checkpoints").glob("step-*.h5"))
    assert len(left) == 3  # checkpoint.keep
