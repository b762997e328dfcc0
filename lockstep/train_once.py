"""A training that happens once, however often it is asked for, and ends with its owner's lease."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import EnvironmentFailure
from configs.schema import Job
from lockstep.api import Run, TrainOptions, train
from lockstep.follow import Listener
from registry.leases import Heartbeat
from trainer.errors import RunFolderError


def train_once(job: Job, options: TrainOptions, listener: Listener, heartbeat: Heartbeat) -> Run:
    """Train a run, go on with what an earlier process began of it, or take what that one ended.

    Args:
        job: The job.
        options: Names the run.
        listener: Is told of progress.
        heartbeat: Of whoever owns the run; where it is lost, the training ends.

    Raises:
        LeaseLost: Another process owns the run now.
        EnvironmentFailure: Processes of an earlier one are still at work; later they are not.
        What `lockstep.api.train` raises.
    """
    folder = Path(job.runs_dir).absolute() / job.name / str(options.run_id)
    if not _is_trained(folder):
        options = replace(options, is_resume=folder.exists())
        try:
            train(job, options=options, listener=_Watchful(listener, heartbeat))
        except RunFolderError as error:
            # Nobody chose this folder: what is wrong with it is a process that is about to end.
            raise EnvironmentFailure(f"{error} Then run the pipeline again.") from error
    return Run(folder)


def _is_trained(folder: Path) -> bool:
    summary = folder / "summary.json"
    if not summary.exists() or not (folder / "artifact" / "manifest.json").exists():
        return False
    return bool(json.loads(summary.read_text())["status"] == "done")


class _Watchful:
    """A listener that ends a training whose run another process has taken over."""

    def __init__(self, listener: Listener, heartbeat: Heartbeat) -> None:
        self._listener, self._heartbeat = listener, heartbeat

    def event(self, event: dict[str, Any]) -> None:
        """Passed on."""
        self._heartbeat.check()
        self._listener.event(event)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)
