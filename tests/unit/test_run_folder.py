"""Run folders: new ones, and who may go on in one that exists."""

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.load import job_digest, load_job
from configs.schema import Job
from tests.support.jobs import make_job, write_rows
from trainer.checkpoint_store import CheckpointStore, Origin
from trainer.errors import RunFolderError
from trainer.payloads import PlannedData
from trainer.preflight import open_sources, plan_data
from trainer.run_folder import RunFolder, open_run_folder


def job_in(runs: Path, **changes: Any) -> Job:
    return load_job(make_job(runs / "data", runs, **changes))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], PlannedData]:
    """Training rows, planned as a run has them when it opens its folder."""

    @functools.cache
    def plan(count: int) -> PlannedData:
        folder = tmp_path_factory.mktemp("data")
        job = load_job(make_job(folder, folder, data__train=str(write_rows(folder, count, 0))))
        job = load_job(job, ["data.validation=null", "data.test=null"])
        return plan_data(job, *open_sources(job))

    return plan


@pytest.fixture
def rows(planned: Callable[[int], PlannedData]) -> PlannedData:
    return planned(40)


def with_checkpoint(folder: RunFolder, step: int = 5) -> RunFolder:
    save_checkpoint(folder, step)
    return folder


def save_checkpoint(folder: RunFolder, step: int) -> None:
    origin = Origin(folder.run_id, job_digest(load_job(folder.path / "job.yaml")))
    CheckpointStore(folder.checkpoints, origin).save(step, 1, {"a": np.zeros(3)}, {})


def test_a_new_run_has_its_folders_and_records(tmp_path, rows):
    job = job_in(tmp_path)
    folder = open_run_folder(job, rows, None, is_resume=False)
    assert folder.path == tmp_path / "small" / folder.run_id
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", folder.run_id)
    assert not folder.is_resumed
    assert sorted(path.name for path in folder.path.iterdir()) == [
        *("data.json", "environment.json", "job.yaml", "logs"),
    ]
    assert load_job(folder.path / "job.yaml") == job
    environment = json.loads((folder.path / "environment.json").read_text())
    assert {"python", "tensorflow", "keras", "ray", "platform", "cpus"} <= environment.keys()


def test_a_relative_runs_dir_is_made_absolute(tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    folder = open_run_folder(job_in(tmp_path, runs_dir="somewhere"), rows, "one", is_resume=False)
    assert folder.path == tmp_path / "somewhere" / "small" / "one"


def test_two_new_runs_do_not_meet(tmp_path, rows):
    job = job_in(tmp_path)
    assert (
        open_run_folder(job, rows, None, False).path != open_run_folder(job, rows, None, False).path
    )


def test_a_run_id_in_use_by_the_same_job_is_refused(tmp_path, rows):
    job = job_in(tmp_path)
    folder = open_run_folder(job, rows, "mine", is_resume=False)
    with pytest.raises(RunFolderError) as error:
        open_run_folder(job, rows, "mine", is_resume=False)
    assert str(error.value) == (
        f"{folder.path} already holds a run of this job. Add --resume to go on with it, or use "
        "another --run-id."
    )
    assert error.value.exit_status == 2


@pytest.mark.parametrize("is_resume", [False, True])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"train__seed": 4}, "train.seed"),
        ({"train__global_batch_size": 32}, "train.global_batch_size"),
        ({"data__label": "k"}, "data.label"),
        ({"data__virtual_shards": 8}, "data.virtual_shards"),
        ({"compile__optimizer": "sgd"}, "compile.optimizer"),
        ({"data__shuffle": "none", "train__seed": 4}, "data.shuffle, train.seed"),
    ],
)
def test_another_job_is_refused_with_the_fields(tmp_path, change, field, is_resume, rows):
    folder = with_checkpoint(open_run_folder(job_in(tmp_path), rows, "mine", is_resume=False))
    before = (folder.path / "job.yaml").read_text()
    with pytest.raises(RunFolderError) as error:
        open_run_folder(job_in(tmp_path, **change), rows, "mine", is_resume)
    assert str(error.value) == (
        f"{folder.path} already holds another job; it differs in {field}. Use another --run-id, "
        "or the job it was started with (epochs and cluster may change on --resume)."
    )
    assert (folder.path / "job.yaml").read_text() == before


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"train__epochs": 9},
        {"train__steps_per_execution": 7},
        {"cluster__workers": 4},
        {"checkpoint__every_steps": 3},
        {"export__h5": False},
    ],
)
def test_what_earlier_steps_did_not_depend_on_may_change(tmp_path, change, rows):
    folder = with_checkpoint(open_run_folder(job_in(tmp_path), rows, "mine", is_resume=False))
    job = job_in(tmp_path, **change)
    resumed = open_run_folder(job, rows, "mine", is_resume=True)
    assert resumed == RunFolder(folder.path, "mine", folder.checkpoints, is_resumed=True)
    assert load_job(folder.path / "job.yaml") == job


def test_resume_without_a_run_to_go_on_from(tmp_path, rows):
    job = job_in(tmp_path)
    open_run_folder(job, rows, "started", is_resume=False)
    with pytest.raises(RunFolderError) as error:
        open_run_folder(job, rows, None, is_resume=True)
    assert str(error.value) == (
        f"--resume found no run with a checkpoint in {tmp_path / 'small'}. Start one without "
        "--resume."
    )


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path, rows):
    job = job_in(tmp_path)
    folder = open_run_folder(job, rows, "mine", is_resume=False)
    again = open_run_folder(job, rows, "mine", is_resume=True)
    assert (again.path, again.is_resumed) == (folder.path, False)


def test_resume_of_a_run_that_never_was(tmp_path, rows):
    job = job_in(tmp_path)
    path = tmp_path / "small" / "mine"
    with pytest.raises(RunFolderError) as error:
        open_run_folder(job, rows, "mine", is_resume=True)
    assert str(error.value) == (
        f"{path} does not exist; --resume goes on with a run that was started. Start it without "
        "--resume, or name another run with --run-id."
    )
    assert not path.exists()


def test_resume_takes_the_newest_run_with_a_checkpoint(tmp_path, rows):
    job = job_in(tmp_path)
    for second, run_id in enumerate(("a", "c", "b", "empty"), start=1_000):
        folder = open_run_folder(job, rows, run_id, is_resume=False)
        if run_id != "empty":
            with_checkpoint(folder)
        os.utime(folder.path, (second, second))
    assert open_run_folder(job, rows, None, is_resume=True).run_id == "b"


def test_the_final_weights_alone_are_nothing_to_go_on_from(tmp_path, rows):
    job = job_in(tmp_path)
    folder = open_run_folder(job, rows, "mine", is_resume=False)
    origin = Origin("mine", job_digest(job))
    CheckpointStore(folder.checkpoints, origin).save_final(1, {"a": np.zeros(3)}, {})
    assert not open_run_folder(job, rows, "mine", is_resume=True).is_resumed


def test_checkpoints_may_lie_elsewhere(tmp_path, rows):
    job = job_in(tmp_path, checkpoint__uri=f"{tmp_path}/elsewhere/")
    folder = with_checkpoint(open_run_folder(job, rows, "mine", is_resume=False))
    assert folder.checkpoints == f"{tmp_path}/elsewhere/small/mine"
    assert open_run_folder(job, rows, None, is_resume=True).run_id == "mine"
    assert not (folder.path / "checkpoints").exists()


@pytest.mark.parametrize("is_resume", [False, True])
def test_other_training_rows_are_refused(tmp_path, rows, planned, is_resume):
    job = job_in(tmp_path)
    folder = with_checkpoint(open_run_folder(job, rows, "mine", is_resume=False))
    if not is_resume:
        (folder.path / "job.yaml").unlink()  # else that a run is there is told first
    with pytest.raises(RunFolderError) as error:
        open_run_folder(job, planned(41), "mine", is_resume)
    assert str(error.value) == (
        f"{folder.path} was started on other training rows: 40 then, 41 now, or files of other "
        "sizes. Start a new run, or put the files back; a run goes on with the rows it began with."
    )
