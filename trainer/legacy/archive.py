"""`.keras` archives of Keras 2.12 to 2.15: the description as in old `.h5` files, arrays by place.

Owns the names under which that Keras kept arrays: the class in small letters, counted within its
model, then the attributes on the way to the array.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from trainer.errors import ImportRefused
from trainer.legacy.file import Array, Config, OldModel, Stored, plain_json

_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")
# What comes first where an object holds several; anything else follows by name.
_ORDER = (
    *("vars", "forward_layer", "backward_layer", "cell", "cells", "layer"),
    *("_query_dense", "_key_dense", "_value_dense", "_output_dense"),
)
_MODELS = ("Sequential", "Model", "Functional")


def is_old_archive(metadata: Config) -> bool:
    """Whether a `.keras` archive with this `metadata.json` is of Keras 2."""
    return str(metadata.get("keras_version", "")).startswith("2.")


def read_old_archive(config: Any, metadata: Config, weights: Path) -> OldModel:
    """The model in an unpacked archive of Keras 2.

    Raises:
        ImportRefused: It is no whole model.
    """
    try:
        plain = plain_json(config)
        with h5py.File(weights) as file:
            arrays = {
                name: list(_stored(group, entry)) for name, group, entry in _members(file, plain)
            }
        return OldModel(
            class_name=str(plain["class_name"]),
            config=plain["config"],
            training=_training(plain.get("compile_config")),
            weights=arrays,
            keras=2,
            version=str(metadata.get("keras_version")),
            backend="tensorflow",
            has_optimizer_state=True,
        )
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ImportRefused(
            f"the archive is no whole model of Keras 2 ({type(error).__name__}: {error}). Save the "
            "model again."
        ) from error


def _training(compiled: Any) -> Config | None:
    if not isinstance(compiled, dict) or not compiled.get("loss"):
        return None
    return {**compiled, "optimizer_config": compiled.get("optimizer") or {}}


def _members(group: Any, model: Config) -> Iterator[tuple[str, Any, Config]]:
    """Name, group and description of each layer of a model that has arrays."""
    container = next((group[name] for name in _CONTAINERS if name in group), None)
    if container is None:
        return
    seen: dict[str, int] = {}
    config = model["config"]
    for entry in config if isinstance(config, list) else config["layers"]:
        kind = _small(str(entry["class_name"]))
        count = seen.get(kind, 0)
        seen[kind] = count + 1
        key = f"{kind}_{count}" if count else kind
        if key in container:
            yield str(entry["config"].get("name") or entry.get("name")), container[key], entry


def _stored(group: Any, entry: Config) -> Iterator[Stored]:
    """The arrays of a layer; each is named by the layer of a nested model that it belongs to."""
    inner = entry
    while inner["class_name"] == "TimeDistributed":
        inner, group = inner["config"]["layer"], group["layer"]
    if inner["class_name"] in _MODELS:
        for _, member, described in _members(group, inner):
            yield from _stored(member, described)
        return
    name = str(inner["config"].get("name"))
    yield from (Stored(f"{name}/{index}", array) for index, array in enumerate(_arrays(group)))


def _arrays(group: Any) -> Iterator[Array]:
    """All arrays under a group, in the order in which the layer has them."""
    names = sorted(group, key=lambda name: (_ORDER.index(name) if name in _ORDER else 99, name))
    for name in names:
        if name == "vars":
            for index in sorted(group[name], key=int):
                yield np.asarray(group[name][index])
        elif isinstance(group[name], h5py.Group):
            yield from _arrays(group[name])


def _small(name: str) -> str:
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
