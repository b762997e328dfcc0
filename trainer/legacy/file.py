"""Old `.h5` model files: the description of the model and its arrays, as they stand in the file.

Owns the many ways in which attributes were written: text or bytes, in one piece or in chunks, with
or without version and backend.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from trainer.errors import ImportRefused

Array = NDArray[Any]
Config = dict[str, Any]

# Words that no configuration of Keras 2 has.
_KERAS_1_WORDS = frozenset(
    {
        *("nb_filter", "border_mode", "dim_ordering", "W_regularizer", "init", "inner_init"),
        *("pool_length", "subsample", "concat_axis", "p", "sigma"),
    }
)


@dataclass(frozen=True)
class Stored:
    """One array of a layer, with the name of the variable that it was."""

    name: str
    values: Array


@dataclass
class OldModel:
    """A model as an old file describes it.

    Attributes:
        class_name: "Sequential", or a functional model's class.
        config: The model's configuration.
        training: Loss, metrics and optimizer, or None.
        weights: The arrays by the name of the layer, in the order of the file.
        keras: 1 or 2.
        version: What the file says of its Keras.
        backend: "tensorflow", "theano" or "cntk".
        has_optimizer_state: Whether there are arrays of the optimizer.
        notes: What the user should know.
    """

    class_name: str
    config: Any
    training: Config | None
    weights: dict[str, list[Stored]]
    keras: int
    version: str
    backend: str
    has_optimizer_state: bool = False
    notes: list[str] = field(default_factory=list)


def is_old_h5(path: Path) -> bool:
    """Whether an `.h5` file holds a model of Keras 1 or 2.

    Raises:
        ImportRefused: It cannot be read, or holds weights only.
    """
    try:
        with h5py.File(path) as file:
            if "model_config" not in file.attrs:
                raise ImportRefused(
                    f"{path.name} holds weights without a model; whole models are allowed. Save "
                    "the model with model.save."
                )
            return not _text(file.attrs.get("keras_version", "")).startswith("3.")
    except OSError as error:
        raise ImportRefused(
            f"{path.name} cannot be read ({error}); whole HDF5 files are allowed. Copy it again."
        ) from error


def read_old_h5(path: Path) -> OldModel:
    """The model in an `.h5` file of Keras 1 or 2.

    Raises:
        ImportRefused: The file is no whole model.
    """
    try:
        with h5py.File(path) as file:
            model = plain_json(json.loads(_text(file.attrs["model_config"])))
            training = file.attrs.get("training_config")
            group = file.get("model_weights", file)
            weights = {
                name: list(_arrays(group[name])) for name in _texts(group.attrs, "layer_names")
            }
            version = _text(file.attrs.get("keras_version", group.attrs.get("keras_version", "")))
            keras = 1 if version.startswith("1") or (not version and _is_keras_1(model)) else 2
            backend = _text(file.attrs.get("backend", group.attrs.get("backend", "")))
            return OldModel(
                class_name=str(model["class_name"]),
                config=model["config"],
                training=None if training is None else plain_json(json.loads(_text(training))),
                weights=weights,
                keras=keras,
                version=version or f"{keras}.x",
                backend=backend.lower() or _backend_by_names(weights),
                has_optimizer_state="optimizer_weights" in file,
            )
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ImportRefused(
            f"{path.name} is not a whole model file of Keras ({type(error).__name__}: {error}); "
            "what model.save wrote is allowed. Save it again, or copy it again."
        ) from error


def plain_json(value: Any, depth: int = 0) -> Any:
    """A configuration without the marks by which tuples and shapes were kept apart from lists."""
    if depth > 200:
        raise ValueError("the configuration is nested too deeply")
    if isinstance(value, dict):
        if value.get("class_name") in ("__tuple__", "TensorShape") and "items" in value:
            return [plain_json(item, depth + 1) for item in value["items"] or []]
        if value.get("type") == "ndarray" and "value" in value:
            return value["value"]
        return {key: plain_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_json(item, depth + 1) for item in value]
    return value


def _arrays(group: Any) -> Iterator[Stored]:
    for name in _texts(group.attrs, "weight_names"):
        yield Stored(name, np.asarray(group[name]))


def _texts(attributes: Any, name: str) -> list[str]:
    """A list of names; a long one is cut into attributes `name0`, `name1` and so on."""
    if name in attributes:
        return [_text(entry) for entry in attributes[name]]
    found: list[str] = []
    chunk = 0
    while f"{name}{chunk}" in attributes:
        found += [_text(entry) for entry in attributes[f"{name}{chunk}"]]
        chunk += 1
    return found


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value.item()
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _is_keras_1(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(_KERAS_1_WORDS & value.keys()) or any(map(_is_keras_1, value.values()))
    return isinstance(value, list) and any(map(_is_keras_1, value))


def _backend_by_names(weights: dict[str, list[Stored]]) -> str:
    """The backend of a file that does not say: TensorFlow's variables have names such as `W:0`."""
    names = [stored.name for arrays in weights.values() for stored in arrays]
    return "theano" if names and not any(":" in name for name in names) else "tensorflow"
