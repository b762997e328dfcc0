"""What `report.html` shows of a run folder, and that nothing in the folder can break the page."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trainer.report import write_report

SUMMARY: dict[str, Any] = {
    "status": "done",
    "job": "flights",
    "run_id": "20260101-120000-ab12",
    "workers": 4,
    "epochs": 3,
    "steps": 984,
    "rows_seen": 1_007_616,
    "rows_per_s": 91234.5,
    "wall_s": 83.4,
    "metrics": {"test": {"loss": 18.25, "mae": 3.5}, "constant": {"loss": 225.5, "mae": 12.75}},
    "recoveries": [
        {"kind": "worker", "detected_s": 0.04, "recovered_s": 1.93, "steps_replayed": 12}
    ],
    "goodput": {
        "productive": {"seconds": 75.0, "share": 0.7},
        "data_wait": {"seconds": 25.0},
    },
    "artifact": "/runs/flights/20260101-120000-ab12/artifact",
}
VOID = {"meta"}
VERTEX = re.compile(r"[ML](-?[\d.]+) (-?[\d.]+)")


class Page(HTMLParser):
    """The elements of a page; refuses tags that do not balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # (innermost element, text)
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, tag: str, class_: str = "") -> list[dict[str, str]]:
        """Attributes of the elements that carry all classes of `class_`."""
        wanted = set(class_.split())
        return [
            a for t, a in self.elements if t == tag and wanted <= set(a.get("class", "").split())
        ]

    def inside(self, tag: str) -> list[str]:
        return [text for inner, text in self.texts if inner == tag]

    def curves(self) -> list[list[tuple[float, float]]]:
        """Vertices of each curve in the order of the page."""
        return [
            [(float(x), float(y)) for x, y in VERTEX.findall(path["d"])]
            for path in self.all("path", "curve")
        ]


def report(folder: Path, summary: dict[str, Any], records: list[dict[str, Any]] | str = "") -> Page:
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = records if isinstance(records, str) else "".join(json.dumps(r) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text(lines)
    return Page(write_report(folder).read_text(encoding="utf-8"))


def epochs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "step": 328 * (epoch + 1),
            "loss": 10.0 - 9.0 * epoch / count,
            "val_loss": 11.0 - 9.0 * epoch / count,
            "learning_rate": 0.001,
            "epoch_s": 3.5,
            "rows_per_s": 90_000.0,
        }
        for epoch in range(count)
    ]


def test_page_shows_the_key_facts_in_the_title_and_the_head(tmp_path: Path) -> None:
    page = report(tmp_path, SUMMARY, epochs(3))

    assert page.inside("title")[0] == "flights · 20260101-120000-ab12 · done"
    assert page.inside("h1") == ["flights"]
    assert page.inside("dd") == ["4", "3", "984", "1,007,616", "91,234", "1 min 23 s"]
    assert SUMMARY["artifact"] in page.inside("code")


def test_test_metrics_stand_beside_those_of_the_best_constant_prediction(tmp_path: Path) -> None:
    page = report(tmp_path, SUMMARY)

    heads, cells = page.inside("th"), page.inside("td")
    assert heads[:3] == ["metric", "test", "best constant prediction"]
    assert cells[:6] == ["loss", "18.25", "225.5", "mae", "3.5", "12.75"]


def test_page_needs_nothing_from_outside_the_file(tmp_path: Path) -> None:
    page = report(tmp_path, SUMMARY, epochs(3))

    assert "http://" not in page.source
    assert "https://" not in page.source
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert not {"script", "link", "img", "iframe", "a"} & {tag for tag, _ in page.elements}
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.elements)


def test_everything_from_the_run_folder_is_escaped(tmp_path: Path) -> None:
    evil = "</title><script>alert('\"&')</script>\x1b\x00"
    (tmp_path / "job.yaml").write_text(f"name: {evil}\n")
    (tmp_path / "environment.json").write_text(json.dumps({evil: {evil: [evil]}}))
    summary = {key: evil for key in SUMMARY} | {
        "metrics": {"test": {evil: evil}},
        "recoveries": [{"kind": evil}],
        "goodput": {evil: {"seconds": 1.0}},
        "error": evil,
        "traceback": evil,
    }
    page = report(tmp_path, summary, [{"epoch": 0, evil: 1.0, f"val_{evil}": 2.0, "loss": evil}])

    assert not page.all("script")
    assert "<script" not in page.source
    assert "\x1b" not in page.source
    assert "\x00" not in page.source
    shown = evil.replace("\x1b\x00", "\N{REPLACEMENT CHARACTER}" * 2)
    assert page.inside("h1") == [shown]
    assert page.inside("h3") == [shown]


def test_text_that_is_not_unicode_is_written_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"name: \xff\n")

    assert report(tmp_path, SUMMARY | {"job": "half a pair \ud800"}).inside("h1")


def test_each_metric_has_a_chart_with_a_vertex_an_epoch(tmp_path: Path) -> None:
    records = [record | {"mae": 1.0} for record in epochs(12)]
    page = report(tmp_path, SUMMARY, records)

    assert page.inside("h3") == ["loss", "mae", "learning_rate", "rows_per_s"]
    train, validation, *others = page.curves()
    assert [len(curve) for curve in (train, validation, *others)] == [12] * 5
    assert len(page.all("g", "point")) == 4 * 12
    assert "epoch 12\ntrain 1.75\nvalidation 2.75" in page.inside("title")
    # The loss falls evenly (downwards is larger y), the validation loss stays above it.
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(train, train[1:], strict=False)]
    assert all(dx == pytest.approx(steps[0][0], abs=0.2) for dx, _ in steps)
    assert all(dy == pytest.approx(steps[0][1], abs=0.2) and dy > 0 for _, dy in steps)
    assert all(v[1] < t[1] for t, v in zip(train, validation, strict=True))


def test_single_epoch_is_a_visible_dot_in_the_middle(tmp_path: Path) -> None:
    page = report(tmp_path, SUMMARY, epochs(1))

    train = page.curves()[0]
    assert len(train) == 1
    assert train[0][0] == pytest.approx((56 + 430) / 2, abs=1)
    assert page.all("path", "curve")[0]["d"].endswith("h0")
    assert page.all("g", "dots")


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf"), None])
def test_value_that_is_not_finite_breaks_the_curve_and_is_named(
    tmp_path: Path, broken: float | None
) -> None:
    records = epochs(6)
    records[2]["loss"] = broken
    page = report(tmp_path, SUMMARY, records)

    assert [path["d"].count("M") for path in page.all("path", "curve")[:2]] == [2, 1]
    assert [len(curve) for curve in page.curves()[:2]] == [5, 6]
    assert page.inside("p") == ["Not finite, not drawn: train, epoch 3."]


def test_metric_that_never_was_finite_still_has_its_chart(tmp_path: Path) -> None:
    page = report(tmp_path, SUMMARY, [{"epoch": e, "loss": float("nan")} for e in range(8)])

    assert page.curves() == [[]]
    assert page.inside("p") == ["Not finite, not drawn: train, epoch 1, 2, 3, 4, 5 and 3 more."]


def test_validation_of_every_third_epoch_is_one_connected_curve(tmp_path: Path) -> None:
    records = epochs(9)
    for record in records:
        if record["epoch"] % 3 != 2:
            del record["val_loss"]
    page = report(tmp_path, SUMMARY, records)

    assert [len(curve) for curve in page.curves()[:2]] == [9, 3]
    assert page.all("path", "curve")[1]["d"].count("M") == 1


def test_run_without_validation_has_one_curve_a_chart(tmp_path: Path) -> None:
    page = report(tmp_path, SUMMARY, [{"epoch": e, "loss": 1.0 / (e + 1)} for e in range(4)])

    assert len(page.curves()) == 1
    assert not any("validation" in text for text in page.inside("span"))


def test_thousands_of_epochs_are_thinned_but_spikes_stay(tmp_path: Path) -> None:
    records = [{"epoch": epoch, "loss": 1.0 + epoch % 7 / 100} for epoch in range(5_000)]
    records[2_345]["loss"] = 2.0
    page = report(tmp_path, SUMMARY, records)

    (curve,) = page.curves()
    assert len(page.all("g", "point")) == len(curve) <= 300
    assert "epoch 2,346\ntrain 2" in page.inside("title")
    assert {"epoch 1\ntrain 1", "epoch 5,000\ntrain 1.01"} <= set(page.inside("title"))
    assert len(page.source) < 500_000


def test_values_over_many_magnitudes_use_a_log_scale(tmp_path: Path) -> None:
    records = [{"epoch": epoch, "learning_rate": 10.0**-epoch} for epoch in range(1, 7)]
    page = report(tmp_path, SUMMARY, records)

    assert page.inside("h3") == ["learning_rate (log scale)"]
    falls = [b[1] - a[1] for a, b in zip(page.curves()[0], page.curves()[0][1:], strict=False)]
    assert falls == pytest.approx([falls[0]] * 5, abs=0.2)
    assert {"0.1", "0.001", "1e-06"} <= set(page.inside("text"))


def test_last_line_of_a_repeated_epoch_wins_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"epoch": e, "loss": loss}) for e, loss in [(0, 8.0), (1, 7.0), (1, 5.5)]]
    page = report(tmp_path, SUMMARY, "\n".join([*lines, '{"epoch": 2, "lo']))

    assert len(page.curves()[0]) == 2
    assert page.inside("td")[-4:] == ["1", "8", "2", "5.5"]


def test_parts_of_the_time_fill_the_bar(tmp_path: Path) -> None:
    page = report(tmp_path, SUMMARY)

    widths = [float(rect["width"]) for rect in page.all("rect")]
    assert widths == [750.0, 250.0]
    assert [float(rect["x"]) for rect in page.all("rect")] == [0.0, 750.0]
    assert {"productive 1 min 15 s, 70.0%", "data_wait 25.0 s, 25.0%"} <= set(page.inside("title"))


def test_recoveries_are_listed_only_if_there_were_any(tmp_path: Path) -> None:
    assert report(tmp_path, SUMMARY).inside("td")[-4:] == ["worker", "0.04", "1.93", "12"]
    assert "Recoveries" not in report(tmp_path, SUMMARY | {"recoveries": []}).inside("h2")


@pytest.mark.parametrize(("count", "folded"), [(20, []), (21, ["Table of 21 epochs"])])
def test_long_table_of_epochs_is_folded(tmp_path: Path, count: int, folded: list[str]) -> None:
    page = report(tmp_path, SUMMARY, epochs(count))

    assert page.inside("summary") == folded
    assert str(count * 328) in [cell.replace(",", "") for cell in page.inside("td")]


def test_job_and_environment_are_shown(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: flights\n")
    (tmp_path / "environment.json").write_text('{"packages": {"keras": "3.15.1"}, "cpus": 8}')
    page = report(tmp_path, SUMMARY)

    assert page.inside("summary") == ["job.yaml", "Environment"]
    assert page.inside("pre") == ["name: flights\n"]
    assert page.inside("td")[-4:] == ["packages.keras", "3.15.1", "cpus", "8"]


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_run_that_did_not_finish_has_a_report(tmp_path: Path, status: str) -> None:
    summary = {"status": status, "job": "flights", "artifact": None, "metrics": None}
    page = report(tmp_path, summary | {"traceback": "File <module>\nValueError: no"})

    assert page.inside("pre") == ["File <module>\nValueError: no"]
    assert page.inside("p") == ["No epoch was completed."]
    assert page.all("span", f"status {status}")


@pytest.mark.parametrize("summary", [{}, dict.fromkeys(SUMMARY), dict.fromkeys(SUMMARY, 7)])
def test_any_field_may_be_missing_or_odd(tmp_path: Path, summary: dict[str, Any]) -> None:
    assert report(tmp_path, summary, epochs(2)).inside("h3")


def test_summary_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")

    assert write_report(tmp_path) == tmp_path / "report.html"


def test_report_that_cannot_be_completed_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(tmp_path, SUMMARY | {"job": "old"})

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        report(tmp_path, SUMMARY | {"job": "new"})
    assert "<h1>old</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["metrics.jsonl", "report.html", "summary.json"]


VALUES = st.none() | st.floats() | st.integers() | st.sampled_from([0.0, 1e-310, 1e308, -1e308])
RECORDS = st.fixed_dictionaries(
    {"epoch": st.integers(0, 10**6)}, optional={"loss": VALUES, "val_loss": VALUES}
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(records=st.lists(RECORDS, max_size=8))
@example(records=[{"epoch": 0, "loss": 5e-324}])
def test_curves_stay_inside_the_plot_whatever_the_values(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    page = report(tmp_path, SUMMARY, records)

    assert all(56 <= x <= 430 and 10 <= y <= 200 for c in page.curves() for x, y in c)
    assert len(page.all("line", "grid")) <= 9


def test_import_of_the_module_leaves_tensorflow_alone() -> None:
    code = "import sys, trainer.report; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
