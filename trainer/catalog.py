"""Writes `configs/keras_catalog.json`: the names and arguments of the pinned Keras.

Run `python -m trainer.catalog` after a change of the Keras version; a test compares the file with
the installed Keras.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import keras

_KINDS: dict[str, tuple[Any, type]] = {
    "layers": (keras.layers, keras.layers.Layer),
    "losses": (keras.losses, keras.losses.Loss),
    "metrics": (keras.metrics, keras.metrics.Metric),
    "optimizers": (keras.optimizers, keras.optimizers.Optimizer),
    "schedules": (
        keras.optimizers.schedules,
        keras.optimizers.schedules.LearningRateSchedule,
    ),
    "callbacks": (keras.callbacks, keras.callbacks.Callback),
    "initializers": (keras.initializers, keras.initializers.Initializer),
    "regularizers": (keras.regularizers, keras.regularizers.Regularizer),
    "constraints": (keras.constraints, keras.constraints.Constraint),
}

# Bases and wrappers that stand in Keras's own tables but cannot be used by name alone.
_NOT_BY_NAME = {
    *("Loss", "LossFunctionWrapper", "Metric", "metric", "mean_metric_wrapper"),
    *("optimizer", "optimizermap", "lossscaleoptimizer", "multioptimizer"),
}


def build_catalog() -> dict[str, Any]:
    """The table: kind -> {"classes": {name: {"arguments", "required"}}, "aliases": [names]}."""
    return {kind: _kind_table(kind, *where) for kind, where in _KINDS.items()}


def _kind_table(kind: str, module: Any, base: type) -> dict[str, Any]:
    classes = {
        name: _signature(value, base)
        for name, value in sorted(vars(module).items())
        if inspect.isclass(value) and issubclass(value, base) and value is not base
    }
    return {"classes": classes, "aliases": _aliases(kind, module, classes)}


def _aliases(kind: str, module: Any, classes: dict[str, Any]) -> list[str]:
    """Names other than classes that `module.get` resolves: functions and lower-case forms."""
    if kind not in ("losses", "metrics", "optimizers"):
        return []
    source = inspect.getmodule(module.get)
    known = set(getattr(source, "ALL_OBJECTS_DICT", {}))
    if kind == "metrics":
        known |= {"accuracy", "acc", "crossentropy", "ce"}  # resolved by compile from the loss
    return sorted(name for name in known if name not in classes and name not in _NOT_BY_NAME)


def _signature(cls: type, base: type) -> dict[str, list[str]]:
    """Argument names of a constructor; `**kwargs` stands for those of the base class."""
    arguments: list[str] = []
    required: list[str] = []
    for parameter in list(inspect.signature(_constructor(cls)).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments += _base_arguments(base)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            arguments.append(parameter.name)
            if parameter.default is parameter.empty:
                required.append(parameter.name)
    return {"arguments": list(dict.fromkeys(arguments)), "required": required}


def _base_arguments(base: type) -> list[str]:
    names = [
        parameter.name
        for parameter in list(inspect.signature(_constructor(base)).parameters.values())[1:]
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if base is keras.layers.Layer:
        names += ["input_shape", "batch_size"]  # accepted by Layer.__init__ through its kwargs
    return names


def _constructor(cls: type) -> Any:
    """The constructor itself: Keras replaces the signature of the class by one of `__new__`."""
    return vars(cls).get("__init__") or _constructor(cls.__mro__[1])


def main() -> None:
    """Write the table beside the schema."""
    import configs

    path = Path(configs.__file__).with_name("keras_catalog.json")
    path.write_text(json.dumps(build_catalog(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
