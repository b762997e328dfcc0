"""Mistakes that `lockstep retrain` tells before anything starts, and what it hands to whom."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import EnvironmentFailure, LockstepError, UserError
from configs.load import load_pipeline
from lockstep import cli
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


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ({"SparseCategoricalAccuracy": {"name": "top1"}}, "top1"),
        ({"AUC": {"name": "area"}}, "area"),
    ],
)
def test_a_name_that_hides_what_is_better_needs_a_mode(metric: Any, name: str) -> None:
    job = JOB | {"compile": {"loss": "mse", "metrics": [metric]}}

    def gate(where: str, **mode: str) -> dict[str, Any]:
        comparisons = [{"metric": name, "by": 0.01, "confidence": None, **mode}]
        if where == "slice":
            part = {"column": "x", "no_worse_than_champion": comparisons}
            return {"job": job, "gate__slices": [part]}
        return {"job": job, "gate__no_worse_than_champion": comparisons}

    for where in ("all", "slice"):
        with pytest.raises(UserError, match=f"'{name}', which is a .* more is better"):
            module.check_metrics(load_pipeline(pipeline(**gate(where))))
        module.check_metrics(load_pipeline(pipeline(**gate(where, mode="max"))))


@pytest.mark.parametrize("metric", ["AUC", "F1Score", {"Precision": {"name": "mine_precision"}}])
def test_confidence_in_what_is_no_mean_over_rows_is_refused_before_training(metric: Any) -> None:
    job = JOB | {"compile": {"loss": "mse", "metrics": ["mae", metric]}}
    compiled = load_pipeline(pipeline(job=job)).job.compile
    assert compiled is not None
    name = metric_names(compiled)[-1]

    def check(**given: Any) -> None:
        rule = {"metric": name, "by": 0.01, **given}
        module.check_metrics(load_pipeline(pipeline(job=job, gate__no_worse_than_champion=[rule])))

    with pytest.raises(UserError, match=f"'{name}', which is .*: no mean over rows.*confidence: "):
        check()
    check(confidence=None)
    check(metric="mae")
    check(metric="loss")


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


CHECK = {"kind": "threshold", "metric": "mae", "where": "", "is_passed": True, "numbers": {}}


class SmallSteps:
    """Steps without data or training, each with what the real one would come to."""

    is_new = True
    is_passed = True
    error: BaseException | None = None

    def __init__(self, context: Any, run_id: str) -> None:
        self.folder = f"runs/{run_id}"

    def stale(self, done: Any) -> str:
        return ""

    def discover(self, done: Any) -> dict[str, Any]:
        reason = "2 of 2 files are new" if self.is_new else "nothing new: no file is new"
        return {"is_new": self.is_new, "reason": reason, "champion": 1, "folder": self.folder}

    def prepare(self, done: Any) -> dict[str, Any]:
        return {"rows": {"evaluation_rows": 1200, "train_rows": 3400, "train": ["t.parquet"]}}

    def train(self, done: Any) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"artifact": "a"}

    def evaluate(self, done: Any) -> dict[str, Any]:
        candidate = {"metrics": {"mae": math.nan if not self.is_passed else 2.5}}
        return {"candidate": candidate, "champion": {"metrics": {"mae": 3.0}}}

    def decide(self, done: Any) -> dict[str, Any]:
        reasons = [] if self.is_passed else ["mae is 30; at most 20 passes."]
        numbers = {"value": 2.5 if self.is_passed else math.nan}
        check = {**CHECK, "is_passed": self.is_passed, "numbers": numbers}
        return {"is_passed": self.is_passed, "reasons": reasons, "checks": [check]}

    def register(self, done: Any) -> dict[str, Any]:
        return {"version": 2}

    def promote(self, done: Any, commit: Any) -> dict[str, Any]:
        if not self.is_passed:
            return {"decision": "kept", "reasons": done["decide"]["reasons"]}
        return {"decision": "promoted", "reasons": ["small/2 took the place of small/1"]}

    def report(self, done: Any) -> dict[str, Any]:
        return {"path": f"{self.folder}/report.html"}

    def notify(self, done: Any) -> dict[str, Any]:
        return {"problem": "the webhook was not told"}


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs `lockstep retrain` with small steps; gives status, standard output and error."""
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("LOCKSTEP_DATABASE", raising=False)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(pipeline()))

    def run(*arguments: str, **behaviour: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(module, "PipelineSteps", type("Steps", (SmallSteps,), behaviour))
        monkeypatch.setattr(
            "sys.argv", ["lockstep", "retrain", str(tmp_path / "p.yaml"), *arguments]
        )
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_a_promotion_is_shown_and_status_0(typed: Any) -> None:
    status, printed, errors = typed()
    assert (status, errors) == (0, "")
    assert "discover: 2 of 2 files are new" in printed
    assert "prepare: 1,200 rows judge, 3,400 train" in printed
    assert "evaluate: mae 2.5 (champion 3)" in printed
    assert "decide: 1 checks passed" in printed
    assert "register: version 2" in printed
    lines = printed.splitlines()
    assert ["threshold", "mae", "all", "rows", "passed"] in [line.split() for line in lines]
    assert lines[-2] == "promoted: small/2 took the place of small/1"
    assert lines[-1].startswith("report: runs/")


def test_json_is_one_object_on_standard_output(typed: Any) -> None:
    status, printed, told = typed("--json", is_passed=False)
    assert status == 0
    result = json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (result["decision"], result["version"], result["champion"]) == ("kept", 2, 1)
    assert result["reasons"] == ["mae is 30; at most 20 passes."]
    assert result["checks"][0]["numbers"] == {"value": None}
    assert result["warnings"] == ["the webhook was not told"]
    assert result["report"] == f"{result['run_folder']}/report.html"
    assert "register: version 2" in told


def test_nothing_new_is_status_0(typed: Any) -> None:
    status, printed, _ = typed(is_new=False)
    assert status == 0
    assert printed.splitlines()[-1] == "nothing to do: nothing new: no file is new"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("no column 'x'. Add it."), 2, "error: no column 'x'. Add it."),
        (PermissionError(13, "Permission denied", "/runs"), 3, "error: the step train failed: "),
        (Interrupted("stopped"), 130, "interrupted: stopped"),
    ],
)
def test_a_failure_has_its_status_and_a_sentence(
    typed: Any, error: Exception, status: int, words: str
) -> None:
    ended, _, told = typed(error=error)
    assert ended == status
    assert words in told
    assert "Traceback" not in told
    ended, printed, _ = typed()
    goes_on = "goes on with train" in printed
    assert (ended, goes_on) == (0, status != 2)


def test_a_locked_database_ends_the_command_with_status_3(
    typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed(is_new=False)[0] == 0  # the tables are there
    monkeypatch.setattr(module, "Database", lambda: Database(busy_s=0.05))
    other = Database()
    with other.writing("leases"):
        status, _, told = typed()
    other.close()
    assert status == 3
    assert "metadata.db is locked: another process" in told


@pytest.mark.parametrize("what", ["database", "metric"])
def test_what_fails_before_the_first_step_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path))
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "post_webhook", lambda hook, body: told.append(body) or "")
    changes: dict[str, Any] = {"on_failure": {"url": "http://host/hook"}}
    if what == "database":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LOCKSTEP_DATABASE", f"sqlite:///{tmp_path}/file/metadata.db")
    else:
        changes["gate__thresholds"] = [{"metric": "mea", "max": 3}]
    with pytest.raises(LockstepError):
        module.retrain(pipeline(**changes))
    (body,) = told
    assert (body["event"], body["run_id"]) == ("pipeline_failed", None)
