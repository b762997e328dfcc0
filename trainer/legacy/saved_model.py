"""SavedModels that Keras 2 wrote: layers from Keras's description, arrays from the checkpoint.

Owns the two places where the description was kept (`keras_metadata.pb` since TensorFlow 2.5, the
object graph before), and the way from a layer to its arrays, which leads over the lists of
trainable, other and all variables that every saved layer has.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2, trackable_object_graph_pb2

from trainer.errors import ImportRefused
from trainer.legacy.file import Config, OldModel, Stored, plain_json

_METADATA = "keras_metadata.pb"
_LISTS = ("trainable_variables", "non_trainable_variables", "variables")


def read_old_saved_model(folder: Path) -> OldModel:
    """The model of layers that a SavedModel was saved from.

    Raises:
        ImportRefused: It tells nothing of layers, or is of a class of its author's.
    """
    try:
        described = dict(_descriptions(folder))
        root = described.get("root")
        if root is None or "config" not in root:
            raise ImportRefused("it tells nothing of its layers.")
        if root.get("class_name") not in ("Functional", "Model", "Sequential"):
            raise ImportRefused(f"it is a {root.get('class_name')}, a class of its author's.")
        return OldModel(
            class_name=str(root["class_name"]),
            config=root["config"],
            training=root.get("training_config"),
            weights=_weights(folder, described),
            keras=2,
            version=str(root.get("keras_version", "2")),
            backend="tensorflow",
            has_optimizer_state=bool(root.get("training_config")),
        )
    except (OSError, KeyError, TypeError, ValueError, IndexError, tf.errors.OpError) as error:
        raise ImportRefused(
            f"its description of layers cannot be read ({type(error).__name__}: {error})."
        ) from error


def _descriptions(folder: Path) -> Iterator[tuple[str, Config]]:
    """What Keras wrote of each object, by the path to it, such as `root.layer-1`."""
    if (folder / _METADATA).exists():
        for node in _fields((folder / _METADATA).read_bytes()):
            if node[0] == 1:
                fields = dict(_fields(node[1]))
                yield fields[3].decode(), plain_json(json.loads(fields[5]))
        return
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    nodes = saved.meta_graphs[0].object_graph_def.nodes
    for path, index in [("root", 0)] + [
        (f"root.{child.local_name}", child.node_id) for child in nodes[0].children
    ]:
        text = nodes[index].user_object.metadata
        if nodes[index].user_object.identifier.startswith("_tf_keras") and text:
            yield path, plain_json(json.loads(text))


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the fields of a protocol buffer that hold bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 2:
            length = number()
            yield key >> 3, data[at : at + length]
            at += length
        elif key & 7 == 0:
            number()
        else:
            raise ValueError(f"a field of kind {key & 7} in {_METADATA}")


def _weights(folder: Path, described: dict[str, Config]) -> dict[str, list[Stored]]:
    reader = tf.train.load_checkpoint(str(folder / "variables" / "variables"))
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    weights = {}
    for child in graph.nodes[0].children:
        record = described.get(f"root.{child.local_name}")
        if record is not None and child.local_name.startswith("layer"):
            layer = graph.nodes[child.node_id]
            listed = [index for name in _LISTS for index in _list(graph, layer, name)]
            weights[str(record["name"])] = [
                Stored(attribute.full_name, np.asarray(reader.get_tensor(attribute.checkpoint_key)))
                for index in dict.fromkeys(listed)
                for attribute in graph.nodes[index].attributes
            ]
    return weights


def _list(graph: Any, node: Any, name: str) -> list[int]:
    """Numbers of the objects in a list that a layer keeps."""
    for child in node.children:
        if child.local_name == name:
            entries = [
                entry for entry in graph.nodes[child.node_id].children if entry.local_name.isdigit()
            ]
            return [entry.node_id for entry in sorted(entries, key=lambda e: int(e.local_name))]
    return []
