"""Engine A: plain Keras `fit` in one process, on the same global batches in the same order."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from configs.load import load_job
from data_pipeline.blocks import BlockReader
from tests.support.orders import row_order
from trainer.model import build_model, make
from trainer.preflight import open_sources, plan_data


def fit_plain(
    job_values: dict[str, Any], validation_batch_size: int = 512
) -> tuple[keras.Model, keras.callbacks.History]:
    """The job's model, trained by `fit`; validation and callbacks as the job says."""
    job = load_job(job_values)
    sources, layout = open_sources(job)
    data = plan_data(job, sources, layout)
    model = build_model(job, layout, data.statistics)
    rows = {
        role: _all_rows(BlockReader(s, layout, "error"), s, layout) for role, s in sources.items()
    }
    x, y, w = rows["train"]
    has_weights = job.data.weight is not None

    def batches() -> Any:
        for epoch in range(job.train.epochs):
            order = row_order(data.plan, epoch)
            for step in range(data.plan.steps_per_epoch):
                chosen = order[step * job.train.global_batch_size :][: job.train.global_batch_size]
                batch = (x[chosen], y[chosen]) + ((w[chosen],) if has_weights else ())
                yield batch

    shapes = [tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in (x, y, w)]
    dataset = tf.data.Dataset.from_generator(
        batches, output_signature=tuple(shapes[: 3 if has_weights else 2])
    )
    validation = None
    if "validation" in rows:
        validation = rows["validation"][: 3 if has_weights else 2]
    made = [make("callbacks", spec) for spec in job.train.callbacks]
    made = [make("callbacks", {c: {}}) if isinstance(c, str) else c for c in made]
    history = model.fit(
        dataset,
        epochs=job.train.epochs,
        steps_per_epoch=data.plan.steps_per_epoch,
        validation_data=validation,
        validation_batch_size=validation_batch_size,
        callbacks=made,
        shuffle=False,
        verbose=0,
    )
    return model, history


def _all_rows(reader: BlockReader, source: Any, layout: Any) -> tuple[Any, Any, Any]:
    blocks = [reader.read(number) for number in range(len(source.blocks))]
    columns = [np.concatenate(parts) for parts in zip(*(b.features for b in blocks), strict=True)]
    x = np.concatenate([column.reshape(source.rows, -1) for column in columns], axis=1)
    x = x.reshape(-1, *layout.input_shape).astype(np.float32, copy=False)
    y = np.concatenate([b.label for b in blocks])
    if blocks[0].weight is None:
        return x, y, np.ones(len(x), np.float32)
    return x, y, np.concatenate([b.weight for b in blocks])
