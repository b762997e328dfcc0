"""The processes that `benchmarks.step` times: plain Keras, legacy tf_keras, Lockstep.

Run as `python -m benchmarks.step_peers PEER JSON`. Each trains a workload for some epochs and
prints, on its last line, the seconds of every epoch and the clock times at which the second epoch
began and the last one ended.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import WORKLOADS, Workload


def main() -> None:
    """Run one peer and print what it measured."""
    options = json.loads(sys.argv[2])
    peer = {"keras": run_keras, "tf_keras": run_tf_keras, "lockstep": run_lockstep}[sys.argv[1]]
    print(json.dumps(peer(WORKLOADS[options["workload"]], options)))


def run_keras(workload: Workload, options: dict[str, Any]) -> dict[str, Any]:
    """Plain Keras 3 `fit` in one process, fed from arrays in memory.

    Options: `data`, `batch`, `epochs`, `steps_per_execution` and `jit_compile` ("auto" is Keras's
    default: compiled by XLA).
    """
    import keras
    import tensorflow as tf

    inputs, labels = workload.read(Path(options["data"]))
    model = _compiled(
        keras,
        workload,
        steps_per_execution=options["steps_per_execution"],
        jit_compile=options["jit_compile"],
    )
    rows = tf.data.Dataset.from_tensor_slices((inputs, labels))
    return _timed_fit(keras, model, rows.batch(options["batch"]), options["epochs"])


def run_tf_keras(workload: Workload, options: dict[str, Any]) -> dict[str, Any]:
    """One of two processes of legacy tf_keras `fit` under MultiWorkerMirroredStrategy.

    Expects TF_CONFIG in the environment. Options: `data`, `batch` (global), `epochs`,
    `steps_per_execution`, `rank`, `workers`. Each process is fed its own part of the rows, so that
    none reads rows only to throw them away.
    """
    import tensorflow as tf
    import tf_keras

    strategy = tf.distribute.MultiWorkerMirroredStrategy(
        communication_options=tf.distribute.experimental.CommunicationOptions(
            implementation=tf.distribute.experimental.CommunicationImplementation.RING
        )
    )
    inputs, labels = workload.read(Path(options["data"]))
    own = slice(options["rank"], None, options["workers"])
    with strategy.scope():
        model = _compiled(tf_keras, workload, steps_per_execution=options["steps_per_execution"])
    sharding = tf.data.Options()
    sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    rows = tf.data.Dataset.from_tensor_slices((inputs[own], labels[own]))
    # Unsharded batches are not cut either: they are this process's parts of the global ones.
    batches = rows.batch(options["batch"] // options["workers"]).with_options(sharding)
    return _timed_fit(tf_keras, model, batches, options["epochs"])


def run_lockstep(workload: Workload, options: dict[str, Any]) -> dict[str, Any]:
    """A job through `lockstep.api.train`, from Parquet files to the artifact.

    Options: `data`, `batch` (global), `epochs`, `workers`, `runs_dir`, and `overrides` of the job.
    Epochs are timed by the run's own records: `epoch_s` of metrics.jsonl goes from the first batch
    of an epoch to its metrics, waits for data included.
    """
    from lockstep.api import train

    job = {
        "name": workload.name,
        "model": {"layers": list(workload.layers)},
        "compile": workload.compile,
        "data": {"train": options["data"], "features": workload.features, "label": "y"},
        "train": {"epochs": options["epochs"], "global_batch_size": options["batch"]},
        "cluster": {"workers": options["workers"], "cpus_per_worker": 1},
        "export": {"h5": False, "saved_model": False},
        "runs_dir": options["runs_dir"],
    }
    run = train(job, overrides=options["overrides"])
    epochs = _json_lines(run.folder / "metrics.jsonl")
    # A checkpoint follows each epoch, so the first one's time is the begin of the second epoch.
    events = _json_lines(run.folder / "events.jsonl")
    ends = [event["time"] for event in events if event["event"] == "checkpoint"]
    return {
        "epoch_s": [epoch["epoch_s"] for epoch in epochs],
        "steps": run.summary["steps"],
        "begin_s": ends[0],
        "end_s": ends[-1],
        "goodput": run.summary["goodput"],
    }


def _compiled(keras: Any, workload: Workload, **settings: Any) -> Any:
    """The workload's model, of Keras 3 or of tf_keras."""
    layers = [keras.layers.Input(workload.shape)]
    for layer in workload.layers:
        layers += [getattr(keras.layers, name)(**given) for name, given in layer.items()]
    model = keras.Sequential(layers)
    model.compile(**workload.compile, **settings)
    return model


def _timed_fit(keras: Any, model: Any, batches: Any, epochs: int) -> dict[str, Any]:
    import tensorflow as tf

    begins: list[float] = []
    ends: list[float] = []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: begins.append(time.time()),
        on_epoch_end=lambda *_: ends.append(time.time()),
    )
    model.fit(batches.prefetch(tf.data.AUTOTUNE), epochs=epochs, verbose=0, callbacks=[clock])
    return {
        "epoch_s": np.subtract(ends, begins).tolist(),
        "steps": int(model.optimizer.iterations.numpy()),
        "begin_s": begins[1],
        "end_s": ends[-1],
    }


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
