"""Models of the parity suite, as builders of jobs, and what a user might bring of their own.

`k` is the Keras that builds: Keras 3, or legacy tf_keras for the second opinion.
"""

from typing import Any

import keras


def dnn(norm: str | None = None, inputs: int = 1, k: Any = keras) -> Any:
    """Dense 10, 10 with L2, 10, 1 on a few numbers; maybe normalised in between."""
    layers = [
        k.layers.Input((inputs,)),
        k.layers.Dense(10, activation="relu"),
        k.layers.Dense(10, activation="relu", kernel_regularizer=k.regularizers.L2(1e-4)),
    ]
    if norm is not None:
        layers.append(k.layers.BatchNormalization(synchronized=norm == "sync"))
    layers += [k.layers.Dense(10, activation="relu"), k.layers.Dense(1)]
    return k.Sequential(layers)


class SubclassedDnn(keras.Model):
    """The same without normalisation, as a class."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = [
            keras.layers.Dense(10, activation="relu"),
            keras.layers.Dense(
                10, activation="relu", kernel_regularizer=keras.regularizers.L2(1e-4)
            ),
            keras.layers.Dense(10, activation="relu"),
            keras.layers.Dense(1),
        ]

    def call(self, inputs: Any) -> Any:
        for layer in self.stack:
            inputs = layer(inputs)
        return inputs


def subclassed_dnn() -> keras.Model:
    return SubclassedDnn()


def image(norm: str | None = None, k: Any = keras) -> Any:
    """Conv 16 with L2 and stride 4, one or two normalisations side by side, pooling, Dense 10."""
    inputs = k.layers.Input((28, 28, 3))
    x = k.layers.Conv2D(
        16, 3, strides=4, activation="relu", kernel_regularizer=k.regularizers.L2(1e-4)
    )(inputs)
    if norm == "regular":
        x = k.layers.BatchNormalization()(x)
    elif norm == "sync":
        normalised = [k.layers.BatchNormalization(synchronized=True)(x) for _ in range(2)]
        x = k.layers.Add()(normalised)
    x = k.layers.Flatten()(k.layers.MaxPooling2D(2)(x))
    return k.Model(inputs, k.layers.Dense(10, activation="softmax")(x))


def embedding(is_distributed: bool = False, k: Any = keras) -> Any:
    """Embedding(20, 10), maybe a Dense on each token, mean over tokens, two classes."""
    layers = [k.layers.Input((10,)), k.layers.Embedding(20, 10)]
    if is_distributed:
        layers.append(k.layers.TimeDistributed(k.layers.Dense(10)))
    layers += [k.layers.GlobalAveragePooling1D(), k.layers.Dense(2, activation="softmax")]
    return k.Sequential(layers)


def siamese(k: Any = keras) -> Any:
    """Two inputs by name, one embedding for both, cosine of their means."""
    left = k.layers.Input((10,), name="left")
    right = k.layers.Input((10,), name="right")
    shared = k.Sequential([k.layers.Embedding(20, 10), k.layers.GlobalAveragePooling1D()])
    likeness = k.layers.Dot(axes=1, normalize=True)([shared(left), shared(right)])
    return k.Model([left, right], likeness)


def rnn(cell: str, k: Any = keras) -> Any:
    """Embedding, GRU(4) or LSTM(4), two classes."""
    return k.Sequential(
        [
            k.layers.Input((10,)),
            k.layers.Embedding(20, 10),
            getattr(k.layers, cell)(4),
            k.layers.Dense(2, activation="softmax", dtype="float32"),
        ]
    )


def masked() -> keras.Model:
    """Embedding with a mask that reaches the output: a class for each token."""
    return keras.Sequential(
        [
            keras.layers.Input((10,)),
            keras.layers.Embedding(20, 6, mask_zero=True),
            keras.layers.LSTM(4, return_sequences=True),
            keras.layers.Dense(4, activation="softmax"),
        ]
    )


def masked_norm() -> keras.Model:
    """A mask that reaches a synchronised BatchNormalization."""
    return keras.Sequential(
        [
            keras.layers.Input((10,)),
            keras.layers.Embedding(20, 6, mask_zero=True),
            keras.layers.BatchNormalization(synchronized=True),
            keras.layers.LSTM(4),
            keras.layers.Dense(1),
        ]
    )


def one_dense(units: int = 1, kernel: float = 2.0, bias: float = 0.0) -> keras.Model:
    """Dense from constants: for closed forms."""
    made = keras.layers.Dense(
        units,
        kernel_initializer=keras.initializers.Constant(kernel),
        bias_initializer=keras.initializers.Constant(bias),
    )
    return keras.Sequential([keras.layers.Input((1,)), made])


def only_norm(momentum: float = 0.9) -> keras.Model:
    """A synchronised normalisation and a Dense: for the recurrence of its moving mean."""
    return keras.Sequential(
        [
            keras.layers.Input((1,)),
            keras.layers.BatchNormalization(momentum=momentum, synchronized=True),
            keras.layers.Dense(1),
        ]
    )


class AddsLosses(keras.layers.Layer):
    """Adds the mean, or the sum, of its squared input to the loss."""

    def __init__(self, is_sum: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.is_sum = is_sum

    def call(self, inputs: Any) -> Any:
        squares = keras.ops.square(inputs)
        reduced = keras.ops.sum(squares) if self.is_sum else keras.ops.mean(squares)
        self.add_loss(0.01 * reduced)
        return inputs


def adds_losses(is_sum: bool = False) -> keras.Model:
    return keras.Sequential(
        [
            keras.layers.Input((3,)),
            keras.layers.Dense(8, activation="tanh"),
            AddsLosses(is_sum),
            keras.layers.Dense(1),
        ]
    )


def root_of_mean(y_true: Any, y_pred: Any) -> Any:
    """A loss and metric that is not a mean over rows."""
    return keras.ops.sqrt(keras.ops.mean(keras.ops.square(y_true - y_pred)))


def sum_of_squares(y_true: Any, y_pred: Any) -> Any:
    """A loss that is a sum though nothing says so."""
    return keras.ops.sum(keras.ops.square(y_true - y_pred)) * 1e-3


def pairwise(y_true: Any, y_pred: Any) -> Any:
    """A loss between neighbours of a batch: depends on the order of its rows."""
    gaps = (y_true[1:] - y_true[:-1]) - (y_pred[1:] - y_pred[:-1])
    return keras.ops.sum(keras.ops.square(gaps)) / (
        keras.ops.cast(keras.ops.shape(y_pred)[0], "float32") + 1.0
    )


class Largest(keras.metrics.Metric):
    """A user's metric whose state is no sum: the largest error of a row, and the last batch's."""

    def __init__(self, name: str = "largest", **settings: Any) -> None:
        super().__init__(name=name, **settings)
        self.largest = self.add_variable((), initializer="ones", name="largest")
        self.batches = self.add_variable((), initializer="zeros", name="batches")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        error = keras.ops.max(keras.ops.abs(y_true - y_pred))
        self.largest.assign(keras.ops.maximum(self.largest * 0.9, error))
        self.batches.assign(self.batches + 1)

    def result(self) -> Any:
        return self.largest + 0.001 * self.batches

    def reset_state(self) -> None:
        self.largest.assign(keras.ops.ones(()))
        self.batches.assign(keras.ops.zeros(()))


class RowsSeen(keras.metrics.Metric):
    """How often each row id of 0 to `rows - 1` was seen; the label is the row id."""

    def __init__(self, rows: int, name: str = "rows_seen", **settings: Any) -> None:
        super().__init__(name=name, **settings)
        self.times = self.add_variable((rows,), initializer="zeros", name="times")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        ids = keras.ops.cast(keras.ops.reshape(y_true, (-1,)), "int32")
        seen = keras.ops.segment_sum(
            keras.ops.ones_like(ids, dtype="float32"), ids, num_segments=self.times.shape[0]
        )
        self.times.assign(self.times + seen)

    def result(self) -> Any:
        once = keras.ops.sum(keras.ops.cast(keras.ops.equal(self.times, 1.0), "float32"))
        return {"rows_once": once, "most_times": keras.ops.max(self.times)}

    def reset_state(self) -> None:
        self.times.assign(keras.ops.zeros(self.times.shape))


def small(norm: str | None = None, is_regularized: bool = False) -> keras.Model:
    """A smooth network on three numbers."""
    settings: dict[str, Any] = {}
    if is_regularized:
        settings = {
            "kernel_regularizer": keras.regularizers.L1L2(1e-3, 1e-2),
            "bias_regularizer": keras.regularizers.L2(1e-2),
            "activity_regularizer": keras.regularizers.L2(1e-3),
        }
    layers = [
        keras.layers.Input((3,)),
        keras.layers.Dense(8, activation="tanh", bias_initializer="ones", **settings),
    ]
    if norm is not None:
        layers.append(keras.layers.BatchNormalization(synchronized=norm == "sync"))
    return keras.Sequential([*layers, keras.layers.Dense(1, dtype="float32")])


def classifier(units: int) -> keras.Model:
    """The same with classes."""
    activation = "sigmoid" if units == 1 else "softmax"
    return keras.Sequential(
        [
            keras.layers.Input((3,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(units, activation=activation),
        ]
    )
