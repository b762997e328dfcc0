"""Fifty deaths in one run, of any rank and by any means, and the death of coordinators."""

import random
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.api import TrainOptions
from tests.support.chaos import assert_fired, assert_untouched, chaos_job, events_of
from tests.support.jobs import assert_same_bits

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.chaos]

DEATHS = 50
EPOCHS = 20
STEPS = EPOCHS * 16


@pytest.mark.timeout(900)
def test_fifty_deaths_leave_no_trace(rows: Path, tmp_path: Path) -> None:
    patient = {"train__epochs": EPOCHS, "train__callbacks": callbacks_without_a_stop(rows)}
    draw = random.Random(5)
    steps = sorted(draw.sample(range(3, STEPS), DEATHS))
    kinds = draw.choices(("kill", "segv", "exit", "raise"), k=DEATHS)
    faults = [f"{kind}:any@step={step}" for kind, step in zip(kinds, steps, strict=True)]
    quiet = lockstep.train(chaos_job(rows, tmp_path / "quiet", **patient))
    run = lockstep.train(
        chaos_job(rows, tmp_path / "runs", **patient), options=TrainOptions(chaos="; ".join(faults))
    )
    assert_fired(run, "; ".join(faults))
    # Two that die in one call of the compiled loop are one failure; nobody died unasked.
    struck = {event["generation"] for event in events_of(run.folder, "chaos")}
    failed = [event["generation"] for event in events_of(run.folder, "failure")]
    assert failed == sorted(struck)
    assert_untouched(run, quiet)


def callbacks_without_a_stop(rows: Path) -> list[Any]:
    """The job's callbacks but the one that would end it early."""
    callbacks = chaos_job(rows, rows)["train"]["callbacks"]
    return [spec for spec in callbacks if "EarlyStopping" not in spec]


@pytest.mark.parametrize("moment", ["step=21", "phase=epoch_end:3", "phase=forming"])
def test_a_lost_coordinator_has_a_successor(
    rows: Path, tmp_path: Path, undisturbed: Any, moment: str
) -> None:
    plan = f"coordinator@{moment}"
    run = lockstep.train(chaos_job(rows, tmp_path / "runs"), options=TrainOptions(chaos=plan))
    assert_fired(run, plan)
    assert len(events_of(run.folder, "placing")) == 2
    generations = [event["generation"] for event in events_of(run.folder, "formed")]
    assert generations == sorted(set(generations))
    assert_untouched(run, undisturbed)


def test_all_ranks_may_die_at_once(rows: Path, tmp_path: Path, undisturbed: Any) -> None:
    plan = "kill:all@step=21; host:0@step=40; template:1@step=60"
    run = lockstep.train(chaos_job(rows, tmp_path / "runs"), options=TrainOptions(chaos=plan))
    assert_fired(run, plan)
    assert_same_bits(run, undisturbed)
    assert_untouched(run, undisturbed)
