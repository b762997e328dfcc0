"""A pipeline with real training: stopped and gone on with, promoted, nothing new."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.errors import EnvironmentFailure
from lockstep.retrain import RetrainOptions, SilentRetrainListener, retrain
from registry.database import Database
from registry.store import Registry
from tests.support.chaos import events_of
from tests.support.jobs import write_data, write_rows
from tests.support.retrain_jobs import MODEL, make_pipeline

pytestmark = pytest.mark.usefixtures("ray_session")


class Stops(SilentRetrainListener):
    """Fails when a step is done."""

    def __init__(self, at: str) -> None:
        self.at = at

    def step(self, name: str, result: dict[str, Any]) -> None:
        if name == self.at:
            raise EnvironmentFailure("stopped")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def registry() -> Registry:
    return Registry(Database())


@pytest.mark.long
def test_a_run_that_stopped_goes_on_and_then_nothing_is_new(tmp_path: Path, home: Path) -> None:
    pipeline = make_pipeline(write_data(tmp_path / "rows"), tmp_path / "runs")
    with pytest.raises(EnvironmentFailure, match="stopped"):
        retrain(pipeline, listener=Stops("train"))
    result = retrain(pipeline)
    assert (result["decision"], result["version"], result["champion"]) == ("promoted", 1, None)
    assert result["is_resumed"]
    assert result["reasons"] == ["small/1 is the first champion: it passed 7 checks."]
    (folder,) = (tmp_path / "runs" / MODEL).iterdir()
    assert len(events_of(folder, "done")) == 1  # it trained once
    assert [c["kind"] for c in result["checks"]].count("threshold") == 3

    run = Path(result["run_folder"])
    decision = json.loads((run / "decision.json").read_text())
    trained = json.loads((folder / "summary.json").read_text())["metrics"]["test"]
    measured = decision["trial"]["candidate"]["metrics"]
    assert measured["mae"] == pytest.approx(trained["mae"], rel=1e-4)
    assert set(decision["trial"]["candidate"]["slices"]["k"]) == {"0", "1"}
    assert decision["trial"]["latency_ms"]["one_row_ms"] > 0
    assert "small/1 is the first champion" in (run / "report.html").read_text()
    assert not (run / "rows" / "train").exists()
    assert (run / "rows" / "evaluation.parquet").exists()

    version = registry().resolve(MODEL)
    assert version.tags == {"pipeline": "fresh", "gate": "passed"}
    gate = version.lineage["gate"]
    assert (gate["is_passed"], gate["reasons"], gate["champion"]) == (True, [], None)
    assert gate["checks"] == result["checks"]
    assert [len(file["ends_sha256"]) for file in version.lineage["pipeline"]["files"]] == [64, 64]
    assert all(len(f["ends_sha256"]) == 64 for f in version.lineage["data"]["train"])

    again = retrain(pipeline)
    assert (again["decision"], again["version"]) == ("nothing_new", None)
    assert again["reasons"] == [
        "nothing new: no file is new since small/1, the champion, was trained"
    ]
    assert len(list((tmp_path / "runs" / MODEL).iterdir())) == 1


@pytest.mark.long
def test_a_worse_candidate_is_refused_and_not_trained_again(tmp_path: Path, home: Path) -> None:
    data = write_data(tmp_path / "rows")
    pipeline = make_pipeline(data, tmp_path / "runs", job__train__epochs=6)
    assert retrain(pipeline)["decision"] == "promoted"
    worse = make_pipeline(data, tmp_path / "runs", job__train__epochs=1)
    write_rows(data / "train" / "more", 50, seed=9)
    result = retrain(worse)
    assert (result["decision"], result["version"], result["champion"]) == ("kept", 2, 1)
    assert re.search(r"mae is .* the champion's .* worse", result["reasons"][0])
    there = registry()
    assert there.resolve(MODEL).number == 1
    assert there.resolve(f"{MODEL}@candidate").number == 2
    assert there.version(MODEL, 2).tags["gate"] == "refused"
    again = retrain(worse)
    assert again["decision"] == "nothing_new"
    assert "judged the same files and kept the champion" in again["reasons"][0]
    forced = retrain(worse, options=RetrainOptions(is_forced=True))
    assert (forced["decision"], forced["version"]) == ("kept", 3)


@pytest.mark.long
def test_training_goes_on_from_the_champion_on_new_rows(tmp_path: Path, home: Path) -> None:
    data = write_data(tmp_path / "rows")
    changes = {"start_from": "champion", "data__train_on": "new", "gate": {}}
    pipeline = make_pipeline(data, tmp_path / "runs", **changes)
    assert retrain(pipeline)["decision"] == "promoted"
    write_rows(data / "train" / "more", 200, seed=9)
    result = retrain(pipeline)
    assert (result["decision"], result["version"]) == ("promoted", 2)
    summary = json.loads(
        (tmp_path / "runs" / MODEL / result["run_id"] / "summary.json").read_text()
    )
    assert 120 < summary["rows_seen"] < 160  # 200 rows, but for those that judge
    assert registry().version(MODEL, 2).parent == 1
