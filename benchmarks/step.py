"""Steps and examples a second: Lockstep beside plain Keras and legacy tf_keras.

Run as `python -m benchmarks.step`. Every reading comes from fresh processes
(`benchmarks.step_peers`) and is the median epoch without the first, which holds start-up and
tracing.
"""

import json
import socket
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    LookOut,
    Peer,
    Reading,
    Report,
    Row,
    Target,
    arguments,
    conditions,
    measure,
    ratio,
    ratio_of_medians,
    run_fresh,
)
from benchmarks.workloads import WORKLOADS

_PACKAGES = ("lockstep", "tensorflow", "keras", "tf_keras", "ray", "numpy", "pyarrow")
_GLOBAL_BATCH = 128
_STEPS_A_CALL = 50
_ROWS = {"flights": 192_000, "cnn": 12_800, "lstm": 25_600, "mlp": 25_600}
_EPOCHS = {"flights": 6, "cnn": 6, "lstm": 6, "mlp": 9}
_SLOW_EPOCHS = 3  # of tf_keras at its default, of which one takes half a minute
_QUICK_ROWS = 6_400
_QUICK_EPOCHS = 3
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}

_ABOUT = (
    "Models: flights is Dense 32, 128, 1 on 9 numbers; cnn is two 3x3 convolutions (32, 64) and "
    "two dense layers on 28x28x1; lstm is LSTM(64) on 24x8; mlp is Dense 512, 512, 10 on 784. "
    "Adam, float32, synthetic rows. Each reading is the median epoch of a training in fresh "
    "processes, without its first epoch (start-up, tracing); what happens between epochs "
    "(checkpoints of Lockstep, callbacks of Keras) is not in an epoch's time.",
    "Lockstep runs whole jobs through `lockstep.api.train`: Parquet files, shuffled anew each "
    "epoch, exact batches, one core a worker. An epoch's time is `epoch_s` in metrics.jsonl, waits "
    "for data included. The Keras peers are fed by `tf.data` from arrays in memory, unshuffled, "
    "with prefetching and `verbose=0`, and may use two cores a process.",
    "flights: steps of 64 rows a process, so the global batch is 64 or 128. The other models: "
    "global batch 128, 50 steps a call, two workers of one core beside one process of two cores; "
    "`fit` is measured with its default (XLA, but for LSTM, which Keras does not compile) and "
    "without XLA, and the better of the two is the bar. Lockstep's default computes the gradients "
    "of recurrent layers by XLA (`train.jit_compile: auto`) and all others without.",
)
_NOT_MEASURED = (
    "More than one machine, more than two workers, GPUs.",
    "Start-up, tracing, checkpoints, validation and export: see the run's summary for their share.",
    "Whether the models learn: the same steps on the same data are another test's matter.",
)


@dataclass(frozen=True)
class Comparison:
    """A ratio of two rows, or of one to the better of several, and the bar it has to reach."""

    name: str
    above: str
    below: tuple[str, ...]
    target: float | None


COMPARISONS = (
    Comparison(
        "flights, two workers to tf_keras, defaults",
        "flights, Lockstep 2 workers",
        ("flights, tf_keras 2 processes",),
        5.0,
    ),
    Comparison(
        "flights, two workers to tf_keras, 50 steps a call",
        "flights, Lockstep 2 workers, 50 steps a call",
        ("flights, tf_keras 2 processes, 50 steps a call",),
        2.5,
    ),
    Comparison(
        "flights, one worker to fit, defaults",
        "flights, Lockstep 1 worker",
        ("flights, fit",),
        3.0,
    ),
    Comparison(
        "flights, one worker to fit, 50 steps a call",
        "flights, Lockstep 1 worker, 50 steps a call",
        ("flights, fit, 50 steps a call",),
        1.15,
    ),
    Comparison(
        "flights, one worker to fit without XLA, 50 steps a call",
        "flights, Lockstep 1 worker, 50 steps a call",
        ("flights, fit without XLA, 50 steps a call",),
        None,
    ),
    Comparison(
        "flights, uneven batches (parts 7:8) to even ones",
        "flights, Lockstep 2 workers, 15 virtual shards",
        ("flights, Lockstep 2 workers",),
        None,
    ),
    *(
        Comparison(
            f"{model}, two workers to fit",
            f"{model}, Lockstep 2 workers",
            (f"{model}, fit", f"{model}, fit without XLA"),
            target,
        )
        for model, target in (("cnn", 0.95), ("lstm", 0.85), ("mlp", 0.45))
    ),
    Comparison(
        "mlp, two workers, bfloat16 gradients to fit",
        "mlp, Lockstep 2 workers, bfloat16 gradients",
        ("mlp, fit", "mlp, fit without XLA"),
        0.6,
    ),
)


class Trials:
    """Takes readings of the peers of `benchmarks.step_peers`.

    Args:
        folder: Holds the rows of each workload in a folder of its name, and receives runs.
        is_quick: Few rows, few epochs.
    """

    def __init__(self, folder: Path, is_quick: bool) -> None:
        self._folder = folder
        self._is_quick = is_quick

    def write_rows(self) -> None:
        """Write the rows of all workloads."""
        for name, workload in WORKLOADS.items():
            workload.write(self._folder / name, self._rows(name))

    def peers(self) -> list[Peer]:
        """Everything that is measured, in the order of a repeat."""
        call = f", {_STEPS_A_CALL} steps a call"
        return [
            self._keras("flights, fit", "flights", 1),
            self._tf_keras("flights, tf_keras 2 processes", 1),
            self._lockstep("flights, Lockstep 1 worker", "flights", 1, 0),
            self._lockstep("flights, Lockstep 2 workers", "flights", 2, 0),
            self._lockstep(
                "flights, Lockstep 2 workers, 15 virtual shards",
                "flights",
                2,
                0,
                "data.virtual_shards=15",
            ),
            self._keras(f"flights, fit{call}", "flights", _STEPS_A_CALL),
            self._keras(f"flights, fit without XLA{call}", "flights", _STEPS_A_CALL, False),
            self._tf_keras(f"flights, tf_keras 2 processes{call}", _STEPS_A_CALL),
            self._lockstep(f"flights, Lockstep 1 worker{call}", "flights", 1, _STEPS_A_CALL),
            self._lockstep(f"flights, Lockstep 2 workers{call}", "flights", 2, _STEPS_A_CALL),
            *(peer for model in ("cnn", "lstm", "mlp") for peer in self._pair(model)),
            self._lockstep(
                "mlp, Lockstep 2 workers, bfloat16 gradients",
                "mlp",
                2,
                _STEPS_A_CALL,
                "train.reduce_dtype=bfloat16",
            ),
        ]

    def _pair(self, model: str) -> list[Peer]:
        """One model by `fit`, with and without XLA, and by two workers."""
        return [
            self._keras(f"{model}, fit", model, _STEPS_A_CALL),
            self._keras(f"{model}, fit without XLA", model, _STEPS_A_CALL, False),
            self._lockstep(f"{model}, Lockstep 2 workers", model, 2, _STEPS_A_CALL),
        ]

    def _keras(self, name: str, model: str, call_steps: int, jit: str | bool = "auto") -> Peer:
        batch = _GLOBAL_BATCH // 2 if model == "flights" else _GLOBAL_BATCH
        options = {"batch": batch, "steps_per_execution": call_steps, "jit_compile": jit}
        return self._peer(name, model, batch, "keras", options)

    def _tf_keras(self, name: str, call_steps: int) -> Peer:
        options = {
            "batch": _GLOBAL_BATCH,
            "steps_per_execution": call_steps,
            "workers": 2,
        }
        if call_steps == 1:
            options["epochs"] = _SLOW_EPOCHS
        return self._peer(name, "flights", _GLOBAL_BATCH, "tf_keras", options)

    def _lockstep(
        self, name: str, model: str, workers: int, call_steps: int, *overrides: str
    ) -> Peer:
        batch = workers * _GLOBAL_BATCH // 2
        options = {
            "batch": batch,
            "workers": workers,
            "runs_dir": str(self._folder / "runs"),
            "overrides": [f"train.steps_per_execution={call_steps}", *overrides],
        }
        return self._peer(name, model, batch, "lockstep", options)

    def _peer(
        self, name: str, model: str, batch: int, program: str, options: dict[str, Any]
    ) -> Peer:
        """A peer whose values are steps a second for flights, examples a second otherwise."""
        rows = self._rows(model)
        epochs = options.get("epochs", _EPOCHS[model])
        if self._is_quick:
            epochs = _QUICK_EPOCHS
        options |= {"workload": model, "data": str(self._folder / model), "epochs": epochs}
        is_in_steps = model == "flights"

        def read() -> Reading:
            said = _run(program, options)
            if said["steps"] != epochs * rows // batch:
                raise RuntimeError(
                    f"{name} took {said['steps']} steps, expected were {epochs * rows // batch}"
                )
            epoch_s = statistics.median(said["epoch_s"][1:])
            value = rows / epoch_s / (batch if is_in_steps else 1)
            return Reading(value, said["begin_s"], said["end_s"])

        return Peer(name, "steps/s" if is_in_steps else "examples/s", read)

    def _rows(self, model: str) -> int:
        return _QUICK_ROWS if self._is_quick else _ROWS[model]


def compare(rows: Mapping[str, Row]) -> tuple[list[Row], list[Target]]:
    """Ratios by repeat, and the targets held against ratios of medians."""
    ratios, targets = [], []
    for comparison in COMPARISONS:
        below = max(comparison.below, key=lambda name: rows[name].median)
        ratios.append(ratio(comparison.name, rows, comparison.above, below))
        if comparison.target is not None:
            value = ratio_of_medians(rows, comparison.above, below)
            targets.append(Target(comparison.name, value, comparison.target))
    return ratios, targets


def main() -> int:
    """Measure, print, write; returns the exit status."""
    options = arguments("Steps and examples a second beside plain Keras and tf_keras.").parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        trials = Trials(Path(folder), options.quick)
        trials.write_rows()
        with LookOut(0.0 if options.quick else 120.0) as look_out:
            if options.quick:
                rows = measure(trials.peers(), repeats=1, watch=look_out, retries=0)
            else:
                rows = measure(trials.peers(), options.repeats, look_out)
    ratios, targets = compare(rows)
    return Report(
        topic="step",
        is_quick=options.quick,
        rows=[*rows.values(), *ratios],
        targets=targets,
        about=_ABOUT,
        not_measured=_NOT_MEASURED,
        conditions=conditions(_PACKAGES),
    ).conclude()


def _run(program: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one peer in fresh processes; what its (first) process reported."""
    if program != "tf_keras":
        return run_fresh([_command(program, options)], [_ENVIRONMENT])
    addresses = _free_addresses(options["workers"])
    commands, environments = [], []
    for rank in range(options["workers"]):
        config = {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": rank},
        }
        commands.append(_command(program, {**options, "rank": rank}))
        environments.append(
            {**_ENVIRONMENT, "TF_USE_LEGACY_KERAS": "1", "TF_CONFIG": json.dumps(config)}
        )
    return run_fresh(commands, environments)


def _command(program: str, options: dict[str, Any]) -> tuple[str, ...]:
    return ("benchmarks.step_peers", program, json.dumps(options))


def _free_addresses(count: int) -> list[str]:
    """Loopback addresses with ports that were free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


if __name__ == "__main__":
    sys.exit(main())
