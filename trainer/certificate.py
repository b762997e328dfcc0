"""The parity certificate: how far a job on several workers is from plain Keras, and why.

A delegate of `cluster.coordinator` that runs the stages of a verification and compares what they
report. No TensorFlow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.channel import Message
from cluster.coordinator import Stage
from cluster.errors import GangFailure
from configs.schema import Job
from trainer.payloads import PlannedData, VerifyPayload

TOLERANCE = 4e-5
"""Greatest d with |a - b| <= d + d |b| that counts as equal."""

_ROUNDING = 4.0
"""How many times the difference of plain Keras from itself, with the rows of each batch in another
order, still counts as the order of floating-point sums: it is a sample of something random."""

_PLAIN, _REORDERED = "plain Keras", "plain Keras, rows of each batch reordered"

Verdict = Literal["equal", "differs as expected", "differs"]


@dataclass(frozen=True)
class VerifySettings:
    """A planned verification, as the coordinator gets it.

    Attributes:
        job: The job.
        data: Its planned data.
        workers: Numbers of workers to compare with plain Keras.
        steps: Steps to take.
    """

    job: Job
    data: PlannedData
    workers: tuple[int, ...]
    steps: int


class Verification:
    """Stages "plain" and one for each number of workers; the result is the certificate."""

    def __init__(self, settings: VerifySettings, emit: Callable[[dict[str, Any]], None]) -> None:
        self._settings = settings
        self._emit = emit
        self._stages = [
            Stage(_PLAIN, 1, "trainer.verify:reference"),
            *(
                Stage(f"{workers} workers", workers, "trainer.verify:together")
                for workers in settings.workers
            ),
        ]
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._running = ""

    def next_stage(self) -> Stage | None:
        """Plain Keras first, then each number of workers.

        Where something differs, plain Keras once more with the rows of its batches in another
        order, to see how far rounding alone takes it; not where their order has a meaning.
        """
        if self._stages:
            return self._stages.pop(0)
        is_open = _REORDERED not in self._outcomes and not self._are_all_within(TOLERANCE)
        if is_open and self._outcomes[_PLAIN]["is_in_any_order"]:
            return Stage(_REORDERED, 1, "trainer.verify:reordered")
        return None

    def begin(self) -> int:
        """A verification is new."""
        return 0

    def attachment(self, stage: Stage) -> tuple[str, Any] | None:
        """Nothing."""
        return None

    def position(self) -> int:
        """Stages that are done."""
        return len(self._outcomes)

    def payload(self, stage: Stage, generation: int, workers: int) -> Any:
        """The job with this stage's number of workers."""
        self._running = stage.name
        job = self._settings.job
        cluster = job.cluster.model_copy(update={"workers": stage.workers})
        job = job.model_copy(update={"cluster": cluster})
        return VerifyPayload(job, self._settings.data, self._settings.steps)

    def on_message(self, message: Message) -> None:
        """Keep what a stage found."""
        if message.kind == "outcome":
            self._outcomes[self._running] = message.body
            self._emit({"event": "verified", "stage": self._running})

    def on_event(self, event: dict[str, Any]) -> None:
        """Pass on."""
        self._emit(event)

    def on_failure(self, failure: GangFailure, silent_s: float) -> None:
        """Nothing is kept of it: a stage that is run again gives the same."""

    def on_stacks(self, generation: int, stacks: dict[int, str]) -> None:
        """The logs are in the folder that stays where something fails."""

    def result(self, stopped: str | None) -> dict[str, Any]:
        """The certificate."""
        if stopped:
            return {"verdict": None, "stopped_by": stopped}
        plain, reordered = self._outcomes[_PLAIN], self._outcomes.get(_REORDERED)
        rounding = None if reordered is None else differences(plain, reordered)
        comparisons = [
            {"workers": workers, **compare(plain, self._of(workers), rounding)}
            for workers in self._settings.workers
        ]
        order = ["equal", "differs as expected", "differs"]
        worst = max((each["verdict"] for each in comparisons), key=order.index)
        plan = self._settings.data.plan
        return {
            "verdict": worst,
            "job": self._settings.job.name,
            "steps": min(self._settings.steps, plan.steps_per_epoch),
            "global_batch_size": plan.global_batch_size,
            "tolerance": TOLERANCE,
            "rounding": rounding,
            "comparisons": comparisons,
        }

    def _of(self, workers: int) -> dict[str, Any]:
        return self._outcomes[f"{workers} workers"]

    def _are_all_within(self, tolerance: float) -> bool:
        plain = self._outcomes[_PLAIN]
        found = [differences(plain, self._of(workers)) for workers in self._settings.workers]
        return all(
            value <= tolerance
            for each in found
            for values in each.values()
            for value in values.values()
        )

    def failed(self, error: Exception) -> None:
        """Nothing to record."""


Differences = dict[str, dict[str, float]]
"""By kind (layers, training, evaluation) and name."""


def differences(plain: Mapping[str, Any], other: Mapping[str, Any]) -> Differences:
    """Greatest differences by layer (the optimizer's state counts as one), log and metric."""
    layers: dict[str, float] = {}
    pairs = zip(plain["arrays"].items(), other["arrays"].values(), strict=True)
    for (name, expected), found in pairs:
        kind, _, path = name.split("/", 2)
        layer = "optimizer" if kind == "optimizer" else str(Path(path).parent)
        layers[layer] = max(layers.get(layer, 0.0), difference(found, expected))
    return {
        "layers": layers,
        "training": _of_metrics(plain["logs"], other["logs"]),
        "evaluation": _of_metrics(plain["evaluation"], other["evaluation"]),
    }


def compare(
    plain: Mapping[str, Any], together: Mapping[str, Any], rounding: Differences | None
) -> dict[str, Any]:
    """Differences of several workers from plain Keras, their causes, and the verdict.

    Args:
        plain: What plain Keras gave.
        together: What the workers gave.
        rounding: How far plain Keras is from itself with the rows of each batch in another order.
    """
    found = differences(plain, together)
    causes = list(together["causes"])
    allowed = {
        (kind, name): max(TOLERANCE, _ROUNDING * rounding[kind][name] if rounding else 0.0)
        for kind, values in found.items()
        for name in values
    }
    beyond = [
        name
        for kind, values in found.items()
        for name, value in values.items()
        if not value <= allowed[kind, name]  # a NaN is not equal
    ]
    loose = [
        name
        for kind, values in found.items()
        for name, value in values.items()
        if TOLERANCE < value <= allowed[kind, name]
    ]
    if loose:
        causes.append(
            f"the order of floating-point sums ({', '.join(loose)}): plain Keras differs from "
            "itself by as much when the rows of its batches change places. Gradients there are "
            "close to zero, as of a bias in front of a normalisation, and the optimizer scales "
            "them up."
        )
    verdict: Verdict = "equal"
    if beyond:
        verdict = "differs as expected" if together["causes"] else "differs"
    greatest = max(value for values in found.values() for value in values.values())
    return {"verdict": verdict, "greatest": greatest, **found, "causes": causes}


def difference(found: Any, expected: Any) -> float:
    """The least d with |a - b| <= d + d |b| everywhere; infinite for a NaN in one of them only."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if not a.size:
        return 0.0
    with np.errstate(invalid="ignore"):  # infinities
        apart = np.abs(a - b) / (1 + np.abs(b))
    same = (np.isnan(a) & np.isnan(b)) | (a == b)
    apart = np.where(same, 0.0, np.where(np.isfinite(apart), apart, np.inf))
    return float(apart.max())


def _of_metrics(plain: Mapping[str, float], together: Mapping[str, float]) -> dict[str, float]:
    names: Sequence[str] = sorted({*plain, *together})
    return {
        name: difference(together.get(name, np.nan), plain[name]) if name in plain else np.inf
        for name in names
    }
