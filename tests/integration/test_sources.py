"""The same rows from every kind of source train the same model, bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import lockstep
from tests.support.jobs import FEATURES, make_job

KINDS = ["csv", "ndjson", "arrow", "tfrecord", "numpy"]


def write_ndjson(table: pa.Table, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def write_tfrecord(table: pa.Table, path: Path) -> None:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in table.to_pylist():
            features = {
                name: tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
                if isinstance(value, int)
                else tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
                for name, value in row.items()
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())


WRITERS = {
    "csv": (".csv", lambda table, path: pacsv.write_csv(table, path)),
    "ndjson": (".ndjson", write_ndjson),
    "arrow": (".arrow", lambda table, path: feather.write_feather(table, str(path))),
    "tfrecord": (".tfrecord", write_tfrecord),
    "numpy": (
        ".npz",
        lambda table, path: np.savez(path, **{n: table[n].to_numpy() for n in table.column_names}),
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of converted data, so that no test writes to the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("LOCKSTEP_HOME", str(folder))
        yield folder


def small_job(data: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    return make_job(data, runs, train__epochs=1, **changes)


def copied(rows: Path, kind: str, folder: Path) -> Path:
    """The rows of all roles, one file a role, in the format `kind`."""
    suffix, write = WRITERS[kind]
    for role in ("train", "validation", "test"):
        table = pq.read_table(sorted((rows / role).glob("*.parquet")))
        (folder / role).mkdir(parents=True)
        write(table, folder / role / f"rows{suffix}")
    return folder


def same_blocks(rows: Path, folder: Path) -> Path:
    """The Parquet rows in one file a role, in the blocks that a conversion makes of so few."""
    for role in ("train", "validation", "test"):
        table = pq.read_table(sorted((rows / role).glob("*.parquet")))
        (folder / role).mkdir(parents=True)
        pq.write_table(table, folder / role / "rows.parquet")
    return folder


@pytest.fixture(scope="module")
def expected(ray_session, rows, home, tmp_path_factory):
    folder = same_blocks(rows, tmp_path_factory.mktemp("parquet"))
    return lockstep.train(small_job(folder, home / "runs"))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "csv" else pytest.mark.long) for kind in KINDS]
)
def test_a_source_trains_as_the_same_rows_in_parquet(kind, expected, rows, home, tmp_path):
    run = lockstep.train(small_job(copied(rows, kind, tmp_path), home / "runs", name=kind))
    assert run.summary["rows_seen"] == expected.summary["rows_seen"]
    for ours, theirs in zip(run.model().get_weights(), expected.model().get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert run.metrics["test"] == expected.metrics["test"]


def test_images_train_from_folders_and_are_varied_in_training_only(ray_session, home, tmp_path):
    rng = np.random.default_rng(0)
    for role, count in (("train", 24), ("test", 8)):
        for index in range(count):
            name = ("dark", "light")[index % 2]
            folder = tmp_path / role / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 100, (9, 7, 3)) + 150 * (index % 2)
            encoded = tf.io.encode_png(tf.constant(pixels, tf.uint8))
            (folder / f"{index}.png").write_bytes(encoded.numpy())
    job = {
        "name": "images",
        "model": {
            "layers": [
                {"Conv2D": {"filters": 2, "kernel_size": 3, "activation": "relu"}},
                "GlobalAveragePooling2D",
                {"Dense": {"units": 2, "activation": "softmax"}},
            ]
        },
        "compile": {
            "optimizer": {"Adam": {"learning_rate": 0.05}},
            "loss": "sparse_categorical_crossentropy",
            "metrics": ["accuracy"],
        },
        "data": {
            "train": str(tmp_path / "train"),
            "test": str(tmp_path / "test"),
            "images": {"height": 8, "width": 8},
            "features": ["image"],
            "label": "label",
            "normalize": True,
            "augment": [
                {"RandomFlip": {"mode": "horizontal"}},
                {"RandomContrast": {"factor": 0.2}},
            ],
        },
        "train": {"epochs": 8, "global_batch_size": 8},
        "cluster": {"workers": 2},
        "runs_dir": str(home / "runs"),
    }
    run = lockstep.train(job)
    assert run.metrics["test"]["accuracy"] == 1.0
    signature = json.loads((run.artifact / "signature.json").read_text())
    assert signature["label"]["classes"] == ["dark", "light"]
    assert signature["inputs"][0]["shape"] == [None, 8, 8, 3]
    model = run.model()
    assert [type(layer).__name__ for layer in model.layers[:2]] == ["RandomFlip", "RandomContrast"]
    image = np.random.default_rng(1).uniform(0, 255, (1, 8, 8, 3)).astype("f4")
    np.testing.assert_array_equal(model(image), model(image))
    assert np.ptp([model(image, training=True)[0, 0] for _ in range(8)]) > 0


def test_the_features_of_a_job_may_be_in_the_names_of_folders(ray_session, home, rows, tmp_path):
    table = pq.read_table(sorted((rows / "train").glob("*.parquet")))
    for value in (1, 2):
        folder = tmp_path / "train" / f"part={value}"
        folder.mkdir(parents=True)
        pq.write_table(table.slice(500 * (value - 1), 500), folder / "rows.parquet")
    job = small_job(tmp_path, home / "runs", data__features=[*FEATURES, "part"])
    job["data"] |= {"validation": None, "test": None}
    run = lockstep.train(job)
    assert run.summary["rows_seen"] == 1000
    assert run.model().input_shape == (None, 4)
