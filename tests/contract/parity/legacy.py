"""Engine C, a second opinion: legacy tf_keras `fit` under the same strategy, two processes.

Run as `python -m tests.contract.parity.legacy RESULT.json`. Each case of the table that tf_keras
can express is trained by one process without a strategy and by two under it, from the same weights
and on the same rows in the same order; the greatest difference of weights, losses and metrics is
written by case. Nothing is asserted: where parts of a batch are uneven, tf_keras is known to be
off.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from tests.contract.parity.cases import CASES, Case

_GROUPS = (
    *("dnn", "dnn, partial training", "image", "image, partial training"),
    *("image, plain norm", "image, synchronised norms", "embedding"),
    *("embedding, distributed in time", "gru", "lstm"),
)
_TIMEOUT_S = 900.0


def selected() -> list[Case]:
    """One case of each group that tf_keras can express."""
    return [
        case
        for case in CASES
        if case.group in _GROUPS
        and "is exact" not in case.name
        and case.files > 1
        and case.validates
    ]


def main() -> int:
    """Run three processes and compare what they wrote."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="parity-legacy-") as folder:
        alone = _start(folder, "alone", {})
        if alone.wait(_TIMEOUT_S):
            return 1
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        processes = []
        for rank in range(2):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
            processes.append(_start(folder, f"rank-{rank}", {"TF_CONFIG": json.dumps(config)}))
        try:
            if any(process.wait(_TIMEOUT_S) for process in processes):
                return 1
        finally:
            for process in processes:
                process.kill()
        differences = _compare(Path(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(differences, indent=2) + "\n")
    return 0


def train_all(folder: str, name: str) -> None:
    """What each process does: fit and evaluate every case, and write the outcomes."""
    import tensorflow as tf
    import tf_keras

    from tests.contract.parity import models

    strategy: Any = tf.distribute.get_strategy()
    if name != "alone":
        strategy = tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(
                implementation=tf.distribute.experimental.CommunicationImplementation.RING
            )
        )
    for number, case in enumerate(selected()):
        tf_keras.utils.set_random_seed(1337)
        rng = np.random.default_rng(1337)
        rows, evaluation = case.draw(rng, case.rows), case.draw(rng, case.evaluation_rows)
        with strategy.scope():
            model = getattr(models, case.model)(**case.arguments, k=tf_keras)
            ((optimizer, settings),) = case.optimizer.items()
            model.compile(
                getattr(tf_keras.optimizers, optimizer)(**settings),
                case.loss,
                metrics=list(case.metrics),
            )
        history = model.fit(
            _dataset(case, rows),
            epochs=case.epochs,
            validation_data=_dataset(case, evaluation),
            verbose=0,
        )
        outcome = {f"history/{key}": value for key, value in history.history.items()}
        outcome |= {f"weights/{i}": weight for i, weight in enumerate(model.get_weights())}
        np.savez(Path(folder) / f"{name}-{number}.npz", **outcome)


def _dataset(case: Case, columns: dict[str, Any]) -> Any:
    import tensorflow as tf

    inputs = columns["x"].reshape(len(columns["y"]), *case.shapes.get("x", [-1]))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    rows = tf.data.Dataset.from_tensor_slices((inputs, columns["y"]))
    return rows.batch(case.batch).with_options(options)


def _start(folder: str, name: str, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
    code = (
        "from tests.contract.parity.legacy import train_all; import sys; train_all(*sys.argv[1:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, folder, name],
        env={**os.environ, **quiet, "TF_USE_LEGACY_KERAS": "1", **environment},
    )


def _compare(folder: Path) -> dict[str, float]:
    found = {}
    for number, case in enumerate(selected()):
        alone = np.load(folder / f"alone-{number}.npz")
        two = np.load(folder / f"rank-0-{number}.npz")
        found[case.name] = max(
            float(np.max(np.abs(two[key] - alone[key]) / (1 + np.abs(alone[key]))))
            for key in alone.files
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
