"""The rules for recurrent layers.

Owns the order of gates, the separate arrays of Keras 1, cuDNN's layers, and the hard sigmoid of old
Keras, which becomes the one of Keras 3 by scaling the gates' weights.
"""

from collections.abc import Sequence
from typing import Any

import keras

from trainer.errors import ImportRefused
from trainer.legacy.arguments import arguments_of, base_arguments
from trainer.legacy.convolution import sizes
from trainer.legacy.file import Array, Config
from trainer.legacy.layers import make_layer, rule
from trainer.legacy.piece import Piece, Shape, Site, Step
from trainer.legacy.weights import (
    from_cudnn,
    joined_gates,
    scaled_gates,
    spatial_last_of_keras_1,
    turned,
)

_GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1, "ConvLSTM1D": 4, "ConvLSTM2D": 4, "ConvLSTM3D": 4}


@rule("LSTM", "GRU", "SimpleRNN", "CuDNNLSTM", "CuDNNGRU")
def _recurrent(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    class_in_file = str(config["class_name_in_file"])
    class_name = class_in_file.removeprefix("CuDNN")
    config = _checked(dict(config), class_in_file, site)
    arguments = arguments_of(class_name, config, site.note)
    if class_in_file != class_name:
        arguments |= {"activation": "tanh", "recurrent_activation": "sigmoid"}
        site.note(f"{class_in_file} became {class_name}, with its arrays in the usual order")
    if class_name == "GRU":
        is_after = bool(config.get("reset_after", False)) or class_in_file != class_name
        arguments["reset_after"] = is_after
        arguments.setdefault("recurrent_activation", "hard_sigmoid")
    if class_name == "LSTM":
        arguments.setdefault("recurrent_activation", "hard_sigmoid")
    layer = make_layer(class_name, arguments)
    gates = _scaled(class_name, arguments, str(config.get("name")), site)
    count = 3 if config.get("use_bias", True) else 2
    if site.is_keras_1 and class_name in ("LSTM", "GRU") and config.get("consume_less") != "gpu":
        count *= _GATES[class_name]

    def arrange(arrays: list[Array]) -> list[Array]:
        arrays = _in_order(class_name, class_in_file, list(arrays))
        return scaled_gates(arrays, gates) if any(gates) else arrays

    return Piece(str(config.get("name")), [Step(layer)], layer, arrange, (count, 0))


def _in_order(class_name: str, class_in_file: str, arrays: list[Array]) -> list[Array]:
    if class_in_file != class_name:
        return from_cudnn(arrays, _GATES[class_name])
    if class_name == "LSTM" and len(arrays) == 12:  # input, cell, forget, output
        return joined_gates(arrays, (0, 2, 1, 3))
    if class_name == "GRU" and len(arrays) == 9:
        return joined_gates(arrays, (0, 1, 2))
    units = arrays[1].shape[0]
    is_cudnn_file = len(arrays) == 3 and arrays[2].shape == (2 * units * _GATES[class_name],)
    if is_cudnn_file and class_name in ("LSTM", "GRU"):
        return from_cudnn(arrays, _GATES[class_name])
    return arrays


def _scaled(class_name: str, arguments: dict[str, Any], name: str, site: Site) -> list[bool]:
    """Which gates go through the old hard sigmoid."""
    is_gate = arguments.get("recurrent_activation") == "hard_sigmoid"
    is_cell = arguments.get("activation") == "hard_sigmoid"
    if is_cell and _GATES[class_name] == 4:
        raise ImportRefused(
            f"layer {name!r} is {class_name} with the activation 'hard_sigmoid' of old Keras, "
            "which Keras 3 does not have; any other activation is allowed, and hard_sigmoid as "
            "recurrent_activation. Train the model again."
        )
    if is_gate or is_cell:
        site.note(
            "weights of recurrent gates were multiplied by 1.2, which makes the hard_sigmoid of "
            "Keras 3 that of old Keras"
        )
    if _GATES[class_name] == 1:
        return [is_cell]
    if _GATES[class_name] == 3:
        return [is_gate, is_gate, is_cell]
    return [is_gate, is_gate, False, is_gate]


def _checked(config: Config, class_name: str, site: Site) -> Config:
    """The configuration without what Keras 3 does otherwise, or need not be told."""
    name = config.get("name")
    if config.get("stateful"):
        site.note(
            f"layer {name!r} was stateful: it starts from zeros for each row now, as after "
            "reset_states"
        )
    if config.get("time_major"):
        raise ImportRefused(
            f"layer {name!r} takes time before rows (time_major), which Keras 3 does not. Rebuild "
            "the model with rows first."
        )
    for key in ("stateful", "unroll", "time_major"):
        config.pop(key, None)
    return config


@rule("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")
def _convolutional(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    class_name = str(config["class_name_in_file"])
    axes = int(class_name[-2])
    is_first = config.get("data_format") == "channels_first"
    config = _checked(dict(config), class_name, site)
    kernel = sizes(config["kernel_size"], axes)
    strides = sizes(config.get("strides", 1), axes)
    is_usual = all(size % 2 for size in kernel) and set(strides) == {1}
    if site.is_theano and not (is_usual or config.get("padding") == "valid" and kernel[0] % 2):
        raise ImportRefused(
            f"layer {config.get('name')!r} is a {class_name} that Theano padded in a way that "
            "Keras 3 does not; odd kernels without strides are allowed. Train the model again."
        )
    arguments = {**arguments_of(class_name, config, site.note), "data_format": "channels_last"}
    arguments.setdefault("recurrent_activation", "hard_sigmoid")
    layer = make_layer(class_name, arguments)
    gates = _scaled(class_name, arguments, str(config.get("name")), site)

    def arrange(arrays: list[Array]) -> list[Array]:
        arrays = list(arrays)
        if len(arrays) == 12:
            if is_first:
                arrays = [
                    spatial_last_of_keras_1(array, axes) if array.ndim > 1 else array
                    for array in arrays
                ]
            arrays = joined_gates(arrays, (0, 2, 1, 3))
        if site.is_theano:
            arrays[:2] = [turned(array, axes) for array in arrays[:2]]
        return scaled_gates(arrays, gates) if any(gates) else arrays

    stored = ((3 if config.get("use_bias", True) else 2) * (4 if site.is_keras_1 else 1), 0)
    steps = [Step(layer)]
    if is_first:  # the channels stand behind the axis of time, if there is one
        before = (1, *range(3, axes + 3), 2)
        after = (axes + 1, *range(1, axes + 1))
        if config.get("return_sequences"):
            after = (1, axes + 2, *range(2, axes + 2))
        steps = [Step(keras.layers.Permute(before)), *steps, Step(keras.layers.Permute(after))]
    return Piece(str(config.get("name")), steps, layer, arrange, stored)


@rule("LSTMCell", "GRUCell", "SimpleRNNCell")
def _cell(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    class_name = str(config["class_name_in_file"])
    kind = class_name.removesuffix("Cell")
    arguments = arguments_of(class_name, config, site.note)
    if kind == "GRU":
        arguments["reset_after"] = bool(config.get("reset_after", False))
    cell = make_layer(class_name, arguments)
    gates = _scaled(kind, arguments, str(config.get("name")), site)

    def arrange(arrays: list[Array]) -> list[Array]:
        return scaled_gates(arrays, gates) if any(gates) else list(arrays)

    count = 3 if config.get("use_bias", True) else 2
    return Piece(str(config.get("name")), [Step(cell)], cell, arrange, (count, 0))


@rule("RNN")
def _cells(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """One cell or several on top of each other, driven by RNN."""
    config = _checked(dict(config), "RNN", site)
    cell = config["cell"]
    is_stacked = cell["class_name"] == "StackedRNNCells"
    described = cell["config"]["cells"] if is_stacked else [cell]
    pieces = [site.make(str(d["class_name"]), d["config"], [], site) for d in described]
    cells = [piece.steps[0].layer for piece in pieces]
    arguments: dict[str, Any] = base_arguments(config)
    for key in ("return_sequences", "return_state", "go_backwards"):
        arguments[key] = bool(config.get(key, False))
    layer = make_layer("RNN", {"cell": cells if is_stacked else cells[0], **arguments})

    def arrange(arrays: list[Array]) -> list[Array]:
        arranged: list[Array] = []
        for piece in pieces:
            count = piece.counts[0]
            arranged += piece.arrange(arrays[:count])
            arrays = arrays[count:]
        return arranged

    stored = (sum(piece.counts[0] for piece in pieces), 0)
    return Piece(str(config.get("name")), [Step(layer)], layer, arrange, stored)


@rule("Bidirectional")
def _bidirectional(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    inner = config["layer"]
    forward = site.make(str(inner["class_name"]), inner["config"], shapes, site)
    arguments: dict[str, Any] = {**base_arguments(config), "layer": forward.steps[0].layer}
    arguments["merge_mode"] = config.get("merge_mode", "concat")
    backward = forward
    if config.get("backward_layer"):
        other = config["backward_layer"]
        backward = site.make(str(other["class_name"]), other["config"], shapes, site)
        arguments["backward_layer"] = backward.steps[0].layer
    layer = make_layer("Bidirectional", arguments)
    count = forward.counts[0]

    def arrange(arrays: list[Array]) -> list[Array]:
        return [*forward.arrange(arrays[:count]), *backward.arrange(arrays[count:])]

    stored = (count + backward.counts[0], 0)
    return Piece(str(config.get("name")), [Step(layer)], layer, arrange, stored)
