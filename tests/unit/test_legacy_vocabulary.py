"""The words of Keras 1 in those of Keras 2."""

import pytest

from trainer.errors import ImportRefused
from trainer.legacy.vocabulary import from_keras_1, ordering_of


def test_a_convolution_of_keras_1():
    config = {
        "name": "c",
        "nb_filter": 4,
        "nb_row": 3,
        "nb_col": 2,
        "border_mode": "same",
        "subsample": [2, 2],
        "dim_ordering": "th",
        "init": "glorot_uniform",
        "bias": False,
        "W_regularizer": {"name": "WeightRegularizer", "l1": 0.0, "l2": 0.1},
    }
    name, new = from_keras_1("Convolution2D", config, "channels_last")
    assert name == "Conv2D"
    assert new == {
        "name": "c",
        "filters": 4,
        "kernel_size": [3, 2],
        "padding": "same",
        "strides": [2, 2],
        "data_format": "channels_first",
        "kernel_initializer": "glorot_uniform",
        "use_bias": False,
        "kernel_regularizer": {"name": "WeightRegularizer", "l1": 0.0, "l2": 0.1},
    }
    assert config["nb_row"] == 3  # not changed


def test_recurrent_layers_and_embeddings_of_keras_1():
    config = {"output_dim": 5, "inner_activation": "hard_sigmoid", "dropout_U": 0.1}
    assert from_keras_1("GRU", config, "channels_last")[1] == {
        "units": 5,
        "recurrent_activation": "hard_sigmoid",
        "recurrent_dropout": 0.1,
        "reset_after": False,
    }
    embedding = from_keras_1("Embedding", {"input_dim": 9, "output_dim": 3}, "channels_last")[1]
    assert embedding == {"input_dim": 9, "embedding_size": 3}


def test_a_layer_that_does_not_tell_where_its_channels_are_takes_the_models_place():
    described = [{"config": {"dim_ordering": "th"}}, {"config": {"padding": [1, 1]}}]
    assert ordering_of(described) == "channels_first"
    assert ordering_of([{"config": {}}]) is None
    config = from_keras_1("ZeroPadding2D", {"padding": [1, 1]}, "channels_first")[1]
    assert config["data_format"] == "channels_first"


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("sum", "Add"), ("mul", "Multiply"), ("ave", "Average"), ("max", "Maximum"), ("dot", "Dot")],
)
def test_a_merge_becomes_the_layer_of_its_mode(mode, kind):
    config = {"name": "m", "mode": mode, "mode_type": "raw", "dot_axes": -1}
    assert from_keras_1("Merge", config, "channels_last")[0] == kind


@pytest.mark.parametrize("mode_type", ["lambda", "function"])
def test_a_merge_by_a_function_is_refused(mode_type):
    config = {"name": "m", "mode": "x", "mode_type": mode_type}
    with pytest.raises(ImportRefused, match="'m' runs a function"):
        from_keras_1("Merge", config, "channels_last")


@pytest.mark.parametrize("mode", [1, 2])
def test_a_batch_normalization_without_averages_is_refused(mode):
    with pytest.raises(ImportRefused, match=f"of mode {mode}"):
        from_keras_1("BatchNormalization", {"name": "b", "mode": mode}, "channels_last")
