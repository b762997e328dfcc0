"""A training process from its first line to its last: one screen.

Runs in a fork of the template, once for each generation.
"""

import functools
import hashlib
from pathlib import Path

import keras

from cluster.channel import Channel
from cluster.template import Launch
from trainer.callbacks import CallbackRunner
from trainer.curves import CurveWriter
from trainer.evaluate import best_of, constant_candidates
from trainer.learner import Learner, form_group
from trainer.loop import LoopParts, TrainingLoop
from trainer.payloads import TrainingPayload
from trainer.snapshots import Link
from trainer.state import capture

_LEAVE_TIMEOUT_S = 120.0
_SNAPSHOT_TIMEOUT_S = 120.0


def main(channel: Channel, launch: Launch) -> None:
    """Train, evaluate on the test rows, report, and leave together with the others."""
    payload: TrainingPayload = launch.payload
    channel.mark("forming")
    group = form_group(payload.job, launch.rank, launch.addresses)
    channel.heed_sigterm()  # TensorFlow's coordination service has a handler of its own
    channel.mark("building")
    learner = Learner(payload.job, payload.data, group)
    learner.evaluator.mark = lambda: channel.mark("evaluation_rows")
    loop = make_loop(payload, learner, channel)
    if payload.has_snapshot:
        loop.restore(channel.take("snapshot", _SNAPSHOT_TIMEOUT_S))
    channel.send("ready", {"step": loop.progress.step})
    loop.run()
    if not loop.is_stopped:
        if "test" in learner.roles:
            _report_test(payload, learner, channel)
        if launch.rank == 0:
            channel.send_large("final", capture(learner.model))
    loop.report_times()
    progress = loop.progress
    channel.send(
        "paused" if loop.is_stopped else "finished",
        {
            "weights_sha256": weights_sha256(learner.model),
            "step": progress.step,
            "rows_seen": progress.rows_seen_all,
            "ended_by": progress.ended_by,
        },
    )
    channel.wait_for("leave", _LEAVE_TIMEOUT_S)


def make_loop(payload: TrainingPayload, learner: Learner, link: Link) -> TrainingLoop:
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
        validate = functools.partial(learner.evaluate, "validation")
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
            link=link,
        )
    )


def _report_test(payload: TrainingPayload, learner: Learner, channel: Channel) -> None:
    channel.mark("evaluation")
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
