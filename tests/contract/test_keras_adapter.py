"""Keras's private parts behave as trainer/keras_adapter.py expects; fails when Keras changes."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer import keras_adapter

L = keras.layers


@pytest.fixture
def model() -> keras.Model:
    made = keras.Sequential(
        [
            L.Input((4,)),
            L.Normalization(mean=np.zeros(4), variance=np.ones(4)),
            L.Dense(3, kernel_regularizer=keras.regularizers.L2(0.5)),
            L.BatchNormalization(),
            L.Dropout(0.5),
            L.ActivityRegularization(l2=0.25),
            L.Dense(1),
        ]
    )
    made.compile("adam", "mse", metrics=["mae", keras.metrics.AUC()])
    return made


@pytest.fixture
def built(model: keras.Model) -> keras.Model:
    x, y = keras.KerasTensor((None, 4)), keras.KerasTensor((None, 1))
    keras_adapter.build_training_state(model, x, y, None)
    return model


def test_every_variable_exists_after_building(built: keras.Model) -> None:
    assert built.optimizer.built
    names = [variable.path for variable in keras_adapter.optimizer_variables(built.optimizer)]
    assert any("momentum" in name for name in names)
    count = len(keras_adapter.metric_variables(built))
    x, y = np.ones((5, 4), "f4"), np.ones((5, 1), "f4")
    built.fit(x, y, verbose=0)
    assert len(keras_adapter.metric_variables(built)) == count == 2 + 2 + 4
    everything = keras_adapter.all_variables(built)
    assert len(everything) == len({id(variable) for variable in everything})
    assert len(everything) == len(built.variables) + count + len(built.optimizer.variables)


def test_loss_parts_add_up_to_the_loss_of_fit(built: keras.Model) -> None:
    x, y = tf.random.normal((6, 4), seed=1), tf.random.normal((6, 1), seed=2)
    keras_adapter.clear_row_losses(built)
    outputs = built(x, training=False)
    data = keras_adapter.data_loss(built, y, outputs, None)
    rows = keras_adapter.row_losses(built)
    penalties = keras_adapter.weight_regularization(built)
    assert (len(rows), len(penalties)) == (1, 1)
    whole = built.compute_loss(x, y, outputs)
    assert float(data + rows[0] + penalties[0]) == pytest.approx(float(whole), rel=1e-6)
    assert float(data) == pytest.approx(float(tf.reduce_mean((y - outputs) ** 2)), rel=1e-6)
    keras_adapter.clear_row_losses(built)
    assert keras_adapter.row_losses(built) == []


ROWS = keras.KerasTensor((None, 2))


def compiled(loss: Any, metrics: Any = (), width: int = 1) -> keras.Model:
    model = keras.Sequential([L.Input((2,)), L.Dense(width)])
    model.compile("sgd", loss, metrics=list(metrics))
    label = keras.KerasTensor((None, width if width == 1 else 1))
    keras_adapter.build_training_state(model, ROWS, label, None)
    return model


@pytest.mark.parametrize(
    ("reduction", "is_mean"), [("sum_over_batch_size", True), ("mean", True), ("sum", False)]
)
def test_reduction_of_the_loss_is_found(reduction: str, is_mean: bool) -> None:
    model = compiled(keras.losses.MeanSquaredError(reduction=reduction))
    assert keras_adapter.is_mean_loss(model) is is_mean
    assert keras_adapter.is_row_wise_loss(model)


def own_loss(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.mean(keras.ops.square(y_true - y_pred))


class OwnLoss(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


@pytest.mark.parametrize(
    ("loss", "width"),
    [
        (own_loss, 1),
        (OwnLoss(), 1),
        ("dice", 1),
        (keras.losses.Tversky(), 1),
        (keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"), 1),
        (keras.losses.MeanSquaredError(reduction=None), 1),
        (keras.losses.SparseCategoricalCrossentropy(ignore_class=2), 3),
        (keras.losses.CosineSimilarity(axis=0), 1),
    ],
)
def test_losses_that_need_the_whole_batch_are_told(loss: Any, width: int) -> None:
    assert not keras_adapter.is_row_wise_loss(compiled(loss, width=width))


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "binary_crossentropy", "poisson"])
def test_losses_of_keras_are_row_wise(loss: str) -> None:
    assert keras_adapter.is_row_wise_loss(compiled(loss))


def test_a_mask_is_found() -> None:
    layers = [L.Input((4,)), L.Embedding(5, 2, mask_zero=True), L.LSTM(3, return_sequences=True)]
    model = keras.Sequential([*layers, L.Dense(3)])
    model.compile("sgd", "sparse_categorical_crossentropy")
    rows = keras.KerasTensor((None, 4))
    keras_adapter.build_training_state(model, rows, keras.KerasTensor((None, 4)), None)
    assert keras_adapter.gives_mask(model, rows)


def own_metric(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.max(keras.ops.abs(y_true - y_pred))


class OwnMean(keras.metrics.Mean):
    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(own_metric(y_true, y_pred))


def test_metrics_of_the_users_are_told_from_those_of_keras() -> None:
    own = [own_metric, OwnMean()]
    model = compiled("mse", ["mae", *own, keras.metrics.AUC(), "R2Score"])
    assert [metric.name for metric in keras_adapter.own_metrics(model)] == [
        "own_metric",
        "mean",
    ]
    names = [metric.name for metric in keras_adapter.all_metrics(model)]
    assert names[0] == "loss"
    assert len(names) == 6
    assert len(keras_adapter.own_metric_variables(model)) == 4


def test_each_metric_is_updated_once_and_with_its_weights() -> None:
    model = keras.Sequential([L.Input((2,)), L.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae", own_metric], weighted_metrics=["mse"])
    label, weight = keras.KerasTensor((None, 1)), keras.KerasTensor((None,))
    keras_adapter.build_training_state(model, ROWS, label, weight)
    y, p, w = tf.constant([[1.0], [2.0]]), tf.constant([[2.0], [5.0]]), tf.constant([1.0, 0.0])
    keras_adapter.update_metrics(model, y, p, w, keras_adapter.is_summable)
    assert float(model.get_metrics_result()["own_metric"]) == 0
    keras_adapter.update_metrics(model, y, p, w, lambda m: not keras_adapter.is_summable(m))
    results = model.get_metrics_result()
    assert float(results["mae"]) == pytest.approx(2)
    assert float(results["own_metric"]) == pytest.approx(3)
    assert float(results["mse"]) == pytest.approx(1)


class Adds(keras.layers.Layer):
    def call(self, inputs: Any, training: bool = False) -> Any:
        self.add_loss(keras.ops.sum(keras.ops.square(inputs)))
        self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
        if training:
            self.add_loss(keras.ops.sum(keras.ops.square(inputs)))
        return inputs


def test_added_losses_are_sums_or_means(built: keras.Model) -> None:
    rows = keras.KerasTensor((None, 4))
    # Keras divides activity penalties by the rows of the batch.
    before = [np.array(variable.value) for variable in built.variables]
    assert keras_adapter.row_losses_are_sums(built, rows, True) == [False]
    for variable, value in zip(built.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    model = keras.Sequential([L.Input((2,)), Adds(), L.Dense(1)])
    assert keras_adapter.row_losses_are_sums(model, ROWS, False) == [True, False]
    assert keras_adapter.row_losses_are_sums(model, ROWS, True) == [True, False, True]
    assert keras_adapter.row_losses(model) == []


class OwnStep(keras.Model):
    def train_step(self, data: Any) -> Any:
        return {}


def test_models_with_a_step_of_their_own_are_told(built: keras.Model) -> None:
    assert keras_adapter.own_steps(built) == []
    assert keras_adapter.own_steps(OwnStep()) == ["train_step"]


def test_normalization_takes_the_moments_it_is_given(built: keras.Model) -> None:
    (layer,) = keras_adapter.batch_normalizations(built)
    calls = []

    def moments(inputs: Any, mask: Any, axes: Any) -> Any:
        calls.append(axes)
        return tf.fill((3,), 2.0), tf.fill((3,), 4.0 - layer.epsilon)

    keras_adapter.synchronize(layer, moments)
    assert keras_adapter.is_synchronized(layer)
    outputs = layer(tf.fill((5, 3), 6.0), training=True)
    np.testing.assert_allclose(outputs, np.full((5, 3), 2.0), rtol=1e-6)
    assert calls == [[0]]
    assert keras_adapter.moving_statistics(built) == []


def test_loss_tracker_holds_sum_and_count(built: keras.Model) -> None:
    total, count = keras_adapter.loss_tracker_variables(built)
    total.assign(6.0)
    count.assign(4.0)
    assert float(built.get_metrics_result()["loss"]) == pytest.approx(1.5)
    built.reset_metrics()
    assert float(total) == 0


def test_moving_statistics_and_seeds_are_found_and_nothing_else(built: keras.Model) -> None:
    moving = [variable.path for variable in keras_adapter.moving_statistics(built)]
    assert sorted(path.rpartition("/")[2] for path in moving) == [
        "moving_mean",
        "moving_variance",
    ]
    assert len(keras_adapter.seed_variables(built)) == 1
    built.layers[2].trainable = False
    frozen = next(layer for layer in built.layers if isinstance(layer, L.BatchNormalization))
    frozen.trainable = False
    assert keras_adapter.moving_statistics(built) == []


@pytest.mark.parametrize("wrap", [False, True])
def test_the_optimizers_own_reduction_is_off(built: keras.Model, wrap: bool) -> None:
    optimizer: Any = keras.optimizers.SGD(1.0)
    if wrap:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1.0)
    optimizer.build(built.trainable_variables)
    keras_adapter.leave_reduction_to_caller(optimizer, tf.distribute.get_strategy())
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    pairs = [(tf.ones(1), tf.Variable([1.0]))]
    with strategy.scope():
        assert inner._all_reduce_sum_gradients(pairs) == pairs


def test_present_learning_rate_follows_a_schedule() -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    optimizer = keras.optimizers.SGD(schedule)
    optimizer.build([keras.Variable(1.0)])
    optimizer.iterations.assign(2)
    rate = keras_adapter.present_learning_rate(optimizer)
    assert float(np.asarray(rate)) == pytest.approx(0.125)


def test_unproved_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keras_adapter.check_versions() is None
    monkeypatch.setattr(keras_adapter, "PROVED_KERAS", ("3.9",))
    warning = keras_adapter.check_versions()
    assert warning is not None
    assert f"Keras {keras.__version__} (proved on 3.9)" in warning


@pytest.mark.parametrize(
    "metric",
    [keras.losses.dice, keras.losses.Huber(), keras.metrics.CosineSimilarity(axis=0), own_metric],
)
def test_metrics_in_which_rows_meet_are_no_sums(metric: Any) -> None:
    model = compiled("mse", [metric])
    assert len(keras_adapter.own_metrics(model)) == 1


def test_only_layers_that_draw_are_random() -> None:
    def names(*layers: Any) -> list[str]:
        model = keras.Sequential([L.Input((3, 2)), *layers])
        return [type(layer).__name__ for layer in keras_adapter.random_layers(model)]

    assert names(L.LSTM(2), L.Dense(1)) == []
    assert "LSTMCell" in names(L.LSTM(2, dropout=0.5), L.Dense(1))
    assert names(L.Dropout(0.5)) == ["Dropout"]
    assert names(L.GaussianNoise(0.1)) == ["GaussianNoise"]


def test_a_model_is_compiled_like_another_with_functions_of_the_users() -> None:
    model = compiled(own_loss, [own_metric])
    other = keras.Sequential([L.Input((2,)), model])
    keras_adapter.compile_like(other, model)
    x, y = np.ones((4, 2), "f4"), np.ones((4, 1), "f4")
    assert other.evaluate(x, y, verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0))
    assert other.optimizer is not model.optimizer
