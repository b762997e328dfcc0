"""The front of a model: Keras layers between a row of the pipeline and the user's first layer.

Owns normalisation, one-hot vectors and embeddings. A row of the pipeline is one vector in which a
category is its index and a text the indices of its words (`data_pipeline.encoding`); the front
makes of it what the job asks for. It consists of Keras's own layers only, so that the trained model
loads wherever Keras is.
"""

import re
from collections.abc import Sequence
from typing import Any

import keras

from data_pipeline.encoding import Category, Text
from data_pipeline.features import InputColumn, InputLayout
from data_pipeline.scan import Statistics

_NORMALIZE = "normalize"
_FEATURES = "features"


def front_layers(layout: InputLayout, statistics: Statistics | None) -> list[keras.layers.Layer]:
    """The layers to put before the user's; none where rows are what the model should see."""
    if any(_expands(feature) for feature in layout.features):
        return [_features_model(layout, statistics)]
    if statistics is None:
        return []
    return [_normalization(statistics, slice(None), _NORMALIZE)]


def has_front(model: keras.Model) -> bool:
    """Whether one of the model's layers is a front, as in a model of ours."""
    return any(
        isinstance(layer, keras.layers.Normalization) or layer.name == _FEATURES
        for layer in model.layers
    )


def _expands(feature: InputColumn) -> bool:
    """Whether the model sees more of a feature than the numbers in the row."""
    encoding = feature.encoding
    return isinstance(encoding, Category | Text) and encoding.output != "index"


def _normalization(
    statistics: Statistics, channels: slice, name: str, dtype: str | None = None
) -> keras.layers.Layer:
    """Shifts and scales the last axis: (x - mean) / sqrt(variance)."""
    mean, variance = statistics.mean[channels], statistics.variance[channels]
    return keras.layers.Normalization(axis=-1, mean=mean, variance=variance, name=name, dtype=dtype)


def columns_of(row: Any, first: int, last: int) -> Any:
    """Numbers `[first, last)` of rows, `(rows, last - first)`, in full precision.

    By layers: a model with an operation such as `row[:, 1:3]` in it does not load from .h5.
    """
    width = row.shape[-1]
    column = keras.layers.Reshape((width, 1), dtype="float32")(row)
    kept = keras.layers.Cropping1D((first, width - last), dtype="float32")(column)
    return keras.layers.Reshape((last - first,), dtype="float32")(kept)


def _features_model(layout: InputLayout, statistics: Statistics | None) -> keras.Model:
    """From a row `(rows, width)` to what the features become, joined to one vector.

    In float32 whatever the dtype policy is: half precision holds no index above 256 or 2,048.
    """
    row = keras.layers.Input((layout.width,), name="row", dtype="float32")
    parts = []
    for run in _runs(layout.features):
        first, last = run[0].offset, run[-1].offset + run[-1].size
        part = columns_of(row, first, last)
        if _expands(run[0]):
            parts.append(_expanded(run[0], part))
        elif statistics is not None and any(feature.is_normalized for feature in run):
            name = f"{_NORMALIZE}_{first}"
            parts.append(_normalization(statistics, slice(first, last), name, "float32")(part))
        else:
            parts.append(part)
    joined = keras.layers.Concatenate(dtype="float32")(parts) if len(parts) > 1 else parts[0]
    return keras.Model(row, joined, name=_FEATURES)


def _runs(features: Sequence[InputColumn]) -> list[list[InputColumn]]:
    """Neighbours that are passed on together; a feature that expands stands alone."""
    runs: list[list[InputColumn]] = []
    for feature in features:
        if runs and not _expands(feature) and not _expands(runs[-1][0]):
            runs[-1].append(feature)
        else:
            runs.append([feature])
    return runs


def _expanded(feature: InputColumn, indices: Any) -> Any:
    """What the model sees of a category, `(rows, 1)`, or of a text, `(rows, words)`."""
    encoding = feature.encoding
    name = f"{re.sub('[^A-Za-z0-9]', '_', feature.name)}_{feature.offset}"
    size = encoding.indices  # type: ignore[union-attr]
    if isinstance(encoding, Category):
        if encoding.output == "one_hot":
            layer = keras.layers.CategoryEncoding(
                size, output_mode="one_hot", name=f"one_hot_{name}", dtype="float32"
            )
            return layer(indices)
        embedding = keras.layers.Embedding(
            size, encoding.embedding_size, name=f"embedding_{name}", dtype="float32"
        )
        return keras.layers.Reshape((encoding.embedding_size,), dtype="float32")(embedding(indices))
    if not isinstance(encoding, Text):
        raise TypeError(f"{feature.name} has no layer of its own: {encoding}")
    if encoding.output == "embedding":
        embedding = keras.layers.Embedding(
            size, encoding.embedding_size, name=f"embedding_{name}", dtype="float32"
        )
        shares = _shares_of_words(indices)
        return keras.layers.Dot(axes=1, dtype="float32")([shares, embedding(indices)])
    counts = keras.layers.CategoryEncoding(
        size, output_mode=encoding.output, name=f"{encoding.output}_{name}", dtype="int32"
    )(indices)
    numbers = keras.layers.Rescaling(1.0, dtype="float32")(counts)
    return columns_of(numbers, 1, size)  # the first one counts the lack of words


def _shares_of_words(indices: Any) -> Any:
    """One over the number of words where there is a word, else 0: `(rows, words)`.

    A text without words has zeros only. Averages under a mask would divide by zero there.
    """
    is_word = keras.layers.ReLU(max_value=1.0, dtype="float32")(indices)
    unit = keras.layers.UnitNormalization(dtype="float32")(is_word)
    return keras.layers.Multiply(dtype="float32")([unit, unit])
