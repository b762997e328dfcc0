"""Chaos plans: the grammar, who is hit and how often, and that each blow is a real one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.faults import (
    COORDINATOR,
    KINDS,
    PHASES,
    TARGETS,
    TOLD,
    Fault,
    FaultPlan,
    FaultTrigger,
    Trigger,
    strike,
)
from configs.errors import UserError

ROOT = Path(__file__).parents[2]
WORKERS = st.integers(1, 8)

triggers = st.one_of(
    st.builds(
        Trigger,
        st.sampled_from(["every", "at"]),
        seconds=st.integers(1, 10**9).map(lambda milliseconds: milliseconds / 1000),
    ),
    st.builds(Trigger, st.just("step"), step=st.integers(1, 10**9)),
    st.builds(Trigger, st.just("phase"), phase=st.sampled_from(PHASES), nth=st.integers(1, 99)),
)


@st.composite
def faults(draw: st.DrawFn, number: int = 0) -> Fault:
    kind = draw(st.sampled_from(KINDS))
    ranks = st.integers(0, 99).map(str)
    target = "" if kind == COORDINATOR else draw(st.sampled_from(TARGETS) | ranks)
    trigger = draw(triggers)
    if trigger.kind == "at":
        times: int | None = 1
    elif trigger.kind == "every":
        times = draw(st.none() | st.integers(1, 99))
    else:
        times = draw(st.integers(1, 99))
    return Fault(number, kind, target, trigger, times)


@st.composite
def fault_lists(draw: st.DrawFn) -> list[Fault]:
    count = draw(st.integers(1, 4))
    return [draw(faults(number)) for number in range(count)]


def carriers(plan: FaultPlan, workers: int) -> dict[int, list[int]]:
    """The faults of a new generation, each with the ranks that carry it."""
    carried: dict[int, list[int]] = {}
    for rank in range(workers):
        for fault in plan.for_rank(rank, workers):
            carried.setdefault(fault.number, []).append(rank)
    return carried


# Grammar


@given(fault_lists())
def test_what_a_plan_says_is_what_it_was_read_from(wanted: list[Fault]) -> None:
    read = FaultPlan.parse(" ; ".join(map(str, wanted)) + ";")
    assert list(read.faults) == wanted


def test_a_fault_is_read_with_its_defaults() -> None:
    plan = FaultPlan.parse("kill:any@every=20s; stop:1@step=120x3;coordinator@at=5s")
    assert plan.faults == (
        Fault(0, "kill", "any", Trigger("every", seconds=20.0), None),
        Fault(1, "stop", "1", Trigger("step", step=120), 3),
        Fault(2, "coordinator", "", Trigger("at", seconds=5.0), 1),
    )
    later = FaultPlan.parse("segv:other@phase=checkpoint:3;exit:0@phase=export")
    assert later.faults == (
        Fault(0, "segv", "other", Trigger("phase", phase="checkpoint", nth=3), 1),
        Fault(1, "exit", "0", Trigger("phase", phase="export"), 1),
    )


@pytest.mark.parametrize(
    ("text", "received", "remedy"),
    [
        ("", "''", "Name a fault"),
        (" ; ", "' ; '", "Name a fault"),
        ("kill", "no fault", "Write it so"),
        ("kill:0@step", "no fault", "Write it so"),
        ("kil:0@at=5s", "kind 'kil'", "Did you mean 'kill'?"),
        ("zzz:0@at=5s", "kind 'zzz'", "Name one of these"),
        ("kill@at=5s", "target ''", "Write kill:any@WHEN"),
        ("kill:ani@at=5s", "target 'ani'", "Did you mean 'any'?"),
        ("kill:-1@at=5s", "target '-1'", "Write kill:any@WHEN"),
        ("coordinator:0@at=5s", "target '0'", "Write coordinator@WHEN"),
        ("kill:0@evry=5s", "evry=5s", "Did you mean 'every'?"),
        ("kill:0@at=5", "at=5", "Write at=20s"),
        ("kill:0@every=0s", "every=0s", "Write every=20s"),
        ("kill:0@every=-1s", "every=-1s", "Write every=20s"),
        ("kill:0@at=nans", "at=nans", "Write at=20s"),
        ("kill:0@step=0", "step=0", "Write step=120"),
        ("kill:0@step=5s", "step=5s", "Write step=120"),
        ("kill:0@phase=exprot", "phase 'exprot'", "Did you mean 'export'?"),
        ("kill:0@phase=export:0", "phase=export:0", "Write phase=export:1"),
        ("kill:0@phase=export:x", "phase 'export:x'", "Did you mean 'export'?"),
        ("kill:0@step=5x0", "x0", "Write x1"),
        ("kill:0@at=5sx2", "x2", "Write every=SECONDSsx2"),
        ("kill:any@at=5s;kil:0@at=5s", "'kil:0@at=5s'", "Did you mean 'kill'?"),
    ],
)
def test_a_bad_plan_is_answered_with_what_to_write(text: str, received: str, remedy: str) -> None:
    with pytest.raises(UserError) as told:
        FaultPlan.parse(text)
    assert received in str(told.value)
    assert remedy in str(told.value)


@pytest.mark.parametrize(
    ("text", "enough"), [("kill:2@at=5s", 3), ("kill:7@step=3", 8), ("kill:other@at=5s", 2)]
)
def test_a_target_that_there_will_never_be_is_refused(text: str, enough: int) -> None:
    plan = FaultPlan.parse(text)
    with pytest.raises(UserError, match=rf"cluster\.workers={enough - 1}; allowed: ranks 0 to"):
        plan.check(enough - 1)
    plan.check(enough)


# Faults that travel with a rank


def test_a_rank_carries_its_own_faults_at_steps_and_phases_only() -> None:
    plan = FaultPlan.parse("kill:1@step=5;kill:1@at=5s;raise:0@phase=export;exit:all@step=9")
    assert carriers(plan, 3) == {0: [1], 2: [0], 3: [0, 1, 2]}


@given(st.sampled_from(["any", "other"]), st.integers(2, 8), st.integers(0, 99), WORKERS)
def test_the_ranks_agree_on_the_one_that_is_drawn(
    target: str, workers: int, seed: int, times: int
) -> None:
    text = f"kill:{target}@step=5x{times}"
    plan, again = FaultPlan.parse(text, seed), FaultPlan.parse(text, seed)
    for _ in range(times):
        carried = carriers(plan, workers)
        assert carried == carriers(plan, workers) == carriers(again, workers)
        (rank,) = carried[0]
        assert rank > 0 or target == "any"
        plan.fired(0)
        again.fired(0)
    assert carriers(plan, workers) == {}


@pytest.mark.parametrize(("target", "ranks"), [("any", {0, 1, 2}), ("other", {1, 2})])
def test_the_draw_reaches_every_rank_it_may(target: str, ranks: set[int]) -> None:
    plan = FaultPlan.parse(f"kill:{target}@step=5x99", seed=3)
    drawn = set()
    for _ in range(40):
        drawn.update(carriers(plan, 3)[0])
        plan.fired(0)
    assert drawn == ranks


def test_the_seed_decides_the_draw() -> None:
    sequences = set()
    for seed in range(8):
        plan = FaultPlan.parse("kill:any@every=1s", seed)
        sequences.add(tuple(plan.due(float(second), 4)[0][1] for second in range(1, 12)))
    assert len(sequences) == 8


def test_what_has_fired_is_not_handed_out_again() -> None:
    plan = FaultPlan.parse("kill:0@step=5x2;kill:1@step=7")
    assert carriers(plan, 2) == {0: [0], 1: [1]}
    plan.fired(0)
    assert carriers(plan, 2) == {0: [0], 1: [1]}
    plan.fired(0)
    assert carriers(plan, 2) == {1: [1]}
    plan.fired(1)
    assert carriers(plan, 2) == {}
    assert plan.summary() == [
        {"fault": "kill:0@step=5x2", "fired": 2},
        {"fault": "kill:1@step=7", "fired": 1},
    ]


@pytest.mark.parametrize(("firings", "is_spent"), [(0, False), (1, False), (2, True)])
def test_a_plan_is_spent_when_nothing_can_fire_any_more(firings: int, is_spent: bool) -> None:
    plan = FaultPlan.parse("kill:0@step=5x2")
    for _ in range(firings):
        carriers(plan, 1)
        plan.fired(0)
    assert plan.is_spent == is_spent


def test_ranks_that_fire_together_count_once() -> None:
    plan = FaultPlan.parse("kill:all@step=5x2")
    for generation in (1, 2):
        assert carriers(plan, 3) == {0: [0, 1, 2]}
        for _ in range(3):
            plan.fired(0)
        assert plan.summary()[0]["fired"] == generation
    assert plan.is_spent


def test_a_fault_at_the_coordinator_goes_with_rank_0() -> None:
    plan = FaultPlan.parse("coordinator@phase=checkpoint")
    assert carriers(plan, 3) == {0: [0]}
    plan.fired(0)
    assert plan.is_spent


# Faults by the clock


def test_nothing_is_due_before_the_first_step() -> None:
    plan = FaultPlan.parse("kill:0@at=0s")
    assert plan.due(None, 2) == []
    assert plan.due(0.0, 2) == [(plan.faults[0], 0)]


def test_a_moment_comes_once() -> None:
    plan = FaultPlan.parse("kill:1@at=12s;coordinator@at=13s")
    assert plan.due(11.9, 2) == []
    assert plan.due(12.0, 2) == [(plan.faults[0], 1)]
    assert plan.due(12.5, 2) == []
    assert plan.due(99.0, 2) == [(plan.faults[1], -1)]
    assert plan.due(100.0, 2) == []
    assert plan.is_spent


def test_a_period_comes_again_and_what_was_missed_is_not_made_up_for() -> None:
    plan = FaultPlan.parse("kill:0@every=20s")
    moments = (0.0, 19.0, 20.0, 21.0, 39.9, 40.1, 125.0, 125.1, 140.0)
    assert [len(plan.due(now_s, 1)) for now_s in moments] == [0, 0, 1, 0, 0, 1, 1, 0, 1]
    assert not plan.is_spent


@given(
    st.integers(1, 5),
    st.lists(st.floats(0, 100, allow_nan=False), max_size=60).map(sorted),
    WORKERS,
)
def test_a_period_ends_with_its_times(times: int, moments: list[float], workers: int) -> None:
    plan = FaultPlan.parse(f"kill:all@every=1.5sx{times}")
    struck = [plan.due(now_s, workers) for now_s in moments]
    fired = [hits for hits in struck if hits]
    assert len(fired) == min(times, len({now_s // 1.5 for now_s in moments} - {0.0}))
    assert all([rank for _, rank in hits] == list(range(workers)) for hits in fired)
    assert plan.is_spent == (len(fired) == times)


def test_a_fault_waits_for_a_rank_that_is_missing() -> None:
    plan = FaultPlan.parse("kill:2@at=5s")
    assert plan.due(6.0, 2) == []
    assert plan.summary()[0]["fired"] == 0
    assert plan.due(7.0, 3) == [(plan.faults[0], 2)]


# Inside a training process


def trigger_of(text: str) -> FaultTrigger:
    return FaultTrigger(FaultPlan.parse(text).faults)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 400))
def test_a_step_fires_at_the_call_that_takes_it(calls: list[int], wanted: int) -> None:
    trigger = trigger_of(f"kill:0@step={wanted}")
    step, fired_at = 0, []
    for steps in calls:
        if trigger.reached("step", step + steps):
            fired_at.append(range(step + 1, step + steps + 1))
        step += steps
    assert len(fired_at) == (step >= wanted)
    assert all(wanted in steps for steps in fired_at)


def test_a_step_that_is_behind_fires_at_once() -> None:
    trigger = trigger_of("kill:0@step=120")
    assert trigger.reached("forming", 150) is not None
    assert trigger.reached("step", 151) is None


def test_a_phase_fires_at_its_nth_entry() -> None:
    trigger = trigger_of("kill:0@phase=evaluation:3")
    passed = ["evaluation", "step", "evaluation", "checkpoint", "evaluation", "evaluation"]
    fired = [trigger.reached(phase, 5) is not None for phase in passed]
    assert fired == [False, False, False, False, True, False]


def test_two_faults_at_one_entry_have_their_turns() -> None:
    trigger = trigger_of("term:0@phase=checkpoint;kill:0@phase=checkpoint")
    fired = [trigger.reached("checkpoint", 5) for _ in range(3)]
    assert [fault and fault.kind for fault in fired] == ["term", "kill", None]


def test_an_order_of_the_coordinator_comes_at_the_next_moment() -> None:
    trigger = FaultTrigger(())
    assert trigger.reached("step", 1) is None
    (fault,) = FaultPlan.parse("raise:0@at=5s").faults
    trigger.order(fault)
    assert trigger.reached("evaluation", 1) is fault
    assert trigger.reached("evaluation", 1) is None


def test_a_phase_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="received phase 'epochend'"):
        FaultTrigger(()).reached("epochend", 1)


# Blows


def striking(kind: str) -> str:
    return (
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
        f"from cluster.faults import strike; strike({kind!r})"
    )


def start(script: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("kill", -signal.SIGKILL),
        ("segv", -signal.SIGSEGV),
        ("term", -signal.SIGTERM),
        ("exit", 7),
    ],
)
def test_a_process_ends_as_the_fault_says(kind: str, status: int) -> None:
    process = start(striking(kind))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status, errors


def test_a_stopped_process_lives_and_does_nothing() -> None:
    process = start(striking("stop") + "; print('went on')")
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=30)
        assert out == "went on\n"
    finally:
        process.kill()
        process.wait(timeout=30)


def test_an_exception_is_one() -> None:
    with pytest.raises(RuntimeError, match="chaos"):
        strike("raise")


# As a host starts a template, and this a training process, which lives until its input closes.
TEMPLATE = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=sys.stdin)
sys.stdin.read()
"""


def test_the_template_above_is_hit() -> None:
    template = start(TEMPLATE.format(child=striking("template")))
    template.wait(timeout=30)
    _, errors = template.communicate(timeout=30)
    assert template.returncode == -signal.SIGKILL, errors


@pytest.mark.parametrize("kind", TOLD)
def test_no_process_strikes_what_it_only_tells_of(kind: str) -> None:
    with pytest.raises(ValueError, match=f"received fault '{kind}'"):
        strike(kind)
