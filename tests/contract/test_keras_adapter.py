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


@pytest.mark.parametrize(("reduction", "is_mean"), [("sum_over_batch_size", True), ("sum", False)])
def test_reduction_of_the_loss_is_found(reduction: str, is_mean: bool) -> None:
    model = keras.Sequential([L.Input((2,)), L.Dense(1)])
    model.compile("sgd", keras.losses.MeanSquaredError(reduction=reduction))
    example = (keras.KerasTensor((None, 2)), keras.KerasTensor((None, 1)))
    keras_adapter.build_training_state(model, *example, None)
    assert keras_adapter.is_mean_loss(model) is is_mean


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
    keras_adapter.leave_reduction_to_caller(optimizer)
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
