"""Verification inside training processes: the user's job for some steps, plainly and together.

`reference` runs Keras's own `fit` in one process on the global batches; `together` runs Lockstep's
step on any number of workers. Both report weights, losses, metrics and an evaluation, which
`trainer.certificate` compares.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cluster.channel import Channel
from cluster.template import Launch
from data_pipeline.blocks import BlockReader
from data_pipeline.plan import Share
from data_pipeline.reader import EvaluationChunks, EvaluationCut, TrainingChunks
from trainer import keras_adapter
from trainer.causes import causes_of_difference, is_in_any_order
from trainer.evaluate import metric_results, reset_metrics
from trainer.learner import (
    Learner,
    all_classes,
    example_batch,
    first_blocks,
    form_group,
    has_row_weights,
)
from trainer.loop import ChunkCursor, finish_training
from trainer.model import build_model
from trainer.payloads import VerifyPayload
from trainer.state import capture, seed_dropout
from trainer.step import Vote

MOST_EVALUATION_ROWS = 100_000
"""Rows of data.validation that are evaluated, up to a whole block."""

_LEAVE_TIMEOUT_S = 120.0


def reference(channel: Channel, launch: Launch) -> None:
    """Plain Keras, one process."""
    _run_plain(channel, launch.payload, is_reordered=False)


def reordered(channel: Channel, launch: Launch) -> None:
    """Plain Keras on the same batches, the rows of each in another order."""
    _run_plain(channel, launch.payload, is_reordered=True)


def _run_plain(channel: Channel, payload: VerifyPayload, is_reordered: bool) -> None:
    job, data = payload.job, payload.data
    model = build_model(job, data.layout, data.statistics)
    keras_adapter.build_training_state(model, *example_batch(data.layout, has_row_weights(job)))
    seed_dropout(model, job.train.seed, 0, 0)
    channel.send("ready")
    taken = payload.spans
    arrays = next(_global_batches(payload, taken, is_reordered))
    signature = tuple(tf.TensorSpec((None, *array.shape[1:]), array.dtype) for array in arrays)
    history = model.fit(
        tf.data.Dataset.from_generator(
            lambda: _global_batches(payload, taken, is_reordered), output_signature=signature
        ),
        steps_per_epoch=sum(last - first for first, last in taken),
        class_weight=all_classes(job.train.class_weight, data),
        shuffle=False,
        verbose=0,
    )
    evaluation = {}
    if "validation" in data.sources:
        rows = tf.data.Dataset.from_generator(
            lambda: _evaluation_batches(payload), output_signature=signature
        )
        evaluation = model.evaluate(rows, verbose=0, return_dict=True)
    logs = {name: values[-1] for name, values in history.history.items()}
    _report(channel, model, logs, evaluation)


def together(channel: Channel, launch: Launch) -> None:
    """This rank's part of the same steps on several workers."""
    payload: VerifyPayload = launch.payload
    job, data = payload.job, payload.data
    group = form_group(job, launch.rank, launch.addresses)
    learner = Learner(job, data, group)
    channel.send("ready")
    reset_metrics(learner.model, group)
    seed_dropout(learner.model, job.train.seed, 0, group.first_replica)
    for first, last in payload.spans:
        cursor = ChunkCursor(learner.chunks, data.layout, first)
        step = first
        while step < last:
            chunk, index, left = cursor.at(step)
            steps = min(left, last - step)
            may_be_empty = learner.share.may_be_empty(step, step + steps)
            learner.step.run(chunk, index, steps, may_be_empty, Vote(False, False, 0.0))
            step += steps
    logs = metric_results(learner.model, group)
    finish_training(learner.model, group)
    evaluation = {}
    if "validation" in learner.roles:
        evaluation = learner.evaluate("validation", most_rows=MOST_EVALUATION_ROWS)
    causes = causes_of_difference(learner.model, job, group.replicas)
    _report(channel, learner.model, logs, evaluation, causes)


def _report(
    channel: Channel,
    model: keras.Model,
    logs: dict[str, float],
    evaluation: dict[str, float],
    causes: Sequence[str] = (),
) -> None:
    if channel.rank == 0:
        body = {
            "arrays": capture(model),
            "logs": logs,
            "evaluation": evaluation,
            "causes": list(causes),
            "is_in_any_order": is_in_any_order(model),
        }
        channel.send("outcome", body)
    channel.send("finished")
    channel.wait_for("leave", _LEAVE_TIMEOUT_S)


def _global_batches(
    payload: VerifyPayload, taken: Sequence[tuple[int, int]], is_reordered: bool
) -> Iterator[tuple[Any, ...]]:
    """Inputs, labels and maybe weights of each step, as one worker would have them."""
    rng = np.random.default_rng(payload.job.train.seed)
    job, data = payload.job, payload.data
    reader = BlockReader(data.sources["train"], data.layout, job.data.on_null)
    chunks = TrainingChunks(Share(data.plan, 0, 1), reader, data.layout, 1)
    for first, last in taken:
        step = first
        while step < last:
            number, index = chunks.chunk_of(step)
            arrays = chunks.assemble(number)
            left = min(len(arrays[3]) - 1 - index, last - step)
            for batch in _steps(arrays, index, index + left, job.data.weight is not None):
                if is_reordered:
                    order = rng.permutation(len(batch[0]))
                    yield tuple(array[order] for array in batch)
                else:
                    yield batch
            step += left


def _evaluation_batches(payload: VerifyPayload) -> Iterator[tuple[Any, ...]]:
    job, data = payload.job, payload.data
    reader = BlockReader(data.sources["validation"], data.layout, job.data.on_null)
    block_rows = first_blocks(data.scans["validation"].block_rows, MOST_EVALUATION_ROWS)
    cut = EvaluationCut(0, 1, job.train.global_batch_size)
    chunks = EvaluationChunks(block_rows, reader, data.layout, cut)
    for number in range(chunks.chunks):
        arrays = chunks.assemble(number)
        yield from _steps(arrays, 0, len(arrays[3]) - 1, job.data.weight is not None)


def _steps(arrays: Any, first: int, last: int, has_weights: bool) -> Iterator[tuple[Any, ...]]:
    inputs, labels, weights, offsets = arrays[:4]
    for index in range(first, last):
        rows = slice(offsets[index], offsets[index + 1])
        yield (inputs[rows], labels[rows], *((weights[rows],) if has_weights else ()))
