"""The table of the parity suite: what is trained, on which rows, and what has to come out.

The cases follow those that Keras 2's own multi-worker tests cover, and go beyond them. A case is a
job (a builder of `models`, a compile section, overrides) and a function that draws its rows.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MODELS = "tests.contract.parity.models"
TOLERANCE = 4e-5
HALF_PRECISION_TOLERANCE = 1e-2
"""Of float16 and bfloat16: what Keras 2's own suite allows them; their sums of parts are rounded
to 11 or 8 bits before they meet, on one process as on several."""

Columns = dict[str, Any]
Draw = Callable[[np.random.Generator, int], Columns]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: Unique; what stands before the first slash is its group.
        draw: Columns of so many rows, the label as "y"; a weight, if any, as "w".
        model: Builder in `models`.
        arguments: Of the builder.
        loss: As in a job; so are optimizer and metrics.
        rows: For training.
        batch: Global batch size.
        evaluation_rows: For evaluation and predictions.
        validates: Evaluate in each epoch as well.
        fits: 2 trains the same number of epochs again, as the second `fit` of a model.
        files: Parquet files that the rows lie in.
        overrides: Dotted fields of the job.
        shapes: Of features that are lists.
        tolerance: Greatest difference d with |a - b| <= d + d * |b|, b of plain Keras.
        differs: The comparison must fail with several workers.
        expected: Values that must come out besides, by key of an outcome.
        is_variant: Another layout of the rows of a case that stands in the table as well: run on
            two and three workers only.
        is_fast: Part of `make test`.
    """

    name: str
    draw: Draw
    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = field(default_factory=lambda: {"SGD": {"learning_rate": 0.05}})
    loss: Any = "mse"
    metrics: tuple[Any, ...] = ("mse",)
    rows: int = 9984
    batch: int = 64
    epochs: int = 2
    evaluation_rows: int = 1000
    validates: bool = True
    fits: int = 2
    files: int = 1
    overrides: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    tolerance: float = TOLERANCE
    differs: bool = False
    expected: dict[str, float] = field(default_factory=dict)
    is_variant: bool = False
    is_fast: bool = False

    @property
    def group(self) -> str:
        """First part of the name."""
        return self.name.partition("/")[0]


def line(rng: np.random.Generator, rows: int) -> Columns:
    """One number x of 0 to 1 and y = 3x."""
    x = rng.uniform(0, 1, rows).astype("f4")
    return {"x": x, "y": 3 * x}


def pictures(rng: np.random.Generator, rows: int) -> Columns:
    """28x28x3 around ten class centres of mean zero.

    With a mean as large as their spread, what a normalisation subtracts is mostly rounding: plain
    Keras is then 5e-5 from itself when the rows of its batches change places, else 5e-7.
    """
    centres = np.random.default_rng(1337).normal(0, 1, (10, 28 * 28 * 3))
    classes = rng.integers(0, 10, rows)
    noise = rng.normal(0, 0.1, (rows, centres.shape[1]))
    return {"x": (centres[classes] + noise).astype("f4"), "y": classes}


def tokens(rng: np.random.Generator, rows: int) -> Columns:
    """Ten tokens of 1 to 19 and whether most are above the middle."""
    x = rng.integers(1, 20, (rows, 10)).astype("f4")
    return {"x": x, "y": (x.mean(axis=1) > 10).astype("i8")}


def padded(rng: np.random.Generator, rows: int) -> Columns:
    """Tokens with zeros behind, of very different lengths, and a class for each place."""
    x = rng.integers(1, 20, (rows, 10))
    lengths = np.where(np.arange(rows) % 3 == 0, 10, rng.integers(1, 4, rows))
    x = np.where(np.arange(10) < lengths[:, None], x, 0).astype("f4")
    return {"x": x, "y": x.astype("i8") % 4}


def padded_scalar(rng: np.random.Generator, rows: int) -> Columns:
    columns = padded(rng, rows)
    return {"x": columns["x"], "y": columns["y"].mean(axis=1).astype("f4")}


def pairs(rng: np.random.Generator, rows: int) -> Columns:
    """Two rows of tokens and how alike they are."""
    left = rng.integers(0, 20, (rows, 10)).astype("f4")
    same = rng.uniform(0, 1, rows) < 0.5
    right = np.where(same[:, None], left, rng.integers(0, 20, (rows, 10))).astype("f4")
    return {"left": left, "right": right, "y": same.astype("f4")}


def plane(rng: np.random.Generator, rows: int) -> Columns:
    """Three numbers, a smooth function of them, and weights."""
    columns: Columns = {name: rng.normal(0, 1, rows).astype("f4") for name in "abc"}
    signal = columns["a"] - 2 * columns["b"] + 0.5 * columns["c"] * columns["a"]
    columns["y"] = (signal + rng.normal(0, 0.1, rows)).astype("f4")
    columns["w"] = rng.uniform(0.2, 2.0, rows).astype("f4")
    return columns


def sides(rng: np.random.Generator, rows: int) -> Columns:
    """Three numbers and two classes of unequal size."""
    columns = plane(rng, rows)
    return {**columns, "y": (columns["y"] > 1).astype("i8")}


def kinds(rng: np.random.Generator, rows: int) -> Columns:
    """Three numbers and four classes; class 3 stands for rows that do not count."""
    columns = plane(rng, rows)
    return {**columns, "y": np.digitize(columns["y"], [-1.5, 0, 1.5]).astype("i8")}


def one_hot(rng: np.random.Generator, rows: int) -> Columns:
    columns = kinds(rng, rows)
    return {**columns, "y": np.eye(4, dtype="f4")[columns["y"]]}


def ids(rng: np.random.Generator, rows: int) -> Columns:
    """A number, and the row's id as the label."""
    return {"x": rng.normal(0, 1, rows).astype("f4"), "y": np.arange(rows, dtype="f4")}


def counting(rng: np.random.Generator, rows: int) -> Columns:
    """x = 1 and targets 0, 1, 2, ..."""
    return {"x": np.ones(rows, "f4"), "y": np.arange(rows, dtype="f4")}


def ones(rng: np.random.Generator, rows: int) -> Columns:
    return {"x": np.ones(rows, "f4"), "y": np.ones(rows, "f4")}


def identity(rng: np.random.Generator, rows: int) -> Columns:
    x = rng.uniform(0, 1, rows).astype("f4")
    return {"x": x, "y": x}


def steps_of_two(rng: np.random.Generator, rows: int) -> Columns:
    """Batches of four rows with means 1, 2, 3, ...: for moving means."""
    x = 1 + np.arange(rows) // 4 + np.tile([-0.5, 0.5, -0.25, 0.25], rows // 4)
    return {"x": x.astype("f4"), "y": np.zeros(rows, "f4")}


_SGD = {"SGD": {"learning_rate": 0.1}}
_CLASSES = {
    "optimizer": _SGD,
    "loss": "sparse_categorical_crossentropy",
    "metrics": ("sparse_categorical_accuracy",),
}
_AXES = tuple(
    (
        f"{files} file{'s' if files > 1 else ''}{', validated' if validates else ''}",
        files,
        validates,
    )
    for files, validates in itertools.product((1, 5), (False, True))
)


def _four(name: str, first_is_fast: bool = False, **settings: Any) -> list[Case]:
    """A case with its rows in one file or several, with and without validation."""
    return [
        Case(
            f"{name}/{label}",
            files=files,
            validates=validates,
            is_variant=not (files > 1 and validates),
            is_fast=first_is_fast and files > 1 and validates,
            **settings,
        )
        for label, files, validates in _AXES
    ]


def _dnn_cases() -> list[Case]:
    dnn: dict[str, Any] = {"draw": line, "model": "dnn", "shapes": {}}
    exact = {"draw": ones, "model": "one_dense", "metrics": ("binary_accuracy",), "rows": 64}
    return [
        *_four("dnn", **dnn),
        *_four("dnn, partial evaluation", **dnn, evaluation_rows=1003),
        *_four("dnn, partial training", True, **dnn, rows=10_000, evaluation_rows=1003, epochs=1),
        *_four("subclassed dnn", **{**dnn, "model": "subclassed_dnn"}),
        *_four(
            "subclassed dnn, partial training",
            **{**dnn, "model": "subclassed_dnn"},
            rows=10_000,
            evaluation_rows=1003,
            epochs=1,
        ),
        Case(
            "dnn/stateful metric is exact",
            **exact,
            arguments={"kernel": 1.0},
            optimizer={"SGD": {"learning_rate": 0.0}},
            expected={"history/binary_accuracy/0": 1.0, "history/binary_accuracy/1": 1.0},
        ),
        Case(
            "dnn/evaluation metric is exact",
            **exact,
            arguments={"kernel": 0.0},
            optimizer={"SGD": {"learning_rate": 0.0}},
            expected={"history/binary_accuracy/0": 0.0, "history/val_binary_accuracy/1": 0.0},
        ),
    ]


def _image_cases() -> list[Case]:
    image: dict[str, Any] = {
        "draw": pictures,
        "model": "image",
        "rows": 1280,
        "evaluation_rows": 640,
        "shapes": {"x": [28, 28, 3]},
        **_CLASSES,
    }
    partial = {"rows": 1290, "epochs": 1}
    return [
        *_four("image", **image),
        *_four("image, partial evaluation", **{**image, "evaluation_rows": 650}),
        *_four("image, partial training", True, **{**image, **partial, "evaluation_rows": 650}),
        *_four("image, plain norm", **image, arguments={"norm": "regular"}, differs=True),
        *_four("image, synchronised norms", **image, arguments={"norm": "sync"}),
    ]


def _sequence_cases() -> list[Case]:
    words: dict[str, Any] = {"draw": tokens, "rows": 1000, "evaluation_rows": 333, **_CLASSES}
    alike = {
        "draw": pairs,
        "model": "siamese",
        "rows": 1000,
        "evaluation_rows": 333,
        "optimizer": _SGD,
    }
    half = {"overrides": {"train.dtype_policy": "mixed_float16"}}
    return [
        *_four("embedding", True, **words, model="embedding"),
        *_four(
            "embedding, distributed in time",
            **words,
            model="embedding",
            arguments={"is_distributed": True},
        ),
        *_four("siamese embedding", **alike),
        *_four("gru", **words, model="rnn", arguments={"cell": "GRU"}),
        *_four("lstm", **words, model="rnn", arguments={"cell": "LSTM"}),
        *_four(
            "lstm in float16",
            **words,
            model="rnn",
            arguments={"cell": "LSTM"},
            tolerance=HALF_PRECISION_TOLERANCE,
            **half,
        ),
    ]


def _loop_cases() -> list[Case]:
    """Custom loops of Keras 2, 66 rows in batches of 32: a partial batch in each epoch.

    Where the reference varies how the loop is written, ours varies what stands in its place: the
    order of rows, and the steps in one call of the compiled loop. A bias in front of a
    normalisation has no effect, so its gradient is rounding, of which Adam would make steps (plain
    Keras with the rows of its batches permuted is then 3e-3 from itself): its epsilon is larger.
    """
    optimizers: dict[str, Any] = {
        "sgd": {"SGD": {"learning_rate": 0.05}},
        "adagrad": {"Adagrad": {"learning_rate": 0.05}},
        "adam": {"Adam": {"learning_rate": 0.001, "epsilon": 1e-3}},
    }
    return [
        Case(
            f"loop/{name}, {'synchronised norm' if norm else 'no norm'}, shuffle {shuffle}, "
            f"{call or 'many'} steps a call",
            draw=plane,
            model="dnn",
            arguments={"norm": norm, "inputs": 3},
            optimizer=optimizer,
            rows=66,
            batch=32,
            evaluation_rows=66,
            overrides={"data.shuffle": shuffle, "train.steps_per_execution": call},
            is_fast=(name, norm, shuffle, call) == ("adam", "sync", "window", 0),
        )
        for (name, optimizer), norm, shuffle, call in itertools.product(
            optimizers.items(), (None, "sync"), ("none", "window"), (1, 0)
        )
    ]


def _closed_forms() -> list[Case]:
    frozen = {"optimizer": {"SGD": {"learning_rate": 0.0}}, "fits": 1, "epochs": 1, "batch": 8}
    return [
        # Predictions 3.0, targets 0 to 7: the mean of |3 - t| is 2.25, of (3 - t)^2 is 5.5.
        Case(
            "closed form/squared error of 0 to 7 is 5.5",
            counting,
            "one_dense",
            {"kernel": 3.0},
            rows=8,
            evaluation_rows=8,
            expected={"history/loss/0": 5.5, "evaluate/1/loss": 5.5},
            **frozen,
        ),
        Case(
            "closed form/half the squared error of 0 to 7 is 2.75",
            counting,
            "one_dense",
            {"kernel": 3.0},
            rows=8,
            evaluation_rows=8,
            expected={"history/loss/0": 2.75},
            overrides={"compile.loss_weights": 0.5},
            **frozen,
        ),
        # One step of SGD on (w - 1)^2 from w = 2 with rate 0.1: the mean over n rows moves w by
        # 0.2 to 1.8, a sum over n rows by 0.2 n.
        Case(
            "closed form/a mean moves once",
            ones,
            "one_dense",
            {"kernel": 2.0},
            optimizer=_SGD,
            rows=7,
            batch=8,
            epochs=1,
            fits=1,
            evaluation_rows=7,
            expected={"weights/1/0": 1.8, "weights/1/1": -0.2},
        ),
        Case(
            "closed form/a sum moves with the rows",
            ones,
            "one_dense",
            {"kernel": 2.0},
            optimizer={"SGD": {"learning_rate": 0.01}},
            loss={"MeanSquaredError": {"reduction": "sum"}},
            rows=7,
            batch=8,
            epochs=1,
            fits=1,
            evaluation_rows=7,
            expected={"weights/1/0": 2.0 - 0.01 * 7 * 2, "weights/1/1": -0.01 * 7 * 2},
        ),
        # m' = 0.9 m + 0.1 mean over batches of means 1, 2, 3 in order.
        Case(
            "closed form/moving mean of a synchronised norm",
            steps_of_two,
            "only_norm",
            {"momentum": 0.9},
            optimizer={"SGD": {"learning_rate": 0.0}},
            rows=12,
            batch=4,
            epochs=1,
            fits=1,
            evaluation_rows=12,
            overrides={"data.shuffle": "none"},
            expected={"weights/1/2": 0.9 * (0.9 * 0.1 + 0.2) + 0.3},
        ),
        Case(
            "closed form/a batch larger than the rows moves towards y = x",
            identity,
            "one_dense",
            {"kernel": 3.0},
            optimizer=_SGD,
            rows=10,
            batch=12,
            epochs=10,
            fits=1,
            evaluation_rows=10,
        ),
    ]


_SMALL: dict[str, Any] = {
    "draw": plane,
    "model": "small",
    "rows": 1003,
    "evaluation_rows": 211,
    "fits": 1,
    "metrics": ("mae",),
    "overrides": {},
}


def _small(name: str, **settings: Any) -> Case:
    """A small smooth network on three numbers, 1,003 rows: partial batches, uneven parts."""
    merged = {**_SMALL, **settings}
    return Case(name, **merged)


def _optimizer_cases() -> list[Case]:
    rates = {
        "SGD": {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True},
        "Adam": {"learning_rate": 0.01},
        "AdamW": {"learning_rate": 0.01, "weight_decay": 0.05},
        "RMSprop": {"learning_rate": 0.002},
        "Adagrad": {"learning_rate": 0.05},
        "Lion": {"learning_rate": 0.001},
        "Ftrl": {"learning_rate": 0.05},
        "Nadam": {"learning_rate": 0.002},
        "Adamax": {"learning_rate": 0.01},
        "Adadelta": {"learning_rate": 0.5},
    }
    plain = [
        _small(f"optimizer/{name}", optimizer={name: settings}) for name, settings in rates.items()
    ]
    adam: dict[str, Any] = {"learning_rate": 0.01}
    extras: dict[str, dict[str, Any]] = {
        "clipnorm": {"Adam": {**adam, "clipnorm": 0.05}},
        "global_clipnorm": {"SGD": {"learning_rate": 0.1, "global_clipnorm": 0.3}},
        "clipvalue": {"SGD": {"learning_rate": 0.1, "clipvalue": 0.05}},
        "weight decay": {"SGD": {"learning_rate": 0.01, "weight_decay": 0.1}},
        "gradient accumulation": {"Adam": {**adam, "gradient_accumulation_steps": 3}},
        "accumulation with clipping": {
            "SGD": {"learning_rate": 0.1, "gradient_accumulation_steps": 2, "clipnorm": 0.1}
        },
        "moving average": {"Adam": {**adam, "use_ema": True, "ema_momentum": 0.9}},
        "moving average, overwritten": {
            "Adam": {**adam, "use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 5}
        },
        "loss scale factor": {"Adam": {**adam, "loss_scale_factor": 8.0}},
        "cosine schedule": {
            "SGD": {
                "learning_rate": {"CosineDecay": {"initial_learning_rate": 0.05, "decay_steps": 30}}
            }
        },
        "exponential schedule": {
            "Adam": {
                "learning_rate": {
                    "ExponentialDecay": {
                        "initial_learning_rate": 0.02,
                        "decay_steps": 10,
                        "decay_rate": 0.5,
                    }
                }
            }
        },
    }
    fast = {"gradient accumulation", "global_clipnorm", "moving average"}
    return plain + [
        _small(f"optimizer/{name}", optimizer=spec, is_fast=name in fast)
        for name, spec in extras.items()
    ]


def _classes_of(units: int, draw: Draw, loss: str) -> dict[str, Any]:
    """Settings of a small classifier."""
    return {
        "draw": draw,
        "model": "classifier",
        "arguments": {"units": units},
        "loss": loss,
        "optimizer": {"Adam": {"learning_rate": 0.01}},
    }


def _weight_cases() -> list[Case]:
    binary = _classes_of(1, sides, "binary_crossentropy")
    many = _classes_of(4, kinds, "sparse_categorical_crossentropy")
    return [
        _small(
            "weights/column",
            overrides={"data.weight": "w", "compile.weighted_metrics": ["mae", "mse"]},
        ),
        _small("weights/loss weight", overrides={"compile.loss_weights": 0.3}),
        _small(
            "weights/classes",
            **binary,
            metrics=("binary_accuracy",),
            overrides={
                "train.class_weight": {0: 0.5, 1: 4.0},
                "compile.weighted_metrics": ["binary_accuracy"],
            },
            is_fast=True,
        ),
        _small(
            "weights/some of many classes",
            **many,
            metrics=("accuracy",),
            overrides={"train.class_weight": {2: 3.0}},
        ),
        _small(
            "weights/mean with sample weight",
            loss={"MeanSquaredError": {"reduction": "mean_with_sample_weight"}},
            overrides={"data.weight": "w"},
        ),
        _small(
            "regularizers/on weights, biases and activities",
            model="small",
            arguments={"is_regularized": True},
            is_fast=True,
        ),
        _small("regularizers/an added mean", model="adds_losses", arguments={"is_sum": False}),
        _small("regularizers/an added sum", model="adds_losses", arguments={"is_sum": True}),
    ]


def _metric_cases() -> list[Case]:
    binary = _classes_of(1, sides, "binary_crossentropy")
    many = _classes_of(4, one_hot, "categorical_crossentropy")
    return [
        _small(
            "metrics/of two classes",
            **binary,
            metrics=(
                *("binary_accuracy", "AUC", "Precision", "Recall", "TruePositives"),
                {"AUC": {"name": "pr", "curve": "PR"}},
                {"SensitivityAtSpecificity": {"specificity": 0.5}},
            ),
        ),
        _small(
            "metrics/of many classes",
            **many,
            metrics=(
                "categorical_accuracy",
                {"TopKCategoricalAccuracy": {"k": 2}},
                {"F1Score": {"average": "macro"}},
                {"OneHotMeanIoU": {"num_classes": 4}},
            ),
        ),
        _small(
            "metrics/of numbers",
            metrics=("mae", "R2Score", "RootMeanSquaredError", "LogCoshError"),
        ),
        _small(
            "metrics/of the user's",
            metrics=("mae", f"{MODELS}:Largest", f"{MODELS}:root_of_mean"),
            is_fast=True,
        ),
    ]


def _loss_cases() -> list[Case]:
    many: dict[str, Any] = {
        "draw": kinds,
        "model": "classifier",
        "arguments": {"units": 4},
        "optimizer": {"Adam": {"learning_rate": 0.01}},
    }
    own = f"{MODELS}:"
    return [
        _small(
            "losses/sum over the batch",
            loss={"MeanSquaredError": {"reduction": "sum"}},
            optimizer={"SGD": {"learning_rate": 1e-5}},
        ),
        _small(
            "losses/no reduction",
            loss={"MeanSquaredError": {"reduction": "none"}},
            optimizer={"SGD": {"learning_rate": 1e-5}},
        ),
        _small("losses/huber", loss={"Huber": {"delta": 0.7}}),
        _small(
            "losses/a class that does not count",
            **many,
            loss={"SparseCategoricalCrossentropy": {"ignore_class": 3}},
        ),
        _small(
            "losses/Dice",
            draw=one_hot,
            model="classifier",
            arguments={"units": 4},
            loss={"Dice": {}},
            metrics=("categorical_accuracy",),
        ),
        _small("losses/the user's root of a mean", loss=f"{own}root_of_mean"),
        _small("losses/the user's sum", loss=f"{own}sum_of_squares"),
        _small("losses/the user's, between rows", loss=f"{own}pairwise", is_fast=True),
        _small(
            "losses/masked",
            draw=padded,
            model="masked",
            batch=50,
            loss="sparse_categorical_crossentropy",
            metrics=("sparse_categorical_accuracy",),
            optimizer={"Adam": {"learning_rate": 0.01}},
            is_fast=True,
        ),
    ]


def _layer_cases() -> list[Case]:
    half = {"tolerance": HALF_PRECISION_TOLERANCE}
    normed = {"model": "small", "arguments": {"norm": "plain"}}
    return [
        _small("norm/plain", **normed, differs=True, is_fast=True),
        _small(
            "norm/train.sync_batch_norm",
            **normed,
            overrides={"train.sync_batch_norm": True},
            is_fast=True,
        ),
        _small("norm/synchronised, few rows", model="small", arguments={"norm": "sync"}, rows=67),
        _small("norm/synchronised under a mask", draw=padded_scalar, model="masked_norm"),
        _small("half precision/float16", overrides={"train.dtype_policy": "mixed_float16"}, **half),
        _small(
            "half precision/bfloat16", overrides={"train.dtype_policy": "mixed_bfloat16"}, **half
        ),
    ]


def _size_cases() -> list[Case]:
    sizes = [(1, 64), (2, 64), (3, 64), (37, 64), (65, 64), (101, 7), (997, 100), (1009, 4)]
    few = [
        _small(f"sizes/{rows} rows in batches of {batch}", rows=rows, batch=batch, epochs=3)
        for rows, batch in sizes
    ]
    sparse = [
        Case(
            f"sizes/embedding, {rows} rows in batches of {batch}",
            draw=tokens,
            model="embedding",
            rows=rows,
            batch=batch,
            evaluation_rows=97,
            epochs=3,
            fits=1,
            loss="sparse_categorical_crossentropy",
            metrics=("accuracy",),
            optimizer={"Adam": {"learning_rate": 0.01}},
        )
        for rows, batch in ((65, 64), (101, 7))
    ]
    return [
        *few,
        *sparse,
        _small("sizes/100 virtual shards", overrides={"data.virtual_shards": 100}),
        _small("sizes/5 virtual shards", overrides={"data.virtual_shards": 5}, is_fast=True),
        _small("sizes/full shuffle", overrides={"data.shuffle": "full"}),
        Case(
            "exactly once/10,007 rows by their ids",
            ids,
            "one_dense",
            {"kernel": 0.1},
            optimizer={"SGD": {"learning_rate": 1e-9}},
            metrics=({f"{MODELS}:RowsSeen": {"rows": 10_007}},),
            rows=10_007,
            evaluation_rows=10_007,
            fits=1,
            expected={
                "history/rows_once/0": 10_007,
                "history/most_times/0": 1,
                "history/rows_once/1": 10_007,
                "history/most_times/1": 1,
                "history/val_rows_once/1": 10_007,
                "evaluate/1/most_times": 1,
            },
            is_fast=True,
        ),
    ]


def _random_cases(count: int = 16) -> list[Case]:
    """Rows, batch, virtual shards, seed, order and file layout drawn at random, by a fixed seed."""
    rng = np.random.default_rng(20585)
    cases = []
    for number in range(count):
        rows, batch = int(rng.integers(1, 400)), int(rng.integers(4, 120))
        shards, seed = int(rng.integers(4, 48)), int(rng.integers(0, 2**31 - 1))
        shuffle = ("none", "window", "full")[number % 3]
        cases.append(
            _small(
                f"random/{rows} rows, batch {batch}, {shards} shards, shuffle {shuffle}",
                rows=rows,
                batch=batch,
                files=int(rng.integers(1, 1 + min(3, rows))),
                optimizer={"Adam": {"learning_rate": 0.01, "global_clipnorm": 0.5}},
                arguments={"is_regularized": True},
                overrides={
                    "data.virtual_shards": shards,
                    "data.shuffle": shuffle,
                    "train.seed": seed,
                    **({"data.window_rows": 16} if shuffle == "window" else {}),
                },
                is_fast=number < 3,
            )
        )
    return cases


CASES: tuple[Case, ...] = (
    *_dnn_cases(),
    *_image_cases(),
    *_sequence_cases(),
    *_loop_cases(),
    *_closed_forms(),
    *_optimizer_cases(),
    *_weight_cases(),
    *_metric_cases(),
    *_loss_cases(),
    *_layer_cases(),
    *_size_cases(),
    *_random_cases(),
)

DEVICE_CASES = tuple(
    case
    for case in CASES
    if case.name
    in {
        "norm/train.sync_batch_norm",
        "optimizer/gradient accumulation",
        "metrics/of the user's",
        "losses/masked",
        "losses/the user's, between rows",
        "sizes/37 rows in batches of 64",
        "sizes/embedding, 65 rows in batches of 64",
        "metrics/of two classes",
        "regularizers/on weights, biases and activities",
        "half precision/float16",
    }
)
"""Run on workers of two devices as well."""
