"""The forms in which old files were written, made here by hand."""

import json

import h5py
import numpy as np
import pytest

from trainer.errors import ImportRefused
from trainer.legacy.archive import is_old_archive, read_old_archive
from trainer.legacy.file import is_old_h5, plain_json, read_old_h5

DENSE = {"class_name": "Dense", "config": {"name": "d", "units": 2}}
KERAS_1 = {"class_name": "Convolution1D", "config": {"name": "d", "nb_filter": 2}}


def written(path, layers=(DENSE,), names=("d/kernel:0", "d/bias:0"), is_bytes=True, **attributes):
    """An old `.h5` file with one layer `d`."""

    def text(value):
        return value.encode() if is_bytes else value

    with h5py.File(path, "w") as file:
        model = {"class_name": "Sequential", "config": list(layers)}
        file.attrs["model_config"] = text(json.dumps(model))
        for key, value in attributes.items():
            file.attrs[key] = text(value)
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = [text("d")]
        group = weights.create_group("d")
        group.attrs["weight_names"] = [text(name) for name in names]
        for number, name in enumerate(names):
            group[name] = np.full((2,), number, np.float32)
    return path


@pytest.mark.parametrize("is_bytes", [True, False])
def test_attributes_may_be_bytes_or_text(tmp_path, is_bytes):
    path = written(
        tmp_path / "m.h5",
        is_bytes=is_bytes,
        keras_version="2.2.4",
        backend="tensorflow",
        training_config='{"loss": "mse"}',
    )
    model = read_old_h5(path)
    assert is_old_h5(path)
    assert (model.keras, model.version, model.backend) == (2, "2.2.4", "tensorflow")
    assert model.training == {"loss": "mse"}
    assert [(stored.name, stored.values[0]) for stored in model.weights["d"]] == [
        ("d/kernel:0", 0.0),
        ("d/bias:0", 1.0),
    ]


def test_long_lists_of_names_were_cut_into_chunks(tmp_path):
    path = written(tmp_path / "m.h5", keras_version="2.2.4")
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]["d"]
        names = list(group.attrs["weight_names"])
        del group.attrs["weight_names"]
        group.attrs["weight_names0"], group.attrs["weight_names1"] = names[:1], names[1:]
    assert len(read_old_h5(path).weights["d"]) == 2


@pytest.mark.parametrize(
    ("layers", "attributes", "keras"),
    [
        ((KERAS_1,), {}, 1),
        ((DENSE,), {}, 2),
        ((KERAS_1,), {"keras_version": "1.2.2"}, 1),
        ((DENSE,), {"keras_version": "2.2.4-tf"}, 2),
    ],
)
def test_the_version_is_told_by_the_file_or_its_words(tmp_path, layers, attributes, keras):
    assert read_old_h5(written(tmp_path / "m.h5", layers, **attributes)).keras == keras


@pytest.mark.parametrize(
    ("names", "backend"),
    [(("d_W:0", "d_b:0"), "tensorflow"), (("d_W", "d_b"), "theano")],
)
def test_a_file_without_backend_is_told_by_the_names_of_its_variables(tmp_path, names, backend):
    path = written(tmp_path / "m.h5", (KERAS_1,), names, keras_version="1.2.2")
    assert read_old_h5(path).backend == backend


def test_files_that_are_no_whole_models_are_refused(tmp_path):
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file.create_group("d")
    with pytest.raises(ImportRefused, match="holds weights without a model"):
        is_old_h5(tmp_path / "weights.h5")
    for broken in ("{", '{"class_name": "Sequential"}', "[]"):
        path = written(tmp_path / "m.h5")
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = broken
        with pytest.raises(ImportRefused, match="is not a whole model file"):
            read_old_h5(path)


def test_marks_of_tuples_and_shapes_are_taken_off():
    marked = {
        "axis": {"class_name": "__tuple__", "items": [1, 2]},
        "shape": {"class_name": "TensorShape", "items": [None, 3]},
        "alpha": {"type": "ndarray", "value": 0.3},
        "config": [{"a": "b"}],
    }
    assert plain_json(marked) == {
        "axis": [1, 2],
        "shape": [None, 3],
        "alpha": 0.3,
        "config": [{"a": "b"}],
    }
    deep: dict = {}
    for _ in range(1000):
        deep = {"config": deep}
    with pytest.raises(ValueError, match="nested too deeply"):
        plain_json(deep)


def test_arrays_of_an_old_archive_are_found_by_class_and_number(tmp_path):
    def described(class_name, name, **config):
        return {"class_name": class_name, "config": {"name": name, **config}}

    inner = described("Sequential", "inner", layers=[described("Dense", "a")])
    layers = [
        described("Dense", "first"),
        inner,
        described("Bidirectional", "both", layer=described("LSTM", "lstm")),
        described("Dense", "second"),
    ]
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        for place, value in [
            ("layers/dense/vars/0", 1),
            ("layers/dense/vars/1", 2),
            ("layers/dense_1/vars/0", 3),
            ("layers/sequential/layers/dense/vars/0", 4),
            ("layers/bidirectional/backward_layer/cell/vars/0", 6),
            ("layers/bidirectional/forward_layer/cell/vars/0", 5),
        ]:
            file[place] = np.float32(value)
    config = {
        "class_name": "Sequential",
        "config": {"layers": layers},
        "compile_config": {"loss": "mse", "optimizer": "adam"},
    }
    metadata = {"keras_version": "2.15.0"}
    assert is_old_archive(metadata)
    assert not is_old_archive({"keras_version": "3.15.1"})
    model = read_old_archive(config, metadata, tmp_path / "model.weights.h5")
    found = {name: [float(s.values) for s in stored] for name, stored in model.weights.items()}
    assert found == {"first": [1, 2], "inner": [4], "both": [5, 6], "second": [3]}
    assert model.weights["inner"][0].name == "a/0"
    assert model.training is not None
    assert model.training["optimizer_config"] == "adam"
