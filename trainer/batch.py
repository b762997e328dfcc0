"""Loss and metrics of a global batch whose rows lie on several replicas.

Owns what may be computed part by part and what has to see the whole batch. Keras's own losses and
metrics treat rows one by one: their parts add up. Losses in which rows meet, masked losses (their
divisor is known of the whole batch only), and the user's own losses and metrics are shown the
whole batch, in its order, on every replica: predictions and labels are gathered, and the gradient
of the loss with respect to a replica's own predictions goes on to its own rows.
"""

from dataclasses import dataclass
from typing import Any, Literal

import keras
import tensorflow as tf

from trainer import keras_adapter
from trainer.strategy import Group, Replica


@dataclass(frozen=True)
class BatchRows:
    """One replica's rows of a step.

    Attributes:
        inputs: `(rows, *input_shape)`.
        labels: `(rows, label_size)`.
        weights: `(rows,)`, or None.
        places: `(rows,) int32`, places in the global batch; empty where nothing asks for them.
        global_rows: Rows of the step over all replicas, a float.
    """

    inputs: tf.Tensor
    labels: tf.Tensor
    weights: tf.Tensor | None
    places: tf.Tensor
    global_rows: tf.Tensor

    @property
    def count(self) -> tf.Tensor:
        """Rows of this replica."""
        return tf.shape(self.inputs)[0]

    @property
    def part(self) -> tf.Tensor:
        """Share of the batch's rows, a float."""
        return tf.cast(self.count, tf.float32) / self.global_rows


@dataclass(frozen=True)
class Score:
    """What a replica computed of its rows.

    Attributes:
        objective: Its gradients, summed over all replicas, are those of the batch's loss.
        share: Its sum over all replicas is the loss that Keras reports.
        whole: Labels, outputs and weights of the whole batch, where somebody needs them.
    """

    objective: tf.Tensor
    share: tf.Tensor
    whole: tuple[Any, Any, Any] | None


Mode = Literal["training", "evaluation", "constant"]
"""How outputs came about: by the model in one of its modes, or as a constant prediction."""


class Scorer:
    """Loss and metrics of one model in one group; used while steps are traced.

    Args:
        model: Built and compiled; its loss and metrics too.
        group: Who takes part.
        rows: Symbolic input of the model.
        global_batch_size: The most rows of a batch that is shown whole.

    Attributes:
        has_mask: The model's output carries a mask.
        needs_places: Rows have to tell their places in the global batch.
        meets: A step is a collective beyond its gradients: all replicas must take part in it,
            also those without rows.
    """

    def __init__(
        self, model: keras.Model, group: Group, rows: keras.KerasTensor, global_batch_size: int
    ) -> None:
        self._model = model
        self._most_rows = global_batch_size
        self._group = group
        self.has_mask = keras_adapter.gives_mask(model, rows)
        self._is_row_wise = keras_adapter.is_row_wise_loss(model) and not self.has_mask
        self._is_mean = keras_adapter.is_mean_loss(model)
        with group.copies(keras_adapter.all_variables(model), 0):
            self._row_losses_are_sums = {
                is_training: keras_adapter.row_losses_are_sums(model, rows, is_training)
                for is_training in (False, True)
            }
        self._has_own_metrics = bool(keras_adapter.own_metrics(model))
        self._total, self._count = keras_adapter.loss_tracker_variables(model)
        self.needs_places = group.replicas > 1 and (not self._is_row_wise or self._has_own_metrics)
        self.meets = self.needs_places or any(
            keras_adapter.is_synchronized(layer)
            for layer in keras_adapter.batch_normalizations(model)
        )

    @property
    def depends_on_batches(self) -> bool:
        """Whether an evaluation depends on how rows are cut into batches."""
        return (
            not self._is_row_wise
            or not self._is_mean
            or self._has_own_metrics
            or bool(self._row_losses_are_sums[False])
        )

    def score(
        self, replica: Replica, rows: BatchRows, outputs: Any, mode: "Mode" = "training"
    ) -> Score:
        """The loss of a replica's rows as a part of the batch's."""
        model = self._model
        whole = self._gather(replica, rows, outputs) if self.needs_places else None
        if self._is_row_wise or self._group.replicas == 1:
            loss = keras_adapter.data_loss(model, rows.labels, outputs, rows.weights)
            if self._is_row_wise and self._is_mean:
                loss *= rows.part
            replicas = 1
        else:
            labels, all_outputs, weights = whole or (None, None, None)
            loss = keras_adapter.data_loss(model, labels, all_outputs, weights)
            replicas = self._group.replicas
        extra = tf.zeros(()) if mode == "constant" else self._extra_losses(rows, mode)
        elements = tf.cast(tf.size(loss), loss.dtype)  # more than one without any reduction
        return Score(
            tf.reduce_sum(loss) + extra * elements,
            tf.reduce_mean(loss) / replicas + extra,
            whole,
        )

    def record(self, rows: BatchRows, outputs: Any, share: tf.Tensor, whole: Any) -> None:
        """Add a batch to the loss tracker and the metrics; `share` and `whole` as in its score."""
        self._total.assign_add(tf.cast(share * rows.global_rows, self._total.dtype))
        self._count.assign_add(tf.cast(rows.count, self._count.dtype))
        model, is_summable = self._model, keras_adapter.is_summable
        keras_adapter.update_metrics(model, rows.labels, outputs, rows.weights, is_summable)
        labels, all_outputs, weights = whole or (rows.labels, outputs, rows.weights)
        keras_adapter.update_metrics(
            model, labels, all_outputs, weights, lambda metric: not is_summable(metric)
        )

    def _extra_losses(self, rows: BatchRows, mode: "Mode") -> tf.Tensor:
        """Penalties on weights, by rows, and what the layers added of theirs."""
        total = tf.zeros(())
        are_sums = self._row_losses_are_sums[mode == "training"]
        for loss, is_sum in zip(keras_adapter.row_losses(self._model), are_sums, strict=True):
            value = tf.cast(tf.reduce_sum(loss), tf.float32)
            total += value * (tf.cast(rows.count > 0, tf.float32) if is_sum else rows.part)
        for penalty in keras_adapter.weight_regularization(self._model):
            total += tf.cast(penalty, tf.float32) * rows.part
        return total

    def _gather(self, replica: Replica, rows: BatchRows, outputs: Any) -> tuple[Any, Any, Any]:
        """Labels, outputs and weights of the whole batch, in its order, on every replica."""
        mask = keras_adapter.mask_of(outputs)
        parts = [rows.labels]
        parts += [] if rows.weights is None else [rows.weights]
        parts += [] if mask is None else [tf.cast(mask, tf.float32)]
        wholes = [self._whole(replica, rows, part) for part in parts]
        all_outputs = self._whole_with_gradient(replica, rows, outputs)
        if mask is not None:
            keras_adapter.set_mask(all_outputs, wholes[-1] > 0.5)
        return wholes[0], all_outputs, None if rows.weights is None else wholes[1]

    def _whole(self, replica: Replica, rows: BatchRows, part: tf.Tensor) -> tf.Tensor:
        """A tensor by rows, of the whole batch.

        It travels at one size: TensorFlow ties a collective to the shape that it saw first.
        """
        shape = tf.concat([[self._most_rows], tf.shape(part)[1:]], 0)
        table = replica.sum(tf.scatter_nd(rows.places[:, None], part, shape))
        whole = table[: tf.cast(rows.global_rows, tf.int32)]
        return tf.ensure_shape(whole, (None, *part.shape[1:]))

    def _whole_with_gradient(self, replica: Replica, rows: BatchRows, part: Any) -> tf.Tensor:
        def gather(own: tf.Tensor) -> Any:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                return tf.gather(upstream, rows.places)

            return self._whole(replica, rows, own), gradient

        return tf.custom_gradient(gather)(tf.convert_to_tensor(part))


def run_model(
    model: keras.Model, rows: BatchRows, replica: Replica, is_training: bool, may_be_empty: bool
) -> Any:
    """The model's output for a replica's rows, which may be none.

    Without rows the model is shown one of zeros, whose output is dropped: kernels of oneDNN give
    wrong shapes for nothing. It counts in no statistic (`global_moments`), loss or metric.
    """
    if not may_be_empty:
        return model(rows.inputs, training=is_training)
    is_empty = tf.equal(rows.count, 0)
    free = [[0, tf.cast(is_empty, tf.int32)], *[[0, 0]] * (len(rows.inputs.shape) - 1)]
    inputs = tf.ensure_shape(tf.pad(rows.inputs, free), rows.inputs.shape)
    replica.is_empty = is_empty
    outputs = model(inputs, training=is_training)
    mask = keras_adapter.mask_of(outputs)
    kept = outputs[: rows.count]
    if mask is not None:
        keras_adapter.set_mask(kept, mask[: rows.count])
    return kept


def without_rows(value: Any, replica: Replica) -> Any:
    """Zeros where a replica has no rows in this step: what a stand-in gave is dropped, NaN too."""
    if replica.is_empty is None or value is None:
        return value
    if isinstance(value, tf.IndexedSlices):
        values = without_rows(value.values, replica)
        return tf.IndexedSlices(values, value.indices, value.dense_shape)
    return tf.where(replica.is_empty, tf.zeros_like(value), value)


def place_on_replica(parts: tuple[Any, ...], replica: Replica, group: Group) -> tuple[Any, ...]:
    """A replica's slice of its worker's rows."""
    if group.devices == 1:
        return parts
    index = replica.number % group.devices
    rows = tf.shape(parts[0])[0]
    begin, end = rows * index // group.devices, rows * (index + 1) // group.devices
    return tuple(part[begin:end] for part in parts)


def global_moments(inputs: Any, mask: Any, axes: list[int]) -> tuple[Any, Any]:
    """Mean and variance over the rows of all replicas, `(channels,)` each; a collective.

    Each replica's moments are merged as Chan, Golub and LeVeque (1979) do it, which keeps the
    digits that a mean of squares loses. Outside of a replica's step they are those of the inputs.
    """
    replica = Replica.current()
    weights = tf.ones_like(inputs)
    if replica is not None and replica.is_empty is not None:
        weights *= 1.0 - tf.cast(replica.is_empty, inputs.dtype)
    if mask is not None:
        weights *= tf.cast(mask, inputs.dtype)[..., None]
    inputs = tf.where(weights > 0, inputs, 0.0)  # whatever does not count, infinities too
    shape = [1 if axis in axes else inputs.shape[axis] for axis in range(len(inputs.shape))]
    count = tf.reduce_sum(weights, axes)
    mean = tf.math.divide_no_nan(tf.reduce_sum(inputs * weights, axes), count)
    squares = tf.reduce_sum(weights * tf.square(inputs - tf.reshape(mean, shape)), axes)
    if replica is None:
        return mean, tf.math.divide_no_nan(squares, count)
    own = tf.stack([count, mean, squares])  # (3, channels)
    counts, means, all_squares = tf.unstack(_sum_with_gradient(replica, own), axis=1)
    total = tf.reduce_sum(counts, 0)
    merged = tf.math.divide_no_nan(tf.reduce_sum(counts * means, 0), total)
    spread = all_squares + counts * tf.square(means - merged)
    return merged, tf.math.divide_no_nan(tf.reduce_sum(spread, 0), total)


def _sum_with_gradient(replica: Replica, own: tf.Tensor) -> tf.Tensor:
    """`(replicas, *own.shape)`: every replica's values; gradients flow back to each."""

    def gather(values: tf.Tensor) -> Any:
        table = replica.sum(replica.slot(values))

        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            return replica.sum(without_rows(upstream, replica))[replica.number]

        return table, gradient

    return tf.custom_gradient(gather)(own)
