"""Old models of layers, sequential or functional, as Keras 3's models.

Owns the forms in which connections were written, models inside models, and branches.
"""

from collections.abc import Sequence
from typing import Any

import keras

from trainer.errors import ImportRefused
from trainer.legacy import convolution, recurrent  # noqa: F401  (they bring their rules)
from trainer.legacy.arguments import layer_name
from trainer.legacy.file import Config, OldModel
from trainer.legacy.filling import fill_from_groups
from trainer.legacy.layers import RULES, same_layer
from trainer.legacy.piece import Moved, Piece, Shape, Site, Step, apply_steps, settled
from trainer.legacy.vocabulary import from_keras_1, ordering_of, without_versions

_MODELS = ("Sequential", "Model", "Functional")
_MAX_LAYERS = 20_000


def rebuild(
    model: OldModel, input_shape: tuple[int, ...] | None = None
) -> tuple[keras.Model, list[str]]:
    """A model of Keras 3 that computes what an old model did.

    Args:
        model: The old model.
        input_shape: Lengths of a row's axes, where the file does not tell them.

    Returns:
        The model, not compiled, and what the user should know.

    Raises:
        ImportRefused: A layer has no equal in Keras 3, would run code, or does not fit its arrays.
    """
    usual = "channels_first" if model.keras == 1 and model.backend == "theano" else "channels_last"
    site = Site(model, ordering_of(model.config) or usual, make_piece)
    if model.class_name not in _MODELS:
        raise ImportRefused(
            f"the model is a {model.class_name}, a class of its author's; Sequential and "
            "functional models are allowed. Build the model from layers, and save it again."
        )
    built, parts = _build(model.class_name, model.config, site, input_shape)
    _name_models(parts, list(model.weights))
    for part in parts:
        fill_from_groups(part, model.weights)
    return built, site.notes


def _name_models(parts: list[Piece], groups: list[str]) -> None:
    """Name nested models as the groups of their arrays: Keras 1 did not write their names."""
    if len(parts) == len(groups):
        for part, group in zip(parts, groups, strict=True):
            if part.parts is not None and part.name not in groups:
                part.name = group


def make_piece(class_name: str, config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """The piece that a layer or a nested model becomes.

    Raises:
        ImportRefused: It has no equal in Keras 3.
    """
    if class_name in _MODELS:
        built, parts = _build(class_name, config, site, None, shapes)
        is_trainable = not (isinstance(config, dict) and config.get("trainable") is False)
        if not is_trainable:
            built.trainable = False
        return _as_piece(built, parts, is_trainable)
    if site.is_keras_1:
        class_name, config = from_keras_1(class_name, config, site.ordering)
    class_name = without_versions(class_name)
    config = {**config, "class_name_in_file": class_name}
    found = RULES.get(class_name)
    piece = found(config, shapes, site) if found else same_layer(class_name, config, site)
    if config.get("trainable") is False:
        piece.is_trainable = False
    return piece


def _as_piece(built: keras.Model, parts: list[Piece], is_trainable: bool) -> Piece:
    return Piece(built.name, [Step(built)], parts=parts, is_trainable=is_trainable)


def _build(
    class_name: str,
    config: Any,
    site: Site,
    input_shape: tuple[int, ...] | None,
    shapes: Sequence[Shape] = (),
) -> tuple[keras.Model, list[Piece]]:
    if class_name == "Sequential":
        return _sequential(config, site, input_shape, shapes)
    return _functional(config, site, input_shape)


def _sequential(
    config: Any, site: Site, input_shape: tuple[int, ...] | None, shapes: Sequence[Shape]
) -> tuple[keras.Model, list[Piece]]:
    listed = config if isinstance(config, list) else config["layers"]
    name = layer_name(config.get("name")) if isinstance(config, dict) else None
    if not listed or len(listed) > _MAX_LAYERS:
        raise ImportRefused("the model has no layers; at least one is needed. Save it again.")
    if listed[0]["class_name"] == "Merge":
        return _merged_branches(listed, site)
    shape = input_shape or _first_shape(config, listed, site)
    if shape is None and shapes:
        shape = tuple(shapes[0][1:])
    if shape is None:
        raise ImportRefused(
            "the file does not tell the shape of a row; it is needed to build the model. Give "
            "--input-shape, such as --input-shape 28,28,1."
        )
    row = keras.layers.Input(shape)
    value = Moved(row)
    used: list[keras.layers.Layer] = []
    parts: list[Piece] = []
    for entry in listed:
        if entry["class_name"] == "InputLayer":
            continue
        piece = make_piece(entry["class_name"], entry["config"], [value.shape], site)
        value = _applied(piece, value, used)
        parts.append(piece)
    settled(value, False, used)
    return keras.Sequential([keras.layers.Input(shape), *used], name=name), parts


def _applied(piece: Piece, value: Moved, used: list[keras.layers.Layer], **keywords: Any) -> Moved:
    try:
        return apply_steps(piece.steps, value, used, **keywords)
    except (TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ImportRefused(
            f"layer {piece.name!r} cannot take rows of shape {list(value.shape[1:])} in Keras 3 "
            f"({reason}). Check --input-shape, or rebuild the layer in Keras 3."
        ) from error


def _first_shape(config: Any, listed: list[Config], site: Site) -> tuple[int | None, ...] | None:
    """The shape of a row by what the first layer, or the first one inside it, tells."""
    if isinstance(config, dict) and config.get("build_input_shape"):
        return tuple(config["build_input_shape"][1:])
    first = listed[0]["config"]
    if listed[0]["class_name"] in _MODELS:
        inner = first if isinstance(first, list) else first["layers"]
        return _first_shape(first, inner, site)
    return _shape_in(first, site)


def _shape_in(config: Config, site: Site) -> tuple[int | None, ...] | None:
    shape = config.get("batch_input_shape") or config.get("batch_shape")
    if shape is None and config.get("input_shape"):
        return tuple(config["input_shape"])
    if shape is None and config.get("input_dim") and "output_dim" in config:
        length = config.get("input_length", "none")
        return (config["input_dim"],) if length == "none" else (length, config["input_dim"])
    if shape is None:
        return None
    if shape[0] is not None:
        site.note(f"the model took {shape[0]} rows at a time; now it takes any number")
    return tuple(shape[1:])


def _merged_branches(listed: list[Config], site: Site) -> tuple[keras.Model, list[Piece]]:
    """Keras 1: a Sequential that begins with branches, which a Merge joins."""
    merge = dict(listed[0]["config"])
    branches = merge.pop("layers", [])
    inputs, values, parts = [], [], []
    for branch in branches:
        piece = make_piece(branch["class_name"], branch["config"], [], site)
        layer = piece.steps[0].layer
        row = keras.layers.Input(tuple(layer.input_shape[1:]), name=f"{layer.name}_input")
        inputs.append(row)
        values.append(Moved(layer(row)))
        parts.append(piece)
    joined = make_piece("Merge", merge, [value.shape for value in values], site)
    value = _joined(joined, values)
    parts.append(joined)
    used: list[keras.layers.Layer] = []
    for entry in listed[1:]:
        piece = make_piece(entry["class_name"], entry["config"], [value.shape], site)
        value = _applied(piece, value, used)
        parts.append(piece)
    return keras.Model(inputs, settled(value, False, used).tensor), parts


def _joined(piece: Piece, values: Sequence[Moved], **keywords: Any) -> Moved:
    """Apply a layer of several inputs; layers that work by number keep moved channels moved."""
    is_moved = all(value.is_moved for value in values) and piece.steps[0].is_moved is None
    tensors = [settled(value, is_moved, []).tensor for value in values]
    step, *others = piece.steps
    if isinstance(step.layer, keras.layers.RNN | keras.layers.Bidirectional):
        outcome = step.layer(tensors[0], initial_state=tensors[1:], **keywords)
    elif type(step.layer).__name__ == "MultiHeadAttention":
        outcome = step.layer(*tensors, **keywords)
    else:
        outcome = step.layer(tensors, **keywords)
    if isinstance(outcome, list | tuple):
        return Moved(outcome)
    return apply_steps(others, Moved(outcome, is_moved), [])


def _functional(
    config: Config, site: Site, input_shape: tuple[int, ...] | None
) -> tuple[keras.Model, list[Piece]]:
    listed = {entry.get("name") or entry["config"]["name"]: entry for entry in config["layers"]}
    if len(listed) > _MAX_LAYERS:
        raise ImportRefused(f"the model has {len(listed)} layers; {_MAX_LAYERS} are allowed.")
    outputs = _references(config["output_layers"])
    inputs = _references(config["input_layers"])
    pieces: dict[str, Piece] = {}
    values: dict[tuple[str, int], list[Moved]] = {}
    for name, entry in listed.items():
        if entry["class_name"] == "InputLayer":
            shape = _shape_in(entry["config"], site)
            if input_shape is not None and len(inputs) == 1:
                shape = input_shape
            row = keras.layers.Input(shape, name=layer_name(name))
            values[name, 0] = [Moved(row)]
            pieces[name] = Piece(name, [])
    waiting = [
        (name, index, node)
        for name, entry in listed.items()
        for index, node in enumerate(
            _nodes(entry, name in pieces), _first_node(name, entry, config["layers"], outputs)
        )
    ]
    while waiting:
        later = [item for item in waiting if not _called(*item, listed, pieces, values, site)]
        if len(later) == len(waiting):
            raise ImportRefused(
                f"layers {', '.join(sorted({name for name, _, _ in later})[:5])} wait for each "
                "other; the file is damaged. Save the model again."
            )
        waiting = later
    taken = [values[name, 0][tensor].tensor for name, _, tensor in inputs]
    given = [settled(values[name, node][i], False, []).tensor for name, node, i in outputs]
    built = keras.Model(
        taken[0] if len(taken) == 1 else taken,
        given[0] if len(given) == 1 else given,
        name=layer_name(config.get("name")),
    )
    return built, [pieces[name] for name in listed if name in pieces]


def _references(listed: Any) -> list[tuple[str, int, int]]:
    """References to tensors, `[layer, node, tensor]`; a single one may stand without a list."""
    if listed and isinstance(listed[0], str):
        listed = [listed]
    return [(str(name), int(node), int(tensor)) for name, node, tensor, *_ in listed]


def _nodes(entry: Config, is_input: bool) -> list[Any]:
    """The calls of a layer, each a list of `[layer, node, tensor, arguments]`."""
    if is_input:
        return []
    nodes = entry.get("inbound_nodes") or []
    if nodes and isinstance(nodes[0], list) and nodes[0] and isinstance(nodes[0][0], str):
        return [nodes]  # tf.keras wrote a single call without its list
    return list(nodes)


def _first_node(
    name: str, entry: Config, listed: list[Config], outputs: list[tuple[str, int, int]]
) -> int:
    """The number of a layer's first call.

    A nested model's own call of its layers was counted as one where it began with an input.
    """
    if entry["class_name"] not in _MODELS:
        return 0
    called = {(source, at) for source, at, _ in outputs}
    for other in listed:
        for node in _nodes(other, other["class_name"] == "InputLayer"):
            called |= {(str(reference[0]), int(reference[1])) for reference in node}
    return 0 if (name, 0) in called else 1


def _called(
    name: str,
    index: int,
    node: Any,
    listed: dict[str, Config],
    pieces: dict[str, Piece],
    values: dict[tuple[str, int], list[Moved]],
    site: Site,
) -> bool:
    """Make a call of a layer if all that it takes is there; returns whether it was made."""
    keywords: dict[str, Any] = {}
    taken: list[tuple[str, int, int]] = []
    for reference in node:
        taken.append((str(reference[0]), int(reference[1]), int(reference[2])))
        if len(reference) > 3:
            keywords |= reference[3]
    named = {key: tuple(v[:3]) for key, v in keywords.items() if _is_reference(v, listed)}
    if any(key[:2] not in values for key in [*taken, *named.values()]):
        return False
    arguments = {key: settled(values[v[:2]][v[2]], False, []).tensor for key, v in named.items()}
    if isinstance(keywords.get("training"), bool):
        arguments["training"] = keywords["training"]
    got = [values[source, at][tensor] for source, at, tensor in taken]
    if name not in pieces:
        entry = listed[name]
        shapes = [value.shape for value in got]
        pieces[name] = make_piece(entry["class_name"], entry["config"], shapes, site)
        pieces[name].name = name
    piece = pieces[name]
    if len(got) == 1:
        outcome = _applied(piece, got[0], [], **arguments)
    else:
        outcome = _joined(piece, got, **arguments)
    several = isinstance(outcome.tensor, list | tuple)
    values[name, index] = [Moved(t) for t in outcome.tensor] if several else [outcome]
    return True


def _is_reference(value: Any, listed: dict[str, Config]) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 3
        and isinstance(value[0], str)
        and value[0] in listed
    )
