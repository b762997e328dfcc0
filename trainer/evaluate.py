"""Distributed evaluation: every row counted once, by whichever worker holds it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import keras
import numpy as np
from numpy.typing import NDArray

from data_pipeline.blocks import BlockReader
from data_pipeline.dataset import chunk_dataset
from data_pipeline.features import InputLayout
from data_pipeline.reader import ChunkRows, EvaluationChunks, EvaluationCut
from data_pipeline.scan import LabelSummary
from trainer import keras_adapter
from trainer.batch import Scorer
from trainer.metric_names import is_more_better
from trainer.step import EvaluationStep
from trainer.strategy import Group

_EVALUATION_ROWS = 512


class Abandoned(Exception):
    """An evaluation that all ranks have left together before its end."""


class Hooks(Protocol):
    """What is told while a model is validated; see `trainer.callbacks`."""

    def on_test_begin(self) -> None:
        """Before the first row."""

    def on_test_batch_begin(self, step: int) -> None:
        """Before a call of the compiled loop."""

    def on_test_batch_end(self, step: int, logs: dict[str, float]) -> None:
        """After a call of the compiled loop."""

    def on_test_end(self, logs: dict[str, float]) -> None:
        """After the last row."""

    @property
    def wants_test_batches(self) -> bool:
        """Whether hooks of batches do anything; the same on all ranks."""
        ...


class Evaluator:
    """Evaluates a model on rows that are split between the workers, in file order.

    Args:
        model: The model under the group's strategy.
        group: Who takes part; every rank must call `evaluate`.
        layout: How the rows lie in memory.
        scorer: Of this model in this group.
        has_weights: Whether rows have weights.
        global_batch_size: Rows of a training step; evaluation uses no smaller parts, and the same
            batches where results depend on them.

    Attributes:
        mark: Called before each chunk of rows; to be replaced by whoever wants to know.
    """

    def __init__(
        self,
        model: keras.Model,
        group: Group,
        layout: InputLayout,
        scorer: Scorer,
        has_weights: bool,
        global_batch_size: int,
    ) -> None:
        self.mark: Callable[[], None] = lambda: None
        self._model = model
        self._group = group
        self._layout = layout
        self._step = EvaluationStep(model, group, layout, scorer, has_weights)
        batch_rows = max(-(-global_batch_size // group.size), _EVALUATION_ROWS)
        if scorer.depends_on_batches:
            batch_rows = global_batch_size
        self._cut = EvaluationCut(group.rank, group.size, batch_rows, scorer.needs_places)

    def evaluate(
        self,
        reader: BlockReader,
        block_rows: NDArray[np.int64],
        constant: Any = None,
        hooks: Hooks | None = None,
        may_go_on: Callable[[], bool] | None = None,
    ) -> dict[str, float]:
        """Loss and metrics over all rows, the same on each rank. A collective.

        Args:
            reader: Reads the role's blocks.
            block_rows: `(blocks,)`, rows that count in each.
            constant: `(outputs,)`: evaluate this constant prediction, not the model's.
            hooks: Is told, as `fit` tells callbacks of validation; batch hooks come once a call.
            may_go_on: Asked before each chunk; where one rank's says no, all leave.

        Raises:
            Abandoned: A rank was not to go on.
        """
        chunks = EvaluationChunks(block_rows, reader, self._layout, self._cut)
        if hooks is not None:
            hooks.on_test_begin()
        reset_metrics(self._model, self._group)
        arrived = iter(chunk_dataset(chunks, self._layout, 0))
        if hooks is not None and hooks.wants_test_batches:
            self._run_in_step(arrived, chunks.chunks, constant, hooks, may_go_on)
        else:
            self._run(arrived, constant, may_go_on)
        results = metric_results(self._model, self._group)
        if hooks is not None:
            hooks.on_test_end(results)
        return results

    def _run(
        self, arrived: Iterator[Any], constant: Any, may_go_on: Callable[[], bool] | None
    ) -> None:
        """Each rank by itself, but where every batch is shared."""
        is_leaving = False
        for arrays in arrived:
            self.mark()
            if may_go_on is not None:
                is_leaving = not may_go_on()
                if self._cut.is_batch_shared:
                    is_leaving = self._is_any(is_leaving)
            if is_leaving:
                break
            self._step.run(ChunkRows(*arrays), constant)
        if may_go_on is not None and self._is_any(is_leaving):
            raise Abandoned

    def _is_any(self, is_so: bool) -> bool:
        """Whether it is so on any rank; a collective."""
        return bool(self._group.sum(np.array([is_so], np.int64))[0])

    def _run_in_step(
        self,
        arrived: Iterator[Any],
        chunks: int,
        constant: Any,
        hooks: Hooks,
        may_go_on: Callable[[], bool] | None,
    ) -> None:
        """Chunk by chunk on all ranks together, so that hooks can be told in between."""
        calls = int(self._group.gather(np.array([chunks], np.int64)).max())
        at = 0
        for _ in range(calls):
            self.mark()
            if may_go_on is not None and self._is_any(not may_go_on()):
                raise Abandoned
            hooks.on_test_batch_begin(at)
            arrays = next(arrived, None)
            steps = 0
            if arrays is not None:
                chunk = ChunkRows(*arrays)
                self._step.run(chunk, constant)
                steps = int(chunk.offsets.shape[0]) - 1
            at += int(self._group.gather(np.array([steps], np.int64)).max())
            hooks.on_test_batch_end(at - 1, metric_results(self._model, self._group))


def metric_results(model: keras.Model, group: Group) -> dict[str, float]:
    """Present values of loss and metrics by name; under several workers a collective.

    Metrics that are sums over parts are read as sums over all replicas, others where they stand:
    every replica has seen every batch.
    """
    with group.copies(keras_adapter.own_metric_variables(model), 0):
        return _flat(model.get_metrics_result())  # a result may be a variable: read it here


def reset_metrics(model: keras.Model, group: Group) -> None:
    """Forget all rows; not a collective."""
    own = keras_adapter.own_metrics(model)
    for metric in keras_adapter.all_metrics(model):
        if metric not in own:
            metric.reset_state()
    for device in range(group.devices):
        with group.copies(keras_adapter.own_metric_variables(model), device):
            for metric in own:
                metric.reset_state()


def _flat(results: Mapping[str, Any]) -> dict[str, float]:
    """As Keras logs them: a metric with several values stands under their names, not its own."""
    flat: dict[str, float] = {}
    for name, value in results.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {name: _plain(value)}
    return flat


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


def best_of(results: list[dict[str, float]]) -> dict[str, float]:
    """For each metric the best value that any of several predictions reached."""
    best: dict[str, float] = {}
    for name in results[0] if results else ():
        values = [result[name] for result in results]
        best[name] = max(values) if is_more_better(name) else min(values)
    return best
