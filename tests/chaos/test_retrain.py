"""Pipelines as processes that SIGKILL ends at each point, and the process that goes on.

The steps are small, the registry and the memory of runs are real (tests/support/pipeline_world.py).
With real training: tests/chaos/test_retrain_training.py.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pipeline_world import MODEL, NAME, World

POINTS = {
    "a run is begun": "after store.begin",
    "inside a step": "in prepare",
    "before training": "before training",
    "trained, not recorded": "after training",
    "before registering": "before registry.register",
    "registered, not recorded": "after registry.register",
    "before promoting": "before promoting",
    "inside the transaction that promotes": "inside promoting",
    "promoted": "after registry.set_alias",
    "in the report": "in report",
    "notified, not recorded": "after notifying",
    "before the end": "before store.end",
}
SOME = ("inside the transaction that promotes",)


def run(folder: Path, point: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.support.pipeline_world", str(folder), point],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, id=name, marks=[] if name in SOME else [pytest.mark.chaos])
        for name, point in POINTS.items()
    ],
)
def test_a_killed_process_is_followed_by_one_that_ends_the_run(tmp_path: Path, point: str) -> None:
    world = World(tmp_path)
    world.give_champion()
    assert run(tmp_path, point).returncode == -signal.SIGKILL
    is_promoted = world.plain_store.result("run-1", "promote") is not None
    assert world.champion() == (2 if is_promoted else 1)
    followed = run(tmp_path)  # the lease of the dead is not awaited
    assert (followed.stdout.strip(), followed.returncode) == ("promoted", 0), followed.stderr
    assert world.champion() == 2
    assert world.versions() == [1, 2]
    for version in world.plain_registry.versions(MODEL):
        assert world.plain_registry.verify(version) == []
    assert [move.to_number for move in world.plain_registry.history(MODEL, "champion")] == [1, 2]
    assert world.times("trained") == 1
    (only,) = world.plain_store.runs(NAME)
    assert (only.run_id, only.status) == ("run-1", "done")
    world.database.close()
