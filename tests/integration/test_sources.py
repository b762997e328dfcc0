"""The same rows from every kind of source train the same model, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import yaml
from pyarrow import fs

import lockstep
from lockstep.examples import write_example
from tests.support.kinds import ROWS, WRITERS, numbered
from tests.support.stores import s3_server

KINDS = [kind for kind in WRITERS if kind != "parquet"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of converted data, so that no test writes to the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("LOCKSTEP_HOME", str(folder))
        yield folder


def job_of(train: str, runs: Path) -> dict[str, Any]:
    """A job whose order of rows does not depend on the blocks of its files."""
    return {
        "name": "sources",
        "model": {
            "layers": [{"Dense": {"units": 4, "activation": "tanh"}}, {"Dense": {"units": 1}}]
        },
        "compile": {"optimizer": "sgd", "loss": "huber"},
        "data": {
            "train": train,
            "features": ["x", "a"],
            "label": "y",
            "normalize": True,
            "shuffle": "none",
        },
        "train": {"epochs": 1, "global_batch_size": 64, "seed": 3},
        "cluster": {"workers": 2},
        "runs_dir": str(runs),
    }


@pytest.fixture(scope="module")
def expected(ray_session, home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "parquet"
    WRITERS["parquet"](folder)
    return lockstep.train(job_of(str(folder), home / "runs"))


def assert_same(run: lockstep.Run, expected: lockstep.Run) -> None:
    assert run.summary["rows_seen"] == expected.summary["rows_seen"] == ROWS
    for ours, theirs in zip(run.model().get_weights(), expected.model().get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert run.metrics["train"] == expected.metrics["train"]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "csv" else pytest.mark.long) for kind in KINDS]
)
def test_a_source_trains_as_the_same_rows_in_parquet(kind, expected, home, tmp_path):
    WRITERS[kind](tmp_path / "rows")
    assert_same(lockstep.train(job_of(str(tmp_path / "rows"), home / "runs")), expected)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_store_trains_as_the_same_rows_on_disk(kind, expected, home, tmp_path):
    """By the command, in an environment of its own: workers get it from their driver."""
    WRITERS[kind](tmp_path / "rows")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_of("s3://rows/training", home / "runs")))
    with s3_server() as address:
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": "reader",
            "AWS_SECRET_ACCESS_KEY": "a-secret",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": address,
        }
        put_objects(tmp_path / "rows", address, "rows/training")
        ended = subprocess.run(
            [sys.executable, "-m", "lockstep.cli", "train", str(tmp_path / "job.yaml"), "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert ended.returncode == 0, ended.stderr[-3000:]
    run = lockstep.Run(Path(json.loads(ended.stdout)["run_folder"]))
    assert_same(run, expected)
    held = [path.read_text(errors="replace") for path in run.folder.glob("*.json*")]
    assert not any("a-secret" in text for text in held)


def put_objects(folder: Path, address: str, prefix: str) -> None:
    client = fs.S3FileSystem(
        access_key="writer",
        secret_key="writer",
        region="us-east-1",
        endpoint_override=address,
        allow_bucket_creation=True,
    )
    client.create_dir(prefix.partition("/")[0])
    for path in sorted(folder.iterdir()):
        with client.open_output_stream(f"{prefix}/{path.name}", compression=None) as out:
            out.write(path.read_bytes())


@pytest.mark.long
def test_flights_train_the_same_from_csv(ray_session, home, tmp_path):
    write_example("flights", tmp_path / "data")
    runs = []
    for suffix in ("parquet", "csv"):
        data = {}
        for role in ("train", "validation", "test"):
            folder = tmp_path / "data" / "flights" / role
            for path in sorted(folder.glob("*.parquet")):
                pacsv.write_csv(pq.read_table(path), path.with_suffix(".csv"))
            data[role] = str(folder / f"*.{suffix}")
        overrides = [f"data.{role}={path}" for role, path in data.items()]
        overrides.append(f"runs_dir={home / 'runs'}")
        runs.append(lockstep.train("configs/flights.yaml", overrides=overrides))
    assert runs[0].metrics["test"]["mae"] == runs[1].metrics["test"]["mae"]


@pytest.mark.long
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
    first, second = (model.predict(image, verbose=0) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.ptp([model(image, training=True)[0, 0] for _ in range(8)]) > 0


@pytest.mark.long
def test_the_features_of_a_job_may_be_in_the_names_of_folders(ray_session, home, tmp_path):
    for value in ("evening", "morning"):
        folder = tmp_path / f"part={value}"
        folder.mkdir(parents=True)
        pq.write_table(numbered(500), folder / "rows.parquet")
    job = job_of(str(tmp_path), home / "runs")
    job["data"]["features"] = ["x", "part"]
    run = lockstep.train(job)
    assert run.summary["rows_seen"] == 1000
    signature = json.loads((run.artifact / "signature.json").read_text())
    assert signature["inputs"][1]["encoding"]["vocabulary"] == ["evening", "morning"]
