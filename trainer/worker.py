"""A training process from its first line to its last: one screen.

Runs in a fork of the template, once for each generation.
"""

import hashlib
from pathlib import Path
from typing import Any

import keras

from cluster.channel import Channel
from cluster.template import Launch
from data_pipeline.blocks import BlockReader
from data_pipeline.features import InputLayout
from data_pipeline.plan import Share
from data_pipeline.reader import TrainingChunks
from trainer import keras_adapter
from trainer.callbacks import CallbackRunner
from trainer.checkpoint import read_checkpoint
from trainer.curves import CurveWriter
from trainer.evaluate import Evaluator, best_of, constant_candidates
from trainer.loop import LoopParts, TrainingLoop
from trainer.model import build_model
from trainer.payloads import Snapshot, TrainingPayload
from trainer.state import capture
from trainer.step import TrainingStep
from trainer.strategy import Group

_LEAVE_TIMEOUT_S = 120.0


def main(channel: Channel, launch: Launch) -> None:
    """Train, evaluate on the test rows, report, and leave together with the others."""
    payload: TrainingPayload = launch.payload
    job, data, layout = payload.job, payload.data, payload.data.layout
    group = Group(launch.rank, launch.addresses, job.cluster.cpus_per_worker)
    statistics = data.statistics
    with group.strategy.scope():
        model = build_model(job, layout, statistics)
        example = example_batch(layout, job.data.weight is not None)
        keras_adapter.build_training_state(model, *example)
    readers = {
        role: BlockReader(source, layout, job.data.on_null, job.data.cache_mb * 2**20)
        for role, source in data.sources.items()
    }
    share = Share(data.plan, launch.rank, group.size)
    has_weights = job.data.weight is not None
    evaluator = Evaluator(model, group, layout, has_weights, job.train.global_batch_size)

    def evaluate(role: str, constant: Any = None) -> dict[str, float]:
        return evaluator.evaluate(readers[role], data.scans[role].block_rows, constant)

    def make_shadow() -> keras.Model:
        shadow = build_model(job, layout, statistics)
        keras_adapter.build_training_state(shadow, *example)
        return shadow

    loop = TrainingLoop(
        LoopParts(
            job=job,
            layout=layout,
            group=group,
            model=model,
            step=TrainingStep(model, group, layout, has_weights, job.train.reduce_dtype),
            share=share,
            chunks=TrainingChunks(share, readers["train"], layout, job.train.epochs),
            callbacks=CallbackRunner(
                job,
                group,
                model,
                make_shadow,
                Path(payload.run_folder),
                data.plan.steps_per_epoch,
            ),
            curves=CurveWriter(Path(payload.run_folder)),
            validate=(lambda: evaluate("validation")) if "validation" in readers else None,
            report=channel.send,
            has_stop_request=lambda: channel.has_command("stop"),
        )
    )
    if payload.checkpoint is not None:
        arrays, meta = read_checkpoint(Path(payload.checkpoint))
        loop.restore(Snapshot(int(meta["step"]), arrays, meta))
    channel.send("ready", {"step": loop.progress.step})
    loop.run()
    if not loop.is_stopped:
        if "test" in readers:
            _report_test(payload, model, evaluate, channel)
        if launch.rank == 0:
            channel.send("final", capture(model))
    channel.send(
        "finished",
        {
            "weights_sha256": weights_sha256(model),
            "step": loop.progress.step,
            "rows_seen": loop.progress.rows_seen_all,
            "is_stopped": loop.is_stopped,
            "times_s": dict(loop.progress.times_s),
        },
    )
    channel.wait_for("leave", _LEAVE_TIMEOUT_S)


def _report_test(
    payload: TrainingPayload, model: keras.Model, evaluate: Any, channel: Channel
) -> None:
    test = evaluate("test")
    width = int(model.output_shape[-1]) if isinstance(model.output_shape, tuple) else 1
    candidates = []
    if len(model.output_shape) == 2:
        candidates = constant_candidates(payload.data.scans["train"].constants, width)
    constant = best_of([evaluate("test", candidate) for candidate in candidates])
    if channel.rank == 0:
        channel.send("test", {"test": test, "constant": constant})


def example_batch(layout: InputLayout, has_weights: bool) -> tuple[Any, Any, Any]:
    """Symbolic inputs, labels and weights of the shapes and types that training will see."""
    weights = keras.KerasTensor((None,), "float32") if has_weights else None
    return (
        keras.KerasTensor((None, *layout.input_shape), "float32"),
        keras.KerasTensor((None, layout.label_size), layout.label_dtype),
        weights,
    )


def weights_sha256(model: keras.Model) -> str:
    """A digest of this process's weights, equal on all ranks that agree bit for bit."""
    digest = hashlib.sha256()
    for name, array in capture(model).items():
        if name.startswith("model/"):
            digest.update(array.tobytes())
    return digest.hexdigest()
