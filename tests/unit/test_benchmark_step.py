"""The benchmarks' own arithmetic: order of readings, ratios, verdicts, tables; nothing is timed."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import (
    Peer,
    Reading,
    Report,
    Row,
    Target,
    Usage,
    measure,
    ratio,
    ratio_of_medians,
    share_of_others,
    table,
)
from benchmarks.step import COMPARISONS, Trials, compare
from benchmarks.workloads import WORKLOADS


class Quiet:
    """A machine on which others take what it is told, reading after reading."""

    def __init__(self, *shares: float) -> None:
        self._shares = iter(shares)
        self.waits = 0

    def wait_for_quiet(self) -> None:
        self.waits += 1

    def share_of_others(self, begin_s: float, end_s: float) -> float:
        return next(self._shares, 0.0)


def peer(name: str, values: Iterator[float], order: list[str]) -> Peer:
    def read() -> Reading:
        order.append(name)
        return Reading(next(values), 0.0, 1.0)

    return Peer(name, "steps/s", read)


def report(targets: list[Target], is_quick: bool = False) -> Report:
    rows = [Row("a", "steps/s", (3.0, 1.0, 2.0), (0.0, 0.01, 0.5)), Row("a to b", "x", (0.5, 0.25))]
    return Report(
        topic="fake",
        is_quick=is_quick,
        rows=rows,
        targets=targets,
        about=("How it is done.",),
        not_measured=("The weather.",),
        conditions={"python": "3.11.0", "machine": "two cores"},
    )


def test_readings_are_interleaved() -> None:
    order: list[str] = []
    peers = [peer("a", iter([1.0, 5.0, 3.0]), order), peer("b", iter([2.0, 2.0, 2.0]), order)]

    rows = measure(peers, 3, Quiet())

    assert order == ["a", "b"] * 3
    assert rows["a"].values == (1.0, 5.0, 3.0)
    assert rows["a"].median == 3.0


def test_a_disturbed_reading_is_taken_again_and_the_quietest_counts() -> None:
    order: list[str] = []
    quiet = Quiet(0.4, 0.2, 0.3, 0.01)

    rows = measure([peer("a", iter([1.0, 2.0, 3.0, 4.0]), order)], 2, quiet, retries=2)

    assert rows["a"].values == (2.0, 4.0)
    assert rows["a"].disturbance == (0.2, 0.01)
    assert quiet.waits == 4


def test_share_of_others_is_what_the_benchmark_did_not_spend() -> None:
    usage = [Usage(0.0, 100.0, 10.0), Usage(10.0, 116.0, 22.0), Usage(20.0, 130.0, 22.0)]

    assert share_of_others(usage, 0.0, 10.0, cores=2) == pytest.approx(0.2)
    assert share_of_others(usage, 9.0, 21.0, cores=2) == pytest.approx(0.7)
    assert share_of_others(usage, 1.0, 9.0, cores=2) == 0.0


def test_ratios_of_medians_and_by_repeat() -> None:
    rows = {"a": Row("a", "", (10.0, 20.0, 90.0)), "b": Row("b", "", (5.0, 4.0, 3.0))}

    assert ratio_of_medians(rows, "a", "b") == 5.0
    assert ratio("a to b", rows, "a", "b").values == (2.0, 5.0, 30.0)


@pytest.mark.parametrize(
    ("target", "is_met"),
    [
        (Target("at the bar", 2.5, 2.5), True),
        (Target("below", 2.499, 2.5), False),
        (Target("nothing measured", math.nan, 2.5), False),
        (Target("at the limit", 2.5, 2.5, is_limit=True), True),
        (Target("over the limit", 2.501, 2.5, is_limit=True), False),
        (Target("nothing measured", math.nan, 2.5, is_limit=True), False),
    ],
)
def test_verdict_and_exit_status(target: Target, is_met: bool) -> None:
    assert target.is_met is is_met
    assert report([Target("fine", 1.0, 0.5), target]).exit_status == (0 if is_met else 1)


def test_a_quick_run_has_no_verdict() -> None:
    quick = report([Target("missed", 0.0, 1.0)], is_quick=True)

    assert quick.exit_status == 0
    assert quick.as_json()["targets"] == []
    assert "MISSED" not in quick.tables()


def test_files(tmp_path: Path) -> None:
    report([Target("good", 2.0, 1.0), Target("bad", 0.5, 1.0)]).write(tmp_path / "results")

    found = json.loads((tmp_path / "results" / "fake.json").read_text())
    assert set(found) == {"topic", "versions", "rows", "targets"}
    assert found["topic"] == "fake"
    assert found["versions"]["python"] == "3.11.0"
    assert found["rows"][0] == {
        "name": "a",
        "unit": "steps/s",
        "values": [3.0, 1.0, 2.0],
        "min": 1.0,
        "median": 2.0,
        "max": 3.0,
        "disturbance": [0.0, 0.01, 0.5],
    }
    assert found["targets"] == [
        {"name": "good", "value": 2.0, "target": 1.0, "met": True},
        {"name": "bad", "value": 0.5, "target": 1.0, "met": False},
    ]
    text = (tmp_path / "results" / "fake.md").read_text()
    for part in ("python -m benchmarks.fake", "3.000, 1.000, 2.000", "50%", "MISSED", "two cores"):
        assert part in text
    assert "The weather." in text


def test_table_lines_up() -> None:
    lines = table(("", "value"), [("short", "1"), ("a longer name", "12,345")]).splitlines()

    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| short         |      1 |"


def test_comparisons_hold_two_workers_against_the_better_peer(tmp_path: Path) -> None:
    rows = {
        each.name: Row(each.name, each.unit, (100.0,)) for each in Trials(tmp_path, False).peers()
    }
    rows["cnn, fit without XLA"] = Row("cnn, fit without XLA", "examples/s", (200.0,))

    ratios, targets = compare(rows)

    by_name = {target.name: target for target in targets}
    assert by_name["cnn, two workers to fit"].value == 0.5
    assert by_name["lstm, two workers to fit"].value == 1.0
    assert len(ratios) == len(COMPARISONS)
    assert len(targets) == sum(each.target is not None for each in COMPARISONS) == 8


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_peers_read_what_was_written(name: str, tmp_path: Path) -> None:
    workload = WORKLOADS[name]
    workload.write(tmp_path, 10)

    inputs, labels = workload.read(tmp_path)

    assert inputs.shape == (10, *workload.shape)
    assert inputs.dtype == np.float32
    assert labels.shape == (10,)
    assert labels.dtype == (np.int64 if workload.classes else np.float32)
