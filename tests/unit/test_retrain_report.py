"""The page of a pipeline's run: what it shows, and that nothing in the record can break it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_report import Page
from trainer.retrain_report import write_retrain_report

CHECK: dict[str, Any] = {
    "kind": "no_worse",
    "metric": "mae",
    "where": "origin=JFK",
    "is_passed": False,
    "reason": "mae where origin=JFK is 12, the champion's 10: 20 % worse.",
    "numbers": {"worse": 0.2, "at_most": 0.23, "allowed": 0.05, "candidate": 12, "champion": 10},
}
RECORD: dict[str, Any] = {
    "pipeline": "nightly",
    "run_id": "20260101-120000-ab12",
    "model": "flights",
    "version": 4,
    "champion": 3,
    "decision": "kept",
    "reasons": [CHECK["reason"]],
    "checks": [CHECK, {**CHECK, "kind": "size", "numbers": {}, "is_passed": None}],
    "trial": {
        "candidate": {
            "metrics": {"loss": 200.0, "mae": 11.0},
            "slices": {"origin": {"JFK": {"mae": 12.0}, "LGA": {"mae": 9.0}}},
        },
        "champion": {
            "metrics": {"loss": 180.0, "mae": 10.0},
            "slices": {"origin": {"JFK": {"mae": 10.0}, "LGA": {"mae": 9.5}}},
        },
        "latency_ms": {"one_row_ms": 1.25},
        "size_bytes": 2_500_000,
        "rows": 5_000,
    },
    "new_files": ["a", "b"],
    "wall_s": 75.0,
    "run_folder": "/runs/flights/x",
}


def page(folder: Path, record: Any) -> Page:
    (folder / "decision.json").write_text(json.dumps(record))
    return Page(write_retrain_report(folder).read_text(encoding="utf-8"))


def test_the_page_tells_the_decision_and_why(tmp_path: Path) -> None:
    found = page(tmp_path, RECORD)
    assert found.inside("title")[0] == "nightly · 20260101-120000-ab12 · kept"
    assert found.all("span", "status interrupted")
    assert CHECK["reason"] in found.inside("p")
    assert found.inside("dd")[:3] == ["flights/4", "flights/3", "5,000"]
    assert {"1.25 ms", "2.5 MB", "1 min 15 s"} <= set(found.inside("dd"))


def test_candidate_stands_beside_champion_over_all_and_by_slice(tmp_path: Path) -> None:
    found = page(tmp_path, RECORD)
    cells = found.inside("td")
    assert cells[:4] == ["loss", "200", "180", "+11.11 %"]
    bars = [bar for bar in found.all("rect") if "style" in bar]
    assert [bar["style"] for bar in bars] == ["fill:var(--color0)", "fill:var(--color1)"] * 2
    widths = [float(bar["width"]) for bar in bars]
    assert widths[0] / widths[1] == pytest.approx(1.2, rel=0.01)
    assert {"JFK", "LGA"} <= set(found.inside("text"))


def test_a_comparison_is_drawn_with_its_doubt(tmp_path: Path) -> None:
    found = page(tmp_path, RECORD)
    (line,) = found.all("path", "curve color6")
    first, last = (float(x) for x in line["d"][1:].replace("H", " ").split()[0::2])
    assert last > first
    assert len(found.all("circle", "color6")) == 1
    assert "not judged" in found.inside("td")


def test_comparisons_of_one_unit_share_a_chart(tmp_path: Path) -> None:
    def check(metric: str, is_relative: float) -> dict[str, Any]:
        numbers = {**CHECK["numbers"], "is_relative": is_relative}
        return {**CHECK, "metric": metric, "numbers": numbers}

    checks = [check("mae", 1.0), check("mse", 1.0), check("mae", 0.0), check("mse", 0.0)]
    titles = page(tmp_path, {**RECORD, "checks": checks}).inside("h3")
    assert [title for title in titles if title.startswith("Worse")] == [
        "Worse than the champion, in parts of its value",
        "Worse than the champion, in mae",
        "Worse than the champion, in mse",
    ]


def test_the_first_model_and_many_values_are_shown(tmp_path: Path) -> None:
    many = {f"v{n}": {"mae": float(n)} for n in range(60)}
    trial = {**RECORD["trial"], "champion": None}
    trial["candidate"] = {**trial["candidate"], "slices": {"dest": many}}
    record = {**RECORD, "champion": None, "decision": "promoted", "trial": trial, "checks": []}
    found = page(tmp_path, record)
    assert found.all("span", "status done")
    assert "v59" in found.inside("td")


@pytest.mark.parametrize(
    "record",
    [
        {},
        {key: None for key in RECORD},
        {key: "<script>" for key in RECORD} | {"checks": [], "reasons": ["<script>"]},
        {**RECORD, "trial": {"candidate": {"metrics": {"m": None}, "slices": {"c": {"v": None}}}}},
        {**RECORD, "checks": [{"numbers": {"worse": None, "at_most": None, "allowed": 1}}]},
        {
            **RECORD,
            "trial": {"candidate": {"slices": {"<b>": {"<i>": {"<u>": float("inf")}}}}},
        },
    ],
)
def test_any_field_may_be_missing_or_odd(tmp_path: Path, record: Any) -> None:
    found = page(tmp_path, record)
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in found.elements}
    assert "http" not in found.source.replace("http-equiv", "")
