"""A training process that the kernel kills because memory ran short."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lockstep
from tests.support.chaos import OWN_CODE, assert_untouched, chaos_job, events_of
from tests.support.drivers import driving

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("ray_session")]

GROUPS = Path("/sys/fs/cgroup")
LIMIT_BYTES = 16 * 2**20


@pytest.fixture
def tight() -> Iterator[Path]:
    """A control group whose processes may take little more memory than they have."""
    is_second = (GROUPS / "cgroup.controllers").exists()
    parent, limit = (
        (GROUPS, "memory.max") if is_second else (GROUPS / "memory", "memory.limit_in_bytes")
    )
    group = parent / f"lockstep-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(LIMIT_BYTES))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"memory cannot be limited here: {error}")
    yield group
    group.rmdir()


def test_who_ran_out_of_memory_is_told_so_and_replaced(
    rows: Path, tmp_path: Path, undisturbed: Any, tight: Path
) -> None:
    job = chaos_job(rows, tmp_path / "runs")
    job["train"]["callbacks"].append({f"{OWN_CODE}:Hungry": {"size_bytes": 4 * LIMIT_BYTES}})
    with driving(job) as driver:
        driver.until("checkpoint")
        pid = driver.until("formed")["pids"][0]
        (tight / "cgroup.procs").write_text(str(pid))
        assert driver.wait() == 0, driver.said
    (failure,) = events_of(driver.folder, "failure")
    assert (failure["failure"], failure["rank"]) == ("exited", 0)
    assert "killed by signal 9" in failure["error"]
    assert "memory runs short" in failure["error"]
    assert_untouched(lockstep.api.Run(driver.folder), undisturbed)
