"""The peer of `benchmarks.recovery`: tf_keras with BackupAndRestore, restarted by a loop.

`python -m benchmarks.recovery_peers loop JSON` starts both processes of a training again whenever
one has died, and kills them itself, by plan; `... rank JSON` is one of the two processes. The loop
prints what it found as JSON on its last line.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from benchmarks.recovery_kills import Blow, Outcome, plan_blows
from benchmarks.workloads import FLIGHTS

_START_S = 120.0
_MANY_EPOCHS = 1_000_000


def main() -> None:
    """Run the loop, or one process of the training."""
    options = json.loads(sys.argv[2])
    if sys.argv[1] == "rank":
        run_rank(options)
    else:
        print(json.dumps(run_loop(options)))


def run_loop(options: dict[str, Any]) -> dict[str, Any]:
    """Train with two processes, kill by plan, and start both again each time.

    Options: `data`, `batch` (global), `save_freq` of BackupAndRestore, `kills`, `pauses_s`, `seed`.
    """
    least_s, most_s = options["pauses_s"]
    blows = plan_blows(options["kills"], 2, (least_s, most_s), options["seed"])
    outcome = Outcome()
    begin_s = time.time()
    with tempfile.TemporaryDirectory(prefix="bench-backup-") as backup:
        struck_at, furthest = None, 0
        for blow in [*blows, None]:
            with Training({**options, "backup": backup}) as training:
                first_at, first = training.wait_for_step(_START_S)
                if struck_at is not None:
                    outcome.next_step_s.append(first_at - struck_at)
                    outcome.steps_lost.append(max(0, furthest - (first - 1)))
                if blow is not None:
                    struck_at, furthest = _strike(training, blow)
                    outcome.steps += furthest - first
                    outcome.seconds += struck_at - first_at
    return {**outcome.as_json(), "begin_s": begin_s, "end_s": time.time()}


def _strike(training: "Training", blow: Blow) -> tuple[float, int]:
    """Kill a rank after the pause; when, and the newest step that was completed by then."""
    time.sleep(blow.pause_s)
    struck_at = time.monotonic()
    training.processes[blow.rank].kill()
    training.processes[blow.rank].wait()
    return struck_at, training.newest_step


class Training:
    """Two processes of one training; a context manager that ends them both with SIGKILL.

    That is kinder to the peer than its own way: a process whose partner has died notices it only
    after some seconds.

    Attributes:
        processes: By rank.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._stack = ExitStack()
        self._first: tuple[float, int] | None = None
        self._has_begun = threading.Event()
        self.newest_step = 0
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Training":
        """Start both processes."""
        addresses = _free_addresses(2)
        for rank in range(2):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
            environment = {"TF_USE_LEGACY_KERAS": "1", "TF_CONFIG": json.dumps(config)}
            options = json.dumps({**self._options, "rank": rank})
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.recovery_peers", "rank", options],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                text=True,
            )
            self._stack.callback(process.wait)
            self._stack.callback(process.kill)
            self.processes.append(process)
        threading.Thread(target=self._read, args=(self.processes[0].stdout,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End both."""
        self._stack.close()

    def wait_for_step(self, timeout_s: float) -> tuple[float, int]:
        """When the first step was completed, and its number.

        Raises:
            RuntimeError: It was not, in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._has_begun.wait(0.5):
            codes = [process.poll() for process in self.processes]
            if any(code is not None for code in codes) or time.monotonic() > deadline:
                raise RuntimeError(f"tf_keras completed no step; its processes ended with {codes}")
        if self._first is None:
            raise RuntimeError("tf_keras began without a step")
        return self._first

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            word, _, step = line.partition(" ")
            if word != "step":
                continue
            self.newest_step = int(step)
            if self._first is None:
                self._first = (time.monotonic(), self.newest_step)
                self._has_begun.set()


def run_rank(options: dict[str, Any]) -> None:
    """One of the two processes; expects TF_CONFIG. Rank 0 prints "step N" after each step."""
    import tensorflow as tf
    import tf_keras

    strategy = tf.distribute.MultiWorkerMirroredStrategy(
        communication_options=tf.distribute.experimental.CommunicationOptions(
            implementation=tf.distribute.experimental.CommunicationImplementation.RING
        )
    )
    inputs, labels = FLIGHTS.read(Path(options["data"]))
    own = slice(options["rank"], None, 2)
    with strategy.scope():
        layers = [tf_keras.layers.Input(FLIGHTS.shape)]
        for layer in FLIGHTS.layers:
            layers += [getattr(tf_keras.layers, name)(**given) for name, given in layer.items()]
        model = tf_keras.Sequential(layers)
        model.compile(**FLIGHTS.compile)
    sharding = tf.data.Options()
    sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    rows = tf.data.Dataset.from_tensor_slices((inputs[own], labels[own]))
    batches = rows.batch(options["batch"] // 2).with_options(sharding)
    callbacks = [
        tf_keras.callbacks.BackupAndRestore(options["backup"], save_freq=options["save_freq"])
    ]
    if options["rank"] == 0:
        callbacks.append(_telling(tf_keras, model))
    model.fit(
        batches.prefetch(tf.data.AUTOTUNE), epochs=_MANY_EPOCHS, verbose=0, callbacks=callbacks
    )


def _free_addresses(count: int) -> list[str]:
    """Loopback addresses with ports that were free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def _telling(tf_keras: Any, model: Any) -> Any:
    """A callback that prints the optimizer's count of steps, which is read only once."""
    count: list[int] = []

    def tell(*_: Any, **__: Any) -> None:
        if count:
            count[0] += 1
        else:
            count.append(int(model.optimizer.iterations.numpy()))
        with suppress(BrokenPipeError):
            print("step", count[0], flush=True)

    on_batch_end: Callable[..., None] = tell
    return tf_keras.callbacks.LambdaCallback(on_batch_end=on_batch_end)


if __name__ == "__main__":
    main()
