"""When a run gives up: what it says, with which status, and that it goes on once that is mended."""

from pathlib import Path
from typing import Any

import pytest

import lockstep
from cluster.errors import RetriesExhausted
from configs.errors import UserCodeError
from lockstep.api import TrainOptions
from tests.support.chaos import OWN_CODE, assert_untouched, chaos_job, events_of
from tests.support.jobs import assert_same_bits
from trainer.errors import RunFolderError

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.chaos]


def first_or_resumed(job: dict[str, Any], is_resume: bool = False) -> Any:
    return lockstep.train(job, options=TrainOptions(run_id="run", is_resume=is_resume))


def test_what_always_fails_at_one_step_is_the_users(rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "live"

    def job(name: str) -> dict[str, Any]:
        fuse = {f"{OWN_CODE}:Fuse": {"file": str(file), "batches": 11}}
        return chaos_job(
            rows,
            tmp_path / name,
            compile__metrics=["mae", fuse],
            train__callbacks=[],
            data__validation=None,
            cluster__max_failures=5,
        )

    quiet = first_or_resumed(job("quiet"))
    file.touch()
    with pytest.raises(UserCodeError, match="three|3 times in a row") as raised:
        first_or_resumed(job("runs"))
    assert raised.value.exit_status == 2
    assert "the fuse has blown" in raised.value.traceback
    folder = tmp_path / "runs" / "small" / "run"
    assert len(events_of(folder, "failure")) == 3
    assert len(events_of(folder, "failed")) == 1
    file.unlink()
    run = first_or_resumed(job("runs"), is_resume=True)
    assert_same_bits(run, quiet)


def test_what_a_callback_raises_once_leaves_no_trace(
    rows: Path, tmp_path: Path, undisturbed: Any
) -> None:
    run = first_or_resumed(raising_job(rows, tmp_path, is_once=True))
    (failure,) = events_of(run.folder, "failure")
    assert failure["failure"] == "exception"
    assert "ConnectionError: the dashboard does not answer" in failure["error"]
    assert_untouched(run, undisturbed)


def test_what_a_callback_always_raises_is_the_users_and_the_state_is_kept(
    rows: Path, tmp_path: Path, undisturbed: Any
) -> None:
    job = raising_job(rows, tmp_path, is_once=False)
    with pytest.raises(UserCodeError, match="3 times in a row") as raised:
        first_or_resumed(job)
    assert "the dashboard does not answer" in raised.value.traceback
    folder = tmp_path / "runs" / "small" / "run"
    assert len(events_of(folder, "failure")) == 3
    (tmp_path / "live").unlink()
    run = first_or_resumed(job, is_resume=True)
    assert run.summary["weights_sha256"] == undisturbed.summary["weights_sha256"]
    assert run.history == undisturbed.history


def raising_job(rows: Path, tmp_path: Path, is_once: bool) -> dict[str, Any]:
    (tmp_path / "live").touch()
    job = chaos_job(rows, tmp_path / "runs", cluster__max_failures=5)
    raising = {"file": str(tmp_path / "live"), "epoch": 3, "is_once": is_once}
    job["train"]["callbacks"].append({f"{OWN_CODE}:Raising": raising})
    return job


@pytest.fixture
def worn_out(rows: Path, tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    """The undisturbed run, and the job of one that has failed too often in its fourth epoch."""
    file = tmp_path / "deadly"

    def job(name: str) -> dict[str, Any]:
        deadly = {f"{OWN_CODE}:Deadly": {"file": str(file), "epoch": 3}}
        return chaos_job(rows, tmp_path / name, train__callbacks=[deadly], cluster__max_failures=2)

    quiet = first_or_resumed(job("quiet"))
    file.touch()
    with pytest.raises(RetriesExhausted) as raised:
        first_or_resumed(job("runs"))
    file.unlink()
    assert raised.value.exit_status == 3
    said = str(raised.value)
    assert "3 failures within 600 s (cluster.failure_window_s), 2 are allowed" in said
    assert "--resume goes on from the newest checkpoint" in said
    return quiet, job("runs")


def test_a_run_that_failed_too_often_can_be_resumed(worn_out: Any) -> None:
    quiet, job = worn_out
    run = first_or_resumed(job, is_resume=True)
    assert run.history == quiet.history
    assert run.summary["rows_seen"] == quiet.summary["rows_seen"]
    assert_same_bits(run, quiet)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(worn_out: Any) -> None:
    quiet, job = worn_out
    folder = Path(job["runs_dir"]) / "small" / "run"
    newest = max((folder / "checkpoints").glob("step-*.h5"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run = first_or_resumed(job, is_resume=True)
    (skipped,) = events_of(run.folder, "checkpoint_skipped")
    assert newest.name in skipped["reason"]
    assert run.history == quiet.history
    assert_same_bits(run, quiet)


def test_the_folder_of_another_job_is_refused(rows: Path, tmp_path: Path) -> None:
    job = chaos_job(rows, tmp_path / "runs", train__epochs=1)
    first_or_resumed(job)
    job["compile"]["optimizer"] = {"Adam": {"learning_rate": 0.5}}
    with pytest.raises(RunFolderError, match="holds another job; it differs in compile.optimizer"):
        first_or_resumed(job, is_resume=True)
