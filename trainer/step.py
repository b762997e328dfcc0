"""The step: Keras's own single-process step on a global batch, computed by all workers together.

Each replica takes its rows of the batch; its loss is scaled so that the sum over replicas is the
loss of the whole batch (the divisor is the global row count, so uneven parts are exact, and a part
may be empty); gradients are summed before the optimizer sees them, so clipping acts on the global
gradient. Many steps run in one call of a compiled function: Python is not on the per-step path.
"""

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from data_pipeline.features import InputLayout
from data_pipeline.reader import ChunkRows, chunk_signature
from trainer import keras_adapter
from trainer.strategy import Group


@dataclass(frozen=True)
class CallResult:
    """What all ranks know after a call, the same on each.

    Attributes:
        loss_sum: Sum over the call's steps of loss x global rows.
        stop_votes: Ranks that asked to stop.
        seconds: Mean over ranks of the seconds that were passed in.
    """

    loss_sum: float
    stop_votes: int
    seconds: float


class TrainingStep:
    """Compiled training steps of one model in one group.

    Args:
        model: Built and compiled inside the group's scope.
        group: Who takes part.
        layout: Types and shapes of rows.
        has_weights: Whether rows have weights of their own.
        reduce_dtype: Type in which gradients travel, "float32" or "bfloat16".
    """

    def __init__(
        self,
        model: keras.Model,
        group: Group,
        layout: InputLayout,
        has_weights: bool,
        reduce_dtype: str,
    ) -> None:
        self._model = model
        self._group = group
        self._has_weights = has_weights
        self._reduce_dtype = tf.as_dtype(reduce_dtype)
        self._variables = list(model.trainable_variables)
        self._moving = keras_adapter.moving_statistics(model) if group.size > 1 else []
        self._is_mean = keras_adapter.is_mean_loss(model)
        self._total, self._count = keras_adapter.loss_tracker_variables(model)
        keras_adapter.leave_reduction_to_caller(model.optimizer)
        self._signature = chunk_signature(layout)
        self._calls: dict[bool, Any] = {}

    def run(
        self, chunk: ChunkRows, first: int, steps: int, may_be_empty: bool, vote: tuple[bool, float]
    ) -> CallResult:
        """Train on `steps` steps of a chunk, from its step `first` on. A collective.

        Args:
            chunk: This worker's rows.
            first: Index of the first step in the chunk.
            steps: How many.
            may_be_empty: Whether some rank may have a step without rows; the same on all ranks.
            vote: Whether this rank wants to stop, and seconds to be averaged.
        """
        votes = tf.constant([float(vote[0]), vote[1]], tf.float32)
        span = tf.constant([first, first + steps], tf.int32)
        rows = (chunk.inputs, chunk.labels, chunk.weights, chunk.offsets, chunk.global_rows)
        reduced = self._compiled(may_be_empty)(rows, span, votes).numpy()
        return CallResult(
            float(reduced[0]), round(float(reduced[1])), float(reduced[2]) / self._group.size
        )

    def _compiled(self, may_be_empty: bool) -> Any:
        """The compiled loop; one that allows for empty parts is traced only where it is needed."""
        if may_be_empty not in self._calls:

            def run_steps(rows: Any, span: tf.Tensor, votes: tf.Tensor) -> tf.Tensor:
                return self._run_steps(rows, span, votes, may_be_empty)

            signature = (
                self._signature,
                tf.TensorSpec((2,), tf.int32),
                tf.TensorSpec((2,), tf.float32),
            )
            self._calls[may_be_empty] = tf.function(run_steps, input_signature=signature)
        return self._calls[may_be_empty]

    def _run_steps(
        self, rows: tuple[tf.Tensor, ...], span: tf.Tensor, votes: tf.Tensor, may_be_empty: bool
    ) -> tf.Tensor:
        inputs, labels, weights, offsets, global_rows = rows
        loss_sum = tf.zeros(())
        for index in tf.range(span[0], span[1]):
            begin, end = offsets[index], offsets[index + 1]
            part = (inputs[begin:end], labels[begin:end], weights[begin:end])
            loss = self._group.strategy.run(
                self._step, args=(*part, global_rows[index], may_be_empty)
            )
            loss_sum += self._local(loss) * global_rows[index]
        own = tf.concat([loss_sum[None], votes], axis=0)
        if self._group.size == 1:
            return own
        return self._local(self._group.strategy.run(self._reduce, args=(own,)))

    def _step(
        self,
        inputs: tf.Tensor,
        labels: tf.Tensor,
        weights: tf.Tensor,
        global_rows: tf.Tensor,
        may_be_empty: bool,
    ) -> tf.Tensor:
        kinds: list[Any] = []

        def learn() -> tuple[list[Any], tf.Tensor]:
            gradients, loss = self._gradients(inputs, labels, weights, global_rows)
            kinds[:] = gradients
            return [gradient for gradient in gradients if gradient is not None], loss

        if may_be_empty and self._group.replicas > 1:
            # The first branch is traced first: the second gives gradients of the same kinds.
            present, loss = tf.cond(
                tf.shape(inputs)[0] > 0, learn, lambda: self._nothing_learned(kinds)
            )
        else:
            present, loss = learn()
        found = iter(present)
        gradients = [None if kind is None else next(found) for kind in kinds]
        gradients = self._reduced(gradients, tf.shape(inputs)[0], global_rows)
        self._model.optimizer.apply(gradients, self._variables)
        return loss

    def _gradients(
        self, inputs: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, global_rows: tf.Tensor
    ) -> tuple[list[Any], tf.Tensor]:
        """Gradients and loss of this replica's rows, as parts of the global batch's."""
        model = self._model
        sample_weight = weights if self._has_weights else None
        rows = tf.cast(tf.shape(inputs)[0], tf.float32)
        keras_adapter.clear_row_losses(model)
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = keras_adapter.data_loss(model, labels, outputs, sample_weight)
            if self._is_mean:
                loss *= self._group.replicas * rows / global_rows
            for row_loss in keras_adapter.row_losses(model):
                loss += tf.reduce_sum(row_loss)
            for penalty in keras_adapter.weight_regularization(model):
                loss += penalty / self._group.replicas
            scaled = model.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, [variable.value for variable in self._variables])
        self._total.assign_add(tf.cast(loss * global_rows, self._total.dtype))
        self._count.assign_add(tf.cast(rows, self._count.dtype))
        keras_adapter.update_metrics(model, labels, outputs, sample_weight)
        return gradients, loss

    def _nothing_learned(self, kinds: list[Any]) -> tuple[list[Any], tf.Tensor]:
        """The part of a replica without rows: its share of the penalties on weights.

        Gradients are absent, sparse or dense where `kinds`, those of a replica with rows, are.
        """
        with tf.GradientTape() as tape:
            loss = tf.zeros(())
            for penalty in keras_adapter.weight_regularization(self._model):
                loss += penalty / self._group.replicas
            scaled = self._model.optimizer.scale_loss(loss)
        native = [variable.value for variable in self._variables]
        dense = tape.gradient(scaled, native, unconnected_gradients="zero")
        gradients = [
            _no_slices(kind, gradient) if isinstance(kind, tf.IndexedSlices) else gradient
            for kind, gradient in zip(kinds, dense, strict=True)
            if kind is not None
        ]
        return gradients, loss

    def _reduced(self, gradients: list[Any], rows: tf.Tensor, global_rows: tf.Tensor) -> list[Any]:
        """Sums over all replicas; moving statistics travel along, weighted by rows."""
        if self._group.replicas == 1:
            return gradients
        share = tf.cast(rows, tf.float32) / global_rows
        moving = [variable.value.read_value() * share for variable in self._moving]
        present = [gradient for gradient in gradients if gradient is not None]
        types = [gradient.dtype for gradient in present]
        if self._reduce_dtype != tf.float32:
            present = [tf.cast(gradient, self._reduce_dtype) for gradient in present]
        context = tf.distribute.get_replica_context()
        summed = context.all_reduce("SUM", present + moving)
        for variable, value in zip(self._moving, summed[len(present) :], strict=True):
            variable.assign(value)
        back = iter(tf.cast(value, dtype) for value, dtype in zip(summed, types, strict=False))
        return [None if gradient is None else next(back) for gradient in gradients]

    def _reduce(self, own: tf.Tensor) -> tf.Tensor:
        # The copy gives the value a device, by which the strategy finds where to reduce.
        return tf.distribute.get_replica_context().all_reduce("SUM", tf.identity(own))

    def _local(self, value: Any) -> tf.Tensor:
        return self._group.strategy.experimental_local_results(value)[0]


def _no_slices(like: tf.IndexedSlices, dense: tf.Tensor) -> tf.IndexedSlices:
    """A sparse gradient of the types of `like` and the shape of `dense` that touches no row."""
    values = tf.zeros((0, *dense.shape[1:]), like.values.dtype)
    shape = tf.constant(dense.shape.as_list(), like.dense_shape.dtype)
    return tf.IndexedSlices(values, tf.zeros((0,), like.indices.dtype), shape)


class EvaluationStep:
    """Compiled evaluation of one model: metrics of each rank's rows, summed when they are read."""

    def __init__(
        self, model: keras.Model, group: Group, layout: InputLayout, has_weights: bool
    ) -> None:
        self._signature = chunk_signature(layout)
        self._model = model
        self._group = group
        self._has_weights = has_weights
        self._total, self._count = keras_adapter.loss_tracker_variables(model)
        self._calls: dict[bool, Any] = {}

    def run(self, chunk: ChunkRows, constant: Any = None) -> None:
        """Add a chunk of rows to the metrics; not a collective.

        Args:
            chunk: This worker's rows.
            constant: `(outputs,) float32` to evaluate this constant prediction, not the model's.
        """
        rows = (chunk.inputs, chunk.labels, chunk.weights, chunk.offsets, chunk.global_rows)
        has_constant = constant is not None
        if has_constant not in self._calls:
            signature = (self._signature, tf.TensorSpec((None,), tf.float32))
            self._calls[has_constant] = tf.function(
                lambda rows, constant: self._run_steps(rows, constant if has_constant else None),
                input_signature=signature,
            )
        self._calls[has_constant](rows, tf.constant(constant if has_constant else [], tf.float32))

    def _run_steps(self, rows: tuple[tf.Tensor, ...], constant: tf.Tensor | None) -> None:
        inputs, labels, weights, offsets, global_rows = rows
        for index in tf.range(tf.shape(offsets)[0] - 1):
            begin, end = offsets[index], offsets[index + 1]
            part = (inputs[begin:end], labels[begin:end], weights[begin:end])
            self._group.strategy.run(self._step, args=(*part, global_rows[index], constant))

    def _step(
        self,
        inputs: tf.Tensor,
        labels: tf.Tensor,
        weights: tf.Tensor,
        global_rows: tf.Tensor,
        constant: tf.Tensor | None,
    ) -> None:
        model = self._model
        sample_weight = weights if self._has_weights else None
        count = tf.shape(inputs)[0]
        keras_adapter.clear_row_losses(model)
        if constant is None:
            outputs = model(inputs, training=False)
            penalties = keras_adapter.weight_regularization(model)
        else:
            outputs = tf.broadcast_to(constant, [count, tf.shape(constant)[0]])
            outputs = tf.ensure_shape(outputs, (None, *model.output_shape[1:]))
            penalties = []
        loss = keras_adapter.data_loss(model, labels, outputs, sample_weight)
        rows = tf.cast(count, tf.float32)
        # `evaluate` weighs the loss of each batch by its rows: a mean over part of a batch counts
        # for the part, a sum over part of a batch for all rows of the batch.
        if keras_adapter.is_mean_loss(model):
            total = loss * self._group.replicas * rows
        else:
            total = loss * global_rows
        for row_loss in keras_adapter.row_losses(model):
            total += tf.reduce_sum(row_loss) * global_rows
        for penalty in penalties:
            total += penalty * rows
        self._total.assign_add(tf.cast(total, self._total.dtype))
        self._count.assign_add(tf.cast(rows, self._count.dtype))
        keras_adapter.update_metrics(model, labels, outputs, sample_weight)
