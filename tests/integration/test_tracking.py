"""A run's record in MLflow, whatever MLflow does; the sender is a process, MLflow a stand-in."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.channel import Message
from configs.errors import JobError, UserError
from configs.load import dump_job, job_digest, load_job
from trainer.payloads import TrainingSettings
from trainer.supervisor import TrainingSupervisor
from trainer.tracking import TrackedRun, Tracker, parameters_of, tracking_address

STUB = Path(__file__).parents[1] / "support" / "stub_mlflow"
JOB: dict[str, Any] = {
    "name": "flights",
    "model": {"layers": [{"Dense": {"units": 4}}, {"Dense": {"units": 1}}]},
    "compile": {"loss": "mse"},
    "data": {"train": "t", "features": ["a", "b"], "label": "y"},
    "train": {"epochs": 2, "global_batch_size": 64},
}
SUMMARY = {
    "status": "done",
    "metrics": {"train": {"loss": 0.5}, "test": {"loss": 0.25, "mae": float("nan")}},
    "rows_seen": 100,
    "rows_per_s": 10.0,
    "wall_s": 3.0,
    "steps": 8,
    "recoveries": [{}],
}


class Tracked:
    """A run with a record, and what MLflow was told of it."""

    def __init__(self, folder: Path, **tracking: Any) -> None:
        self.warnings: list[str] = []
        self._calls = folder / "calls.jsonl"
        (folder / "run" / "artifact").mkdir(parents=True)
        for name in ("report.html", "summary.json", "artifact/manifest.json", "artifact/m.keras"):
            (folder / "run" / name).write_text(name)
        tracking = {"mlflow_uri": "http://127.0.0.1:9", **tracking}
        job = load_job({**JOB, "tracking": tracking})
        run = TrackedRun(job, "r1", folder / "run", "http://me:secret@127.0.0.1:9", False)
        self.tracker = Tracker(run, self.warnings.append)

    def calls(self, name: str) -> list[dict[str, Any]]:
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [call for call in map(json.loads, lines) if call["call"] == name]

    def go(self) -> dict[str, Any]:
        """Two epochs and an end."""
        self.tracker.begin()
        for epoch in range(2):
            record = {"epoch": epoch, "step": 4 * epoch, "loss": 1.0 - epoch, "val_loss": 2.0}
            self.tracker.epoch(record)
        return self.tracker.finish(SUMMARY)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.syspath_prepend(str(STUB))
    monkeypatch.setenv("STUB_MLFLOW", str(tmp_path / "calls.jsonl"))
    return monkeypatch


def test_a_run_is_told_from_begin_to_end(stub: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Tracked(tmp_path, experiment="ours", tags={"team": "a"})
    told = run.go()
    assert told == {
        "mlflow_run": "mlflow-1",
        "experiment": "ours",
        "delivered": 7,
        "undelivered": 0,
    }
    assert run.warnings == []
    (made,) = run.calls("create_run")
    assert made["tags"] == {
        "team": "a",
        "lockstep_run_id": "r1",
        "lockstep_job": "flights",
        "mlflow.runName": "r1",
    }
    params, first, second, final = run.calls("log_batch")
    assert params["params"]["train.epochs"] == "2"
    assert [metric[:2] for metric in first["metrics"]] == [["loss", 1.0], ["val_loss", 2.0]]
    assert [metric[3] for metric in second["metrics"]] == [1, 1]
    values = {key: value for key, value, _, _ in final["metrics"]}
    assert values["final_test_loss"] == 0.25
    assert values["recoveries"] == 1
    assert "final_test_mae" not in values
    assert run.calls("set_terminated") == [{"call": "set_terminated", "status": "FINISHED"}]
    sent = [Path(call["path"]).name for call in run.calls("log_artifact")]
    assert sent == ["report.html", "summary.json", "manifest.json"]


def test_the_model_goes_along_where_it_is_asked_for(
    stub: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Tracked(tmp_path, log_model=True)
    run.go()
    places = [(Path(c["path"]).name, c["folder"]) for c in run.calls("log_artifact")]
    assert places[2:] == [("m.keras", "artifact"), ("manifest.json", "artifact")]


@pytest.mark.parametrize(
    ("mode", "undelivered", "words"),
    [
        ("down", 6, "cannot reach MLflow"),
        ("hang", 6, "not delivered within 0.2 s"),
        ("die", 6, ""),
    ],
)
def test_a_failing_mlflow_costs_a_count_and_a_bounded_wait(
    stub: pytest.MonkeyPatch, tmp_path: Path, mode: str, undelivered: int, words: str
) -> None:
    stub.setenv("STUB_MLFLOW_MODE", mode)
    run = Tracked(tmp_path, timeout_s=0.2)
    run.tracker.begin()
    run.tracker.epoch({"epoch": 0, "loss": 1.0})
    for _ in range(1000 if mode == "down" else 0):  # the sender takes a moment to come up
        if run.warnings:
            break
        time.sleep(0.02)
    begin_s = time.monotonic()
    told = run.tracker.finish(SUMMARY)
    assert time.monotonic() - begin_s < 3
    assert told["undelivered"] == undelivered
    assert words in told.get("reason", "")
    assert "secret" not in json.dumps(told) + "".join(run.warnings)
    assert len(run.warnings) <= 1


def test_what_is_refused_is_counted_and_the_rest_delivered(
    stub: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub.setenv("STUB_MLFLOW_MODE", "refuse")
    run = Tracked(tmp_path)
    stub.setattr("trainer.tracking.parameters_of", lambda job: {})
    told = run.go()
    assert (told["delivered"], told["undelivered"]) == (4, 3)
    assert len(run.warnings) == 1
    assert "no such thing" in run.warnings[0]


@pytest.mark.long
def test_what_waits_is_delivered_when_mlflow_is_back(
    stub: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub.setenv("STUB_MLFLOW_MODE", "absent_then_ok")
    run = Tracked(tmp_path, timeout_s=30)
    told = run.go()
    assert (told["delivered"], told["undelivered"]) == (7, 0)
    assert "me:secret" not in run.warnings[0]


def test_handing_over_never_waits(stub: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub.setenv("STUB_MLFLOW_MODE", "hang")
    run = Tracked(tmp_path, timeout_s=0.0)
    run.tracker.begin()
    begin_s = time.monotonic()
    for epoch in range(13_000):
        run.tracker.epoch({"epoch": epoch, "loss": 1.0, "text": "x" * 10})
    assert time.monotonic() - begin_s < 3
    assert run.tracker.finish(SUMMARY)["delivered"] == 0


def test_parameters_are_the_fields_of_the_job() -> None:
    job = load_job({**JOB, "tracking": {"mlflow_uri": "databricks"}})
    params = parameters_of(job)
    assert params["model.layers.0.Dense.units"] == "4"
    assert params["data.features.1.name"] == "b"
    assert not [name for name in params if name.startswith("tracking")]
    wide = {**JOB, "data": {**JOB["data"], "features": [f"column_{n}" for n in range(500)]}}
    params = parameters_of(load_job(wide))
    assert len(params) == 300
    assert params["train.epochs"] == "2"
    paths = [f"a_folder/of/many/files/{n}" for n in range(100)]
    many = {**JOB, "data": {**JOB["data"], "train": paths}}
    cut = parameters_of(load_job(many))["data.train"]
    assert (len(cut), cut[-1]) == (500, "…")


@pytest.mark.parametrize(
    ("tracking", "words"),
    [
        ({"mlflow_uri": "http://me:secret@host"}, "holds a user, a password or a query"),
        ({"mlflow_uri": "https://host?token=secret"}, "mlflow_uri: env:NAME"),
        ({"mlflow_uri": "secret"}, "begins with none of"),
        ({"mlflow_uri": "file:mlruns"}, "no absolute path"),
        ({"experiment": "x"}, "without mlflow_uri has no effect"),
    ],
)
def test_bad_settings_are_refused_without_their_secrets(
    tracking: dict[str, str], words: str
) -> None:
    with pytest.raises(JobError, match=words) as raised:
        load_job({**JOB, "tracking": tracking})
    assert "secret" not in str(raised.value)


def test_the_address_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert tracking_address(load_job(JOB).tracking) is None  # not read unless it is named
    job = load_job({**JOB, "tracking": {"mlflow_uri": "env:OUR_MLFLOW"}})
    monkeypatch.delenv("OUR_MLFLOW", raising=False)
    with pytest.raises(UserError, match="OUR_MLFLOW, which is not set"):
        tracking_address(job.tracking)
    monkeypatch.setenv("OUR_MLFLOW", "http://me:secret@host")
    assert tracking_address(job.tracking) == "http://me:secret@host"
    assert job_digest(job) == job_digest(load_job(JOB))


def test_a_missing_extra_is_told_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    job = load_job({**JOB, "tracking": {"mlflow_uri": "http://host"}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Install lockstep\[mlflow\]"):
        tracking_address(job.tracking)


def test_no_sender_is_left_behind(stub: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub.setenv("STUB_MLFLOW_MODE", "hang")
    run = Tracked(tmp_path, timeout_s=0.0)
    run.go()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_text() for child in children]
    assert not [command for command in commands if "mlflow_sender" in command]


def test_the_coordinators_side_keeps_the_record(stub: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that fails in its second epoch, and the next coordinator's, without any worker."""
    job = load_job({**JOB, "tracking": {"mlflow_uri": "http://127.0.0.1:9"}})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "job.yaml").write_text(dump_job(job))
    calls = tmp_path / "calls.jsonl"

    def fail_after(epochs: list[int], is_resumed: bool) -> dict[str, Any]:
        settings: Any = TrainingSettings(
            *(job, "r1", str(folder), None, str(folder / "checkpoints"), is_resumed),
            tracking_address="http://me:secret@127.0.0.1:9",
        )
        assert "secret" not in repr(settings)
        supervisor = TrainingSupervisor(settings, lambda event: None)
        supervisor.begin()
        for epoch in epochs:
            body = {"epoch": epoch, "step": 4, "loss": 1.0}
            supervisor.on_message(Message(1, 0, "epoch", body))
        supervisor.failed(RuntimeError("a worker died"))
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        return summary

    first = fail_after([0], is_resumed=False)
    assert (first["tracking"]["undelivered"], first["status"]) == (0, "failed")
    told = [json.loads(line) for line in calls.read_text().splitlines()]
    assert "search_runs" not in [call["call"] for call in told]
    assert {"call": "set_terminated", "status": "FAILED"} in told
    calls.unlink()
    fail_after([1], is_resumed=True)
    told = [json.loads(line) for line in calls.read_text().splitlines()]
    (search,) = [call for call in told if call["call"] == "search_runs"]
    assert search["filter"] == "tags.`lockstep_run_id` = 'r1' and tags.`lockstep_job` = 'flights'"
    losses = [m for call in told for m in call.get("metrics", []) if m[0] == "loss"]
    assert [(value, step) for _, value, _, step in losses] == [(1.0, 0), (1.0, 1)]
    assert "secret" not in "".join(path.read_text() for path in folder.glob("*.*"))
