"""The parts of a run's wall time: each where it belongs, and all together the whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.goodput import Goodput


def seconds(goodput: Goodput, now: float) -> dict[str, float]:
    return {
        name: round(part["seconds"], 6)
        for name, part in goodput.summary(now).items()
        if part["seconds"]
    }


def test_a_failure_costs_detection_restart_and_replay() -> None:
    goodput = Goodput(100.0)
    goodput.worked(106.0, {"start": 0.5, "productive": 0.0})  # the first call is its trace
    goodput.worked(108.0, {"productive": 1.5, "data_wait": 0.25})
    goodput.failed(109.0, 0.75)
    goodput.worked(111.0, {"restart": 0.5, "replay": 0.0})
    goodput.worked(112.0, {"replay": 0.5, "productive": 0.5})
    goodput.began("export", 112.0)
    assert seconds(goodput, 115.0) == {
        "start": 6.0,
        "productive": 2.0,
        "data_wait": 0.25,
        "other": 0.5,
        "detect": 0.75,
        "restart": 2.0,
        "replay": 0.5,
        "export": 3.0,
    }


@given(
    st.lists(
        st.tuples(st.sampled_from(["worked", "failed", "began"]), st.floats(0, 5), st.floats(0, 6)),
        max_size=20,
    )
)
def test_parts_add_up_to_the_wall_time(calls: list[tuple[str, float, float]]) -> None:
    goodput, now = Goodput(0.0), 0.0
    for call, passed, measured in calls:
        now += passed
        if call == "worked":
            goodput.worked(now, {"productive": measured})
        elif call == "failed":
            goodput.failed(now, measured)
        else:
            goodput.began("export", now)
    now += 1
    summary = goodput.summary(now)
    assert sum(part["seconds"] for part in summary.values()) == pytest.approx(now)
    assert sum(part["share"] for part in summary.values()) == pytest.approx(1)
