"""A run's record with the real MLflow client, against a server on loopback and in files."""

import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_job
from tests.integration.test_tracking import JOB, SUMMARY
from tests.support.mlflow_server import MlflowServer, mlflow_server
from trainer.tracking import BOUNDS, TrackedRun, Tracker

pytestmark = pytest.mark.long  # MLflow takes seconds to import


@pytest.fixture
def server() -> Iterator[MlflowServer]:
    with mlflow_server() as running:
        yield running


@pytest.fixture(scope="module")
def sender() -> Any:
    """The sender's module; MLflow takes seconds to import, and has warnings of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trainer import mlflow_sender
    return mlflow_sender


def opening(server: MlflowServer, **more: Any) -> dict[str, Any]:
    tags = {"lockstep_run_id": "r1", "lockstep_job": "flights"}
    basics = {"uri": server.uri, "experiment": "ours", "tags": tags, "params": {"a": "1"}}
    return {**basics, "find": None, "leave_s": 1.0, **more}


def metrics(step: int, **values: float) -> dict[str, Any]:
    return {"kind": "metrics", "values": values, "step": step, "time_ms": 1000}


def test_a_run_is_kept_and_gone_on_with(sender: Any, server: MlflowServer, tmp_path: Path) -> None:
    first = sender.MlflowRun(opening(server))
    for step in range(2):
        first.send(metrics(step, loss=1.0 - step, val_loss=2.0))
    first.send({"kind": "end", "status": "KILLED"})
    (run_id,) = server.runs
    assert server.runs[run_id]["status"] == "KILLED"
    assert server.experiments == {"ours": "1"}

    sender.MlflowRun(opening(server, find={"lockstep_run_id": "r2", "lockstep_job": "flights"}))
    assert len(server.runs) == 2  # another run is not gone on with
    find = {"lockstep_run_id": "r1", "lockstep_job": "flights"}
    second = sender.MlflowRun(opening(server, find=find, params={"a": "2", "b": "3"}))
    assert second.run_id == run_id
    assert server.runs[run_id]["status"] == "RUNNING"
    for step in range(1, 3):  # an epoch that is there already comes once more
        second.send(metrics(step, loss=1.0 - step, val_loss=2.0))
    assert server.values(run_id, "loss") == [(0, 1.0), (1, 0.0), (2, -1.0)]
    assert server.values(run_id, "val_loss") == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert server.runs[run_id]["params"] == {"a": "1", "b": "3"}
    assert server.runs[run_id]["tags"]["resumed.a"] == "2"

    (tmp_path / "report.html").write_text("a report")
    second.send({"kind": "file", "path": str(tmp_path / "report.html"), "folder": None})
    second.send({"kind": "file", "path": str(tmp_path / "report.html"), "folder": "artifact"})
    assert server.files == {"report.html": b"a report", "artifact/report.html": b"a report"}
    second.send({"kind": "end", "status": "FINISHED"})
    assert server.runs[run_id]["status"] == "FINISHED"


def test_many_parameters_go_in_parts(sender: Any, server: MlflowServer) -> None:
    params = {f"p{number}": str(number) for number in range(250)}
    run = sender.MlflowRun(opening(server, params=params))
    assert server.runs[run.run_id]["params"] == params


def test_what_is_refused_for_good_is_told_apart(
    sender: Any, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(sender, "_tell", told.append)
    for name, value in BOUNDS.items():  # without them MLflow alone tries for minutes
        monkeypatch.setenv(name, value)
    box = sender.Sender(opening(server))
    box.take(metrics(0, loss=1.0))
    box.flush()
    server.status = 400
    box.take(metrics(1, loss=1.0))
    box.flush()
    server.status = 503
    box.take(metrics(2, loss=1.0))
    box.flush()
    assert box.has_more
    assert 0 < box.wait_s() <= 2
    server.status = 200
    assert [next(iter(line)) for line in told] == ["run", "sent", "refused", "waiting"]


@pytest.mark.parametrize("kind", ["well", "slow", "error", "refusing", "dead", "files"])
def test_whatever_mlflow_is_the_run_ends_in_time(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    address = server.uri
    if kind == "dead":
        server.shutdown()
        server.server_close()
    elif kind == "files":
        address = (tmp_path / "mlruns").as_uri()
    server.delay_s = 3.0 if kind == "slow" else 0.0
    server.status = {"error": 500, "refusing": 403}.get(kind, 200)
    timeout_s = 30.0 if kind in ("well", "files") else 8.0
    tracking = {"mlflow_uri": address, "timeout_s": timeout_s}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("a report")
    warned: list[str] = []
    job = load_job({**JOB, "tracking": tracking})
    tracker = Tracker(TrackedRun(job, "r1", tmp_path / "run", address, False), warned.append)
    begin_s = time.monotonic()
    tracker.begin()
    tracker.epoch({"epoch": 0, "loss": 1.0})
    assert time.monotonic() - begin_s < 1
    told = tracker.finish(SUMMARY)
    assert time.monotonic() - begin_s < timeout_s + 3
    assert "secret" not in json.dumps(told) + "".join(warned)
    if kind in ("well", "files"):
        assert (told["delivered"], told["undelivered"]) == (4, 0), told
        assert warned == []
    else:
        assert told["undelivered"] > 0
        assert told["reason"]
    if kind == "well":
        assert set(server.authorizations) == {"Basic bWU6c2VjcmV0"}
        (run,) = server.runs.values()
        assert run["status"] == "FINISHED"
        assert run["params"]["train.epochs"] == "2"
        assert server.files == {"report.html": b"a report"}
