"""Who stands still is named, what everybody was doing is on record, and the run goes on."""

from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.api import TrainOptions
from tests.support.chaos import OWN_CODE, assert_untouched, chaos_job, events_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.chaos]

STALL_S = 4.0


def stacks_of(folder: Path, generation: int) -> dict[int, str]:
    found = sorted((folder / "stacks").glob(f"generation-{generation}-rank-*.txt"))
    return {int(path.stem.rpartition("-")[2]): path.read_text() for path in found}


@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_rank_is_named(rows: Path, tmp_path: Path, undisturbed: Any, rank: int) -> None:
    job = chaos_job(rows, tmp_path / "runs", cluster__stall_after_s=STALL_S)
    run = lockstep.train(job, options=TrainOptions(chaos=f"stop:{rank}@step=21"))
    (failure,) = events_of(run.folder, "failure")
    assert (failure["failure"], failure["rank"]) == ("stalled", rank)
    assert f"rank {rank} is behind" in failure["error"]
    assert f"cluster.stall_after_s={STALL_S:g}" in failure["error"]
    stacks = stacks_of(run.folder, failure["generation"])
    assert sorted(stacks) == [0, 1]
    assert all("worker.py" in text for text in stacks.values())
    (recovery,) = run.summary["recoveries"]
    assert STALL_S <= recovery["detected_s"] < 2 * STALL_S + 4
    assert_untouched(run, undisturbed)


def test_an_endless_callback_is_found_in_the_stacks(rows: Path, tmp_path: Path) -> None:
    """Both ranks live and wait: the loop is told from the wait by the stacks."""
    file = tmp_path / "loops"

    def train(name: str) -> Any:
        endless = {f"{OWN_CODE}:Endless": {"file": str(file), "epoch": 1}}
        return lockstep.train(
            chaos_job(
                rows,
                tmp_path / name,
                cluster__stall_after_s=STALL_S,
                train__callbacks=[endless],
            )
        )

    quiet = train("quiet")
    file.touch()
    run = train("runs")
    (failure,) = events_of(run.folder, "failure")
    assert failure["failure"] == "stalled"
    assert "at callbacks" in failure["error"]
    stacks = stacks_of(run.folder, failure["generation"])
    assert "seen_rows.py" in stacks[0]
    assert "seen_rows.py" not in stacks[1]
    assert run.history == quiet.history
