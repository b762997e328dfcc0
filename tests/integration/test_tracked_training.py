"""Runs with a record in MLflow: the same run, the same numbers, whatever MLflow does."""

import json
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.api import TrainOptions
from lockstep.follow import SilentListener
from tests.support.curves import read_curves
from tests.support.jobs import assert_same_bits, make_job
from tests.support.mlflow_server import mlflow_server

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.long]


class Recorder(SilentListener):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] == "warning":
            self.warnings.append(event["warning"])


@pytest.fixture(scope="module")
def untracked(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> lockstep.Run:
    return lockstep.train(make_job(rows, tmp_path_factory.mktemp("plain"), train__epochs=4))


def test_a_resumed_run_goes_on_in_its_record(
    rows: Path, tmp_path: Path, untracked: lockstep.Run
) -> None:
    with mlflow_server() as server:
        tracking = {"mlflow_uri": server.uri, "experiment": "ours", "timeout_s": 60}
        first = lockstep.train(make_job(rows, tmp_path, tracking=tracking))
        told = first.summary["tracking"]
        assert told["undelivered"] == 0, told
        job = make_job(rows, tmp_path, tracking=tracking, train__epochs=4)
        run = lockstep.train(job, options=TrainOptions(is_resume=True))
        assert run.summary["tracking"]["undelivered"] == 0
        assert run.summary["tracking"]["mlflow_run"] == told["mlflow_run"]
        (kept,) = server.runs.values()
        assert kept["status"] == "FINISHED"
        assert kept["tags"]["resumed.train.epochs"] == "4"
        losses = server.values(told["mlflow_run"], "loss")
        assert losses == list(enumerate(run.history["loss"]))
        assert b"<html" in server.files["report.html"]
        assert json.loads(server.files["artifact/manifest.json"])
    assert_same_bits(run, untracked)
    curve = read_curves(run.folder / "tensorboard" / "train")["epoch_loss"]
    assert [step for step, _ in curve] == [0, 1, 2, 3]
    assert [value for _, value in curve] == pytest.approx(run.history["loss"], rel=1e-6)


def test_a_new_coordinator_goes_on_in_the_record(
    rows: Path, tmp_path: Path, untracked: lockstep.Run
) -> None:
    with mlflow_server() as server:
        tracking = {"mlflow_uri": server.uri, "timeout_s": 60}
        job = make_job(rows, tmp_path, tracking=tracking, train__epochs=4)
        run = lockstep.train(job, options=TrainOptions(chaos="coordinator@step=40"))
        assert run.summary["recoveries"][0]["kind"] == "coordinator_lost"
        (kept,) = server.runs.values()
        assert kept["status"] == "FINISHED"
        (run_id,) = server.runs
        assert server.values(run_id, "loss") == list(enumerate(run.history["loss"]))
    assert_same_bits(run, untracked)


def test_an_mlflow_that_is_not_there_costs_a_warning(
    rows: Path, tmp_path: Path, untracked: lockstep.Run
) -> None:
    with mlflow_server() as server:
        address = server.uri
    listener = Recorder()
    tracking = {"mlflow_uri": address, "timeout_s": 1}
    job = make_job(rows, tmp_path, tracking=tracking, train__epochs=4)
    run = lockstep.train(job, listener=listener)
    assert_same_bits(run, untracked)
    assert run.summary["status"] == "done"
    assert run.summary["tracking"]["delivered"] == 0
    assert run.summary["tracking"]["undelivered"] > 4
    assert len([text for text in listener.warnings if "MLflow" in text]) == 1
