"""All of Lockstep's knowledge of Keras's private parts, in one room.

Proved on the versions below; `check_versions` says so when others are installed, and
`tests/contract/test_keras_adapter.py` fails when Keras changes underneath. Outside this file only
Keras's public interface is used.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend import get_keras_mask, set_keras_mask

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


def own_steps(model: keras.Model) -> list[str]:
    """Methods by which a model brings a step of its own, which a loop of ours would not run."""
    names = ("train_step", "test_step", "compute_loss", "compute_metrics")
    return [
        name
        for name in names
        if getattr(type(model), name) is not getattr(keras.Model, name)
        and not getattr(type(model), name).__module__.startswith("keras.")
    ]


def compile_like(model: keras.Model, compiled: keras.Model) -> None:
    """Compile a model with the very losses and metrics of another, functions of the user's too."""
    settings = dict(compiled._compile_config.config)
    optimizer = compiled.optimizer
    settings["optimizer"] = type(optimizer).from_config(optimizer.get_config())
    model.compile(**settings)


def leave_reduction_to_caller(
    optimizer: keras.optimizers.Optimizer, no_strategy: tf.distribute.Strategy
) -> None:
    """Let the optimizer take gradients as reduced already, and act on one replica's variables.

    Keras clips before it reduces; a caller that reduces first gets clipping of the global
    gradient. With `no_strategy`, TensorFlow's default, the optimizer is that of a single process.
    """
    for part in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if part is not None:
            part._all_reduce_sum_gradients = list
            part._distribution_strategy = no_strategy


def held(variable: Any) -> Any:
    """What a Keras variable holds: a TensorFlow variable, or copies of it on several devices."""
    return variable._value


def hold(variable: Any, native: Any) -> None:
    """Let a Keras variable hold another of the copies that it held, or all of them again."""
    variable._value = native


def all_variables(model: keras.Model) -> list[Any]:
    """Every Keras variable that a step reads or writes, each once."""
    found = [*model.variables, *metric_variables(model), *own_metric_variables(model)]
    if model.optimizer is not None:
        found += model.optimizer.variables
    return list({id(variable): variable for variable in found}.values())


def data_loss(model: keras.Model, labels: Any, outputs: Any, weights: Any) -> tf.Tensor:
    """The compiled loss of one batch, without regularisation.

    Under a strategy of R replicas Keras divides losses that are means by R.
    """
    return model._compile_loss(labels, outputs, weights)


def is_mean_loss(model: keras.Model) -> bool:
    """Whether the compiled loss is a mean over the rows of a batch (else it is a sum)."""
    return _loss(model).reduction in _MEANS


def is_row_wise_loss(model: keras.Model) -> bool:
    """Whether the loss of a batch follows from the losses of its parts; without masks.

    True for Keras's own losses that treat rows one by one, reduced to a mean over all rows or to a
    sum. False where rows meet (Dice, Circle), where the divisor is known only of the whole batch
    (`ignore_class`, `mean_with_sample_weight`), and for functions of the user's, which may do
    anything.
    """
    loss = _loss(model)
    return (
        loss.reduction in (*_MEANS, "sum")
        and _is_of_keras(loss)
        and not _joins_rows(getattr(loss, "fn", loss), getattr(loss, "_fn_kwargs", {}))
        and getattr(loss, "_fn_kwargs", {}).get("ignore_class") is None
    )


def gives_mask(model: keras.Model, rows: keras.KerasTensor) -> bool:
    """Whether the model's output carries a mask, as after `Embedding(mask_zero=True)`.

    Found by trial where a layer may begin one: symbolic calls of a model lose it.
    """
    may_mask = any(
        isinstance(layer, keras.layers.Masking)
        or getattr(layer, "mask_zero", False)
        or not _is_of_keras(layer)
        for layer in model._flatten_layers()
    )
    return may_mask and mask_of(model(tf.zeros((1, *rows.shape[1:])), training=False)) is not None


def mask_of(outputs: Any) -> Any:
    """The mask that the model gave with its output, or None."""
    return get_keras_mask(outputs)


def set_mask(outputs: Any, mask: Any) -> None:
    """Give an output a mask, as a layer would."""
    set_keras_mask(outputs, mask)


def adds_row_losses(model: keras.Model) -> bool:
    """Whether calls of the model may add losses: activity regularizers, `add_loss`."""
    return any(
        getattr(layer, "activity_regularizer", None) is not None or not _is_of_keras(layer)
        for layer in model._flatten_layers()
    )


def row_losses_are_sums(
    model: keras.Model, rows: keras.KerasTensor, is_training: bool
) -> list[bool]:
    """For each loss that a call adds: whether it grows with the rows (a sum) or not (a mean).

    Found by trial, which leaves no trace in the model: the same rows twice give twice the sum and
    the same mean. A function of the weights alone counts as a mean; the parts of a mean add up to
    it as well.
    """
    if not (adds_row_losses(model) and _count_row_losses(model, rows, is_training)):
        return []
    before = [np.array(variable.value) for variable in model.variables]
    # Enough rows that random masks in front of a loss do not hide the factor of two.
    once = tf.random.stateless_uniform((32, *rows.shape[1:]), (1, 2))
    found = []
    for inputs in (once, tf.concat([once, once], axis=0)):
        clear_row_losses(model)
        model(inputs, training=is_training)
        found.append([float(np.sum(value)) for value in row_losses(model)])
        for variable, value in zip(model.variables, before, strict=True):
            variable.assign(value)
    clear_row_losses(model)
    return [abs(two - 2 * one) < abs(two - one) for one, two in zip(*found, strict=True)]


def _count_row_losses(model: keras.Model, rows: keras.KerasTensor, is_training: bool) -> int:
    """How many losses a call adds; the model is traced, not run."""
    found: list[int] = []

    def call(inputs: tf.Tensor) -> None:
        clear_row_losses(model)
        model(inputs, training=is_training)
        found.append(len(row_losses(model)))

    signature = tf.TensorSpec((None, *rows.shape[1:]), tf.float32)
    tf.function(call, autograph=False).get_concrete_function(signature)
    clear_row_losses(model)
    return found[-1]


def weight_regularization(model: keras.Model) -> list[tf.Tensor]:
    """Penalties on weights, one tensor each: functions of the weights alone."""
    return list(model._get_regularization_losses())


def row_losses(model: keras.Model) -> list[tf.Tensor]:
    """Losses that the last call added (activity penalties); see `row_losses_are_sums`."""
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


def update_metrics(
    model: keras.Model, labels: Any, outputs: Any, weights: Any, which: Callable[[Any], bool]
) -> None:
    """Update those compiled metrics, not the loss, for which `which` is true, with one batch."""
    for metric, is_weighted in _compiled_metrics(model):
        if which(metric):
            extra = (weights,) if is_weighted and weights is not None else ()
            metric.update_state(labels, outputs, *extra)


def is_summable(metric: Any) -> bool:
    """Whether the state over many rows is the sum of the states over parts of them.

    True for what Keras brings and treats rows one by one; the user's own may do anything with the
    rows they are shown.
    """
    function = getattr(metric, "_fn", None)
    if function is None:
        return _is_of_keras(metric)
    is_of_keras = _is_of_keras(metric) and _is_of_keras(function)
    return is_of_keras and not _joins_rows(function, metric._fn_kwargs)


def all_metrics(model: keras.Model) -> list[Any]:
    """The loss tracker and all metrics, one by one, in a fixed order."""
    found: list[Any] = []
    for metric in model.metrics:
        found += metric.metrics if metric is model._compile_metrics else [metric]
    return found


def own_metrics(model: keras.Model) -> list[Any]:
    """Metrics that are not sums over parts: they have to see whole batches, in their order."""
    return [metric for metric in all_metrics(model) if not is_summable(metric)]


def metric_variables(model: keras.Model) -> list[Any]:
    """Variables of all metrics that are sums over parts, in a fixed order."""
    summable = [metric for metric in all_metrics(model) if is_summable(metric)]
    return [variable for metric in summable for variable in metric.variables]


def own_metric_variables(model: keras.Model) -> list[Any]:
    """Variables of `own_metrics`, in a fixed order; each replica holds the whole state."""
    return [variable for metric in own_metrics(model) for variable in metric.variables]


def seed_variables(model: keras.Model) -> list[Any]:
    """State of the seed generators, in a fixed order."""
    found = []
    for layer in model._flatten_layers():
        for generator in getattr(layer, "_seed_generators", []):
            found.append(generator.state)
    unique = {id(variable): variable for variable in found}
    return list(unique.values())


def batch_normalizations(model: keras.Model) -> list[Any]:
    """All BatchNormalization layers."""
    kind = keras.layers.BatchNormalization
    return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


def synchronize(layer: Any, moments: Callable[[Any, Any, Any], tuple[Any, Any]]) -> None:
    """Let a BatchNormalization normalise by what `moments` gives for (inputs, mask, axes)."""
    layer._moments = lambda inputs, mask: moments(inputs, mask, layer._reduction_axes)


def is_synchronized(layer: Any) -> bool:
    """Whether `synchronize` was called on a layer."""
    return "_moments" in vars(layer)


def may_have_sparse_gradients(model: keras.Model) -> bool:
    """Whether some layer may look rows of a weight up, as Embedding does."""
    return any(
        isinstance(layer, keras.layers.Embedding) or not _is_of_keras(layer)
        for layer in model._flatten_layers()
    )


def gains_from_xla(model: keras.Model) -> bool:
    """Whether XLA surely computes gradients faster than TensorFlow's kernels: recurrent, on CPU.

    A loop of many small operations is what it is good at; convolutions take twice the time.
    """
    layers = list(model._flatten_layers())
    return (
        any(isinstance(layer, keras.layers.RNN) for layer in layers)
        and all(_is_of_keras(layer) for layer in layers)
        and not tf.config.list_physical_devices("GPU")
    )


def random_layers(model: keras.Model) -> list[Any]:
    """Layers that draw random numbers in training; recurrent ones hold a generator in any case."""
    found = []
    for layer in model._flatten_layers():
        names = ("rate", "dropout", "recurrent_dropout")
        rates = [getattr(layer, name) for name in names if hasattr(layer, name)]
        if getattr(layer, "_seed_generators", None) and (not rates or any(rates)):
            found.append(layer)
    return found


def computes_in_half_precision(model: keras.Model) -> bool:
    """Whether some layer computes in float16 or bfloat16."""
    return any(layer.compute_dtype in ("float16", "bfloat16") for layer in model._flatten_layers())


def moving_statistics(model: keras.Model) -> list[Any]:
    """Float variables that training may assign outside the optimizer (BatchNormalization).

    Those of frozen and of synchronised layers, which are equal on all replicas, are left out.
    """
    fixed = {
        id(variable)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Normalization) or is_synchronized(layer)
        for variable in layer.variables
    }
    return [
        variable
        for variable in model.non_trainable_variables
        if "float" in variable.dtype and id(variable) not in fixed and _is_assigned(model, variable)
    ]


def optimizer_variables(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """All variables of the optimizer, in a fixed order."""
    return list(optimizer.variables)


def finish_training(model: keras.Model) -> None:
    """What `fit` does after the last epoch: weights take their moving average, where one is kept.

    Under a strategy call it in cross-replica context.
    """
    if model.optimizer is not None:
        model.optimizer.finalize_variable_values(model.trainable_variables)


def _is_assigned(model: keras.Model, variable: Any) -> bool:
    """Frozen layers keep their statistics: only those of trainable layers move."""
    for layer in model._flatten_layers():
        if any(variable is own for own in layer._non_trainable_variables):
            return bool(layer.trainable)
    return False


def present_learning_rate(optimizer: keras.optimizers.Optimizer) -> Any:
    """The learning rate of the next step, also under a schedule."""
    return getattr(optimizer, "inner_optimizer", optimizer)._get_current_learning_rate()


_MEANS = ("sum_over_batch_size", "mean")
_OF_MANY_ROWS = {"dice", "tversky", "circle"}


def _loss(model: keras.Model) -> Any:
    """The compiled loss of the model's one output."""
    return model._compile_loss._flat_losses[0].loss


def _joins_rows(function: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a loss or metric of Keras's lets rows meet, or gives what is reduced already."""
    name = getattr(function, "__name__", type(function).__name__).lower()
    return (
        name in _OF_MANY_ROWS
        or isinstance(function, keras.losses.Loss)
        or settings.get("axis", -1) != -1
    )


def _is_of_keras(thing: Any) -> bool:
    """Whether an object's class, or a function, and the function inside it, come with Keras."""
    place = thing if callable(thing) and hasattr(thing, "__qualname__") else type(thing)
    inner = getattr(thing, "fn", None)
    return place.__module__.partition(".")[0] == "keras" and (inner is None or _is_of_keras(inner))


def _compiled_metrics(model: keras.Model) -> Iterator[tuple[Any, bool]]:
    """Compiled metrics in their order, and whether each applies sample weights."""
    compiled = model._compile_metrics
    if compiled is None:
        return
    for groups, is_weighted in (
        (compiled._flat_metrics, False),
        (compiled._flat_weighted_metrics, True),
    ):
        for group in groups:
            for metric in group.metrics if group else ():
                yield metric, is_weighted
