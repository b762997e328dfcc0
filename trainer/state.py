"""Training state in memory: everything the next step depends on, as plain arrays and values.

Owns the names under which variables are kept, so that a snapshot of N workers fits any other number
of workers. Writing and finding checkpoints is `trainer.checkpoint`'s.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer import keras_adapter
from trainer.errors import CheckpointError
from trainer.payloads import Arrays
from trainer.strategy import Group


def named_variables(model: keras.Model) -> dict[str, Any]:
    """Variables of model and optimizer by name, in a fixed order.

    Seeds of dropout are left out: they differ between ranks (`capture_ranks`).
    """
    seeds = {id(variable) for variable in keras_adapter.seed_variables(model)}
    names: dict[str, Any] = {}
    for index, variable in enumerate(v for v in model.variables if id(v) not in seeds):
        names[f"model/{index:04d}/{variable.path}"] = variable
    if model.optimizer is not None:
        for index, variable in enumerate(keras_adapter.optimizer_variables(model.optimizer)):
            names[f"optimizer/{index:04d}/{variable.path}"] = variable
    return names


def capture(model: keras.Model) -> Arrays:
    """Copies of model and optimizer; reads this process's variables only."""
    return {name: np.array(value_of(v)) for name, v in named_variables(model).items()}


def hold(model: keras.Model) -> dict[str, Any]:
    """Model and optimizer as they are now, without a copy; tensors where they are on a GPU.

    TensorFlow copies a variable before it changes one whose value somebody holds.
    """
    return {name: _in_place(_copies(v)[0]) for name, v in named_variables(model).items()}


def value_of(variable: Any) -> NDArray[Any]:
    """The value of a Keras variable on this process's first device."""
    return np.asarray(_copies(variable)[0].numpy())


def restore(model: keras.Model, arrays: Arrays) -> None:
    """Put captured arrays back; names must match, as they do for the same job.

    Raises:
        CheckpointError: A variable is missing or has another shape.
    """
    for name, variable in named_variables(model).items():
        found = arrays.get(name)
        if found is None:
            found = _same_place(name, arrays)
        if found.shape != tuple(variable.shape):
            raise CheckpointError(
                f"checkpoint: {name} has shape {found.shape}, the model's has "
                f"{tuple(variable.shape)}: it belongs to another model."
            )
        variable.assign(found)


def _same_place(name: str, arrays: Arrays) -> NDArray[Any]:
    """The array at the same index: automatic layer names may differ between processes."""
    prefix = "/".join(name.split("/")[:2]) + "/"
    for other, array in arrays.items():
        if other.startswith(prefix):
            return array
    raise CheckpointError(f"checkpoint: {name} is missing: it belongs to another model.")


def capture_ranks(model: keras.Model, group: Group) -> Arrays:
    """What differs between ranks, `(workers, elements)`; a collective.

    Metric states are sums over parts, seeds are each replica's own; the states of the user's
    metrics are the same everywhere.
    """
    metrics = [_sum_of_copies(v) for v in keras_adapter.metric_variables(model)]
    own = [value_of(v).astype(np.float64) for v in keras_adapter.own_metric_variables(model)]
    seeds = [
        np.asarray(copy.numpy(), np.float64)
        for variable in keras_adapter.seed_variables(model)
        for copy in _copies(variable)
    ]
    return {
        "ranks/metrics": group.gather(_flat(metrics)),
        "ranks/own_metrics": group.gather(_flat(own)),
        "ranks/seeds": group.gather(_flat(seeds)),
    }


def restore_ranks(model: keras.Model, group: Group, arrays: Arrays, seed: int, step: int) -> None:
    """Each rank takes its own state back.

    With another number of replicas rank 0 takes the sum of the metric states, and seeds are drawn
    anew from (seed, step, replica).
    """
    if "ranks/own_metrics" not in arrays:
        raise CheckpointError(
            "the checkpoint is of an earlier version and lies inside an epoch. Start a new run."
        )
    metrics, seeds = arrays["ranks/metrics"], arrays["ranks/seeds"]
    seed_copies = [
        copy for variable in keras_adapter.seed_variables(model) for copy in _copies(variable)
    ]
    size = sum(int(np.prod(copy.shape)) for copy in seed_copies)
    if seeds.shape == (group.size, size):
        _assign_flat(seed_copies, seeds[group.rank])
    else:
        seed_dropout(model, seed, step, group.first_replica)
    own = metrics[group.rank] if len(metrics) == group.size else metrics.sum(axis=0)
    if len(metrics) != group.size and group.rank != 0:
        own = np.zeros_like(own)
    first, others = [], []
    for variable in keras_adapter.metric_variables(model):
        copies = _copies(variable)
        first.append(copies[0])
        others += copies[1:]
    _assign_flat(first, own)
    for copy in others:
        copy.assign(tf.zeros_like(copy))
    for device in range(group.devices):
        copies = [_copies(v)[device] for v in keras_adapter.own_metric_variables(model)]
        _assign_flat(copies, arrays["ranks/own_metrics"][0])


def seed_dropout(model: keras.Model, seed: int, step: int, first_replica: int) -> None:
    """Put all seed generators where (seed, step, replica) says: replicas draw different masks.

    `first_replica` is the number of this process's first one among those of all workers.
    """
    for index, variable in enumerate(keras_adapter.seed_variables(model)):
        for device, copy in enumerate(_copies(variable)):
            sequence = np.random.SeedSequence([seed, step, first_replica + device, index])
            copy.assign(sequence.generate_state(2).astype(copy.dtype.as_numpy_dtype))


def _copies(variable: Any) -> list[tf.Variable]:
    """This process's copies of a Keras variable, one a device."""
    native = variable.value
    if isinstance(native, tf.distribute.DistributedValues):
        return list(native.values)
    return [native]


def _in_place(variable: tf.Variable) -> Any:
    """The memory of a variable as an array; a tensor where it is another device's memory."""
    value = variable.read_value()
    return np.asarray(value) if "CPU" in value.device else value


def _sum_of_copies(variable: Any) -> Any:
    return np.sum([np.asarray(c.numpy(), np.float64) for c in _copies(variable)], axis=0)


def _flat(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([part.ravel() for part in parts]) if parts else np.zeros(0)


def _assign_flat(variables: list[tf.Variable], values: NDArray[np.float64]) -> None:
    at = 0
    for variable in variables:
        size = int(np.prod(variable.shape))
        value = values[at : at + size].reshape(variable.shape)
        variable.assign(value.astype(variable.dtype.as_numpy_dtype))
        at += size
