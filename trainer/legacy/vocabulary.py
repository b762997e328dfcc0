"""From the words of Keras 1 to those of Keras 2, so that one set of rules reads both.

Owns names of classes and arguments, and the layers of Keras 1 that need more than another name.
"""

from collections.abc import Callable
from typing import Any

from trainer.errors import ImportRefused
from trainer.legacy.file import Config

_CLASSES = {
    "Convolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "Convolution3D": "Conv3D",
    "AtrousConvolution1D": "Conv1D",
    "AtrousConvolution2D": "Conv2D",
    "AtrousConv1D": "Conv1D",
    "AtrousConv2D": "Conv2D",
    "Deconvolution2D": "Conv2DTranspose",
    "Deconv2D": "Conv2DTranspose",
    "SeparableConvolution2D": "SeparableConv2D",
    "TimeDistributedDense": "Dense",
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "LSTMV1": "LSTM",
    "LSTMV2": "LSTM",
    "GRUV1": "GRU",
    "GRUV2": "GRU",
    "Functional": "Model",
}

_ARGUMENTS = {
    "output_dim": "units",
    "init": "kernel_initializer",
    "inner_init": "recurrent_initializer",
    "inner_activation": "recurrent_activation",
    "W_regularizer": "kernel_regularizer",
    "U_regularizer": "recurrent_regularizer",
    "b_regularizer": "bias_regularizer",
    "W_constraint": "kernel_constraint",
    "b_constraint": "bias_constraint",
    "bias": "use_bias",
    "nb_filter": "filters",
    "filter_length": "kernel_size",
    "border_mode": "padding",
    "subsample": "strides",
    "subsample_length": "strides",
    "atrous_rate": "dilation_rate",
    "pool_length": "pool_size",
    "stride": "strides",
    "length": "size",
    "dropout_W": "dropout",
    "dropout_U": "recurrent_dropout",
    "sigma": "stddev",
    "p": "rate",
    "beta_init": "beta_initializer",
    "gamma_init": "gamma_initializer",
}

_MERGES = {"sum": "Add", "mul": "Multiply", "ave": "Average", "max": "Maximum"}
_ORDERINGS = {"th": "channels_first", "tf": "channels_last"}

# Layers of Keras 1 whose place of the channels is not in the file (Keras left it out).
_WITHOUT_ORDERING = (
    *("UpSampling2D", "UpSampling3D", "ZeroPadding2D", "ZeroPadding3D"),
    *("Cropping2D", "Cropping3D", "SpatialDropout2D", "SpatialDropout3D"),
)


def without_versions(class_name: str) -> str:
    """The class's name in Keras 2: `BatchNormalizationV1` is `BatchNormalization`."""
    return _CLASSES.get(class_name, class_name)


def ordering_of(config: Any) -> str | None:
    """The first place of channels that a configuration of Keras 1 tells, or None."""
    if isinstance(config, dict):
        if config.get("dim_ordering") in _ORDERINGS:
            return _ORDERINGS[config["dim_ordering"]]
        values = list(config.values())
    else:
        values = config if isinstance(config, list) else []
    return next((found for value in values if (found := ordering_of(value))), None)


def from_keras_1(class_name: str, config: Config, ordering: str) -> tuple[str, Config]:
    """A layer of Keras 1 in the words of Keras 2.

    Args:
        class_name: Its class.
        config: Its configuration; not changed.
        ordering: The place of channels where the layer does not tell it.

    Raises:
        ImportRefused: Keras 2 and 3 have no such layer.
    """
    special = _SPECIAL.get(class_name)
    config = special(dict(config)) if special else dict(config)
    if class_name == "Merge":
        return _merge(config)
    renamed = {_ARGUMENTS.get(key, key): value for key, value in config.items()}
    given = renamed.pop("dim_ordering", None)
    if given is not None:
        renamed["data_format"] = _ORDERINGS.get(given, ordering)
    elif class_name in _WITHOUT_ORDERING:
        renamed["data_format"] = ordering
    return without_versions(class_name), renamed


def _kernel_size(config: Config) -> Config:
    if "nb_row" in config:
        config["kernel_size"] = [config.pop("nb_row"), config.pop("nb_col")]
    if "kernel_dim1" in config:
        config["kernel_size"] = [config.pop(f"kernel_dim{axis}") for axis in (1, 2, 3)]
    return config


def _embedding(config: Config) -> Config:
    for old, new in (
        ("init", "embeddings_initializer"),
        ("W_regularizer", "embeddings_regularizer"),
        ("W_constraint", "embeddings_constraint"),
        ("output_dim", "embedding_size"),
    ):
        if old in config:
            config[new] = config.pop(old)
    return config


def _recurrent(config: Config) -> Config:
    if "forget_bias_init" in config:
        config["unit_forget_bias"] = config.pop("forget_bias_init") == "one"
    return _kernel_size(config)


def _gru(config: Config) -> Config:
    return {**config, "reset_after": False}


def _batch_normalization(config: Config) -> Config:
    mode = config.pop("mode", 0)
    if mode != 0:
        kind = {1: "normalises each row by itself", 2: "uses the batch's own statistics"}
        raise ImportRefused(
            f"the BatchNormalization {config.get('name')!r} of mode {mode} "
            f"{kind.get(mode, 'works')} also in prediction, which no layer of Keras 3 does in the "
            "same way; mode 0 is allowed. Train the model again with mode 0."
        )
    return config


def _prelu(config: Config) -> Config:
    if "init" in config:
        config["alpha_initializer"] = config.pop("init")
    return config


def _separable(config: Config) -> Config:
    config = _kernel_size(config)
    if "init" in config:
        config["depthwise_initializer"] = config["pointwise_initializer"] = config.pop("init")
    return config


def _time_distributed_dense(config: Config) -> Config:
    config.pop("input_length", None)
    return config


_SPECIAL: dict[str, Callable[[Config], Config]] = {
    "Convolution2D": _kernel_size,
    "AtrousConvolution2D": _kernel_size,
    "Deconvolution2D": _kernel_size,
    "Convolution3D": _kernel_size,
    "LocallyConnected2D": _kernel_size,
    "SeparableConvolution2D": _separable,
    "Embedding": _embedding,
    "LSTM": _recurrent,
    "ConvLSTM2D": _recurrent,
    "GRU": _gru,
    "BatchNormalization": _batch_normalization,
    "PReLU": _prelu,
    "TimeDistributedDense": _time_distributed_dense,
}


def _merge(config: Config) -> tuple[str, Config]:
    """The layer of Keras 2 that does what a Merge did."""
    mode = config.get("mode")
    name = config.get("name")
    if config.get("mode_type", "raw") != "raw":
        raise ImportRefused(
            f"the Merge layer {name!r} runs a function of its author's; the modes sum, mul, ave, "
            "max, concat, dot and cos are allowed. Build the model with one of these."
        )
    kept = {"name": name}
    if mode in _MERGES:
        return _MERGES[mode], kept
    if mode == "concat":
        return "Concatenate", {**kept, "axis": config.get("concat_axis", -1)}
    if mode in ("dot", "cos"):
        axes = config.get("dot_axes", -1)
        return "Dot", {**kept, "axes": axes, "normalize": mode == "cos", "is_merge": True}
    raise ImportRefused(
        f"the Merge layer {name!r} has the mode {mode!r}; sum, mul, ave, max, concat, dot and cos "
        "are allowed. Build the model with one of these."
    )
