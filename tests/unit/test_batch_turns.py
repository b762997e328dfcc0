"""Stations that take too long are ended; a plan that was has more time the next time."""

from types import SimpleNamespace
from typing import Any

import pytest

from serving.batch_seams import RunnerSettings
from serving.batch_turns import Known, Out, State, Turns
from serving.dispatcher import Turn


class Pool:
    def __init__(self) -> None:
        self.killed: list[int] = []

    def kill(self, station: int) -> None:
        self.killed.append(station)


@pytest.mark.parametrize(
    ("shard", "failures", "estimate_s", "bound_s"),
    [
        (None, 0, 0.1, 600.0),
        (None, 1, 0.1, 2_400.0),
        (None, 3, 0.1, 38_400.0),
        (SimpleNamespace(), 3, 0.1, 600.0),
        (SimpleNamespace(), 0, 1_000.0, 30_000.0),
    ],
)
def test_a_task_has_its_time(shard: Any, failures: int, estimate_s: float, bound_s: float) -> None:
    now = 0.0
    known = Known(SimpleNamespace(id="j"), {}, {}, plan_failures=failures)  # type: ignore[arg-type]
    turn = Turn(1, "ann", "j", 0, "m", 10, estimate_s)
    state = State(1, None, None, jobs={"j": known}, out={7: Out(turn, shard, 0.0)})  # type: ignore[arg-type]
    turns = Turns(state, None, None, RunnerSettings(), lambda: now, lambda: now)  # type: ignore[arg-type]
    pool = Pool()
    now = bound_s - 1.0
    turns.end_slow(pool)  # type: ignore[arg-type]
    assert pool.killed == []
    now = bound_s + 1.0
    turns.end_slow(pool)  # type: ignore[arg-type]
    assert pool.killed == [7]
