"""The Python side of the front door: `train`, and the run that it returns.

Also what the command line calls. Owns what comes before a run starts: check, plan, open. The rest
is `lockstep.follow`'s.
"""

import inspect
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.coordinator import RunSpec
from cluster.faults import FaultPlan
from cluster.gang import GangSpec
from cluster.handle import RunHandle
from cluster.runtime import Need, session
from cluster.secret_keeping import forwarded
from configs.errors import UserError
from configs.load import load_job
from configs.schema import Job
from data_pipeline.provenance import provenance_of_sources
from lockstep.follow import Interrupted, Listener, RunPlan, SilentListener, drain, follow
from lockstep.registration import Registration, origin_of
from trainer.certificate import VerifySettings
from trainer.files import write_json
from trainer.payloads import PlannedData, TrainingSettings
from trainer.preflight import open_sources, plan_data
from trainer.probe import IN_PROBE, start_probe
from trainer.run_folder import open_run_folder
from trainer.tracking import tracking_address

_PRELOAD = ("trainer.worker", "trainer.export")
_PRELOAD_VERIFY = ("trainer.verify",)


@dataclass(frozen=True)
class TrainOptions:
    """How a job is run, apart from what it is.

    Attributes:
        run_id: Name of the run folder; None for a new one.
        is_resume: Go on from the newest checkpoint.
        address: A Ray cluster to join; None for an embedded Ray.
        is_verbose: Show what TensorFlow and Ray log.
        chaos: A plan of faults to go through (docs/failures.md); nothing by default.
    """

    run_id: str | None = None
    is_resume: bool = False
    address: str | None = None
    is_verbose: bool = False
    chaos: str = ""


class Run:
    """A finished or interrupted run, read from its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    @property
    def version(self) -> str | None:
        """What the artifact was registered as, such as `flights/3`; None without."""
        version: str | None = self.summary.get("version")
        return version

    def record(self, facts: Mapping[str, Any]) -> None:
        """Add to summary.json what came after the run."""
        self.summary.update(facts)
        write_json(self.folder / "summary.json", self.summary)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Final metrics by role: train, validation, test, and constant (the best constant's)."""
        metrics: dict[str, dict[str, float]] = self.summary["metrics"]
        return metrics

    @property
    def history(self) -> dict[str, list[float]]:
        """Values of each epoch by name, as Keras's `History.history` has them."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        by_epoch = {record["epoch"]: record for record in map(json.loads, lines)}
        history: dict[str, list[float]] = {}
        for epoch in sorted(by_epoch):
            for name, value in by_epoch[epoch].items():
                if name not in ("epoch", "step", "epoch_s", "rows_per_s"):
                    history.setdefault(name, []).append(value)
        return history

    @property
    def artifact(self) -> Path:
        """The artifact's folder."""
        return self.folder / "artifact"

    def model(self) -> Any:
        """The trained Keras model; takes raw, unnormalised rows."""
        import keras

        return keras.saving.load_model(self.artifact / "model.keras")


def train(
    job: Job | Mapping[str, Any] | str | Path | Callable[..., Any],
    *,
    overrides: Sequence[str] = (),
    options: TrainOptions | None = None,
    listener: Listener | None = None,
    **sections: Any,
) -> Run:
    """Train a job to its end and return the run.

    Args:
        job: A Job, a mapping, the path of a job file, or a function that returns a compiled Keras
            model.
        overrides: `a.b=value`, applied last.
        options: How to run it.
        listener: Is told of the plan and of progress.
        **sections: With a function: the sections `data`, `train` and others of the job as
            mappings, and `name`.

    Raises:
        UserError: Something is wrong with the job; nothing was started.
        Interrupted: Ctrl-C; a checkpoint is kept.
        EnvironmentFailure: Machines or processes failed for good.
    """
    if os.environ.get(IN_PROBE):
        raise UserError(
            "train was called while a worker's process imported this file. Guard the call: "
            'if __name__ == "__main__": run = lockstep.train(...)'
        )
    options = options or TrainOptions()
    listener = listener or SilentListener()
    if callable(job):
        job = _job_from_function(job, sections)
    elif sections:
        raise UserError(f"{sorted(sections)} have no effect without a model function.")
    origin = origin_of(load_job(job, overrides))
    loaded = origin.job
    if options.chaos:
        FaultPlan.parse(options.chaos).check(loaded.cluster.workers)
    address = tracking_address(loaded.tracking)
    sources, layout = open_sources(loaded, listener.converting, listener.warned)
    probe = start_probe(loaded, layout)
    cluster = loaded.cluster
    need = Need(
        cluster.workers,
        cluster.cpus_per_worker,
        cluster.gpus_per_worker,
        cluster.standbys,
        cluster.min_workers or 0,
    )
    try:
        data = plan_data(loaded, sources, layout)
        # As training will see them; while it goes on, files may change.
        files = provenance_of_sources(data.with_absolute_paths().sources)
        registration = Registration(origin) if loaded.export.register else None
        # Ray comes up while the probe builds the model; no worker starts before both are done.
        with session(need, options.address, options.is_verbose) as warnings:
            facts = probe.facts(loaded.cluster.start_timeout_s)
            folder = open_run_folder(loaded, data, options.run_id, options.is_resume)
            plan = RunPlan(loaded, folder, data, facts)
            listener.planned(plan)
            for warning in (*facts.warnings, *_data_warnings(data), *warnings):
                listener.warned(warning)
            follow(_run_spec(plan, files, options.chaos, address), listener)
    finally:
        probe.kill()
    run = Run(folder.path)
    if registration is not None:
        run.record({"version": str(registration.register(run.summary))})
    return run


def verify(
    job: Job | Mapping[str, Any] | str | Path,
    *,
    workers: Sequence[int] = (2,),
    steps: int = 50,
    overrides: Sequence[str] = (),
    options: TrainOptions | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """The parity certificate of a job: plain Keras against several workers.

    Takes `steps` steps of the first epoch (its last, maybe smaller one among them) with Keras's own
    `fit` in one process and with each number of workers, evaluates, and compares weights, losses
    and metrics. Callbacks of the job are not called; nothing is kept.

    Returns:
        `verdict` ("equal", "differs as expected", "differs"), `tolerance`, and `comparisons` with
        the greatest differences by layer and metric, and the causes that are known.

    Raises:
        What `train` raises.
    """
    options = options or TrainOptions()
    listener = listener or SilentListener()
    if not workers or min(workers) < 1 or len(set(workers)) != len(workers):
        raise UserError(
            f"--workers received {list(workers)}; different numbers of 1 or more are allowed, such "
            "as 2,3."
        )
    if steps < 1:
        raise UserError(f"--steps received {steps}; 1 or more is allowed.")
    loaded = origin_of(load_job(job, [*overrides, f"cluster.workers={max(workers)}"])).job
    sources, layout = open_sources(loaded, listener.converting, listener.warned)
    probe = start_probe(loaded, layout)
    cluster = loaded.cluster
    need = Need(cluster.workers, cluster.cpus_per_worker, cluster.gpus_per_worker)
    try:
        data = plan_data(loaded, sources, layout)
        folder = tempfile.mkdtemp(prefix="lockstep-verify-")  # stays where something fails
        with session(need, options.address, options.is_verbose) as warnings:
            facts = probe.facts(cluster.start_timeout_s)
            for warning in (*facts.warnings, *_data_warnings(data), *warnings):
                listener.warned(warning)
            settings = VerifySettings(
                with_absolute_paths(loaded), data.with_absolute_paths(), tuple(workers), steps
            )
            gang = _gang_spec(loaded, f"verify-{secrets.token_hex(4)}", folder, _PRELOAD_VERIFY)
            spec = _spec(loaded, gang, "trainer.certificate:Verification", settings)
            certificate = drain(RunHandle(spec), listener)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        probe.kill()
    if certificate["verdict"] is None:
        raise Interrupted("stopped; there is no verdict.")
    return certificate


def _data_warnings(data: PlannedData) -> list[str]:
    warnings = []
    for role, scan in data.scans.items():
        if scan.dropped_rows:
            warnings.append(f"data.{role}: {scan.dropped_rows} rows with null or NaN are dropped.")
        for column, rows in scan.zeroed_rows.items():
            warnings.append(f"data.{role}: {rows} null or NaN in {column!r} count as zero.")
    return warnings


def _gang_spec(job: Job, name: str, log_dir: str, preload: tuple[str, ...]) -> GangSpec:
    cluster = job.cluster
    return GangSpec(
        name=f"lockstep-{name}-{secrets.token_hex(4)}",
        workers=cluster.workers,
        cpus=cluster.cpus_per_worker,
        gpus=cluster.gpus_per_worker,
        preload=preload,
        environment=_worker_environment(cluster.gpus_per_worker),
        log_dir=log_dir,
        start_timeout_s=cluster.start_timeout_s,
        min_workers=cluster.min_workers or cluster.workers,
        standbys=cluster.standbys,
        replace_timeout_s=cluster.replace_timeout_s,
    )


def _spec(job: Job, gang: GangSpec, delegate: str, settings: Any) -> RunSpec:
    cluster = job.cluster
    return RunSpec(
        gang,
        cluster.stall_after_s,
        cluster.max_failures,
        cluster.failure_window_s,
        delegate,
        settings,
    )


def _run_spec(plan: RunPlan, files: dict[str, Any], chaos: str, tracking: str | None) -> RunSpec:
    folder = plan.folder.path
    gang = _gang_spec(plan.job, plan.folder.run_id, str(folder / "logs"), _PRELOAD)
    settings = TrainingSettings(
        with_absolute_paths(plan.job),
        plan.folder.run_id,
        str(folder),
        plan.data.with_absolute_paths(),
        plan.folder.checkpoints,
        plan.folder.is_resumed,
        files=files,
        tracking_address=tracking,
    )
    spec = _spec(plan.job, gang, "trainer.supervisor:TrainingSupervisor", settings)
    return replace(spec, chaos=chaos, chaos_seed=plan.job.train.seed, environment=forwarded())


def with_absolute_paths(job: Job) -> Job:
    """The job with the user's files named absolutely: workers run in another folder."""
    model = job.model.model_copy(
        update={
            "builder": _absolute(job.model.builder),
            "layers": _absolute(job.model.layers),
            "file": str(Path(job.model.file).absolute()) if job.model.file else None,
        }
    )
    update: dict[str, Any] = {
        "model": model,
        "train": job.train.model_copy(update={"callbacks": _absolute(job.train.callbacks)}),
    }
    if job.compile is not None:
        named = {
            name: _absolute(getattr(job.compile, name))
            for name in ("optimizer", "loss", "metrics", "weighted_metrics")
        }
        update["compile"] = job.compile.model_copy(update=named)
    return job.model_copy(update=update)


def _absolute(value: Any) -> Any:
    """Names of the user's code, 'file.py:name', made absolute wherever they stand in a value."""
    if isinstance(value, list):
        return [_absolute(element) for element in value]
    if isinstance(value, dict):
        return {_absolute(key): _absolute(element) for key, element in value.items()}
    place, separator, attribute = value.partition(":") if isinstance(value, str) else ("", "", "")
    return f"{Path(place).absolute()}{separator}{attribute}" if place.endswith(".py") else value


def _worker_environment(gpus: int) -> dict[str, str]:
    environment = {
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1"),
        "TF_GRPC_REUSE_PORT": "1",
        "PYTHONUNBUFFERED": "1",
        IN_PROBE: "1",
        **forwarded(),
    }
    return environment if gpus else {**environment, "CUDA_VISIBLE_DEVICES": "-1"}


def _job_from_function(function: Callable[..., Any], sections: dict[str, Any]) -> dict[str, Any]:
    """A job whose builder is a function of the caller's, named by its file."""
    source = inspect.getsourcefile(function)
    name = getattr(function, "__qualname__", "")
    if source is None or not Path(source).exists() or not name.isidentifier():
        raise UserError(
            f"received {name or function!r}, which workers cannot find; a function at the top of a "
            "Python file is allowed. Move it there, outside of other functions and notebooks."
        )
    job = {"name": name.replace("_", "-"), **sections}
    return {**job, "model": {"builder": f"{Path(source).absolute()}:{name}"}}
