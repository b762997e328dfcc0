"""What the benchmark of failures makes of what it sees; nothing is killed or timed."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import recovery
from benchmarks.harness import Row
from benchmarks.recovery import compare, p95
from benchmarks.recovery_kills import Blow, Killer, plan_blows
from benchmarks.recovery_lockstep import blocked


class Stage:
    """A run as the killer sees it, on a clock that moves when it is told to."""

    def __init__(self, *blows: Blow) -> None:
        self.now = 0.0
        self.killed: list[int] = []
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.killer = Killer(
            blows, self.killed.append, lambda *timer: self.later.append(timer), lambda: self.now
        )

    def event(self, now: float, event: str, **fields: Any) -> None:
        self.now = now
        self.killer.event({"event": event, **fields})

    def strike(self, now: float) -> None:
        self.now = now
        self.later.pop(0)[1]()


def test_the_time_ends_with_a_step_of_ranks_that_were_formed_anew() -> None:
    stage = Stage(Blow(2.5, 1))
    stage.event(1.0, "formed", pids=[10, 11])
    stage.event(2.0, "progress", step=8)
    assert [pause_s for pause_s, _ in stage.later] == [2.5]
    stage.event(4.0, "progress", step=208)
    stage.strike(4.5)
    assert stage.killed == [11]

    stage.event(4.6, "progress", step=240)  # said before the death was known
    stage.event(5.0, "formed", pids=[12, 13])
    stage.event(6.0, "recovered", steps_replayed=40)
    with pytest.raises(KeyboardInterrupt):
        stage.event(6.25, "progress", step=208)

    assert stage.killer.outcome.next_step_s == [1.75]
    assert stage.killer.outcome.steps_lost == [40]
    assert stage.killer.outcome.as_json()["steps_per_s"] == 100.0


def test_each_kill_waits_for_the_recovery_from_the_one_before() -> None:
    stage = Stage(Blow(1.0, 0), Blow(3.0, 1))
    stage.event(0.0, "formed", pids=[10, 11])
    stage.event(1.0, "progress", step=8)
    stage.strike(2.0)
    stage.event(3.0, "formed", pids=[12, 13])
    assert stage.later == []
    stage.event(4.0, "progress", step=8)
    stage.strike(7.0)

    assert stage.killed == [10, 13]


def test_kills_are_drawn_within_bounds_and_hit_all_ranks() -> None:
    blows = plan_blows(20, 2, (2.0, 5.0), seed=5)

    assert [blow.rank for blow in blows].count(0) == 10
    assert all(2.0 <= blow.pause_s <= 5.0 for blow in blows)
    assert len({blow.pause_s for blow in blows}) == 20
    assert blows == plan_blows(20, 2, (2.0, 5.0), seed=5)
    assert blows != plan_blows(20, 2, (2.0, 5.0), seed=6)


def test_the_95th_percentile_is_the_nearest_rank() -> None:
    assert p95([float(value) for value in range(1, 21)]) == 19.0
    assert p95([3.0, 1.0, 2.0]) == 3.0
    assert math.isnan(p95([]))


def test_standstill_is_told_from_slower_steps() -> None:
    gaps = [0.1] * 40
    gaps[20:26] = [0.25, 0.2, 0.2, 0.2, 0.2, 0.2]  # a checkpoint after step 21 stops for 50 ms
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)

    found = blocked(times, every=21, count=1)

    assert found["step_s"] == pytest.approx(0.1)
    assert found["after_s"] == [pytest.approx(0.15)]
    assert found["blocked_s"] == [pytest.approx(0.05)]


def rows(**changed: float) -> dict[str, Row]:
    """Rows that meet all targets, but for those that are named by a word of theirs."""
    values = {
        f"{name}, {what}": value
        for name in (
            recovery.PROCESS,
            recovery.HOST,
            recovery.STANDBY,
            recovery.EPOCH_BACKUP,
            recovery.STEP_BACKUP,
        )
        for what, value in (("next step after", 2.0), ("steps lost", 100.0), ("seconds lost", 1.0))
    }
    values |= {recovery.NO_SNAPSHOTS: 100.0, recovery.SNAPSHOTS: 99.0, recovery.CHECKPOINTS: 98.0}
    values |= {recovery.BLOCKED: 50.0}
    return {
        name: Row(name, "", tuple([value, value, changed.get(name, value)]))
        for name, value in values.items()
    }


def test_all_targets_are_met_where_all_is_well() -> None:
    ratios, targets = compare(rows())

    assert [target.name for target in targets if not target.is_met] == []
    assert len(targets) == 8
    assert {row.name for row in ratios if "tf_keras" in row.name} != set()


@pytest.mark.parametrize(
    ("name", "value", "missed"),
    [
        (f"{recovery.PROCESS}, next step after", 4.1, "p95"),
        (f"{recovery.HOST}, next step after", 8.1, "p95"),
        (f"{recovery.STANDBY}, next step after", 5.1, "p95"),
        (f"{recovery.HOST}, seconds lost", 2.1, "most steps lost"),
    ],
)
def test_one_bad_kill_in_few_misses_its_target(name: str, value: float, missed: str) -> None:
    _, targets = compare(rows(**{name: value}))

    found = [target.name for target in targets if not target.is_met]
    assert len(found) == 1
    assert missed in found[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{recovery.PROCESS}, next step after", 2.6),
        (recovery.SNAPSHOTS, 96.0),
        (recovery.CHECKPOINTS, 96.0),
        (recovery.BLOCKED, 101.0),
    ],
)
def test_medians_that_miss(name: str, value: float) -> None:
    changed = rows()
    changed[name] = Row(name, "", (value,) * 3)

    assert [target.is_met for target in compare(changed)[1]].count(False) == 1
