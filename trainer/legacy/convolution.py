"""The rules for convolutions and pooling.

Owns two differences. `channels_first` layers become `channels_last` ones between moves of the
channels. Theano turned kernels around, and put the padding of "same" half before and half behind,
where TensorFlow counts from what the stride leaves; such layers become an explicit padding and a
layer without.
"""

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from trainer.errors import ImportRefused
from trainer.legacy.arguments import arguments_of, layer_name
from trainer.legacy.file import Array, Config
from trainer.legacy.layers import make_layer, rule, same_layer, with_activation
from trainer.legacy.piece import Piece, Shape, Site, Step
from trainer.legacy.weights import conv1d_of_keras_1, spatial_last_of_keras_1, turned

_GREATEST = 3.0e38
_AXES = {
    **{f"{kind}{n}D": n for kind in ("Conv", "SeparableConv", "DepthwiseConv") for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": n for n in (1, 2, 3)},
    **{f"{kind}Pooling{n}D": n for kind in ("Max", "Average") for n in (1, 2, 3)},
}


def sizes(value: Any, axes: int) -> tuple[int, ...]:
    """A size for each axis of a number or a list."""
    numbers = [int(number) for number in np.ravel(value)]
    return tuple(numbers * axes if len(numbers) == 1 else numbers)


def _spatial(shapes: Sequence[Shape], axes: int, is_first: bool) -> tuple[int | None, ...]:
    """Lengths of the axes in space of the input, where they are known."""
    if not shapes or len(shapes[0]) != axes + 2:
        return (None,) * axes
    return shapes[0][2:] if is_first else shapes[0][1:-1]


@rule("Conv1D", "Conv2D", "Conv3D", "SeparableConv1D", "SeparableConv2D")
@rule("DepthwiseConv1D", "DepthwiseConv2D")
def _convolution(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    class_name = str(config["class_name_in_file"])
    axes = _AXES[class_name]
    is_first = config.get("data_format") == "channels_first"
    is_plain = class_name.startswith("Conv")
    kernel = sizes(config["kernel_size"], axes)
    strides = sizes(config.get("strides", 1), axes)
    changes: dict[str, Any] = {"data_format": "channels_last"}
    before: list[Step] = []
    if site.is_theano and config.get("padding") in ("same", "half"):
        before = _padding_of_theano(config, kernel, strides, axes, is_first)
        changes["padding"] = "valid" if before else "same"
    elif config.get("padding") == "full":
        dilation = sizes(config.get("dilation_rate", 1), axes)
        whole = [(size - 1) * rate for size, rate in zip(kernel, dilation, strict=True)]
        before = [_zero_padding(config, [(size, size) for size in whole], is_first)]
        changes["padding"] = "valid"
    piece = with_activation(class_name, config, site, is_first, **changes)

    def arrange(arrays: list[Array]) -> list[Array]:
        arrays = list(arrays)
        if site.is_keras_1:
            arrays = _laid_by_keras_1(arrays, class_name, config, axes, is_first)
        if site.is_theano and is_plain:  # Theano's depthwise kernels were turned when applied
            arrays[0] = turned(arrays[0], axes)
        return arrays

    if site.is_theano and is_plain:
        site.note(
            "kernels of convolutions were turned around, because Theano convolved with them so"
        )
    if is_first:
        _note_moved(site)
    return Piece(piece.name, [*before, *piece.steps], piece.holder, arrange)


def _note_moved(site: Site) -> None:
    site.note("channels_first layers work with the channels moved to the end and back")


def _laid_by_keras_1(
    arrays: list[Array], class_name: str, config: Config, axes: int, is_first: bool
) -> list[Array]:
    if class_name == "Conv1D":
        (size,) = sizes(config["kernel_size"], 1)
        arrays[0] = conv1d_of_keras_1(arrays[0], size, int(config["filters"]))
    elif is_first and class_name.startswith("Conv"):
        arrays[0] = spatial_last_of_keras_1(arrays[0], axes)
    elif is_first and class_name.startswith("Separable"):
        # (depth multiplier, channels, rows, columns) and (filters, channels, 1, 1)
        arrays[:2] = [spatial_last_of_keras_1(array, axes) for array in arrays[:2]]
    return arrays


def _padding_of_theano(
    config: Config, kernel: tuple[int, ...], strides: tuple[int, ...], axes: int, is_first: bool
) -> list[Step]:
    """What Theano padded for "same"; nothing where TensorFlow pads the same."""
    dilation = sizes(config.get("dilation_rate", 1), axes)
    reach = [(size - 1) * rate + 1 for size, rate in zip(kernel, dilation, strict=True)]
    if all(size % 2 == 1 for size in reach) and set(strides) == {1}:
        return []
    return [_zero_padding(config, [(size // 2, (size - 1) // 2) for size in reach], is_first)]


def _zero_padding(config: Config, amounts: list[tuple[int, int]], is_moved: bool) -> Step:
    axes = len(amounts)
    amount: Any = amounts[0] if axes == 1 else tuple(amounts)
    name = f"{layer_name(config.get('name'))}_padding"
    return Step(make_layer(f"ZeroPadding{axes}D", {"padding": amount, "name": name}), is_moved)


@rule("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def _transposed(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """Where Keras 3 gives rows and columns other than the old layer, the whole result is cut.

    The input gets a zero at the end of each axis, so that the whole result reaches far enough.
    """
    class_name = str(config["class_name_in_file"])
    axes = _AXES[class_name]
    is_first = config.get("data_format") == "channels_first"
    given = config.get("output_shape")
    config = {key: value for key, value in config.items() if key != "output_shape"}
    kernel = sizes(config["kernel_size"], axes)
    strides = sizes(config.get("strides", 1), axes)
    lengths = _spatial(shapes, axes, is_first)
    cut = _cut_of_transposed(config, kernel, strides, lengths, given, site)
    changes: dict[str, Any] = {"data_format": "channels_last"}
    before: list[Step] = []
    after: list[Step] = []
    if cut is not None:
        changes["padding"] = "valid"
        before = [_zero_padding(config, [(0, 1)] * axes, is_first)]
        name = f"{layer_name(config.get('name'))}_cut"
        amount: Any = cut[0] if axes == 1 else tuple(cut)
        after = [Step(make_layer(f"Cropping{axes}D", {"cropping": amount, "name": name}), is_first)]
    piece = with_activation(class_name, config, site, is_first, **changes)
    steps = [*before, piece.steps[0], *after, *piece.steps[1:]]

    def arrange(arrays: list[Array]) -> list[Array]:
        arrays = list(arrays)
        if site.is_keras_1:  # to (rows, columns, filters, channels)
            last = arrays[0]
            if is_first:
                last = spatial_last_of_keras_1(last, axes)
            arrays[0] = np.swapaxes(last, -1, -2)
        if site.is_theano:
            arrays[0] = turned(arrays[0], axes)
        return arrays

    if is_first:
        _note_moved(site)
    return Piece(piece.name, steps, piece.holder, arrange)


def _cut_of_transposed(
    config: Config,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    lengths: tuple[int | None, ...],
    given: Any,
    site: Site,
) -> list[tuple[int, int]] | None:
    """What to cut off before and behind; None where Keras 3 gives the same without.

    With `n` numbers in, the whole result of `n + 1` has `(n + 1) s + max(k - s, 0)`.
    """
    is_same = config.get("padding") == "same"
    wanted = _output_lengths(given, len(kernel), config)
    dilation = sizes(config.get("dilation_rate", 1), len(kernel))
    cuts = []
    is_equal = True
    for axis, (size, stride, length) in enumerate(zip(kernel, strides, lengths, strict=True)):
        size = (size - 1) * dilation[axis] + 1
        usual = None
        if length is not None:
            usual = length * stride + (0 if is_same else max(size - stride, 0))
        out = wanted[axis] if wanted is not None else usual
        if site.is_theano and is_same:
            first = size // 2
            is_equal = is_equal and stride == 1 and out == usual
        else:
            first = max(size - stride, 0) // 2 if is_same else 0
            if is_same and out is not None and length is not None:
                first = max((length - 1) * stride + size - out, 0) // 2
            is_equal = is_equal and out == usual
        if out is None or length is None:
            cuts.append((first, 0))
            continue
        whole = (length + 1) * stride + max(size - stride, 0)
        cuts.append((first, whole - first - out))
    if is_equal:
        return None
    if any(length is None for length in lengths) or any(behind < 0 for _, behind in cuts):
        raise ImportRefused(
            f"layer {config.get('name')!r} is a transposed convolution of padding "
            f"{config.get('padding')!r} over axes of lengths {list(lengths)}, whose result Keras 3 "
            "cannot be brought to; known lengths are allowed. Give --input-shape."
        )
    return cuts


def _output_lengths(given: Any, axes: int, config: Config) -> list[int | None] | None:
    """The lengths in space that Keras 1 was told to give, from its `output_shape` with rows."""
    if not isinstance(given, list) or len(given) != axes + 2:
        return None
    return given[2:] if config.get("data_format") == "channels_first" else given[1:-1]


@rule("MaxPooling1D", "MaxPooling2D", "MaxPooling3D")
@rule("AveragePooling1D", "AveragePooling2D", "AveragePooling3D")
def _pooling(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    class_name = str(config["class_name_in_file"])
    axes = _AXES[class_name]
    is_first = config.get("data_format") == "channels_first"
    arguments = {
        **arguments_of(class_name, config, site.note),
        "pool_size": sizes(config.get("pool_size", 2), axes),
        "strides": sizes(config.get("strides") or config.get("pool_size", 2), axes),
        "data_format": "channels_last",
    }
    lengths = _spatial(shapes, axes, is_first)
    if site.is_theano and config.get("padding") == "same":
        return _pooling_of_theano(class_name, config, arguments, lengths, is_first)
    return Piece(str(config.get("name")), [Step(make_layer(class_name, arguments), is_first)])


def _pooling_of_theano(
    class_name: str,
    config: Config,
    arguments: dict[str, Any],
    lengths: tuple[int | None, ...],
    is_first: bool,
) -> Piece:
    """Theano put the padding of "same" before: `k - 2` for an odd size `k` over 2, else `k - 1`.

    Its windows overlook the padding. For a maximum the padding is made the least number, for an
    average the sums are divided by what a window really sees; `Normalization` does both.
    """
    name = str(config.get("name"))
    pool, strides = arguments["pool_size"], arguments["strides"]
    known = [length for length in lengths if length is not None]
    if len(known) != len(pool):
        raise ImportRefused(
            f"layer {name!r} pools with padding 'same' as Theano did, over axes of any length; "
            "known lengths are allowed. Give --input-shape."
        )
    amounts, seen = [], []
    for length, size, stride in zip(known, pool, strides, strict=True):
        first = size - 2 if size > 2 and size % 2 == 1 else size - 1
        results = -(-length // stride)
        behind = max((results - 1) * stride + size - first - length, 0)
        is_real = np.zeros(length + first + behind)
        is_real[first : first + length] = 1
        amounts.append((first, behind))
        seen.append((is_real, [is_real[i * stride : i * stride + size] for i in range(results)]))
    axes = tuple(range(1, len(pool) + 1))
    if class_name.startswith("Max"):
        is_real = _outer([real for real, _ in seen])
        correction = {"mean": np.where(is_real > 0, 0.0, _GREATEST), "variance": 1.0 + 0 * is_real}
    else:
        counts = _outer([np.array([w.mean() for w in windows]) for _, windows in seen])
        correction = {"mean": 0 * counts, "variance": counts**2}
    corrected = keras.layers.Normalization(axis=axes, **correction)
    pooling = make_layer(class_name, {**arguments, "padding": "valid"})
    padding = _zero_padding(config, amounts, is_first).layer
    is_max = class_name.startswith("Max")
    inner = [padding, corrected, pooling] if is_max else [padding, pooling, corrected]
    steps = [Step(keras.Sequential(inner, name=f"{layer_name(name)}_windows"), is_first)]
    return Piece(name, steps)


def _outer(vectors: list[Array]) -> Array:
    """The product of vectors, one axis each."""
    product = vectors[0]
    for vector in vectors[1:]:
        product = np.multiply.outer(product, vector)
    return product


@rule(*(f"Global{kind}Pooling{n}D" for kind in ("Max", "Average") for n in (1, 2, 3)))
def _global_pooling(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    class_name = str(config["class_name_in_file"])
    is_first = config.get("data_format") == "channels_first"
    arguments = {**arguments_of(class_name, config, site.note), "data_format": "channels_last"}
    return Piece(str(config.get("name")), [Step(make_layer(class_name, arguments), is_first)])


@rule("LocallyConnected1D", "LocallyConnected2D")
def _locally_connected(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """A kernel a place: windows by a fixed convolution, then a sum a place."""
    axes = 1 if config["class_name_in_file"] == "LocallyConnected1D" else 2
    name = layer_name(config.get("name"))
    is_first = config.get("data_format") == "channels_first" and axes == 2
    lengths = _spatial(shapes, axes, is_first)
    channels = shapes[0][1] if is_first else shapes[0][-1]
    if None in lengths or channels is None or config.get("implementation", 1) != 1:
        raise ImportRefused(
            f"layer {name!r} is locally connected over axes of lengths {list(lengths)}; known "
            "lengths and implementation 1 are allowed. Give --input-shape."
        )
    kernel = sizes(config["kernel_size"], axes)
    strides = sizes(config.get("strides", 1), axes)
    places = [
        (int(length or 0) - size) // stride + 1
        for length, size, stride in zip(lengths, kernel, strides, strict=True)
    ]
    window = channels * int(np.prod(kernel))
    described = {
        **config,
        "equation": "bpk,pkf->bpf",
        "output_shape": (int(np.prod(places)), int(config["filters"])),
        "bias_axes": "pf" if config.get("use_bias", True) else None,
        "name": f"{name}_places",
    }
    for key in ("filters", "kernel_size", "strides", "padding", "data_format", "use_bias"):
        described.pop(key, None)
    sums = with_activation("EinsumDense", described, site)
    windows = make_layer(
        f"Conv{axes}D",
        {
            **{"filters": window, "kernel_size": kernel, "strides": strides, "use_bias": False},
            **{"trainable": False, "name": f"{name}_windows"},
        },
    )
    inner = [
        windows,
        keras.layers.Reshape((int(np.prod(places)), window)),
        sums.steps[0].layer,
        keras.layers.Reshape((*places, int(config["filters"]))),
    ]
    model = keras.Sequential(inner, name=name)

    def arrange(arrays: list[Array]) -> list[Array]:
        weights = arrays[0]
        if is_first:  # windows stand as (channels, rows, columns) in the file
            split = weights.reshape(len(weights), channels, *kernel, -1)
            weights = np.moveaxis(split, 1, -2).reshape(weights.shape)
        rest = [array.reshape(-1, int(config["filters"])) for array in arrays[1:]]
        if is_first:  # Keras reshaped biases to the channels in front, and did not turn them
            rest = [array.reshape(int(config["filters"]), -1).T for array in arrays[1:]]
        fixed = np.eye(window, dtype=np.float32).reshape(*kernel, channels, window)
        return [fixed, weights, *rest]

    if is_first:
        _note_moved(site)
    steps = [Step(model, is_first), *sums.steps[1:]]
    stored = (2 if config.get("use_bias", True) else 1, 0)
    return Piece(str(config.get("name")), steps, model, arrange, stored)


@rule("UpSampling2D")
def _upsampling(config: Config, shapes: Sequence[Shape], site: Site) -> Piece:
    """Bilinear in Keras before tf.keras: pixel `i` is read at `i / size`, with no half pixels."""
    is_before = site.model.keras == 2 and re.fullmatch(r"2\.[0-3]\.\d+", site.model.version)
    if config.get("interpolation") != "bilinear" or not is_before:
        return same_layer("UpSampling2D", config, site)
    is_first = config.get("data_format") == "channels_first"
    lengths = _spatial(shapes, 2, is_first)
    known = [length for length in lengths if length is not None]
    channels = shapes[0][1] if is_first else shapes[0][-1]
    if len(known) != 2:
        raise ImportRefused(
            f"layer {config.get('name')!r} enlarges images of any size as Keras before tf.keras "
            "did; known sizes are allowed. Give --input-shape."
        )
    factors = sizes(config.get("size", 2), 2)
    name = layer_name(config.get("name"))
    rows, columns = (length * factor for length, factor in zip(known, factors, strict=True))
    inner = [
        make_layer(
            "EinsumDense",
            {"equation": equation, "output_shape": shape, "trainable": False, "name": label},
        )
        for equation, shape, label in (
            ("bhwc,hi->biwc", (rows, known[1], channels), f"{name}_rows"),
            ("bhwc,wj->bhjc", (rows, columns, channels), f"{name}_columns"),
        )
    ]
    model = keras.Sequential(inner, name=name)
    fixed = [_bilinear(n, factor) for n, factor in zip(known, factors, strict=True)]
    return Piece(
        str(config.get("name")), [Step(model, is_first)], model, lambda _: list(fixed), (0, 0)
    )


def _bilinear(length: int, factor: int) -> Array:
    """From `length` numbers to `factor` times as many: `(length, length * factor)`."""
    places = np.arange(length * factor) / factor
    below = np.floor(places).astype(int)
    matrix = np.zeros((length, length * factor), np.float32)
    for at, (low, place) in enumerate(zip(below, places, strict=True)):
        matrix[low, at] += 1 - (place - low)
        matrix[min(low + 1, length - 1), at] += place - low
    return matrix
