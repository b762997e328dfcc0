"""The driver killed, interrupted or told to go: nothing remains, and the run can be resumed."""

import signal
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.api import TrainOptions
from tests.support.chaos import OWN_CODE, assert_untouched, chaos_job, events_of
from tests.support.drivers import RUN_ID, Belongings, driving, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("ray_session")]

RESUME = TrainOptions(run_id=RUN_ID, is_resume=True)


def is_inside(event: dict[str, Any]) -> bool:
    return bool(event["step"] >= 24)


def test_a_killed_driver_leaves_nothing_and_the_run_goes_on(
    rows: Path, tmp_path: Path, undisturbed: Any
) -> None:
    job = chaos_job(rows, tmp_path / "runs")
    with driving(job) as driver:
        driver.until("checkpoint", is_inside)
        belongings = Belongings(driver.process.pid)
        assert len(belongings.processes) > 4  # Ray's, two templates, two training processes
        assert belongings.ports
        driver.process.kill()
        driver.process.wait()
        wait_for(lambda: belongings.left() == [], "end of all that the driver had")
    assert events_of(driver.folder, "done") == []
    assert_untouched(lockstep.train(job, options=RESUME), undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_told_to_stop_leaves_a_checkpoint(
    rows: Path, tmp_path: Path, undisturbed: Any, number: signal.Signals
) -> None:
    job = chaos_job(rows, tmp_path / "runs")
    with driving(job) as driver:
        driver.until("checkpoint", is_inside)
        belongings = Belongings(driver.process.pid)
        driver.process.send_signal(number)
        assert driver.wait() == 130
        assert "Go on with --resume" in driver.said
        wait_for(lambda: belongings.left() == [], "end of all that the driver had")
    assert len(events_of(driver.folder, "interrupted")) == 1
    assert_untouched(lockstep.train(job, options=RESUME), undisturbed)


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_run_that_ends_by_itself_leaves_nothing_either(
    rows: Path, tmp_path: Path, is_broken: bool
) -> None:
    """In order, and as a failure."""
    file = tmp_path / "live"
    job = chaos_job(rows, tmp_path / "runs")
    raising = {"file": str(file), "epoch": 3, "is_once": False}
    job["train"]["callbacks"].append({f"{OWN_CODE}:Raising": raising})
    if is_broken:
        file.touch()
    with driving(job) as driver:
        driver.until("checkpoint", is_inside)
        belongings = Belongings(driver.process.pid)
        assert len(belongings.processes) > 4
        assert belongings.ports
        assert driver.wait() == (2 if is_broken else 0), driver.said
        wait_for(lambda: belongings.left() == [], "end of all that the driver had")
