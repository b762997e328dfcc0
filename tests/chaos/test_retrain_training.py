"""A pipeline that really trains, killed at each of its steps as a process, and run once more."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from registry.database import Database
from registry.store import Registry
from tests.support.chaos import events_of
from tests.support.drivers import wait_for
from tests.support.jobs import write_data
from tests.support.retrain_jobs import MODEL, make_pipeline, write_pipeline
from trainer.retrain import STEPS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

POINTS = [f"{when} {step}" for step in STEPS[1:] for when in ("before", "after")]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "home"))
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}


def start(path: Path, point: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.retrain_jobs", str(path), point],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(path: Path, environment: dict[str, str]) -> dict[str, Any]:
    said, errors = (process := start(path, "", environment)).communicate(timeout=300)
    assert process.returncode == 0, errors
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    return result


def check(tmp_path: Path, result: dict[str, Any]) -> None:
    """One version, the champion, whole; and one training, from its first step to its last."""
    database = Database()
    registry = Registry(database)
    (version,) = registry.versions(MODEL)
    assert (version.number, version.aliases) == (1, ("candidate", "champion"))
    assert registry.verify(version) == []
    assert [move.to_number for move in registry.history(MODEL, "champion")] == [1]
    database.close()
    (folder,) = (tmp_path / "runs" / MODEL).iterdir()
    assert folder.name == result["run_id"]
    assert len(events_of(folder, "done")) == 1


@pytest.mark.parametrize("point", POINTS)
def test_the_rerun_ends_right(tmp_path: Path, point: str, environment: dict[str, str]) -> None:
    data = write_data(tmp_path / "rows")
    path = write_pipeline(tmp_path, make_pipeline(data, tmp_path / "runs"))
    process = start(path, point, environment)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    result = finish(path, environment)
    assert (result["decision"], result["version"], result["is_resumed"]) == ("promoted", 1, True)
    check(tmp_path, result)


@pytest.fixture(scope="module")
def with_champion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home and a champion, trained from its data; each test takes a copy."""
    folder = tmp_path_factory.mktemp("before")
    path = write_pipeline(folder, make_pipeline(write_data(folder / "rows"), folder / "runs"))
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    assert finish(path, {**environment, "LOCKSTEP_HOME": str(folder / "home")})["version"] == 1
    return folder


@pytest.mark.parametrize("point", POINTS[POINTS.index("before evaluate") :])
def test_beside_a_champion_a_refused_candidate_changes_nothing(
    tmp_path: Path, point: str, with_champion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The champion stays, through death and rerun, at each step that knows of it."""
    home = tmp_path / "home"
    shutil.copytree(with_champion / "home", home)
    monkeypatch.setenv("LOCKSTEP_HOME", str(home))
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    rows = tmp_path / "rows"
    shutil.copytree(with_champion / "rows", rows)
    (source, *_) = sorted((rows / "train").glob("*.parquet"))
    shutil.copyfile(source, source.with_name("newer.parquet"))
    bad = make_pipeline(rows, tmp_path / "runs", gate__thresholds=[{"metric": "mae", "max": 1e-6}])
    path = write_pipeline(tmp_path, bad)
    process = start(path, point, environment)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    assert _state() == (1, [1])
    result = finish(path, environment)
    assert (result["decision"], result["version"], result["champion"]) == ("kept", 2, 1)
    assert result["is_resumed"]
    assert _state() == (1, [1])
    database = Database()
    registry = Registry(database)
    assert [v.number for v in registry.versions(MODEL)] == [1, 2]
    assert registry.version(MODEL, 2).tags["gate"] == "refused"
    assert all(registry.verify(version) == [] for version in registry.versions(MODEL))
    database.close()
    (folder,) = (tmp_path / "runs" / MODEL).iterdir()
    assert len(events_of(folder, "done")) == 1


def _state() -> tuple[int, list[int | None]]:
    """The champion, and where it was moved to so far."""
    database = Database()
    registry = Registry(database)
    champion = registry.resolve(MODEL).number
    moves = [move.to_number for move in registry.history(MODEL, "champion")]
    database.close()
    return champion, moves


def test_a_training_that_was_killed_goes_on(tmp_path: Path, environment: dict[str, str]) -> None:
    data = write_data(tmp_path / "rows")
    pipeline = make_pipeline(data, tmp_path / "runs")
    pipeline["job"]["train"] |= {"epochs": 40}
    pipeline["job"]["checkpoint"] = {"every_steps": 10}
    path = write_pipeline(tmp_path, pipeline)
    process = start(path, "", environment)
    runs = tmp_path / "runs" / MODEL

    def checkpoints() -> list[Any]:
        folders = list(runs.iterdir()) if runs.exists() else []
        return [event for folder in folders for event in events_of(folder, "checkpoint")]

    wait_for(checkpoints, "a checkpoint", lambda: process.poll() is None)
    process.kill()
    process.communicate()
    result = finish(path, environment)
    assert (result["decision"], result["is_resumed"]) == ("promoted", True)
    check(tmp_path, result)
    (folder,) = runs.iterdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(40))
