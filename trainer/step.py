"""The step: Keras's own single-process step on a global batch, computed by all replicas together.

Each replica takes its rows of the batch; its part of the loss is scaled so that the parts sum to
the loss of the whole batch (the divisor is the global row count, so uneven parts are exact, and a
part may be empty); gradients are summed, and then every replica runs Keras's optimizer as a single
process would, so clipping and loss scaling act on the global gradient. Many steps run in one call
of a compiled function: Python is not on the per-step path.
"""

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from data_pipeline.dataset import chunk_signature
from data_pipeline.features import InputLayout
from data_pipeline.reader import ChunkRows
from trainer import keras_adapter
from trainer.batch import BatchRows, Mode, Scorer, place_on_replica, run_model, without_rows
from trainer.sparse import joined, most_slices, padded, zero_slices
from trainer.strategy import Group, Replica


@dataclass(frozen=True)
class Vote:
    """What one rank brings into a call.

    Attributes:
        stop: It was asked to stop.
        time_is_up: The time budget is spent; rank 0's clock decides.
        seconds: To be averaged.
        snapshot: A snapshot is due; rank 0's clock decides.
    """

    stop: bool
    time_is_up: bool
    seconds: float
    snapshot: bool = False


@dataclass(frozen=True)
class CallResult:
    """What all ranks know after a call, the same on each.

    Attributes:
        loss_sum: Sum over the call's steps of loss x global rows.
        stop: Some rank was asked to stop.
        time_is_up: The time budget is spent.
        seconds: Mean over ranks of the seconds that were passed in.
        snapshot: A snapshot is due.
    """

    loss_sum: float
    stop: bool
    time_is_up: bool
    seconds: float
    snapshot: bool


@dataclass(frozen=True)
class StepOptions:
    """What a job says of its steps.

    Attributes:
        most_rows: The most rows of one replica in a step; the same on all.
        has_weights: Rows have weights of their own.
        reduce_dtype: Type in which gradients travel, "float32" or "bfloat16".
        class_weight: Weight of the rows of each class; others count one.
        jit_compile: Gradients by XLA; "auto" where it is faster for certain.
    """

    most_rows: int
    has_weights: bool = False
    reduce_dtype: str = "float32"
    class_weight: dict[int, float] | None = None
    jit_compile: bool | str = "auto"


class TrainingStep:
    """Compiled training steps of one model in one group.

    Args:
        model: Built and compiled inside the group's scope.
        group: Who takes part.
        layout: Types and shapes of rows.
        scorer: Of this model in this group.
        options: What the job says.
    """

    def __init__(
        self,
        model: keras.Model,
        group: Group,
        layout: InputLayout,
        scorer: Scorer,
        options: StepOptions,
    ) -> None:
        self._model = model
        self._group = group
        self._scorer = scorer
        self._has_weights = options.has_weights or options.class_weight is not None
        self._class_weights = _class_weight_table(options.class_weight)
        self._reduce_dtype = tf.as_dtype(options.reduce_dtype)
        self._variables = list(model.trainable_variables)
        self._switched = keras_adapter.all_variables(model) if group.replicas > 1 else []
        self._moving = keras_adapter.moving_statistics(model) if group.replicas > 1 else []
        keras_adapter.leave_reduction_to_caller(model.optimizer, group.no_strategy)
        wanted = options.jit_compile
        has_xla = keras_adapter.gains_from_xla(model) if wanted == "auto" else bool(wanted)
        # XLA knows no collectives, and a mask does not leave a compiled function.
        self._has_xla = has_xla and not scorer.meets and not scorer.has_mask
        self._signature = chunk_signature(layout)
        self._most_slices: dict[int, int] = {}
        if group.replicas > 1 and keras_adapter.may_have_sparse_gradients(model):
            with group.copies(keras_adapter.all_variables(model), 0):
                self._most_slices = most_slices(model, layout.input_shape, options.most_rows)
        self._calls: dict[bool, Any] = {}

    def run(
        self, chunk: ChunkRows, first: int, steps: int, may_be_empty: bool, vote: Vote
    ) -> CallResult:
        """Train on `steps` steps of a chunk, from its step `first` on. A collective.

        Args:
            chunk: This worker's rows.
            first: Index of the first step in the chunk.
            steps: How many.
            may_be_empty: Whether some replica may have a step without rows; the same on all ranks.
            vote: What this rank brings in.
        """
        is_first = self._group.rank == 0
        votes = tf.constant(
            [
                float(vote.stop),
                float(vote.time_is_up and is_first),
                vote.seconds,
                float(vote.snapshot and is_first),
            ],
            tf.float32,
        )
        span = tf.constant([first, first + steps], tf.int32)
        reduced = self._compiled(may_be_empty)(chunk.tensors, span, votes).numpy()
        return CallResult(
            float(reduced[0]),
            bool(round(float(reduced[1]))),
            bool(round(float(reduced[2]))),
            float(reduced[3]) / self._group.size,
            bool(round(float(reduced[4]))),
        )

    def _compiled(self, may_be_empty: bool) -> Any:
        """The compiled loop; one that allows for empty parts is traced only where it is needed."""
        may_be_empty = may_be_empty and self._group.replicas > 1
        if may_be_empty not in self._calls:

            def run_steps(rows: Any, span: tf.Tensor, votes: tf.Tensor) -> tf.Tensor:
                return self._run_steps(rows, span, votes, may_be_empty)

            signature = (
                self._signature,
                tf.TensorSpec((2,), tf.int32),
                tf.TensorSpec((4,), tf.float32),
            )
            self._calls[may_be_empty] = _traced(run_steps, signature)
        return self._calls[may_be_empty]

    def _run_steps(
        self, rows: tuple[tf.Tensor, ...], span: tf.Tensor, votes: tf.Tensor, may_be_empty: bool
    ) -> tf.Tensor:
        inputs, labels, weights, offsets, global_rows, places = rows
        step = tf.autograph.experimental.do_not_convert(self._step)  # as in `fit`

        def take(index: tf.Tensor, loss_sum: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            begin, end = offsets[index], offsets[index + 1]
            part = (inputs[begin:end], labels[begin:end], weights[begin:end], places[begin:end])
            shares = self._group.strategy.run(step, args=(*part, global_rows[index], may_be_empty))
            local = self._group.strategy.experimental_local_results(shares)
            return index + 1, loss_sum + tf.add_n(list(local)) * global_rows[index]

        _, loss_sum = tf.while_loop(lambda index, _: index < span[1], take, (span[0], tf.zeros(())))
        own = tf.concat([loss_sum[None], votes], axis=0)
        return own if self._group.replicas == 1 else self._group.sum_in_graph(own)

    def _step(
        self,
        inputs: tf.Tensor,
        labels: tf.Tensor,
        weights: tf.Tensor,
        places: tf.Tensor,
        global_rows: tf.Tensor,
        may_be_empty: bool,
    ) -> tf.Tensor:
        replica = Replica(self._group, self._switched)
        part = place_on_replica((inputs, labels, weights, places), replica, self._group)
        rows = BatchRows(part[0], part[1], self._weights(part[1], part[2]), part[3], global_rows)
        with replica.alone():
            gradients, share = self._learn(replica, rows, may_be_empty)
            gradients = self._reduced(replica, gradients, rows.part)
            self._model.optimizer.apply(gradients, self._variables)
        return share

    def _weights(self, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor | None:
        if not self._has_weights:
            return None
        if self._class_weights is None:
            return weights
        wide = labels.shape[-1] != 1
        classes = tf.argmax(labels, axis=-1) if wide else tf.round(labels[:, 0])
        classes = tf.cast(classes, tf.int32)
        known = (classes >= 0) & (classes < len(self._class_weights))
        return tf.where(known, tf.gather(self._class_weights, tf.where(known, classes, 0)), 1.0)

    def _learn(
        self, replica: Replica, rows: BatchRows, may_be_empty: bool
    ) -> tuple[list[Any], tf.Tensor]:
        """Gradients and loss of this replica's rows, as parts of the global batch's."""
        if not may_be_empty or self._scorer.meets:
            return self._gradients(replica, rows, may_be_empty)
        kinds: list[Any] = []

        def learn() -> tuple[list[Any], tf.Tensor]:
            gradients, share = self._gradients(replica, rows, may_be_empty=False)
            kinds[:] = gradients
            return [gradient for gradient in gradients if gradient is not None], share

        def nothing() -> tuple[list[Any], tf.Tensor]:
            # Traced after `learn`: gradients are absent, sparse or dense where its are.
            zeros = [
                _zeros(kind, variable)
                for kind, variable in zip(kinds, self._variables, strict=True)
                if kind is not None
            ]
            return zeros, tf.zeros(())

        present, share = tf.cond(rows.count > 0, learn, nothing)
        found = iter(present)
        return [None if kind is None else next(found) for kind in kinds], share

    def _gradients(
        self, replica: Replica, rows: BatchRows, may_be_empty: bool
    ) -> tuple[list[Any], tf.Tensor]:
        def differentiate(inputs: Any, labels: Any, weights: Any, global_rows: Any) -> Any:
            own = BatchRows(inputs, labels, weights, rows.places, global_rows)
            keras_adapter.clear_row_losses(self._model)
            with tf.GradientTape() as tape:
                outputs = run_model(self._model, own, replica, True, may_be_empty)
                score = self._scorer.score(replica, own, outputs)
                scaled = self._model.optimizer.scale_loss(score.objective)
            variables = [variable.value for variable in self._variables]
            gradients = tape.gradient(scaled, variables)
            gradients = [without_rows(gradient, replica) for gradient in gradients]
            return gradients, score.share, score.whole, outputs

        if self._has_xla:
            # A function of this replica's own: what it has traced holds this replica's variables.
            differentiate = tf.function(differentiate, jit_compile=True, autograph=False)
        gradients, share, whole, outputs = differentiate(
            rows.inputs, rows.labels, rows.weights, rows.global_rows
        )
        self._scorer.record(rows, outputs, share, whole)
        return gradients, share

    def _reduced(self, replica: Replica, gradients: list[Any], part: tf.Tensor) -> list[Any]:
        """Sums over all replicas; moving statistics travel along, weighted by rows."""
        if self._group.replicas == 1:
            return gradients
        travelling: list[tf.Tensor] = []
        indices: list[tf.Tensor] = []
        for index, gradient in enumerate(gradients):
            if isinstance(gradient, tf.IndexedSlices):
                values, places = padded(gradient, self._most_slices[index], replica)
                travelling.append(values)
                indices.append(places)
            elif gradient is not None:
                travelling.append(gradient)
        types = [value.dtype for value in travelling]
        if self._reduce_dtype != tf.float32:
            travelling = [tf.cast(value, self._reduce_dtype) for value in travelling]
        moving = [variable.value.read_value() * part for variable in self._moving]
        summed = replica.sum(travelling + moving + indices)
        first = len(travelling)
        for variable, value in zip(self._moving, summed[first:], strict=False):
            variable.value.assign(value)
        back = iter(tf.cast(value, dtype) for value, dtype in zip(summed, types, strict=False))
        places_back = iter(summed[first + len(moving) :])
        reduced: list[Any] = []
        for gradient in gradients:
            if isinstance(gradient, tf.IndexedSlices):
                reduced.append(joined(next(back), next(places_back), gradient))
            else:
                reduced.append(None if gradient is None else next(back))
        return reduced


class EvaluationStep:
    """Compiled evaluation of one model: metrics of each replica's rows, summed when read.

    A collective only where the whole batch has to be shown (`Scorer.needs_places`).
    """

    def __init__(
        self,
        model: keras.Model,
        group: Group,
        layout: InputLayout,
        scorer: Scorer,
        has_weights: bool,
    ) -> None:
        self._signature = chunk_signature(layout)
        self._model = model
        self._group = group
        self._scorer = scorer
        self._has_weights = has_weights
        self._switched = keras_adapter.all_variables(model) if group.replicas > 1 else []
        self._calls: dict[bool, Any] = {}

    def run(self, chunk: ChunkRows, constant: Any = None) -> None:
        """Add a chunk of rows to the metrics.

        Args:
            chunk: This worker's rows.
            constant: `(outputs,) float32` to evaluate this constant prediction, not the model's.
        """
        has_constant = constant is not None
        if has_constant not in self._calls:
            signature = (self._signature, tf.TensorSpec((None,), tf.float32))
            self._calls[has_constant] = _traced(
                lambda rows, constant: self._run_steps(rows, constant if has_constant else None),
                signature,
            )
        prediction = tf.constant(constant if has_constant else [], tf.float32)
        self._calls[has_constant](chunk.tensors, prediction)

    def _run_steps(self, rows: tuple[tf.Tensor, ...], constant: tf.Tensor | None) -> None:
        inputs, labels, weights, offsets, global_rows, places = rows
        step = tf.autograph.experimental.do_not_convert(self._step)
        steps = tf.shape(offsets)[0] - 1

        def take(index: tf.Tensor) -> tuple[tf.Tensor]:
            begin, end = offsets[index], offsets[index + 1]
            part = (inputs[begin:end], labels[begin:end], weights[begin:end], places[begin:end])
            self._group.strategy.run(step, args=(*part, global_rows[index], constant))
            return (index + 1,)

        tf.while_loop(lambda index: index < steps, take, (tf.constant(0),))

    def _step(
        self,
        inputs: tf.Tensor,
        labels: tf.Tensor,
        weights: tf.Tensor,
        places: tf.Tensor,
        global_rows: tf.Tensor,
        constant: tf.Tensor | None,
    ) -> None:
        model = self._model
        replica = Replica(self._group, self._switched)
        part = place_on_replica((inputs, labels, weights, places), replica, self._group)
        own_weights = part[2] if self._has_weights else None
        rows = BatchRows(part[0], part[1], own_weights, part[3], global_rows)
        with replica.alone():
            keras_adapter.clear_row_losses(model)
            if constant is None:
                outputs = run_model(model, rows, replica, False, self._group.replicas > 1)
            else:
                outputs = tf.broadcast_to(constant, [rows.count, tf.shape(constant)[0]])
                outputs = tf.ensure_shape(outputs, (None, *model.output_shape[1:]))
            mode: Mode = "evaluation" if constant is None else "constant"
            score = self._scorer.score(replica, rows, outputs, mode)
            self._scorer.record(rows, outputs, score.share, score.whole)


def _traced(function: Any, signature: Any) -> Any:
    """A compiled function whose loops are written out.

    Autograph would spend half a second of each new process on translating their source.
    """
    return tf.function(function, input_signature=signature, autograph=False)


def _class_weight_table(class_weight: dict[int, float] | None) -> tf.Tensor | None:
    """`(largest class + 1,) float32`: the weight of each class, one where none is given."""
    if class_weight is None:
        return None
    return tf.constant([class_weight.get(c, 1.0) for c in range(max(class_weight) + 1)])


def _zeros(kind: Any, variable: Any) -> Any:
    """A gradient of the kind of another that changes nothing."""
    if isinstance(kind, tf.IndexedSlices):
        return zero_slices(kind, variable.shape)
    return tf.zeros(variable.shape, kind.dtype)
