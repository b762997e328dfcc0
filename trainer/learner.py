"""One rank's share of a job, put together: group, model, compiled steps, rows.

Training (`trainer.worker`) and verification (`trainer.verify`) both work with it.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from configs.schema import Job
from data_pipeline.blocks import BlockReader
from data_pipeline.features import InputLayout
from data_pipeline.plan import Share
from data_pipeline.reader import TrainingChunks
from trainer import keras_adapter
from trainer.batch import Scorer, global_moments
from trainer.evaluate import Evaluator, Hooks
from trainer.model import build_model
from trainer.payloads import PlannedData
from trainer.step import StepOptions, TrainingStep
from trainer.strategy import Group


class Learner:
    """What a rank trains and evaluates with. Creating one is a collective.

    Args:
        job: The job.
        data: Its planned data.
        group: Who takes part; see `form_group`.

    Attributes:
        group: Who takes part.
        model: Built and compiled under the group's strategy.
        step: Its compiled training step.
        share: This rank's rows of the training data.
        chunks: Their chunks.
        evaluator: Evaluates its model.
    """

    def __init__(self, job: Job, data: PlannedData, group: Group) -> None:
        self._job, self._data = job, data
        layout = data.layout
        self.group = group
        self._example = example_batch(layout, has_row_weights(job))
        with self.group.strategy.scope():
            self.model = self._build()
        if self.group.replicas > 1:
            for layer in keras_adapter.batch_normalizations(self.model):
                if job.train.sync_batch_norm or layer.synchronized:
                    keras_adapter.synchronize(layer, global_moments)
        scorer = Scorer(self.model, group, self._example[0], job.train.global_batch_size)
        has_weights = job.data.weight is not None
        self.share = Share(data.plan, group.rank, group.size, group.devices)
        options = StepOptions(
            self.share.most_rows,
            has_weights,
            job.train.reduce_dtype,
            job.train.class_weight,
            job.train.jit_compile,
        )
        self.step = TrainingStep(self.model, self.group, layout, scorer, options)
        self._readers = {
            role: BlockReader(source, layout, job.data.on_null, job.data.cache_mb * 2**20)
            for role, source in data.sources.items()
        }
        self.chunks = TrainingChunks(
            self.share, self._readers["train"], layout, job.train.epochs, scorer.needs_places
        )
        self.evaluator = Evaluator(
            self.model, self.group, layout, scorer, has_weights, job.train.global_batch_size
        )

    @property
    def roles(self) -> set[str]:
        """Roles that have rows: train, and maybe validation and test."""
        return set(self._readers)

    def evaluate(
        self,
        role: str,
        constant: Any = None,
        hooks: Hooks | None = None,
        most_rows: int | None = None,
        may_go_on: Callable[[], bool] | None = None,
    ) -> dict[str, float]:
        """Loss and metrics over the rows of a role; a collective. See `Evaluator.evaluate`.

        With `most_rows` the first blocks that hold up to so many.
        """
        block_rows = self._data.scans[role].block_rows
        if most_rows is not None:
            block_rows = first_blocks(block_rows, most_rows)
        return self.evaluator.evaluate(self._readers[role], block_rows, constant, hooks, may_go_on)

    def make_shadow(self) -> keras.Model:
        """The same model outside of the strategy."""
        return self._build()

    def _build(self) -> keras.Model:
        model = build_model(self._job, self._data.layout, self._data.statistics)
        keras_adapter.build_training_state(model, *self._example)
        return model


def first_blocks(block_rows: NDArray[np.int64], most_rows: int) -> NDArray[np.int64]:
    """The first blocks that hold up to `most_rows` rows, and at least one block."""
    blocks = int(np.searchsorted(np.cumsum(block_rows), most_rows, "right"))
    return block_rows[: max(1, blocks)]


def form_group(job: Job, rank: int, addresses: tuple[str, ...]) -> Group:
    """The job's group of workers; once in the life of a process."""
    cluster = job.cluster
    return Group(rank, addresses, cluster.cpus_per_worker, cluster.cpu_devices_per_worker)


def has_row_weights(job: Job) -> bool:
    """Whether rows count differently in training."""
    return job.data.weight is not None or job.train.class_weight is not None


def all_classes(class_weight: dict[int, float] | None, data: PlannedData) -> Any:
    """Class weights with every class named, as Keras wants them of a dataset; None for none."""
    if class_weight is None:
        return None
    size = data.layout.label_size
    classes = size if size > 1 else int(data.scans["train"].label_range[1]) + 1
    classes = max(classes, max(class_weight) + 1)
    return {index: class_weight.get(index, 1.0) for index in range(classes)}


def example_batch(layout: InputLayout, has_weights: bool) -> tuple[Any, Any, Any]:
    """Symbolic inputs, labels and weights of the shapes and types that training will see."""
    weights = keras.KerasTensor((None,), "float32") if has_weights else None
    return (
        keras.KerasTensor((None, *layout.input_shape), "float32"),
        keras.KerasTensor((None, layout.label_size), layout.label_dtype),
        weights,
    )
