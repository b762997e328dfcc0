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


def value_of(variable: Any) -> NDArray[Any]:
    """The value of a Keras variable on this process's first device."""
    native = variable.value
    if isinstance(native, tf.distribute.DistributedValues):
        native = native.values[0]
    return np.asarray(native.numpy())


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
    """What differs between ranks: metric states and seeds, `(workers, elements)`; a collective."""
    metrics = [value_of(v).astype(np.float64) for v in keras_adapter.metric_variables(model)]
    seeds = [value_of(v).astype(np.float64) for v in keras_adapter.seed_variables(model)]
    return {
        "ranks/metrics": group.gather(_flat(metrics)),
        "ranks/seeds": group.gather(_flat(seeds)),
    }


def restore_ranks(model: keras.Model, group: Group, arrays: Arrays, seed: int, step: int) -> None:
    """Each rank takes its own state back.

    With another number of workers rank 0 takes the sum of the metric states, and seeds are drawn
    anew from (seed, step, rank).
    """
    metrics, seeds = arrays["ranks/metrics"], arrays["ranks/seeds"]
    if len(metrics) == group.size:
        own = metrics[group.rank]
        _assign_flat(group, keras_adapter.seed_variables(model), seeds[group.rank])
    else:
        own = metrics.sum(axis=0) if group.rank == 0 else np.zeros_like(metrics[0])
        seed_dropout(model, seed, step, group)
    _assign_flat(group, keras_adapter.metric_variables(model), own)


def _flat(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([part.ravel() for part in parts]) if parts else np.zeros(0)


def _assign_flat(group: Group, variables: list[Any], values: NDArray[np.float64]) -> None:
    at = 0
    for variable in variables:
        size = int(np.prod(variable.shape))
        _assign_local(group, variable, values[at : at + size].reshape(variable.shape))
        at += size


def _assign_local(group: Group, variable: Any, value: NDArray[Any]) -> None:
    if group.size == 1:
        variable.assign(value)
        return
    tensor = tf.constant(value.astype(variable.dtype))
    group.strategy.run(lambda: variable.value.assign(tensor))


def seed_dropout(model: keras.Model, seed: int, step: int, group: Group) -> None:
    """Put all seed generators where (seed, step, rank) says, so that ranks draw different masks."""
    for index, variable in enumerate(keras_adapter.seed_variables(model)):
        sequence = np.random.SeedSequence([seed, step, group.rank, index])
        _assign_local(group, variable, sequence.generate_state(2))
