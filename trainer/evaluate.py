"""Distributed evaluation: every row counted once, by whichever worker holds it."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from data_pipeline.blocks import BlockReader
from data_pipeline.features import InputLayout
from data_pipeline.reader import ChunkRows, EvaluationChunks, chunk_dataset
from data_pipeline.scan import LabelSummary
from trainer import keras_adapter
from trainer.step import EvaluationStep
from trainer.strategy import Group

_EVALUATION_ROWS = 512


class Evaluator:
    """Evaluates a model on rows that are split between the workers, in file order.

    Args:
        model: The model under the group's strategy.
        group: Who takes part; every rank must call `evaluate`.
        layout: How the rows lie in memory.
        has_weights: Whether rows have weights.
        global_batch_size: Rows of a training step; evaluation uses no smaller parts, and the same
            batches where the loss depends on them.
    """

    def __init__(
        self,
        model: keras.Model,
        group: Group,
        layout: InputLayout,
        has_weights: bool,
        global_batch_size: int,
    ) -> None:
        self._model = model
        self._group = group
        self._layout = layout
        self._step = EvaluationStep(model, group, layout, has_weights)
        self._batch_rows = max(-(-global_batch_size // group.size), _EVALUATION_ROWS)
        if keras_adapter.depends_on_batches(model):
            self._batch_rows = global_batch_size

    def evaluate(
        self, reader: BlockReader, block_rows: NDArray[np.int64], constant: Any = None
    ) -> dict[str, float]:
        """Loss and metrics over all rows, the same on each rank. A collective.

        Args:
            reader: Reads the role's blocks.
            block_rows: `(blocks,)`, rows that count in each.
            constant: `(outputs,)`: evaluate this constant prediction, not the model's.
        """
        chunks = EvaluationChunks(
            block_rows, reader, self._layout, self._group.rank, self._group.size, self._batch_rows
        )
        self._model.reset_metrics()
        for arrays in chunk_dataset(chunks, self._layout, 0):
            self._step.run(ChunkRows(*arrays), constant)
        return metric_results(self._model)


def metric_results(model: keras.Model) -> dict[str, float]:
    """Present values of loss and metrics; under several workers a collective."""
    results: Mapping[str, Any] = model.get_metrics_result()
    return {name: _plain(value) for name, value in results.items()}


def _plain(value: Any) -> float:
    array = np.asarray(value, np.float64)
    return float(array) if array.ndim == 0 else float(array.mean())


def constant_candidates(labels: LabelSummary, output_width: int) -> list[NDArray[np.float32]]:
    """Constant predictions worth comparing with: mean and median, or the shares of the classes.

    Which is best depends on the metric: the mean has the least squared, the median the least
    absolute error; for classes the shares have the least cross-entropy and name the most frequent
    class.
    """
    if labels.frequencies is not None and output_width > 1:
        shares = np.full(output_width, 1e-7, np.float32)
        known = labels.frequencies[:output_width]
        shares[: len(known)] = np.maximum(known, 1e-7)
        return [shares]
    return [
        np.broadcast_to(value, (output_width,)).astype(np.float32)
        for value in (labels.mean, labels.median)
        if len(value) in (1, output_width)
    ]


_MORE_IS_BETTER = (
    *("accuracy", "auc", "precision", "recall", "f1", "fbeta", "r2", "iou", "cosine"),
    *("true_positives", "true_negatives", "sensitivity", "specificity", "correlation"),
)


def best_of(results: list[dict[str, float]]) -> dict[str, float]:
    """For each metric the best value that any of several predictions reached."""
    best: dict[str, float] = {}
    for name in results[0] if results else ():
        values = [result[name] for result in results]
        more = any(word in name.lower() for word in _MORE_IS_BETTER)
        best[name] = max(values) if more else min(values)
    return best
