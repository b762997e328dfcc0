"""A training process from its first line to its last: one screen.

Runs in a fork of the template, once for each generation.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import keras

from cluster.channel import Channel
from cluster.template import Launch
from trainer.callbacks import CallbackRunner
from trainer.checkpoint import read_checkpoint
from trainer.curves import CurveWriter
from trainer.evaluate import best_of, constant_candidates
from trainer.learner import Learner, form_group
from trainer.loop import LoopParts, Report, TrainingLoop
from trainer.payloads import Snapshot, TrainingPayload
from trainer.state import capture

_LEAVE_TIMEOUT_S = 120.0


def main(channel: Channel, launch: Launch) -> None:
    """Train, evaluate on the test rows, report, and leave together with the others."""
    payload: TrainingPayload = launch.payload
    group = form_group(payload.job, launch.rank, launch.addresses)
    learner = Learner(payload.job, payload.data, group)
    loop = make_loop(
        payload, learner, channel.send, has_stop_request=lambda: channel.has_command("stop")
    )
    if payload.checkpoint is not None:
        arrays, meta = read_checkpoint(Path(payload.checkpoint))
        loop.restore(Snapshot(int(meta["step"]), arrays, meta))
    channel.send("ready", {"step": loop.progress.step})
    loop.run()
    if not loop.is_stopped:
        if "test" in learner.roles:
            _report_test(payload, learner, channel)
        if launch.rank == 0:
            channel.send("final", capture(learner.model))
    progress = loop.progress
    channel.send(
        "finished",
        {
            "weights_sha256": weights_sha256(learner.model),
            "step": progress.step,
            "rows_seen": progress.rows_seen_all,
            "is_stopped": loop.is_stopped,
            "ended_by": progress.ended_by,
            "times_s": dict(progress.times_s),
        },
    )
    channel.wait_for("leave", _LEAVE_TIMEOUT_S)


def make_loop(
    payload: TrainingPayload,
    learner: Learner,
    report: Report,
    has_stop_request: Callable[[], bool],
) -> TrainingLoop:
    """The loop of a rank, with the job's callbacks."""
    job, data, folder = payload.job, payload.data, Path(payload.run_folder)
    callbacks = CallbackRunner(
        job,
        learner.group,
        learner.model,
        learner.make_shadow,
        folder,
        data.plan.steps_per_epoch,
    )
    validate = None
    if "validation" in learner.roles:
        validate = functools.partial(learner.evaluate, "validation", None)
    return TrainingLoop(
        LoopParts(
            job=job,
            layout=data.layout,
            group=learner.group,
            model=learner.model,
            step=learner.step,
            share=learner.share,
            chunks=learner.chunks,
            callbacks=callbacks,
            curves=CurveWriter(folder),
            validate=validate,
            report=report,
            has_stop_request=has_stop_request,
        )
    )


def _report_test(payload: TrainingPayload, learner: Learner, channel: Channel) -> None:
    test = learner.evaluate("test")
    shape = learner.model.output_shape
    candidates = []
    if len(shape) == 2:
        candidates = constant_candidates(payload.data.scans["train"].constants, int(shape[-1]))
    constant = best_of([learner.evaluate("test", candidate) for candidate in candidates])
    if channel.rank == 0:
        channel.send("test", {"test": test, "constant": constant})


def weights_sha256(model: keras.Model) -> str:
    """A digest of this process's weights, equal on all ranks that agree bit for bit."""
    digest = hashlib.sha256()
    for name, array in capture(model).items():
        if name.startswith("model/"):
            digest.update(array.tobytes())
    return digest.hexdigest()
