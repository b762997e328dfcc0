"""The names and arguments of Keras, without importing Keras.

Owns the check of a Keras object in a job file: `Dense`, `{Dense: {units: 32}}`,
`{Adam: {learning_rate: {ExponentialDecay: {...}}}}`. The table `keras_catalog.json` is written by
`python -m trainer.catalog` from the pinned Keras; a test compares the two. Whether values fit
(`units: -3`) is left to Keras.
"""

import functools
import json
from pathlib import Path
from typing import Any

from configs.errors import did_you_mean

_SINGULAR = {
    "layers": "layer",
    "losses": "loss",
    "metrics": "metric",
    "optimizers": "optimizer",
    "callbacks": "callback",
}
# Kinds that stand as arguments inside others, such as a schedule inside an optimizer.
_NESTED_KINDS = ("layers", "optimizers", "schedules", "initializers", "regularizers", "constraints")

ROW_FUNCTIONS = {
    "MeanAbsoluteError": "mean_absolute_error",
    "MeanSquaredError": "mean_squared_error",
    "RootMeanSquaredError": "mean_squared_error",
    "MeanAbsolutePercentageError": "mean_absolute_percentage_error",
    "MeanSquaredLogarithmicError": "mean_squared_logarithmic_error",
    "LogCosh": "log_cosh",
    "LogCoshError": "log_cosh",
    "Huber": "huber",
    "Poisson": "poisson",
    "KLDivergence": "kl_divergence",
    "Hinge": "hinge",
    "SquaredHinge": "squared_hinge",
    "CategoricalHinge": "categorical_hinge",
    "BinaryCrossentropy": "binary_crossentropy",
    "CategoricalCrossentropy": "categorical_crossentropy",
    "SparseCategoricalCrossentropy": "sparse_categorical_crossentropy",
    "BinaryAccuracy": "binary_accuracy",
    "CategoricalAccuracy": "categorical_accuracy",
    "SparseCategoricalAccuracy": "sparse_categorical_accuracy",
    "TopKCategoricalAccuracy": "top_k_categorical_accuracy",
    "SparseTopKCategoricalAccuracy": "sparse_top_k_categorical_accuracy",
}
"""Keras's functions that give one value a row, by the class of the metric or loss."""


@functools.cache
def catalog() -> dict[str, Any]:
    """The whole table: kind -> {"classes": {name: entry}, "aliases": [names]}."""
    path = Path(__file__).with_name("keras_catalog.json")
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def is_own_code(name: str) -> bool:
    """Whether a name points at the user's code: 'package.module:Name' or 'file.py:Name'."""
    return ":" in name


def split_spec(spec: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a Keras object as it stands in a job file.

    Raises ValueError where `spec` is neither a name nor a mapping with one key.
    """
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, dict) and len(spec) == 1:
        name, arguments = next(iter(spec.items()))
        if arguments is None:
            return str(name), {}
        if isinstance(arguments, dict):
            return str(name), arguments
        raise ValueError(
            f"received {name}: {arguments!r}; the arguments of {name} are a mapping, such as "
            f"{name}: {{argument: value}}. Name the argument."
        )
    raise ValueError(
        f"received {spec!r}; a name, or a mapping of one name to its arguments, is allowed. "
        "Check the indentation."
    )


def find_kind(name: str) -> str | None:
    """The kind of a class that may stand as an argument inside another, or None."""
    for kind in _NESTED_KINDS:
        if name in catalog()[kind]["classes"]:
            return kind
    return None


def check_spec(kind: str, spec: Any) -> None:
    """Check name and argument names of one Keras object, and of those nested in it.

    Raises ValueError with received, allowed, remedy.
    """
    name, arguments = split_spec(spec)
    if is_own_code(name):
        return
    table = catalog()[kind]
    if name not in table["classes"]:
        if name not in table["aliases"]:
            names = [*table["classes"], *([] if arguments else table["aliases"])]
            raise ValueError(
                f"unknown {_SINGULAR.get(kind, kind)} {name!r}; any of keras.{kind} is allowed."
                f"{did_you_mean(name, names)}"
            )
        if arguments:
            raise ValueError(
                f"received arguments for {name!r}, which is an alias; arguments need the class "
                f"name.{did_you_mean(name.replace('_', ''), table['classes'])}"
            )
        return
    _check_arguments(name, table["classes"][name], arguments)


def _check_arguments(name: str, entry: dict[str, Any], arguments: dict[str, Any]) -> None:
    for argument, value in arguments.items():
        if argument not in entry["arguments"]:
            allowed = ", ".join(entry["arguments"])
            raise ValueError(
                f"{name} has no argument {argument!r}; allowed: {allowed}."
                f"{did_you_mean(str(argument), entry['arguments'])}"
            )
        _check_nested(value)
    missing = [argument for argument in entry["required"] if argument not in arguments]
    if missing:
        raise ValueError(
            f"{name} needs {' and '.join(missing)}. Write {name}: {{{missing[0]}: ...}}."
        )


def _check_nested(value: Any) -> None:
    if isinstance(value, list):
        for element in value:
            _check_nested(element)
    elif isinstance(value, dict) and len(value) == 1:
        name = next(iter(value))
        kind = find_kind(str(name))
        if kind is not None:
            check_spec(kind, value)
