"""Shuffle quality: closed forms at the ends, an order between them, and what is looked at."""

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import quality
from data_pipeline.plan import Plan
from data_pipeline.quality import ShuffleQuality, sample_steps, shuffle_quality
from tests.support.orders import row_order


def plan_of(shuffle: Any, blocks: int = 40, block_rows: int = 400, **changes: Any) -> Plan:
    values = {"global_batch_size": 160, "virtual_shards": 16, "window_rows": 200, "seed": 3}
    rows = np.full(blocks, block_rows, np.int64)
    return Plan(rows, shuffle=shuffle, **{**values, **changes})


def from_rows(plan: Plan) -> ShuffleQuality:
    """The same measures from the order spelt out, all full steps."""
    order, batch = row_order(plan, 0), min(plan.global_batch_size, plan.rows)
    steps = max(1, plan.rows // plan.global_batch_size)
    places = order[: steps * batch].reshape(steps, batch)
    labels = (places + 0.5) / plan.rows
    centered = labels - labels.mean(axis=1, keepdims=True)
    distance = np.abs(places.ravel() - np.arange(places.size)).mean()
    ideal = (plan.rows**2 - 1) / 12 / plan.rows**2 / batch
    ideal *= (plan.rows - batch) / max(1, plan.rows - 1)
    squares = (centered**2).sum()
    return ShuffleQuality(
        travel=distance / ((plan.rows - 1 / plan.rows) / 3) if plan.rows > 1 else 0.0,
        autocorrelation=(centered[:, 1:] * centered[:, :-1]).sum() / squares if squares else 0.0,
        mean_spread=math.sqrt(((labels.mean(axis=1) - 0.5) ** 2).mean() / ideal) if ideal else 1.0,
        steps=steps,
    )


def test_the_order_of_the_files_is_the_worst():
    found = shuffle_quality(plan_of("none"))
    assert found.travel == 0
    assert found.autocorrelation == pytest.approx(1, abs=0.05)
    # Means lie evenly between 0 and 1, as single labels do: sqrt(batch) times too far.
    assert found.mean_spread == pytest.approx(math.sqrt(160), rel=0.05)


def test_windows_are_between_the_order_of_the_files_and_a_full_shuffle():
    none, window, full = (shuffle_quality(plan_of(s)) for s in ("none", "window", "full"))
    assert window.travel == pytest.approx(1, abs=0.15)
    assert full.travel == pytest.approx(1, abs=0.15)
    assert abs(window.autocorrelation) < 0.15
    # Neighbours come from different shards, each of which has a sixteenth of the labels.
    assert full.autocorrelation == pytest.approx(-1 / 16, abs=0.03)
    assert none.mean_spread > 2 * window.mean_spread > 2 * 1.3 * full.mean_spread
    assert full.mean_spread < 1.2


def test_more_shards_and_larger_windows_shuffle_better():
    few = shuffle_quality(plan_of("window", virtual_shards=2))
    many = shuffle_quality(plan_of("window", virtual_shards=32, window_rows=100))
    assert many.mean_spread < 0.7 * few.mean_spread
    small = shuffle_quality(plan_of("window", virtual_shards=4, window_rows=50))
    large = shuffle_quality(plan_of("window", virtual_shards=4, window_rows=2_000))
    assert large.mean_spread < 0.7 * small.mean_spread


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    st.integers(1, 90),
    st.integers(1, 20),
    st.integers(1, 30),
    st.sampled_from(["none", "window", "full"]),
)
def test_the_closed_form_is_what_the_rows_give(blocks, batch, shards, window, shuffle):
    plan = Plan(np.asarray(blocks, np.int64), batch, shards, window, shuffle, 7)
    found, expected = shuffle_quality(plan), from_rows(plan)
    if plan.rows // batch <= 256:
        for name in ("travel", "autocorrelation", "mean_spread", "steps"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-9), name


def test_of_large_plans_a_sample_is_looked_at(monkeypatch):
    monkeypatch.setattr(quality, "_MOST_PERMUTED_ROWS", 3 * 16 * 200)
    plan = plan_of("window")
    steps = sample_steps(plan)
    windows = {step * 160 // (16 * 200) for step in steps}
    assert len(windows) == 3
    assert {0, 4} <= windows  # from the begin to the end of the epoch
    assert shuffle_quality(plan).travel == pytest.approx(1, abs=0.25)


def test_a_plan_of_ten_thousand_million_rows_is_looked_at_in_a_moment():
    plan = plan_of("window", 100_000, 100_000, virtual_shards=1_024, window_rows=256)
    begin = time.process_time()
    found = shuffle_quality(plan)
    assert time.process_time() - begin < 5
    assert found.travel == pytest.approx(1, abs=0.15)
    assert found.steps >= 32
