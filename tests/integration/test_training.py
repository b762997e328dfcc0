"""A job through real workers: the numbers are plain Keras's, every row once, nothing lost."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lockstep
from lockstep.api import TrainOptions
from lockstep.follow import SilentListener
from tests.support.jobs import ROWS, assert_same_bits, make_job
from tests.support.plain_keras import fit_plain

pytestmark = pytest.mark.usefixtures("ray_session")
TOLERANCE = 4e-5


class Recorder(SilentListener):
    """Keeps events; may act on the first one of a kind."""

    def __init__(self, kind: str = "", action: Any = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self._kind, self._action = kind, action

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["event"] == self._kind and self._action is not None:
            action, self._action = self._action, None
            action(event, self)

    def warned(self, warning: str) -> None:
        self.warnings.append(warning)


@pytest.fixture(scope="module")
def plain(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit_plain(make_job(rows, tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def two_workers(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> lockstep.Run:
    return lockstep.train(make_job(rows, tmp_path_factory.mktemp("two")))


@pytest.fixture(scope="module")
def five_epochs(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> lockstep.Run:
    return lockstep.train(make_job(rows, tmp_path_factory.mktemp("five"), train__epochs=5))


@pytest.mark.parametrize(
    "workers",
    [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)],
)
def test_weights_and_history_are_those_of_plain_fit(
    plain: Any, two_workers: lockstep.Run, rows: Path, tmp_path: Path, workers: int
) -> None:
    run = two_workers
    if workers != 2:
        run = lockstep.train(make_job(rows, tmp_path, cluster__workers=workers))
    model, history = plain
    for ours, theirs in zip(run.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    for name, values in history.history.items():
        np.testing.assert_allclose(run.history[name], values, rtol=TOLERANCE)


def test_summary_counts_rows_and_ranks_agree(two_workers: lockstep.Run) -> None:
    summary = two_workers.summary
    assert summary["status"] == "done"
    assert summary["rows_seen"] == ROWS["train"] * 2
    assert len(summary["weights_sha256"]) == 2
    assert len(set(summary["weights_sha256"])) == 1
    assert summary["steps"] == 2 * -(-ROWS["train"] // 64)
    assert summary["metrics"]["test"].keys() == summary["metrics"]["constant"].keys()
    shares = [part["share"] for part in summary["goodput"].values()]
    assert sum(shares) == pytest.approx(1)


def test_test_metrics_are_those_of_plain_evaluate(
    plain: Any, two_workers: lockstep.Run, rows: Path
) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(rows / "test")
    x = np.stack([table[name].to_numpy() for name in ("a", "b", "c")], axis=1)
    y = table["y"].to_numpy()
    loss, mae = plain[0].evaluate(x, y[:, None], batch_size=512, verbose=0)
    assert two_workers.metrics["test"]["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert two_workers.metrics["test"]["mae"] == pytest.approx(mae, rel=TOLERANCE)
    train_y = pq.read_table(rows / "train")["y"].to_numpy().astype("f8")
    best = np.abs(y - np.median(train_y)).mean()
    mean = np.abs(y - train_y.mean()).mean()
    assert two_workers.metrics["constant"]["mae"] == pytest.approx(min(best, mean), rel=1e-5)


def test_the_run_folder_holds_what_the_design_names(two_workers: lockstep.Run) -> None:
    names = {path.name for path in two_workers.folder.iterdir()}
    assert names >= {
        *("job.yaml", "environment.json", "events.jsonl", "metrics.jsonl", "tensorboard"),
        *("checkpoints", "artifact", "report.html", "summary.json", "logs"),
    }
    artifact = {path.name for path in two_workers.artifact.iterdir()}
    assert artifact == {
        *("model.keras", "trained_model.h5", "saved_model", "signature.json", "manifest.json"),
    }
    assert not [path for path in two_workers.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.long
def test_two_epochs_and_three_more_are_five_bit_for_bit(
    five_epochs: lockstep.Run, rows: Path, tmp_path: Path
) -> None:
    first = lockstep.train(make_job(rows, tmp_path))
    job = make_job(rows, tmp_path, train__epochs=5)
    resumed = lockstep.train(job, options=TrainOptions(is_resume=True))
    assert resumed.folder == first.folder
    assert_same_bits(resumed, five_epochs)
    assert resumed.summary["rows_seen"] == ROWS["train"] * 5
    assert resumed.history["mae"] == five_epochs.history["mae"]


@pytest.mark.long
def test_a_killed_worker_leaves_no_trace(
    five_epochs: lockstep.Run, rows: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_rank_1(event: dict[str, Any], recorder: Recorder) -> None:
        formed = [e for e in recorder.events if e["event"] == "formed"]
        killed.append(formed[-1]["pids"][1])
        os.kill(killed[0], signal.SIGKILL)

    job = make_job(rows, tmp_path, train__epochs=5, checkpoint__every_steps=3)
    run = lockstep.train(job, listener=Recorder("epoch", kill_rank_1))
    assert killed
    assert [failure["kind"] for failure in run.summary["recoveries"]] == ["exited"]
    assert_same_bits(run, five_epochs)
    assert run.summary["rows_seen"] == ROWS["train"] * 5


def test_a_stop_keeps_a_checkpoint_inside_the_epoch_and_resume_ends_the_same(
    five_epochs: lockstep.Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(event: dict[str, Any], recorder: Recorder) -> None:
        threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(0.2)

    job = make_job(rows, tmp_path, train__epochs=5, train__steps_per_execution=1)
    with pytest.raises(lockstep.Interrupted) as stopped:
        lockstep.train(job, listener=Recorder("epoch", interrupt))
    assert stopped.value.exit_status == 130
    assert "--resume" in str(stopped.value)
    resumed = lockstep.train(
        make_job(rows, tmp_path, train__epochs=5), options=TrainOptions(is_resume=True)
    )
    assert_same_bits(resumed, five_epochs)


def test_callbacks_act_as_in_fit_and_write_once(rows: Path, tmp_path: Path) -> None:
    callbacks: list[Any] = [
        {"ReduceLROnPlateau": {"factor": 0.5, "patience": 0, "min_delta": 5}},
        {"EarlyStopping": {"monitor": "val_mae", "min_delta": 0.5, "patience": 1}},
    ]
    job = make_job(rows, tmp_path, train__epochs=30, train__callbacks=callbacks)
    model, history = fit_plain(job)
    job["train"]["callbacks"] = [
        *callbacks,
        {"CSVLogger": {"filename": "log.csv"}},
        {"ModelCheckpoint": {"filepath": "best.keras", "save_best_only": True}},
        {"TensorBoard": {"log_dir": "mine"}},
    ]
    run = lockstep.train(job)
    assert len(run.history["loss"]) == len(history.history["loss"]) < 30
    rates = run.history["learning_rate"]
    assert rates[-1] < rates[0]
    for ours, theirs in zip(run.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    lines = (run.folder / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + len(run.history["loss"])
    assert (run.folder / "best.keras").exists()
    assert len(list((run.folder / "mine").rglob("events.*"))) >= 1


OWN_CALLBACKS = """
import json, os, keras

class Recorder(keras.callbacks.Callback):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def write(self, hook, logs):
        with open(self.path, "a") as file:
            file.write(json.dumps([hook, os.getpid(), sorted(logs or {})]) + "\\n")

    def on_train_begin(self, logs=None):
        self.write("train_begin", logs)

    def on_epoch_begin(self, epoch, logs=None):
        self.write(f"epoch_begin {epoch}", logs)

    def on_epoch_end(self, epoch, logs=None):
        self.write(f"epoch_end {epoch}", logs)
        if epoch == 1:
            self.model.stop_training = True

    def on_train_batch_end(self, batch, logs=None):
        self.write(f"batch_end {batch}", logs)

    def on_train_end(self, logs=None):
        self.write("train_end", logs)

class Broken(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise RuntimeError("my callback broke")
"""


def test_own_callbacks_see_what_fit_would_show_them(rows: Path, tmp_path: Path) -> None:
    code = tmp_path / "own_callbacks.py"
    code.write_text(OWN_CALLBACKS)
    calls = tmp_path / "calls.jsonl"
    job = make_job(
        rows,
        tmp_path,
        train__epochs=4,
        train__steps_per_execution=8,
        train__callbacks=[{f"{code}:Recorder": {"path": str(calls)}}],
    )
    run = lockstep.train(job)
    seen = [json.loads(line) for line in calls.read_text().splitlines()]
    assert len({pid for _, pid, _ in seen}) == 1
    batch = [["loss", "mae"]] * 2
    assert [hook for hook, _, _ in seen] == [
        "train_begin",
        *("epoch_begin 0", "batch_end 7", "batch_end 15", "epoch_end 0"),
        *("epoch_begin 1", "batch_end 7", "batch_end 15", "epoch_end 1"),
        "train_end",
    ]
    assert [logs for hook, _, logs in seen if hook.startswith("batch_end")] == batch * 2
    assert seen[4][2] == ["loss", "mae", "val_loss", "val_mae"]
    assert len(run.history["loss"]) == 2


def test_a_callback_that_raises_shows_the_users_traceback(rows: Path, tmp_path: Path) -> None:
    code = tmp_path / "own_callbacks.py"
    code.write_text(OWN_CALLBACKS)
    job = make_job(rows, tmp_path, train__callbacks=[f"{code}:Broken"])
    with pytest.raises(lockstep.UserError, match="my callback broke") as raised:
        lockstep.train(job)
    assert "on_epoch_end" in raised.value.traceback
    assert "trainer/" not in raised.value.traceback
    summary = json.loads(next(tmp_path.rglob("summary.json")).read_text())
    assert summary["status"] == "failed"


BUILDER = """
import keras

def compiled(units=8):
    model = keras.Sequential([keras.layers.Dense(units, activation="tanh"), keras.layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    return model

def broken():
    raise ValueError("my builder broke")
"""


@pytest.mark.long
def test_builder_file_and_saved_model_as_start(
    two_workers: lockstep.Run, rows: Path, tmp_path: Path
) -> None:
    code = tmp_path / "builders.py"
    code.write_text(BUILDER)
    values = make_job(rows, tmp_path, compile=None, train__epochs=1)
    values["model"] = {"builder": f"{code}:compiled", "arguments": {"units": 5}}
    built = lockstep.train(values)
    assert built.model().layers[-2].units == 5
    values["model"] = {"file": str(two_workers.artifact / "model.keras")}
    further = lockstep.train(values)
    assert further.history["loss"][0] < two_workers.history["loss"][-1]


def model_of_this_file() -> Any:
    import keras

    layers = [keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse", metrics=["mae"])
    return model


@pytest.mark.long
def test_a_function_is_trained_as_a_job_is(rows: Path, tmp_path: Path) -> None:
    values = make_job(rows, tmp_path, train__epochs=1)
    sections = {key: values[key] for key in ("data", "train", "cluster", "runs_dir")}
    run = lockstep.train(model_of_this_file, name="mine", **sections)
    assert run.folder.parent.name == "mine"
    assert run.history.keys() >= {"loss", "mae", "val_loss", "val_mae"}
    with pytest.raises(lockstep.UserError, match="a function at the top of a Python file"):
        lockstep.train(lambda: None, **sections)


def test_a_builder_that_raises_shows_the_users_traceback(rows: Path, tmp_path: Path) -> None:
    code = tmp_path / "builders.py"
    code.write_text(BUILDER)
    values = make_job(rows, tmp_path, compile=None)
    values["model"] = {"builder": f"{code}:broken"}
    with pytest.raises(lockstep.UserError, match="my builder broke") as raised:
        lockstep.train(values)
    assert 'raise ValueError("my builder broke")' in raised.value.traceback
    assert "trainer/model.py" not in raised.value.traceback
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"Conv2D": {"filters": 2, "kernel_size": 3}}, {"Dense": {"units": 1}}], "fit together"),
        ([{"Dense": {"units": 8, "activation": "tanhh"}}, {"Dense": {"units": 1}}], "refuses"),
        ([{"Reshape": {"target_shape": [2, 2]}}, {"Dense": {"units": 1}}], "fit together"),
    ],
)
def test_a_model_that_does_not_fit_is_told_before_workers_start(
    rows: Path, tmp_path: Path, layers: list[Any], message: str
) -> None:
    with pytest.raises(lockstep.UserError, match=message):
        lockstep.train(make_job(rows, tmp_path, model__layers=layers))
    assert not (tmp_path / "small").exists()


def test_a_gang_that_cannot_be_placed_says_what_there_is(rows: Path, tmp_path: Path) -> None:
    job = make_job(rows, tmp_path, cluster__workers=2, cluster__cpus_per_worker=3)
    with pytest.raises(
        lockstep.UserError, match=r"asks for 2 workers with 3 CPU\(s\) each; the cluster has 1 node"
    ):
        lockstep.train(job)


@pytest.mark.long
def test_sums_over_batches_and_weights_are_plain_keras(rows: Path, tmp_path: Path) -> None:
    job = make_job(
        rows,
        tmp_path,
        data__weight="w",
        train__global_batch_size=100,
        cluster__workers=3,
        compile__weighted_metrics=["mse"],
        compile__optimizer={"Adam": {"learning_rate": 0.01, "global_clipnorm": 0.5}},
        model__layers=[
            {"Dense": {"units": 8, "kernel_regularizer": {"L2": {"l2": 0.01}}}},
            {"Dense": {"units": 1}},
        ],
    )
    model, history = fit_plain(job)
    run = lockstep.train(job)
    for ours, theirs in zip(run.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    for name, values in history.history.items():
        np.testing.assert_allclose(run.history[name], values, rtol=TOLERANCE)


def write_tokens(folder: Path, rows: int) -> Path:
    """Rows of five tokens out of twelve, and their share of tokens below six."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, 12, (rows, 5)).astype("f4")
    column = pa.FixedSizeListArray.from_arrays(tokens.ravel(), 5)
    table = pa.table({"tokens": column, "y": (tokens < 6).mean(axis=1)})
    pq.write_table(table, folder / "0.parquet", row_group_size=50)
    return folder


@pytest.mark.parametrize(
    ("workers", "steps_per_execution"),
    [
        pytest.param(1, 1, marks=pytest.mark.long),
        pytest.param(2, 1, marks=pytest.mark.long),
        pytest.param(2, 4, marks=pytest.mark.long),
    ],
)
def test_sparse_gradients_do_not_depend_on_calls_or_workers(
    tmp_path: Path, workers: int, steps_per_execution: int
) -> None:
    """65 rows in batches of 64: the last step leaves a worker without a row."""
    job = make_job(
        tmp_path,
        tmp_path / "runs",
        data__train=str(write_tokens(tmp_path / "tokens", 65)),
        data__validation=None,
        data__test=None,
        data__features=["tokens"],
        data__normalize=False,
        train__epochs=4,
        train__steps_per_execution=steps_per_execution,
        compile__optimizer={"Adam": {"learning_rate": 0.05}},
        cluster__workers=workers,
        model__layers=[
            {"Embedding": {"input_dim": 12, "output_dim": 3}},
            "Flatten",
            {"Dense": {"units": 1}},
        ],
    )
    model, history = fit_plain(job)
    run = lockstep.train(job)
    for ours, theirs in zip(run.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(run.history["loss"], history.history["loss"], rtol=TOLERANCE)


@pytest.mark.long
def test_sum_losses_are_those_of_fit_and_evaluate(rows: Path, tmp_path: Path) -> None:
    job = make_job(
        rows,
        tmp_path,
        compile__loss={"MeanSquaredError": {"reduction": "sum"}},
        compile__optimizer={"SGD": {"learning_rate": 1e-5}},
        train__epochs=1,
        cluster__workers=3,
    )
    _, history = fit_plain(job, validation_batch_size=64)
    run = lockstep.train(job)
    for name, values in history.history.items():
        np.testing.assert_allclose(run.history[name], values, rtol=TOLERANCE)


@pytest.mark.long
def test_a_lost_template_is_replaced(five_epochs: lockstep.Run, rows: Path, tmp_path: Path) -> None:
    import psutil

    def kill_template(event: dict[str, Any], recorder: Recorder) -> None:
        formed = [e for e in recorder.events if e["event"] == "formed"]
        psutil.Process(formed[-1]["pids"][0]).parent().kill()

    job = make_job(rows, tmp_path, train__epochs=5)
    run = lockstep.train(job, listener=Recorder("epoch", kill_template))
    assert len(run.summary["recoveries"]) == 1
    assert run.summary["recoveries"][0]["steps_replayed"] <= 16
    assert_same_bits(run, five_epochs)


@pytest.mark.long
def test_resume_refuses_other_rows(rows: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(rows, data)
    job = make_job(data, tmp_path / "runs", train__epochs=1, cluster__workers=1)
    lockstep.train(job)
    shutil.copy(data / "train" / "0.parquet", data / "train" / "2.parquet")
    job["train"]["epochs"] = 2
    with pytest.raises(lockstep.UserError, match=r"other training rows: 1,003 then, 1,504 now"):
        lockstep.train(job, options=TrainOptions(is_resume=True))
