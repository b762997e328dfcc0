"""A training that happens once: what is begun, gone on with, or taken as it is."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import EnvironmentFailure
from configs.load import load_job
from lockstep import train_once as module
from lockstep.api import TrainOptions
from lockstep.follow import SilentListener
from registry.errors import LeaseLost
from tests.unit.test_pipeline_schema import JOB
from trainer.errors import RunFolderError

OPTIONS = TrainOptions(run_id="r1")


class Trainer:
    """Stands for `lockstep.api.train`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.resumed: list[bool] = []
        self.error: Exception | None = None

    def __call__(self, job: Any, options: TrainOptions, listener: Any) -> None:
        self.resumed.append(options.is_resume)
        listener.event({"event": "progress"})
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.error is not None:
            raise self.error
        end(self.folder, "done")


def end(folder: Path, status: str) -> None:
    (folder / "artifact").mkdir(parents=True, exist_ok=True)
    (folder / "artifact" / "manifest.json").write_text("{}")
    (folder / "summary.json").write_text(json.dumps({"status": status}))


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    stand_in = Trainer(tmp_path / "small" / "r1")
    monkeypatch.setattr(module, "train", stand_in)
    return stand_in


def run(tmp_path: Path, check: Any = lambda: None) -> Any:
    job = load_job(JOB | {"runs_dir": str(tmp_path)})
    heartbeat: Any = SimpleNamespace(check=check)
    return module.train_once(job, OPTIONS, SilentListener(), heartbeat)


def test_a_new_run_is_begun_and_then_taken_as_it_is(tmp_path: Path, trainer: Trainer) -> None:
    assert run(tmp_path).folder == trainer.folder
    assert run(tmp_path).summary == {"status": "done"}
    assert trainer.resumed == [False]


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_did_not_end_is_gone_on_with(
    tmp_path: Path, trainer: Trainer, status: str
) -> None:
    end(trainer.folder, status)
    run(tmp_path)
    assert trainer.resumed == [True]


def test_a_run_whose_artifact_is_not_there_is_gone_on_with(
    tmp_path: Path, trainer: Trainer
) -> None:
    end(trainer.folder, "done")
    (trainer.folder / "artifact" / "manifest.json").unlink()
    run(tmp_path)
    assert trainer.resumed == [True]


def test_a_folder_that_is_still_in_use_is_no_mistake_of_the_user(
    tmp_path: Path, trainer: Trainer
) -> None:
    trainer.error = RunFolderError("r1 is in use by another coordinator.")
    with pytest.raises(EnvironmentFailure, match="in use by another coordinator") as error:
        run(tmp_path)
    assert error.value.exit_status == 3


def test_who_lost_the_lease_trains_no_more(tmp_path: Path, trainer: Trainer) -> None:
    def lost() -> None:
        raise LeaseLost("gone")

    with pytest.raises(LeaseLost):
        run(tmp_path, lost)
    assert not (trainer.folder / "summary.json").exists()
