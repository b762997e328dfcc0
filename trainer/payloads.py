"""What travels between driver, coordinator and workers: plain records, no TensorFlow."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from configs.schema import Job
from data_pipeline.features import InputLayout
from data_pipeline.plan import Plan
from data_pipeline.scan import Scan, Statistics
from data_pipeline.source import Source
from data_pipeline.storage import absolute

Arrays = dict[str, NDArray[Any]]

IN_MEMORY = "interval"
"""Reason of a snapshot that is not written."""


@dataclass(frozen=True)
class PlannedData:
    """All that is known of the data before training.

    Attributes:
        layout: How rows lie in memory.
        plan: The order of the training rows.
        sources: Files of each role.
        scans: What the pass over each role found.
    """

    layout: InputLayout
    plan: Plan
    sources: dict[str, Source]
    scans: dict[str, Scan]

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the training rows' files: names, sizes, and rows of each block."""
        files = [
            (Path(file.path).name, file.size_bytes, file.block_rows)
            for file in self.sources["train"].files
        ]
        kept = self.scans["train"].block_rows.tolist()
        return hashlib.sha256(repr((files, kept)).encode()).hexdigest()[:16]

    def with_absolute_paths(self) -> "PlannedData":
        """The same with files named absolutely: workers run in another folder."""
        sources = {
            role: replace(
                source,
                files=tuple(replace(file, path=absolute(file.path)) for file in source.files),
            )
            for role, source in self.sources.items()
        }
        return replace(self, sources=sources)

    @property
    def statistics(self) -> Statistics | None:
        """Normalisation over the training rows, or None."""
        return self.scans["train"].statistics


@dataclass(frozen=True)
class TrainingSettings:
    """A planned run, as the coordinator gets it.

    Attributes:
        job: The job.
        run_id: Names the run folder.
        run_folder: Absolute path.
        data: The planned data.
        checkpoints: Folder or URI of the run's checkpoints.
        is_resumed: Whether to go on from what is there.
        lost_at: When the coordinator before this one was lost, seconds since 1970; None without.
        files: What the lineage says of the data files, by role (`data_pipeline.provenance`).
        tracking_address: MLflow's address, maybe with a password; None without MLflow.
    """

    job: Job
    run_id: str
    run_folder: str
    data: PlannedData
    checkpoints: str
    is_resumed: bool
    lost_at: float | None = None
    files: dict[str, Any] = field(default_factory=dict)
    tracking_address: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class TrainingPayload:
    """What every rank of the stage "train" is given.

    Attributes:
        job: The job.
        data: The planned data.
        run_folder: Where callbacks write.
        has_snapshot: Whether a snapshot to go on from follows, by the command "snapshot".
    """

    job: Job
    data: PlannedData
    run_folder: str
    has_snapshot: bool = False


@dataclass(frozen=True)
class ExportPayload:
    """What the stage "export" is given; the weights follow, by the command "weights".

    Attributes:
        job: The job.
        layout: How raw columns become the model's input.
        statistics: Normalisation, or None.
        folder: Temporary folder to write.
        lineage: Goes into the manifest.
    """

    job: Job
    layout: InputLayout
    statistics: Statistics | None
    folder: str
    lineage: dict[str, Any]


@dataclass(frozen=True)
class VerifyPayload:
    """What every rank of a stage of a verification is given.

    Attributes:
        job: The job, with this stage's number of workers.
        data: The planned data.
        steps: How many steps to take.
    """

    job: Job
    data: PlannedData
    steps: int

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The steps `[first, last)` of the first epoch that are taken.

        The first ones, and in any case the last, which may be smaller than the others.
        """
        last = self.data.plan.steps_per_epoch
        if self.steps >= last:
            return [(0, last)]
        ends = (last - 1, last)
        return [(0, self.steps - 1), ends] if self.steps > 1 else [ends]


@dataclass(frozen=True)
class Snapshot:
    """Training state after a step.

    Attributes:
        step: Optimizer updates completed; the data cursor.
        arrays: `model/...`, `optimizer/...`, and `ranks/...` with one row a worker.
        meta: Plain values: reason, history, callbacks, rows seen.
    """

    step: int
    arrays: Arrays
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def is_durable(self) -> bool:
        """Whether it becomes a checkpoint on storage; others are kept in memory alone."""
        return bool(self.meta.get("reason") != IN_MEMORY)
