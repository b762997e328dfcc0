"""The gate: every check passes and fails where it should, and says why in numbers."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from configs.pipeline import GateConfig
from trainer.gate import Evidence, Judged, SliceRows, judge

ROWS = 400
HARD = np.linspace(1, 9, ROWS)  # what makes a row hard, for both models


def judged(name: str, values: np.ndarray) -> Judged:
    """A model whose errors are `values`; its metrics follow from them, in slices too."""
    slices = {
        "origin": {
            value: {"mae": float(values[ORIGIN.codes == code].mean())}
            for code, value in enumerate(ORIGIN.values)
        }
    }
    metrics = {"mae": float(values.mean()), "auc": 0.9}
    return Judged(name, metrics, slices, {"mae": values})


ORIGIN = SliceRows(("EWR", "JFK", "LGA"), np.arange(ROWS) % 4 // 2 + (np.arange(ROWS) == 7))
# EWR and JFK have about half of the rows each, LGA one row.


def evidence(ours: np.ndarray, theirs: np.ndarray | None = HARD, **changes: Any) -> Evidence:
    champion = None if theirs is None else judged("flights/1", theirs)
    found = Evidence(judged("candidate", ours), champion, slices={"origin": ORIGIN})
    return replace(found, **changes)


def gate(**fields: Any) -> GateConfig:
    return GateConfig.model_validate({"resamples": 200} | fields)


def test_an_empty_gate_lets_all_pass_that_can_be_served() -> None:
    assert judge(gate(), evidence(HARD)).is_passed
    refused = judge(gate(), evidence(HARD, smoke=["saved_model predicts NaN"]))
    assert refused.reasons == ("smoke: saved_model predicts NaN.",)


@pytest.mark.parametrize(
    ("bounds", "is_passed"),
    [
        ({"max": 5.1}, True),
        ({"max": 4.9}, False),
        ({"min": 4.9}, True),
        ({"min": 5.1}, False),
        ({"min": 4, "max": 6}, True),
    ],
)
def test_thresholds(bounds: dict[str, float], is_passed: bool) -> None:
    verdict = judge(gate(thresholds=[{"metric": "mae", **bounds}]), evidence(HARD))
    assert verdict.is_passed is is_passed
    if not is_passed:
        assert verdict.reasons[0].startswith("mae is 5; at ")


def test_a_threshold_never_passes_what_is_not_a_number() -> None:
    broken = replace(judged("candidate", HARD), metrics={"mae": math.nan})
    for bounds in ({"max": 1e9}, {"min": -1e9}):
        found = evidence(HARD, candidate=broken)
        assert not judge(gate(thresholds=[{"metric": "mae", **bounds}]), found).is_passed


def test_a_metric_that_was_not_measured_fails_and_the_nearest_is_named() -> None:
    checks = {"metric": "mea", "max": 10}
    reasons = judge(gate(thresholds=[checks]), evidence(HARD)).reasons
    assert reasons == ("no metric 'mea'; mae, auc were measured. Did you mean 'mae'?",)
    compared = judge(gate(no_worse_than_champion=[{"metric": "rmse", "by": 1}]), evidence(HARD))
    assert compared.reasons[0].startswith("no metric 'rmse'")


def test_no_worse_takes_the_doubt_into_account() -> None:
    """The mean alone is within the bound; what the rows say of it with confidence is not."""
    noise = np.random.default_rng(0).normal(0, 3, ROWS)
    noise -= noise.mean()
    ours = HARD + noise + 0.04
    plain = {"metric": "mae", "by": 0.05, "scale": "absolute"}
    sure = judge(gate(no_worse_than_champion=[plain]), evidence(ours))
    assert not sure.is_passed
    assert "0.04 worse, and with 0.95 confidence at most" in sure.reasons[0]
    as_they_are = plain | {"confidence": None}
    assert judge(gate(no_worse_than_champion=[as_they_are]), evidence(ours)).is_passed


@pytest.mark.parametrize(
    ("shift", "by", "is_passed"),
    [(0.0, 0.0, True), (0.2, 0.05, True), (0.3, 0.05, False), (-1.0, -0.1, True), (0, -0.1, False)],
)
def test_no_worse_is_relative_by_default(shift: float, by: float, is_passed: bool) -> None:
    checks = [{"metric": "mae", "by": by}]
    verdict = judge(gate(no_worse_than_champion=checks), evidence(HARD * (1 + shift / 5)))
    assert verdict.is_passed is is_passed


def test_more_of_an_accuracy_is_better() -> None:
    def of(accuracy: float) -> Judged:
        values = (np.arange(ROWS) < accuracy * ROWS).astype(float)
        return Judged("x", {"accuracy": accuracy}, {}, {"accuracy": values})

    checks = [{"metric": "accuracy", "by": 0.01, "scale": "absolute"}]
    better = evidence(HARD, candidate=of(0.9), champion=of(0.8))
    worse = evidence(HARD, candidate=of(0.8), champion=of(0.9))
    assert judge(gate(no_worse_than_champion=checks), better).is_passed
    assert "0.1 worse" in judge(gate(no_worse_than_champion=checks), worse).reasons[0]


def test_a_metric_that_is_no_mean_needs_confidence_null() -> None:
    checks = {"metric": "auc", "by": 0.0}
    reasons = judge(gate(no_worse_than_champion=[checks]), evidence(HARD)).reasons
    assert "Set confidence: null" in reasons[0]
    checks["confidence"] = None
    assert judge(gate(no_worse_than_champion=[checks]), evidence(HARD)).is_passed


def test_the_first_model_is_held_against_thresholds_alone() -> None:
    fields = {
        "thresholds": [{"metric": "mae", "max": 6}],
        "no_worse_than_champion": [{"metric": "mae", "by": -9}],
        "slices": [{"column": "origin", "no_worse_than_champion": [{"metric": "mae", "by": -9}]}],
    }
    assert judge(gate(**fields), evidence(HARD, None)).is_passed


def test_a_champion_that_cannot_be_evaluated_is_not_passed_over() -> None:
    found = evidence(HARD, None, champion_problem="flights/1 needs a column 'wind'.")
    assert judge(gate(), found).reasons == ("flights/1 needs a column 'wind'.",)


def test_a_slice_alone_can_refuse() -> None:
    ours = HARD - 1.0
    ours = np.where(ORIGIN.codes == 1, HARD + 1.0, ours)
    fields = {
        "no_worse_than_champion": [{"metric": "mae", "by": 0.05}],
        "slices": [
            {
                "column": "origin",
                "thresholds": [{"metric": "mae", "max": 5.5}],
                "no_worse_than_champion": [{"metric": "mae", "by": 0.1}],
            }
        ],
    }
    verdict = judge(gate(**fields), evidence(ours))
    failed = [check for check in verdict.checks if check.is_passed is False]
    assert [(check.kind, check.where) for check in failed] == [
        ("threshold", "origin=JFK"),
        ("no_worse", "origin=JFK"),
    ]
    assert "mae where origin=JFK is" in verdict.reasons[0]


def test_a_slice_of_few_rows_is_not_judged_and_said_so() -> None:
    fields = {"slices": [{"column": "origin", "thresholds": [{"metric": "mae", "max": 0}]}]}
    checks = judge(gate(**fields), evidence(HARD)).checks
    (few,) = [check for check in checks if check.where == "origin=LGA"]
    assert few.is_passed is None
    assert few.reason == "origin=LGA: 1 rows, fewer than min_rows=100; not judged."
    fields["slices"][0]["min_rows"] = 1
    few = judge(gate(**fields), evidence(HARD)).checks[-1]
    assert (few.where, few.is_passed) == ("origin=LGA", False)


def test_a_slice_of_no_column_fails() -> None:
    fields = {"slices": [{"column": "carrier", "thresholds": [{"metric": "mae", "max": 9}]}]}
    assert not judge(gate(**fields), evidence(HARD)).is_passed


def test_weights_count_in_weighted_metrics_alone() -> None:
    ours = np.where(np.arange(ROWS) < 200, HARD - 1, HARD + 1)
    weights = (np.arange(ROWS) < 200).astype(float)
    checks = [{"metric": "mae", "by": -0.1}]
    weighted = evidence(ours, weights=weights, weighted=frozenset({"mae"}))
    assert judge(gate(no_worse_than_champion=checks), weighted).is_passed
    plain = evidence(ours, weights=weights)
    assert not judge(gate(no_worse_than_champion=checks), plain).is_passed


def test_latency_and_size() -> None:
    found = evidence(HARD, latency_ms={"one_row_ms": 3.0}, size_bytes=2_500_000)
    assert judge(gate(latency={"one_row_ms": 4}, max_size_mb=3), found).is_passed
    slow = judge(gate(latency={"one_row_ms": 2, "thousand_rows_ms": 9}, max_size_mb=2), found)
    assert slow.reasons == (
        "latency: one_row_ms is 3; at most 2 passes.",
        "latency: thousand_rows_ms is nan; at most 9 passes.",
        "the artifact has 2.5 MB; at most 2 passes.",
    )
