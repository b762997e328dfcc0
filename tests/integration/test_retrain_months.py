"""The flights of 2013, a month at a time: versions, decisions, champions; wrong labels refused."""

from pathlib import Path
from typing import Any

import pytest

from configs.load import load_pipeline
from lockstep.examples import write_example
from lockstep.retrain import retrain
from registry.database import Database
from registry.store import Registry
from tests.support.months import lay_down

pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(1500),
]

CONFIG = Path(__file__).parents[2] / "configs" / "flights-retrain.yaml"
CORRUPT = 5


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_example("flights", tmp_path / "data")
    return tmp_path


def lines(results: list[tuple[str, dict[str, Any]]], champions: list[int]) -> str:
    """What docs/retraining.md shows: a line a run, with the champion after it."""
    return "\n".join(
        f"{month:12}  {result['version']:2d}  {result['decision']:8}  {champion:2d}  "
        f"{result['reasons'][0][:100]}"
        for (month, result), champion in zip(results, champions, strict=True)
    )


def test_a_year_month_by_month(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """May comes with wrong labels first: its candidate is refused; then it comes again, right."""
    pipeline = load_pipeline(CONFIG, [f"runs_dir={folder}/runs", f"job.runs_dir={folder}/runs"])
    months = folder / "data" / "flights-months"
    results: dict[int, dict[str, Any]] = {}
    shown: list[tuple[str, dict[str, Any]]] = []
    champions: list[int] = []
    registry = Registry(Database())

    def show(month: str, result: dict[str, Any]) -> None:
        shown.append((month, result))
        champions.append(registry.resolve("flights-delay").number)

    for month in range(1, 13):
        if month == CORRUPT:
            lay_down(folder / "data/flights", months, month, is_corrupt=True)
            refused = retrain(pipeline)
            assert refused["decision"] == "kept", refused
            show(f"{month} (wrong)", refused)
            assert "worse" in refused["reasons"][0]
            before = [r["version"] for r in results.values() if r["decision"] == "promoted"]
            assert refused["champion"] == before[-1]
            assert retrain(pipeline)["decision"] == "nothing_new"
        lay_down(folder / "data/flights", months, month)
        results[month] = retrain(pipeline)
        show(str(month), results[month])
    with capsys.disabled():
        print("\n" + lines(shown, champions))
    versions = registry.versions("flights-delay")
    assert len(versions) == 13
    decided = {v.number: v.tags["gate"] for v in versions}
    assert decided[refused["version"]] == "refused"
    champion = registry.resolve("flights-delay")
    promoted = [r["version"] for r in results.values() if r["decision"] == "promoted"]
    assert champion.number == promoted[-1]
    assert len(promoted) >= 4
    moves = registry.history("flights-delay", "champion")
    assert [move.to_number for move in moves] == promoted
