"""The arguments of a layer of Keras 2 as Keras 3 takes them.

Owns activations, initialisers, regularisers, constraints and types in their old forms. Objects are
made here by name, from Keras's own: no configuration of the file reaches Keras's deserialisation.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from configs.catalog import catalog
from trainer.errors import ImportRefused
from trainer.legacy.file import Config

Note = Callable[[str], None]

# Activations that treat each number by itself, and those that need all numbers of the last axis.
_BY_NUMBER = frozenset(
    {
        *("linear", "relu", "relu6", "sigmoid", "tanh", "elu", "selu", "softplus", "softsign"),
        *("exponential", "gelu", "swish", "silu", "mish", "leaky_relu", "hard_sigmoid"),
    }
)
_BY_VECTOR = frozenset({"softmax", "log_softmax"})
_ACTIVATION_NAMES = {"swish": "silu"}

_POLICIES = ("float16", "bfloat16", "float32", "float64", "mixed_float16", "mixed_bfloat16")

_INITIALIZERS = {
    "zero": "Zeros",
    "one": "Ones",
    "uniform": "RandomUniform",
    "normal": "RandomNormal",
    "identity": "Identity",
    "orthogonal": "Orthogonal",
    "glorot_uniform": "GlorotUniform",
    "glorot_normal": "GlorotNormal",
    "he_uniform": "HeUniform",
    "he_normal": "HeNormal",
    "lecun_uniform": "LecunUniform",
    "lecun_normal": "LecunNormal",
}

_CONSTRAINTS = {
    "maxnorm": "MaxNorm",
    "max_norm": "MaxNorm",
    "nonneg": "NonNeg",
    "non_neg": "NonNeg",
    "unitnorm": "UnitNorm",
    "unit_norm": "UnitNorm",
    "minmaxnorm": "MinMaxNorm",
    "min_max_norm": "MinMaxNorm",
}
_CONSTRAINT_ARGUMENTS = {"m": "max_value", "low": "min_value", "high": "max_value"}

# What a configuration says beside the arguments of its layer.
IGNORED = frozenset(
    {
        *("name", "trainable", "dtype", "batch_input_shape", "input_dtype", "input_shape"),
        *("input_dim", "input_length", "build_config", "batch_size", "implementation"),
        *("consume_less", "stateful", "unroll", "time_major", "sparse", "ragged", "reset_after"),
        *("zero_output_for_mask", "autocast", "registered_name", "module", "cell", "layer"),
        *("class_name_in_file", "is_merge"),
    }
)


def has_layers_of_its_own(activation: Any) -> bool:
    """Whether an activation is not one of Keras 3's functions, and becomes layers."""
    return not isinstance(activation, str | None) or activation == "hard_sigmoid"


def is_by_vector(activation: Any) -> bool:
    """Whether an activation needs all numbers of the last axis, as softmax does."""
    return activation in _BY_VECTOR if isinstance(activation, str) else False


def activation_of(name: Any, owner: str) -> str | None:
    """The name in Keras 3 of an activation function.

    Raises:
        ImportRefused: It is not one of Keras's.
    """
    if name is None:
        return None
    if name not in _BY_NUMBER | _BY_VECTOR:
        raise ImportRefused(
            f"layer {owner!r} has the activation {name!r}, which is not one of Keras's; "
            f"{', '.join(sorted(_BY_NUMBER | _BY_VECTOR))} are allowed. A function of your own "
            "has to be built in Keras 3."
        )
    return _ACTIVATION_NAMES.get(str(name), str(name))


def arguments_of(class_name: str, config: Config, note: Note) -> dict[str, Any]:
    """The arguments of `keras.layers.<class_name>`, with name, type and `trainable`.

    What Keras 3 has no argument for is left out; where it was set, `note` is told.

    Raises:
        ImportRefused: An argument is something of the author's own.
    """
    name = str(config.get("name"))
    allowed = catalog()["layers"]["classes"][class_name]["arguments"]
    arguments: dict[str, Any] = base_arguments(config)
    for key, value in config.items():
        if key in IGNORED:
            continue
        if key not in allowed:
            if value not in (None, False, 0, 0.0, 1, {}, []):
                note(f"{class_name} {name!r}: {key}={value!r} has no equal in Keras 3; left out")
            continue
        if key == "activation" or key == "recurrent_activation":
            value = activation_of(value, name)
        elif key.endswith("_initializer"):
            value = _initializer(value)
        elif key.endswith("_regularizer"):
            value = _regularizer(value, name, note)
        elif key.endswith("_constraint"):
            value = _constraint(value, name, note)
        elif isinstance(value, dict):
            raise ImportRefused(
                f"{class_name} {name!r} has {key}={str(value)[:80]}; numbers and names are allowed "
                "there. Build the layer in Keras 3."
            )
        arguments[key] = value
    return arguments


def base_arguments(config: Config) -> dict[str, Any]:
    """Name, `trainable`, and the type where it is not float32."""
    arguments: dict[str, Any] = {"name": layer_name(config.get("name"))}
    if config.get("trainable") is False:
        arguments["trainable"] = False
    policy = config.get("dtype")
    if isinstance(policy, dict):
        policy = (policy.get("config") or {}).get("name")
    if policy in _POLICIES and policy != "float32":
        arguments["dtype"] = policy
    return arguments


def layer_name(name: Any) -> str | None:
    """A name that Keras 3 takes: without slashes."""
    return None if name is None else str(name).replace("/", "_")


def _named(value: Any) -> tuple[str, Config]:
    """Class and configuration of an object in any of its old forms."""
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, dict):
        return "", {}
    if "class_name" in value:
        return str(value["class_name"]), dict(value.get("config") or {})
    return str(value.get("name", "")), {k: v for k, v in value.items() if k != "name"}


def _initializer(value: Any) -> Any:
    """An initialiser; Keras's default where it is unknown, because the weights replace it."""
    class_name, config = _named(value)
    class_name = _INITIALIZERS.get(class_name, class_name)
    classes = catalog()["initializers"]["classes"]
    if config.get("distribution") in ("normal", "truncated_normal"):
        config["distribution"] = "truncated_normal"
    if class_name not in classes:
        return "glorot_uniform"
    kept = {
        key: item
        for key, item in config.items()
        if key in classes[class_name]["arguments"] and isinstance(item, int | float | str)
    }
    try:
        return getattr(keras.initializers, class_name)(**kept)
    except (TypeError, ValueError):
        return "glorot_uniform"


def _regularizer(value: Any, owner: str, note: Note) -> Any:
    if value is None:
        return None
    class_name, config = _named(value)
    if class_name.lower() in ("l1", "l2", "l1_l2", "l1l2", "weightregularizer", "l1l2regularizer"):
        default = {"l1": 0.01} if class_name == "l1" else {"l2": 0.01} if class_name == "l2" else {}
        if class_name == "l1_l2" and not config:
            default = {"l1": 0.01, "l2": 0.01}
        parts = {key: float(np.ravel(config[key])[0]) for key in ("l1", "l2") if config.get(key)}
        return keras.regularizers.L1L2(**(parts if config else default))
    note(f"layer {owner!r}: the regularizer {class_name!r} is not known to Keras 3; left out")
    return None


def _constraint(value: Any, owner: str, note: Note) -> Any:
    if value is None:
        return None
    class_name, config = _named(value)
    class_name = _CONSTRAINTS.get(class_name.lower(), class_name)
    classes = catalog()["constraints"]["classes"]
    if class_name not in classes:
        note(f"layer {owner!r}: the constraint {class_name!r} is not known to Keras 3; left out")
        return None
    renamed = {_CONSTRAINT_ARGUMENTS.get(key, key): item for key, item in config.items()}
    kept = {key: item for key, item in renamed.items() if key in classes[class_name]["arguments"]}
    return getattr(keras.constraints, class_name)(**kept)
