"""Mistakes that `lockstep retrain` tells before anything starts, and what it hands to whom."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import EnvironmentFailure, UserError
from configs.load import load_pipeline
from lockstep import retrain as module
from lockstep.cli import app
from lockstep.follow import Interrupted
from registry.database import Database
from registry.leases import Leases, this_process
from tests.unit.test_pipeline_schema import JOB, pipeline
from trainer.metric_names import metric_names


def command(*arguments: str) -> None:
    app(list(arguments), standalone_mode=False)


def test_the_schema_of_pipelines_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    command("schema", "--pipeline")
    schema = json.loads(capsys.readouterr().out)
    assert {"gate", "schedule", "job"} <= set(schema["properties"])
    command("schema")
    assert "gate" not in json.loads(capsys.readouterr().out)["properties"]


def test_a_metric_that_the_job_does_not_compute_is_told(tmp_path: Path) -> None:
    wrong = pipeline(gate__thresholds=[{"metric": "mea", "max": 3}])
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(UserError, match=r"'mea'; the job computes loss, mae\. Did you mean 'mae'"):
        command("retrain", str(tmp_path / "p.yaml"))


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("mae", "mae"),
        ("accuracy", "accuracy"),
        ("MeanAbsoluteError", "mean_absolute_error"),
        ({"AUC": {}}, "auc"),
        ({"AUC": {"name": "area"}}, "area"),
        ({"R2Score": {}}, "r2_score"),
        ("RootMeanSquaredError", "root_mean_squared_error"),
    ],
)
def test_metrics_are_named_as_keras_does(metric: Any, name: str) -> None:
    job = JOB | {"compile": {"loss": "mse", "metrics": [metric]}}
    compiled = load_pipeline(pipeline(job=job)).job.compile
    assert compiled is not None
    assert metric_names(compiled) == ["loss", name]


@pytest.mark.parametrize("field", ["loss", "metrics"])
def test_what_every_process_cannot_load_judges_nothing(field: str) -> None:
    own = "my.module:Own" if field == "loss" else ["my.module:Own"]
    job = JOB | {"compile": {"loss": "mse"} | {field: own}}
    with pytest.raises(UserError, match="job.compile names my.module:Own; a pipeline judges by"):
        module.check_metrics(load_pipeline(pipeline(job=job)))


def test_what_makes_no_difference_to_a_decision_leaves_an_unfinished_run(tmp_path: Path) -> None:
    def digest(**changes: Any) -> str:
        return module.pipeline_digest(load_pipeline(pipeline(**changes)))

    same = digest()
    assert digest(schedule={"cron": "0 4 * * *"}, lease_s=9.0) == same
    assert digest(on_failure={"url": "http://host/hook"}) == same
    assert digest(job__cluster={"workers": 3}) == same
    assert digest(gate__resamples=500) != same
    assert digest(job__train={"epochs": 2, "global_batch_size": 8}) != same
    assert digest(data__evaluation={"fraction": 0.3}) != same


def test_a_pipeline_at_work_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path))
    database = Database()
    Leases(database).acquire("pipeline fresh", this_process(), 60.0)
    told: list[Any] = []
    monkeypatch.setattr(module, "post_webhook", lambda *args: told.append(args) or "")
    busy = pipeline(on_failure={"url": "http://host/hook"})
    with pytest.raises(EnvironmentFailure, match="pipeline fresh is at work: process"):
        module.retrain(busy)
    assert told == []  # the other one is well
    database.close()


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (UserError("no column"), True),
        (EnvironmentFailure("disk"), True),
        (Interrupted("Ctrl-C"), False),
        (ValueError("a secret"), True),
    ],
)
def test_a_failure_is_told_to_its_webhook_and_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, is_told: bool
) -> None:
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path))
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "post_webhook", lambda hook, body: told.append(body) or "")

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(module.PipelineSteps, "discover", fail)
    with pytest.raises(type(error)):
        module.retrain(pipeline(on_failure={"url": "http://host/hook"}))
    assert len(told) == is_told
    if is_told:
        assert told[0]["event"] == "pipeline_failed"
        assert told[0]["run_id"] is not None
        assert "secret" not in told[0]["error"]
