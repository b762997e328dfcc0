"""What makes a result depend on the number of workers, by design and not by mistake.

Everything else equals Keras's single-process training up to the order of floating-point sums.
"""

from typing import Any

import keras

from configs.schema import Job
from trainer import keras_adapter


def causes_of_difference(model: keras.Model, job: Job, replicas: int) -> list[str]:
    """Sentences that name the layers; empty where results do not depend on the workers."""
    if replicas == 1:
        return []
    causes = []
    plain = [
        layer.name
        for layer in keras_adapter.batch_normalizations(model)
        if layer.trainable and not layer.synchronized and not job.train.sync_batch_norm
    ]
    if plain:
        causes.append(
            f"BatchNormalization ({_names(plain)}) normalises each worker's part of a batch by its "
            "own statistics; train.sync_batch_norm: true uses those of the whole batch."
        )
    random = [layer.name for layer in keras_adapter.random_layers(model)]
    if random:
        causes.append(f"random layers ({_names(random)}) draw another mask on each worker.")
    if job.train.reduce_dtype != "float32":
        causes.append(
            f"train.reduce_dtype: {job.train.reduce_dtype} rounds each worker's gradients before "
            "they are summed."
        )
    if keras_adapter.computes_in_half_precision(model):
        causes.append(
            "layers compute in half precision: each worker's gradients are rounded to it before "
            "they are summed."
        )
    return causes


def is_in_any_order(model: keras.Model) -> bool:
    """Whether the rows of a batch may change places without another result, but for rounding."""
    return (
        not keras_adapter.random_layers(model)
        and keras_adapter.is_row_wise_loss(model)
        and not keras_adapter.own_metrics(model)
    )


def _names(names: list[Any]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
