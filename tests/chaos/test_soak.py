"""Fifty deaths in one run, of any rank and by any means, and the death of coordinators."""

import random
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

import lockstep
from cluster import handle as handle_module
from lockstep.api import TrainOptions
from tests.support.chaos import assert_fired, assert_untouched, chaos_job, events_of
from tests.support.drivers import wait_for
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


def test_what_is_left_of_a_plan_is_the_successors(
    rows: Path, tmp_path: Path, undisturbed: Any
) -> None:
    plan = "kill:0@step=9; coordinator@step=21; exit:1@step=40; coordinator@step=60"
    run = lockstep.train(chaos_job(rows, tmp_path / "runs"), options=TrainOptions(chaos=plan))
    assert_fired(run, plan)
    assert len(events_of(run.folder, "placing")) == 3
    told = events_of(run.folder, "recovered")
    assert [recovery["kind"] for recovery in told] == [
        *("exited", "coordinator_lost", "exited", "coordinator_lost")
    ]
    assert [one["kind"] for one in run.summary["recoveries"]] == [one["kind"] for one in told]
    goodput = run.summary["goodput"]
    assert sum(part["seconds"] for part in goodput.values()) == pytest.approx(run.summary["wall_s"])
    events = events_of(run.folder)
    assert run.summary["wall_s"] == pytest.approx(events[-1]["time"] - events[0]["time"], abs=3.0)
    assert_untouched(run, undisturbed)


def test_a_coordinator_that_hangs_has_a_successor(
    rows: Path, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle_module, "_ANSWER_S", 3.0)

    def stop_it(folder: Path) -> None:
        wait_for(lambda: events_of(folder, "checkpoint"), "checkpoint")
        (coordinator,) = (
            process
            for process in psutil.Process().children(recursive=True)
            if process.name().startswith("ray::Coordinator")
        )
        coordinator.send_signal(signal.SIGSTOP)

    folder = tmp_path / "runs" / "small" / "run"
    stopper = threading.Thread(target=stop_it, args=(folder,))
    stopper.start()
    job = chaos_job(rows, tmp_path / "runs")
    run = lockstep.train(job, options=TrainOptions(run_id="run"))
    stopper.join()
    assert len(events_of(run.folder, "placing")) == 2
    assert_untouched(run, undisturbed)


def test_all_ranks_may_die_at_once(rows: Path, tmp_path: Path, undisturbed: Any) -> None:
    plan = "kill:all@step=21; host:0@step=40; template:1@step=60"
    run = lockstep.train(chaos_job(rows, tmp_path / "runs"), options=TrainOptions(chaos=plan))
    assert_fired(run, plan)
    assert_same_bits(run, undisturbed)
    assert_untouched(run, undisturbed)
