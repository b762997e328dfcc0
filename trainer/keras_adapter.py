"""All of Lockstep's knowledge of Keras's private parts, in one room.

Proved on the versions below; `check_versions` says so when others are installed, and
`tests/contract/test_keras_adapter.py` fails when Keras changes underneath. Outside this file only
Keras's public interface is used.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

PROVED_KERAS = ("3.15",)
PROVED_TENSORFLOW = ("2.21",)


def check_versions() -> str | None:
    """A warning when Keras or TensorFlow are not versions this file was proved on."""
    versions = (
        ("Keras", keras.__version__, PROVED_KERAS),
        ("TensorFlow", tf.__version__, PROVED_TENSORFLOW),
    )
    wrong = [
        f"{name} {found} (proved on {', '.join(proved)})"
        for name, found, proved in versions
        if not any(found.startswith(f"{version}.") for version in proved)
    ]
    if not wrong:
        return None
    return f"not proved with {' and '.join(wrong)}: compare a short run with plain Keras first."


def build_training_state(model: keras.Model, inputs: Any, labels: Any, weights: Any) -> None:
    """Create every variable that training needs: model, optimizer, loss and metrics.

    Nothing is computed; call inside the strategy's scope. Arguments are example tensors whose
    shapes and types count.
    """
    model._symbolic_build(data_batch=(inputs, labels, weights))
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def leave_reduction_to_caller(optimizer: keras.optimizers.Optimizer) -> None:
    """Switch off the optimizer's own all-reduce; `apply` then expects reduced gradients.

    Keras clips before it reduces; a caller that reduces first gets clipping of the global
    gradient.
    """
    target = getattr(optimizer, "inner_optimizer", optimizer)
    target._all_reduce_sum_gradients = list


def data_loss(model: keras.Model, labels: Any, outputs: Any, weights: Any) -> tf.Tensor:
    """The compiled loss of one batch, without regularisation.

    Under a strategy of R replicas Keras divides losses that are means by R.
    """
    return model._compile_loss(labels, outputs, weights)


def is_mean_loss(model: keras.Model) -> bool:
    """Whether the compiled loss is a mean over the rows of a batch (else it is a sum)."""
    losses = model._compile_loss._flat_losses
    return all(entry.loss.reduction != "sum" for entry in losses)


def depends_on_batches(model: keras.Model) -> bool:
    """Whether the loss of an evaluation depends on how rows are cut into batches."""
    return not is_mean_loss(model) or any(
        getattr(layer, "activity_regularizer", None) is not None
        for layer in model._flatten_layers()
    )


def divides_by_weights(model: keras.Model) -> bool:
    """Whether the compiled loss divides by the sum of weights, which no worker knows alone."""
    losses = model._compile_loss._flat_losses
    return any(entry.loss.reduction == "mean_with_sample_weight" for entry in losses)


def weight_regularization(model: keras.Model) -> list[tf.Tensor]:
    """Penalties on weights, one tensor each: functions of the weights alone."""
    return list(model._get_regularization_losses())


def row_losses(model: keras.Model) -> list[tf.Tensor]:
    """Losses that the last call added: sums over the rows of its batch (activity penalties)."""
    losses = list(model._get_own_losses())
    for layer in model._flatten_layers(include_self=False):
        losses.extend(layer._get_own_losses())
    return losses


def clear_row_losses(model: keras.Model) -> None:
    """Forget what earlier calls added."""
    model._clear_losses()


def loss_tracker_variables(model: keras.Model) -> tuple[Any, Any]:
    """The weighted sum and the row count behind the `loss` that `fit` reports."""
    return model._loss_tracker.total, model._loss_tracker.count


def update_metrics(model: keras.Model, labels: Any, outputs: Any, weights: Any) -> None:
    """Update the compiled metrics, not the loss, with one batch."""
    if model._compile_metrics is not None:
        model._compile_metrics.update_state(labels, outputs, weights)


def metric_variables(model: keras.Model) -> list[Any]:
    """Variables of the loss tracker and all metrics, in a fixed order."""
    return [variable for metric in model.metrics for variable in metric.variables]


def seed_variables(model: keras.Model) -> list[Any]:
    """State of the seed generators, in a fixed order."""
    found = []
    for layer in model._flatten_layers():
        for generator in getattr(layer, "_seed_generators", []):
            found.append(generator.state)
    unique = {id(variable): variable for variable in found}
    return list(unique.values())


def moving_statistics(model: keras.Model) -> list[Any]:
    """Float variables that a training step assigns outside the optimizer (BatchNormalization)."""
    fixed = {id(variable) for layer in _normalizations(model) for variable in layer.variables}
    return [
        variable
        for variable in model.non_trainable_variables
        if "float" in variable.dtype and id(variable) not in fixed and _is_assigned(model, variable)
    ]


def optimizer_variables(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """All variables of the optimizer, in a fixed order."""
    return list(optimizer.variables)


def native(variables: Sequence[Any]) -> list[tf.Variable]:
    """The TensorFlow variables behind Keras variables."""
    return [variable.value for variable in variables]


def _normalizations(model: keras.Model) -> list[Any]:
    return [
        layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Normalization)
    ]


def _is_assigned(model: keras.Model, variable: Any) -> bool:
    """Frozen layers keep their statistics: only those of trainable layers move."""
    for layer in model._flatten_layers():
        if any(variable is own for own in layer._non_trainable_variables):
            return bool(layer.trainable)
    return False


def present_learning_rate(optimizer: keras.optimizers.Optimizer) -> Any:
    """The learning rate of the next step, also under a schedule."""
    return getattr(optimizer, "inner_optimizer", optimizer)._get_current_learning_rate()
