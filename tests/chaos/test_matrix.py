"""What dies x which rank x in which phase: the result is that of the undisturbed run, bit for bit.

The core has several faults in one run, one after the other; `make test-chaos` has each alone.
"""

from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.api import TrainOptions
from tests.support.chaos import OWN_CODE, assert_fired, assert_untouched, chaos_job, events_of

pytestmark = pytest.mark.usefixtures("ray_session")

KINDS = ("kill", "segv", "exit", "raise", "stop", "term")
PHASES = {
    "forming": "phase=forming",
    "trace": "phase=trace",
    "step": "step=21",
    "epoch_end": "phase=epoch_end:2",
    "evaluation": "phase=evaluation:2",
    "checkpoint": "phase=checkpoint:3",
    "export": "phase=export",
}
# One rank at a time: two that die in one generation would hide each other.
CORE = {
    "rank 0": "kill:0@phase=forming; segv:0@phase=trace; exit:0@step=21; raise:0@phase=epoch_end; "
    "kill:0@phase=evaluation; exit:0@phase=checkpoint; segv:0@phase=export",
    "the other": "segv:1@phase=forming; kill:1@phase=trace; raise:1@step=21; "
    "exit:1@phase=epoch_end; segv:1@phase=evaluation; kill:1@phase=checkpoint",
    "signals": "term:0@phase=forming; stop:1@step=21; term:0@phase=export; stop:0@step=70",
}


def disturb(rows: Path, tmp_path: Path, plan: str) -> Any:
    return lockstep.train(chaos_job(rows, tmp_path / "runs"), options=TrainOptions(chaos=plan))


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(plan, id=name, marks=pytest.mark.chaos if name == "signals" else ())
        for name, plan in CORE.items()
    ],
)
def test_failures_leave_no_trace(rows: Path, tmp_path: Path, undisturbed: Any, plan: str) -> None:
    run = disturb(rows, tmp_path, plan)
    assert_fired(run, plan)
    assert_untouched(run, undisturbed)
    failures = events_of(run.folder, "failure")
    assert all(failure["is_injected"] for failure in failures)
    struck = [event for event in events_of(run.folder, "chaos") if "term" not in event["fault"]]
    assert [failure["rank"] for failure in failures] == [event["rank"] for event in struck]


def test_who_is_told_to_go_leaves_in_order_and_no_step_is_lost(
    rows: Path, tmp_path: Path, undisturbed: Any
) -> None:
    plan = "term:1@step=3; term:0@step=34"
    run = disturb(rows, tmp_path, plan)
    assert_fired(run, plan)
    reasons = [event["reason"] for event in events_of(run.folder, "pausing")]
    assert reasons == ["ranks [1] are to go", "ranks [0] are to go"]
    assert events_of(run.folder, "failure") == []
    assert_untouched(run, undisturbed)


def test_a_validation_is_left_and_done_again_and_no_step_is_lost(
    rows: Path, tmp_path: Path, undisturbed: Any
) -> None:
    """It may take longer than there is time to go."""
    job = chaos_job(rows, tmp_path / "runs")
    job["train"]["callbacks"].append({f"{OWN_CODE}:SlowValidation": {"seconds": 1.0}})
    plan = "term:1@phase=evaluation:2"
    run = lockstep.train(job, options=TrainOptions(chaos=plan))
    assert_fired(run, plan)
    assert events_of(run.folder, "failure") == []
    assert [recovery["steps_replayed"] for recovery in run.summary["recoveries"]] == []
    paused = events_of(run.folder, "pausing")[0]["generation"]
    kept = {(e["generation"], e["step"]) for e in events_of(run.folder, "checkpoint")}
    ends = {step for _, step in kept if step % 16 == 0}
    assert any({(paused, step), (paused + 1, step)} <= kept for step in ends), kept
    assert_untouched(run, undisturbed)


@pytest.mark.chaos
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_each_cell(
    rows: Path, tmp_path: Path, undisturbed: Any, kind: str, rank: int, phase: str
) -> None:
    if phase == "export" and rank > 0:
        pytest.skip("rank 0 alone exports")
    plan = f"{kind}:{rank}@{PHASES[phase]}"
    run = disturb(rows, tmp_path, plan)
    assert_fired(run, plan)
    assert_untouched(run, undisturbed)
    failures = events_of(run.folder, "failure")
    if kind == "term":  # it leaves in order: nothing is lost, nothing done twice
        assert [recovery["steps_replayed"] for recovery in run.summary["recoveries"]] in ([], [0])
    else:
        assert [(failure["rank"], failure["is_injected"]) for failure in failures] == [(rank, True)]
