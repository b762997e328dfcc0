"""The rules for old layers, but convolutions and recurrent ones: what they are in Keras 3.

A rule takes a configuration in the words of Keras 2 and gives a `Piece`. Layers without a rule of
their own are the layer of the same name in Keras 3, if it is in the catalogue and runs no code of
the author's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from configs.catalog import catalog
from configs.errors import did_you_mean
from trainer.errors import ImportRefused
from trainer.legacy.arguments import (
    activation_of,
    arguments_of,
    base_arguments,
    has_layers_of_its_own,
    is_by_vector,
    layer_name,
)
from trainer.legacy.file import Array, Config
from trainer.legacy.piece import Piece, Shape, Site, Step

Rule = Callable[[Config, Sequence[Shape], Site], Piece]
RULES: dict[str, Rule] = {}
"""By the name of the class in Keras 2."""

# Layers that run code or read files, by their nature.
RUNS_CODE = {
    "Lambda": "runs a function that is stored in the file",
    "TFOpLambda": "calls a function of TensorFlow by its name",
    "SlicingOpLambda": "calls a function of TensorFlow by its name",
    "ClassMethod": "calls a method by its name",
    "InstanceMethod": "calls a method by its name",
    "TensorFlowOpLayer": "runs an operation of TensorFlow that is stored in the file",
    "TFSMLayer": "loads another file",
    "TorchModuleWrapper": "unpickles a module",
    "JaxLayer": "runs a function of its author's",
    "FlaxLayer": "runs a module of its author's",
}

# Each number by itself, so that it does not matter where the channels are.
_BY_NUMBER = frozenset(
    {
        *("Dropout", "AlphaDropout", "GaussianNoise", "GaussianDropout", "ActivityRegularization"),
        *("Rescaling", "Identity"),
    }
)
_WITH_DATA_FORMAT = frozenset(
    {
        f"{kind}{axes}D"
        for kind in ("SpatialDropout", "UpSampling", "ZeroPadding", "Cropping")
        for axes in (1, 2, 3)
    }
)


def rule(*class_names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of classes."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(class_names, function))
        return function

    return register


def same_layer(class_name: str, config: Config, site: Site) -> Piece:
    """The layer of the same name in Keras 3.

    Raises:
        ImportRefused: There is none, or it would run code.
    """
    name = str(config.get("name"))
    if class_name in RUNS_CODE:
        raise ImportRefused(
            f"layer {name!r} is a {class_name}, which {RUNS_CODE[class_name]}; layers of Keras's "
            "own are allowed. Replace it in the model, for example by Rescaling, Activation or "
            "Reshape."
        )
    known = catalog()["layers"]["classes"]
    if class_name not in known:
        raise ImportRefused(
            f"layer {name!r} is a {class_name}, which Keras 3 does not have; its layers are "
            f"allowed.{did_you_mean(class_name, known)} Rebuild the model without it."
        )
    arguments = arguments_of(class_name, config, site.note)
    is_first = arguments.get("data_format") == "channels_first"
    if is_first and class_name in _WITH_DATA_FORMAT:
        arguments["data_format"] = "channels_last"
    layer = make_layer(class_name, arguments)
    where = None if class_name in _BY_NUMBER else is_first and class_name in _WITH_DATA_FORMAT
    return Piece(name, [Step(layer, where)], holder=layer)


def make_layer(class_name: str, arguments: dict[str, Any]) -> keras.layers.Layer:
    """A layer of Keras 3.

    Raises:
        ImportRefused: Keras refuses the arguments.
    """
    try:
        return getattr(keras.layers, class_name)(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise ImportRefused(
            f"layer {arguments.get('name')!r}: Keras 3 refuses {class_name} of this configuration "
            f"({error}). Rebuild the layer in Keras 3."
        ) from error


def activation_steps(activation: Any, name: Any, site: Site) -> list[Step]:
    """The steps that compute an activation which is no function of Keras 3."""
    base = layer_name(name)
    if activation == "hard_sigmoid":
        site.note("hard_sigmoid of Keras 1 and 2, clip(0.2 x + 0.5, 0, 1), is kept by two layers")
        return [
            Step(keras.layers.Rescaling(0.2, 0.5, name=f"{base}_slope"), None),
            Step(keras.layers.ReLU(max_value=1.0, name=f"{base}_clip"), None),
        ]
    if isinstance(activation, dict) and "class_name" in activation:
        inner = dict(activation.get("config") or {})
        if isinstance(activation.get("config"), str):  # a function of Keras's, by name
            function = activation_of(activation["config"], str(name))
            return [Step(keras.layers.Activation(function, name=f"{base}_activation"))]
        inner["name"] = f"{base}_activation"
        return site.make(str(activation["class_name"]), inner, [], site).steps
    raise ImportRefused(
        f"layer {name!r} has the activation {str(activation)[:80]}; one of Keras's is allowed. "
        "Rebuild the layer in Keras 3."
    )


def with_activation(
    class_name: str, config: Config, site: Site, is_moved: bool = False, **changes: Any
) -> Piece:
    """A layer with weights and an activation; what needs layers of its own is put behind it.

    Args:
        class_name: The class in Keras 3.
        config: The old configuration.
        site: Where it is rebuilt.
        is_moved: Whether the layer wants the channels at the end.
        **changes: Arguments that replace those of the configuration.
    """
    activation = config.get("activation")
    after: list[Step] = []
    if has_layers_of_its_own(activation):
        after = activation_steps(activation, config.get("name"), site)
    elif is_moved and is_by_vector(activation):
        name = f"{layer_name(config.get('name'))}_activation"
        after = [Step(keras.layers.Activation(activation_of(activation, name), name=name))]
    if after:
        config = {**config, "activation": "linear"}
    layer = make_layer(class_name, {**arguments_of(class_name, config, site.note), **changes})
    return Piece(str(config.get("name")), [Step(layer, is_moved), *after], holder=layer)


@rule("Dense", "EinsumDense")
def _dense(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    class_name = "EinsumDense" if "equation" in config else "Dense"
    return with_activation(class_name, config, site)


@rule("Activation")
def _activation(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    activation = config.get("activation")
    name = str(config.get("name"))
    if has_layers_of_its_own(activation):
        return Piece(name, activation_steps(activation, name, site))
    arguments = arguments_of("Activation", config, site.note)
    place = False if is_by_vector(activation) else None
    return Piece(name, [Step(make_layer("Activation", arguments), place)])


@rule("Embedding")
def _embedding(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    config = dict(config)
    size = config.pop("embedding_size", config.get("output_dim"))
    words = config.pop("input_dim", None)
    if config.pop("dropout", 0.0):
        site.note(f"Embedding {config.get('name')!r}: its dropout of words in training is left out")
    arguments = arguments_of("Embedding", {**config, "output_dim": size}, site.note)
    layer = make_layer("Embedding", {**arguments, "input_dim": words})
    return Piece(str(config.get("name")), [Step(layer)], holder=layer)


@rule("Flatten")
def _flatten(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """With channels_first, Keras 2.2 and later moved the channels to the end before."""
    is_first = config.get("data_format") == "channels_first"
    arguments = {**arguments_of("Flatten", config, site.note), "data_format": "channels_last"}
    return Piece(str(config.get("name")), [Step(make_layer("Flatten", arguments), is_first)])


@rule("Reshape")
def _reshape(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    return same_layer("Reshape", {**config, "target_shape": tuple(config["target_shape"])}, site)


@rule("LeakyReLU", "ReLU", "ThresholdedReLU", "ELU", "Softmax")
def _advanced_activation(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    name = str(config.get("name"))
    values: dict[str, Any] = base_arguments(config)
    numbers = {
        key: None if config[key] is None else float(np.ravel(config[key])[0])
        for key in ("alpha", "negative_slope", "max_value", "threshold", "theta")
        if key in config
    }
    if "axis" in config:
        return Piece(name, [Step(keras.layers.Softmax(axis=config["axis"], **values))])
    if "theta" in numbers:
        return Piece(name, [Step(keras.layers.ReLU(threshold=numbers["theta"], **values), None)])
    if "max_value" in numbers or "threshold" in numbers:
        kept = {key: value for key, value in numbers.items() if value is not None}
        return Piece(name, [Step(keras.layers.ReLU(**kept, **values), None)])
    slope = numbers.get("alpha", numbers.get("negative_slope"))
    if config.get("class_name_in_file") == "ELU":
        alpha = 1.0 if slope is None else slope
        return Piece(name, [Step(keras.layers.ELU(alpha=alpha, **values), None)])
    slope = 0.3 if slope is None else slope
    return Piece(name, [Step(keras.layers.LeakyReLU(negative_slope=slope, **values), None)])


@rule("BatchNormalization", "SyncBatchNormalization")
def _batch_normalization(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """Along the first axis of an image it works as along the last one, with the channels moved."""
    config = dict(config)
    axis = config.get("axis", -1)
    if isinstance(axis, list):
        if len(axis) != 1:
            raise ImportRefused(
                f"BatchNormalization {config.get('name')!r} works along the axes {axis}; one axis "
                "is allowed in Keras 3. Rebuild the layer."
            )
        (axis,) = axis
    rank = len(shapes[0]) if shapes else 2
    is_moved = axis in (1, 1 - rank) and rank > 2
    config["axis"] = -1 if is_moved else axis
    for key in ("renorm", "virtual_batch_size", "adjustment", "fused"):
        if config.pop(key, None) and key != "fused":
            raise ImportRefused(
                f"BatchNormalization {config.get('name')!r} has {key}, which Keras 3 does not. "
                "Rebuild the layer without it."
            )
    piece = same_layer("BatchNormalization", config, site)
    trained = int(config.get("scale", True) is not False)
    trained += int(config.get("center", True) is not False)
    return Piece(
        piece.name, [Step(piece.steps[0].layer, is_moved)], piece.holder, stored=(trained, 2)
    )


@rule("Normalization")
def _normalization(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """Arrays: mean, variance, and the number of rows they are of."""
    piece = same_layer("Normalization", config, site)
    stored = (0, 3) if config.get("mean") is None else (0, 0)

    def arrange(arrays: list[Array]) -> list[Array]:
        return [*arrays[:2], np.asarray(arrays[2])] if arrays else []

    return Piece(piece.name, piece.steps, piece.holder, arrange, stored)


@rule("PReLU")
def _prelu(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    return same_layer("PReLU", {"shared_axes": None, **config}, site)


@rule("Dot")
def _dot(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    axes = config["axes"]
    axes = axes if isinstance(axes, int) else tuple(np.ravel(axes).tolist())
    is_cosine_of_keras_1 = config.get("is_merge") and config.get("normalize")
    arguments = {"axes": axes, "normalize": bool(config.get("normalize", False))}
    layer = make_layer("Dot", {**base_arguments(config), **arguments})
    steps = [Step(layer)]
    if is_cosine_of_keras_1:  # Keras 1 put an axis of one number before the result
        steps.append(Step(keras.layers.Reshape((1, -1), name=f"{layer.name}_axis")))
    return Piece(str(config.get("name")), steps)


@rule("Concatenate", "Add", "Multiply", "Average", "Maximum", "Minimum", "Subtract")
def _merge(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    kind = str(config["class_name_in_file"])
    if kind == "Concatenate":
        return same_layer(kind, {"axis": -1, **config}, site)
    layer = make_layer(kind, base_arguments(config))
    return Piece(str(config.get("name")), [Step(layer, None)])


@rule("MaxoutDense")
def _maxout(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """The greatest of several Dense layers: one of all their units, and a maximum over them."""
    base = layer_name(config.get("name"))
    features, units = int(config["nb_feature"]), int(config["units"])
    has_bias = config.get("use_bias", True)
    kept = {**config, "units": features * units, "activation": None}
    dense = make_layer("Dense", arguments_of("Dense", {**kept, "name": f"{base}_all"}, site.note))
    steps = [
        Step(dense),
        Step(keras.layers.Reshape((features, units), name=f"{base}_features")),
        Step(keras.layers.GlobalMaxPooling1D(name=base)),
    ]

    def arrange(arrays: list[Array]) -> list[Array]:
        kernel = np.transpose(arrays[0], (1, 0, 2)).reshape(-1, features * units)
        return [kernel, arrays[1].reshape(-1)] if has_bias else [kernel]

    return Piece(str(config.get("name")), steps, dense, arrange)


@rule("Highway")
def _highway(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """T h(x) + (1 - t) x, where t = sigmoid(W_carry x + b_carry)."""
    base = layer_name(config.get("name"))
    width = shapes[0][-1]
    row = keras.layers.Input((width,), name=f"{base}_input")
    changed_config = {**config, "units": width, "name": f"{base}_change"}
    changed_piece = with_activation("Dense", changed_config, site)
    changed = row
    for step in changed_piece.steps:
        changed = step.layer(changed)
    has_bias = bool(config.get("use_bias", True))
    gate = keras.layers.Dense(
        width, activation="sigmoid", use_bias=has_bias, name=f"{base}_gate", bias_initializer="ones"
    )
    share = gate(row)
    rest = keras.layers.Rescaling(-1.0, 1.0, name=f"{base}_rest")(share)
    parts = [keras.layers.Multiply()([share, changed]), keras.layers.Multiply()([rest, row])]
    model = keras.Model(row, keras.layers.Add()(parts), name=base)
    model.trainable = config.get("trainable", True)

    def arrange(arrays: list[Array]) -> list[Array]:
        kernel, carry, *biases = arrays
        pairs = [(kernel, *biases[:1]), (carry, *biases[1:])]
        is_gate_first = model.weights[0] is gate.weights[0]
        order = pairs[::-1] if is_gate_first else pairs
        return [array for pair in order for array in pair]

    return Piece(str(config.get("name")), [Step(model)], model, arrange)


@rule("MultiHeadAttention")
def _attention(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    config = {k: v for k, v in config.items() if k not in ("query_shape", "key_shape")}
    config.pop("value_shape", None)
    return same_layer("MultiHeadAttention", config, site)


@rule("LayerNormalization")
def _layer_normalization(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    return same_layer("LayerNormalization", config, site)


@rule("TimeDistributed")
def _time_distributed(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """Each step of the inner layer under a TimeDistributed of its own."""
    inner = config["layer"]
    inside = [(shape[0], *shape[2:]) for shape in shapes]
    piece = site.make(str(inner["class_name"]), inner["config"], inside, site)
    name = layer_name(config.get("name"))
    rank = len(shapes[0]) if shapes else 3
    steps: list[Step] = []
    is_moved = False
    for index, step in enumerate(piece.steps):
        if step.is_moved is not None and step.is_moved != is_moved and rank > 3:
            steps.append(Step(_behind_time(rank, step.is_moved)))
            is_moved = step.is_moved
        own_name = name if index == 0 else f"{name}_{index}"
        steps.append(Step(keras.layers.TimeDistributed(step.layer, name=own_name)))
        if type(step.layer).__name__.startswith(("Flatten", "Global")):
            is_moved = False
    if is_moved:
        steps.append(Step(_behind_time(rank, False)))
    is_trainable = config.get("trainable", True) is not False
    if not is_trainable:
        for step in steps:
            step.layer.trainable = False
    return Piece(
        str(config.get("name")),
        steps,
        piece.holder,
        piece.arrange,
        piece.stored,
        piece.parts,
        is_trainable and piece.is_trainable,
    )


def _behind_time(rank: int, is_to_end: bool) -> keras.layers.Layer:
    """Moves the channels, which stand behind the axis of time, to the end or back."""
    axes = (1, *range(3, rank), 2) if is_to_end else (1, rank - 1, *range(2, rank - 1))
    return keras.layers.Permute(axes)


@rule("SReLU", "ParametricSoftplus", "LocallyConnected3D")
def _no_equal(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    raise ImportRefused(
        f"layer {config.get('name')!r} is a {config['class_name_in_file']}, whose parameters no "
        "layer of Keras 3 has; its layers are allowed. Train the model again with PReLU or "
        "another activation."
    )
