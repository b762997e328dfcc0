"""A run that went through a plan of chaos, beside the same run undisturbed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.load import job_digest, load_job
from configs.schema import Job
from lockstep.api import Run, TrainOptions, train
from lockstep.follow import Listener
from trainer.checkpoint_store import CheckpointStore, Origin
from trainer.errors import CheckpointError
from trainer.files import RecordLog
from trainer.payloads import Arrays
from trainer.run_folder import checkpoints_of

TOLERANCE = 4e-5
"""Of weights where another number of workers did a part of the work; else every bit is the same."""


def compare_with_undisturbed(
    run: Run,
    job: Job | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    options: TrainOptions | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Train the job once more without chaos, in a run folder beside, and compare the weights.

    Args:
        run: The finished run with chaos.
        job: Its job.
        overrides: `a.b=value`, as they were for the run.
        options: As they were for the run; run id, resume and chaos are replaced.
        listener: Is told of the undisturbed run.

    Returns:
        `verdict` ("equal bit for bit", "equal up to rounding" where fewer workers did a part,
        "differs"), `greatest` (difference
        of a weight, relative to 1 + its size), `failures`, `undisturbed` (the other run's folder).
    """
    options = replace(
        options or TrainOptions(),
        run_id=f"{run.folder.name}-undisturbed",
        is_resume=False,
        chaos="",
    )
    overrides = [*overrides, "export.register=null"]  # one version of one run
    other = train(job, overrides=overrides, options=options, listener=listener)
    ours, theirs = (_weights(one) for one in (run, other))
    apart = [
        float(np.max(np.abs(ours[name] - value) / (1 + np.abs(value)), initial=0.0))
        for name, value in theirs.items()
    ]
    greatest = max(apart, default=0.0)
    is_same = all(np.array_equal(ours[name], value) for name, value in theirs.items())
    verdict = "differs"
    if is_same:
        verdict = "equal bit for bit"
    elif greatest <= TOLERANCE and _had_fewer_workers(run):
        verdict = "equal up to rounding"
    return {
        "verdict": verdict,
        "greatest": greatest,
        "failures": len(run.summary["recoveries"]),
        "undisturbed": str(other.folder),
    }


def _had_fewer_workers(run: Run) -> bool:
    """Whether a part of the training was done by fewer workers than the job has."""
    wanted = load_job(run.folder / "job.yaml").cluster.workers
    events = RecordLog(run.folder / "events.jsonl").records()
    formed = [event for event in events if event["event"] == "forming"]
    return any(event["workers"] < wanted for event in formed if event["stage"] == "train")


def _weights(run: Run) -> Arrays:
    job = load_job(run.folder / "job.yaml")
    origin = Origin(run.folder.name, job_digest(job))
    found, _ = CheckpointStore(checkpoints_of(job, run.folder), origin).final()
    if found is None:
        raise CheckpointError(f"{run.folder} holds no trained weights to compare.")
    return {name: value for name, value in found.arrays.items() if name.startswith("model/")}
