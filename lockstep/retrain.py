"""`lockstep retrain`: one run of a pipeline, from new data to a champion or a reason why not.

Owns what surrounds the steps: the lease, the memory of runs, who is told. The steps are
`lockstep.retrain_steps`, their order is `trainer.retrain`.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from configs.catalog import is_own_code, split_spec
from configs.errors import LockstepError, UserError, did_you_mean
from configs.load import load_pipeline
from configs.pipeline import Pipeline
from lockstep.follow import Interrupted, Listener, SilentListener
from lockstep.retrain_steps import PipelineSteps, StepContext
from lockstep.webhooks import post_webhook
from registry.database import Database
from registry.errors import LeaseHeld, LeaseLost
from registry.leases import Heartbeat, Leases, is_dead, this_process
from registry.pipelines import PipelineStore, Result
from registry.references import check_name
from registry.store import Registry
from trainer.metric_names import (
    is_mean_over_rows,
    is_more_better,
    kinds_of_metrics,
    metric_names,
)
from trainer.retrain import Course, Outcome

_UNREPEATED = {"schedule", "on_success", "on_failure", "lease_s", "job"}
_UNREPEATED_OF_JOB = {"cluster", "checkpoint"}
_STOPPED = 130


@dataclass(frozen=True)
class RetrainOptions:
    """How a pipeline is run, apart from what it is.

    Attributes:
        is_forced: Train even where nothing is new.
        is_fresh: Give an unfinished run up instead of going on with it.
        address: A Ray cluster to join; None for an embedded Ray.
        is_verbose: Show what TensorFlow and Ray log.
    """

    is_forced: bool = False
    is_fresh: bool = False
    address: str | None = None
    is_verbose: bool = False


class RetrainListener(Listener, Protocol):
    """What is told while a pipeline runs, and while it trains."""

    def run(self, run_id: str, given_up: str, resumed_at: str) -> None:
        """A run begins, or goes on at a step; an earlier one may have been given up."""

    def step(self, name: str, result: Result) -> None:
        """A step is done."""


class SilentRetrainListener(SilentListener):
    """Tells nothing."""

    def run(self, run_id: str, given_up: str, resumed_at: str) -> None:
        """Ignored."""

    def step(self, name: str, result: Result) -> None:
        """Ignored."""


def retrain(
    pipeline: Pipeline | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    options: RetrainOptions | None = None,
    listener: RetrainListener | None = None,
) -> dict[str, Any]:
    """Run a pipeline once.

    Goes on with a run that did not end. Blocks until a decision is there.

    Args:
        pipeline: A Pipeline, a mapping, or the path of a pipeline file.
        overrides: `a.b=value`, applied last.
        options: How to run it.
        listener: Is told of steps and of the training's progress.

    Returns:
        `pipeline`, `run_id`, `decision` ("promoted", "kept", "nothing_new"), `reasons`,
        `is_resumed`, `model`, `version` (the candidate's number, or None), `champion` (the number
        when the run began, or None), `checks`, `run_folder`, `report` and `warnings`.

    Raises:
        UserError: Something is wrong with pipeline, job or data; the run has ended.
        LeaseHeld: Another run of the pipeline is at work.
        LeaseLost: Another process took this run over.
        Interrupted: Ctrl-C; the next call goes on.
        EnvironmentFailure: Machines, processes or storage failed; the next call goes on.
    """
    loaded = load_pipeline(pipeline, overrides)
    options = options or RetrainOptions()
    listener = listener or SilentRetrainListener()
    run_ids: list[str] = []
    try:
        check_name(loaded.model_name)
        check_metrics(loaded)
        with closing(Database()) as database:
            outcome = _run_steps(loaded, database, options, listener, run_ids)
    except Exception as error:
        _tell_failure(loaded, error, run_ids, listener)
        raise
    return _result(loaded, outcome)


def _run_steps(
    loaded: Pipeline,
    database: Database,
    options: RetrainOptions,
    listener: RetrainListener,
    run_ids: list[str],
) -> Outcome:
    """Go through the steps under the pipeline's lease; `run_ids` receives the run's id."""
    leases = Leases(database)
    store = PipelineStore(database, leases)
    lease = leases.acquire(f"pipeline {loaded.name}", this_process(), loaded.lease_s, is_dead)
    with Heartbeat(leases, lease) as heartbeat:
        context = StepContext(
            loaded,
            pipeline_digest(loaded),
            store,
            Registry(database),
            heartbeat,
            listener,
            options.is_forced,
            options.address,
            options.is_verbose,
        )

        def steps_of(run_id: str) -> PipelineSteps:
            run_ids[:] = [run_id]
            return PipelineSteps(context, run_id)

        course = Course(loaded.name, context.digest, store, heartbeat, time.time)
        return course.run(_new_run_id(), steps_of, listener, options.is_fresh)


def pipeline_digest(pipeline: Pipeline) -> str:
    """Sixteen hex digits that are equal for pipelines that would come to the same decision.

    When it runs, who is told and how many processes train make no difference.
    """
    values = pipeline.model_dump(mode="json", exclude=_UNREPEATED)
    values["job"] = pipeline.job.model_dump(mode="json", exclude=_UNREPEATED_OF_JOB)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def check_metrics(pipeline: Pipeline) -> None:
    """Whether the gate names metrics that the job computes, where the job file alone can tell.

    Raises UserError.
    """
    compiled = pipeline.job.compile
    if compiled is None:
        return
    judges = (compiled.loss, *compiled.metrics, *compiled.weighted_metrics)
    own = [name for spec in judges if is_own_code(name := split_spec(spec)[0])]
    if own:
        raise UserError(
            f"job.compile names {own[0]}; a pipeline judges by losses and metrics of Keras, which "
            "every process can load. Take it out, or train with `lockstep train`."
        )
    known = metric_names(compiled)
    for name in pipeline.gate.metrics:
        if name not in known:
            raise UserError(
                f"gate names the metric {name!r}; the job computes {', '.join(known)}."
                f"{did_you_mean(name, known)} Add it to job.compile.metrics, or name another one."
            )
    kinds = kinds_of_metrics(compiled)
    for check in pipeline.gate.comparisons:
        kind = kinds.get(check.metric, check.metric)
        if check.confidence is not None and not is_mean_over_rows(kind):
            raise UserError(
                f"gate.no_worse_than_champion names {check.metric!r}, which is {kind}: no mean "
                "over rows, so that no confidence can be given. Set confidence: null to compare "
                "the values as they are."
            )
        if check.mode == "auto" and is_more_better(kind) != is_more_better(check.metric):
            more = "more" if is_more_better(kind) else "less"
            raise UserError(
                f"gate.no_worse_than_champion names {check.metric!r}, which is a {kind}: of that "
                f"{more} is better, and its name does not tell. Set mode: min (less is better) or "
                "mode: max."
            )


def _tell_failure(
    pipeline: Pipeline, error: Exception, run_ids: Sequence[str], listener: RetrainListener
) -> None:
    """Call the webhook for a failure that is this run's own."""
    is_stopped = isinstance(error, Interrupted) or getattr(error, "exit_status", 0) == _STOPPED
    if pipeline.on_failure is None or is_stopped or isinstance(error, LeaseHeld | LeaseLost):
        return
    is_explained = isinstance(error, LockstepError)
    body = {
        "event": "pipeline_failed",
        "pipeline": pipeline.name,
        "model": pipeline.model_name,
        "run_id": run_ids[0] if run_ids else None,
        "error": str(error) if is_explained else type(error).__name__,
        "exit_status": error.exit_status if isinstance(error, LockstepError) else 1,
    }
    problem = post_webhook(pipeline.on_failure, body)
    if problem:
        listener.warned(problem)


def _result(pipeline: Pipeline, outcome: Outcome) -> dict[str, Any]:
    done = outcome.done
    champion = done["discover"].get("champion")
    return {
        "pipeline": pipeline.name,
        "run_id": outcome.run_id,
        "decision": outcome.decision,
        "reasons": list(outcome.reasons),
        "is_resumed": outcome.is_resumed,
        "model": pipeline.model_name,
        "version": done.get("register", {}).get("version"),
        "champion": champion,
        "checks": done.get("decide", {}).get("checks", []),
        "run_folder": done["discover"]["folder"],
        "report": done.get("report", {}).get("path"),
        "warnings": [problem for problem in [done["notify"].get("problem")] if problem],
    }


def _new_run_id() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
