"""What a failure costs: time to the next step, steps lost, and what checkpoints cost without one.

Run as `python -m benchmarks.recovery` in the project's folder, where `data/flights` lies. Runs are
processes of their own (`benchmarks.recovery_lockstep`, `benchmarks.recovery_peers`).
"""

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
from benchmarks.workloads import FLIGHTS, Workload

_PACKAGES = ("lockstep", "tensorflow", "keras", "tf_keras", "ray", "numpy", "pyarrow")
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
_FLIGHTS = Path("data/flights/train")
_COPIES = 20
_INTERVAL_S = 1.0
_CALLS_S = 1.0  # a snapshot is due, noticed by the next call, taken after it, and on its way
_PEER_ROWS = 1_000_000
_BATCH = 4096
_SPEED_EPOCHS = 8

LARGE = Workload(
    "large",
    (
        *({"Dense": {"units": 4096, "activation": "relu"}} for _ in range(4)),
        {"Dense": {"units": 1}},
    ),
    {"optimizer": {"SGD": {"learning_rate": 1e-5, "momentum": 0.9}}, "loss": "mse"},
    columns=0,
    shape=(1024,),
    classes=0,
)
_LARGE_ROWS = 8_000
_LARGE_BATCH = 16
_LARGE_EVERY = 40
_LARGE_CHECKPOINTS = 4

PROCESS = "training process killed"
HOST = "host killed"
STANDBY = "host killed, one standby"
EPOCH_BACKUP = "tf_keras killed, backup each epoch"
STEP_BACKUP = "tf_keras killed, backup each 100 steps"
NO_SNAPSHOTS = "flights, no snapshots"
SNAPSHOTS = "flights, a snapshot each second"
CHECKPOINTS = "flights, a checkpoint each second"
BLOCKED = "large model, training stands still for a checkpoint"
LONGER = "large model, step after a checkpoint, longer by"

_ABOUT = (
    "Kills are SIGKILL from outside at random moments, of rank 0 and rank 1 in turn by lot. The "
    "time goes from the signal to the first report of completed steps by ranks that were formed "
    "anew, as it reaches the driver. The job is configs/flights.yaml with two workers, its nine "
    f"files linked {_COPIES} times over so that an epoch outlasts the interval of snapshots, "
    f"`checkpoint.snapshot_every_s: {_INTERVAL_S:g}`. Between recovery and the next kill pass 2 to "
    "5 s, after the death of a host 6 to 9 s, with a standby 12 to 15 s (it has to be warm again). "
    "p95 is the nearest rank.",
    "A host is the process of the Ray actor that keeps a worker; its template and training process "
    "die with it. All run on one machine, so a standby is on the same one.",
    "Steps lost: those that had been reported and were taken again. The bar is what training does "
    f"in the interval of {_INTERVAL_S:g} s and {_CALLS_S:g} s more: a call takes a third of a "
    "second; a snapshot that is due is noticed by the next call, taken after it, and sent.",
    "tf_keras: the same model and batch in two processes under MultiWorkerMirroredStrategy (RING), "
    f"{_PEER_ROWS:,} synthetic rows from memory, `BackupAndRestore`. A loop sees the death at "
    "once, kills the other process and starts both anew.",
    "Cost of checkpoints: the same job of flights, the median epoch of each run without its first "
    "one; no validation. A checkpoint each second is `checkpoint.every_steps` of a second's steps.",
    "Large model: 54.5 million weights (218 MB), SGD with momentum (436 MB of state), one worker, "
    f"batch {_LARGE_BATCH}, a call a step, a checkpoint each {_LARGE_EVERY} steps. Training stands "
    "still for what the step after one, from the end of the step before to its own, takes more "
    "than the four that follow, which share the machine with sending and writing as it does. What "
    "it takes more than the median step of the whole run is told as well. The worst of "
    f"{_LARGE_CHECKPOINTS} checkpoints is a reading.",
)
_NOT_MEASURED = (
    "The death of a machine, a cut network, several machines: see tests/chaos.",
    "GPUs, whose states have to be copied from the device.",
    "Checkpoints on object stores.",
)


def p95(values: Sequence[float]) -> float:
    """The nearest rank: at most one in twenty values is larger."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else math.nan


class Trials:
    """Takes readings.

    Args:
        folder: For data and runs.
        is_quick: Few kills, few rows.
    """

    def __init__(self, folder: Path, is_quick: bool) -> None:
        self._folder = folder
        self._is_quick = is_quick
        self._steps_a_second = 100
        self.longer_ms: list[float] = []

    def write_files(self) -> None:
        """Links to the files of flights, and synthetic rows.

        Raises:
            FileNotFoundError: The files of flights are not there.
        """
        files = sorted(_FLIGHTS.glob("*.parquet"))
        if not files:
            raise FileNotFoundError(f"{_FLIGHTS} is empty; run `lockstep example flights`.")
        train = self._folder / "flights"
        train.mkdir()
        for copy in range(_COPIES):
            for file in files:
                (train / f"{copy:02d}-{file.name}").symlink_to(file.absolute())
        FLIGHTS.write(self._folder / "peer", 100_000 if self._is_quick else _PEER_ROWS)
        LARGE.write(self._folder / LARGE.name, _LARGE_ROWS)

    def kills(self, watch: LookOut) -> dict[str, Row]:
        """Kills of every kind: rows of seconds to the next step, and of steps lost."""
        found: dict[str, Row] = {}
        many, some, few = (2, 2, 1) if self._is_quick else (20, 12, 5)
        plans = (
            (PROCESS, many, {"victim": "process", "cpus": 2, "pauses_s": (2, 5)}),
            (HOST, some, {"victim": "host", "cpus": 2, "pauses_s": (6, 9)}),
            (STANDBY, some, {"victim": "host", "cpus": 3, "pauses_s": (12, 15)}),
        )
        for name, count, options in plans:
            overrides = [*self._overrides(), f"cluster.standbys={int(name == STANDBY)}"]
            options = {
                **options,
                "job": "configs/flights.yaml",
                "overrides": overrides,
                "kills": count,
                "seed": 5,
            }
            found |= _kill_rows(name, _run("recovery_lockstep", "kills", options), watch)
        for name, save_freq in ((EPOCH_BACKUP, "epoch"), (STEP_BACKUP, 100)):
            options = {
                "data": str(self._folder / "peer"),
                "batch": _BATCH,
                "save_freq": save_freq,
                "kills": few,
                "pauses_s": (2, 5),
                "seed": 5,
            }
            found |= _kill_rows(name, _run("recovery_peers", "loop", options), watch)
        return found

    def peers(self) -> list[Peer]:
        """What is measured without failures, in the order of a repeat."""
        return [
            self._speed(NO_SNAPSHOTS, 0),
            self._speed(SNAPSHOTS, 1),
            self._speed(CHECKPOINTS, 1, is_durable=True),
            Peer(BLOCKED, "ms", self._read_blocked),
        ]

    def _speed(self, name: str, every_s: int, is_durable: bool = False) -> Peer:
        def read() -> Reading:
            every_steps = self._steps_a_second if is_durable else 0
            overrides = [
                *self._overrides(),
                "data.validation=null",
                f"checkpoint.snapshot_every_s={every_s}",
                f"checkpoint.every_steps={every_steps}",
                f"train.epochs={2 if self._is_quick else _SPEED_EPOCHS}",
                "export.h5=false",
                "export.saved_model=false",
            ]
            options = {"job": "configs/flights.yaml", "overrides": overrides}
            said = _run("recovery_lockstep", "speed", options)
            if not every_s:
                self._steps_a_second = round(said["steps_per_s"])
            return Reading(said["steps_per_s"], said["begin_s"], said["end_s"])

        return Peer(name, "steps/s", read)

    def _read_blocked(self) -> Reading:
        times = self._folder / "step-times.txt"
        callback = {"benchmarks/recovery_callback.py:StepTimes": {"path": str(times)}}
        job = {
            "name": LARGE.name,
            "model": {"layers": list(LARGE.layers)},
            "compile": LARGE.compile,
            "data": {
                "train": str(self._folder / LARGE.name),
                "features": LARGE.features,
                "label": "y",
            },
            "train": {
                "epochs": 1,
                "global_batch_size": _LARGE_BATCH,
                "steps_per_execution": 1,
                "callbacks": [callback],
            },
            "checkpoint": {"every_steps": _LARGE_EVERY, "snapshot_every_s": 0},
            "runs_dir": str(self._folder / "runs"),
        }
        options = {
            "job": job,
            "overrides": [],
            "every_steps": _LARGE_EVERY,
            "checkpoints": 1 if self._is_quick else _LARGE_CHECKPOINTS,
            "times": str(times),
        }
        said = _run("recovery_lockstep", "blocked", options)
        self.longer_ms.append(1000 * max(said["after_s"]))
        return Reading(1000 * max(said["blocked_s"]), said["begin_s"], said["end_s"])

    def _overrides(self) -> list[str]:
        return [
            f"data.train={self._folder / 'flights'}",
            "data.test=null",
            f"checkpoint.snapshot_every_s={_INTERVAL_S:g}",
            f"runs_dir={self._folder / 'runs'}",
        ]


def _kill_rows(name: str, said: Mapping[str, Any], watch: LookOut) -> dict[str, Row]:
    disturbance = (watch.share_of_others(said["begin_s"], said["end_s"]),)
    print(f"{name}: {said}, others {disturbance[0]:.0%}", flush=True)
    lost = tuple(float(steps) for steps in said["steps_lost"])
    rate = said["steps_per_s"]
    rows = [
        Row(f"{name}, next step after", "s", tuple(said["next_step_s"]), disturbance),
        Row(f"{name}, steps lost", "steps", lost, disturbance),
        Row(f"{name}, seconds lost", "s", tuple(steps / rate for steps in lost), disturbance),
    ]
    return {row.name: row for row in rows}


def compare(rows: Mapping[str, Row]) -> tuple[list[Row], list[Target]]:
    """Ratios, and the targets."""
    ratios, targets = [], []
    for name, limits in ((PROCESS, (2.5, 4.0)), (HOST, (None, 8.0)), (STANDBY, (None, 5.0))):
        row = rows[f"{name}, next step after"]
        for share, value, limit in zip(
            ("p50", "p95"), (row.median, p95(row.values)), limits, strict=True
        ):
            if limit is not None:
                targets.append(Target(f"{row.name}, {share}", value, limit, is_limit=True))
    worst = max(max(rows[f"{name}, seconds lost"].values) for name in (PROCESS, HOST, STANDBY))
    bound_s = _INTERVAL_S + _CALLS_S
    targets.append(Target("most steps lost to the bound", worst / bound_s, 1.0, is_limit=True))
    for name in (SNAPSHOTS, CHECKPOINTS):
        short = f"{name} to none"
        ratios.append(ratio(short, rows, name, NO_SNAPSHOTS))
        targets.append(Target(short, ratio_of_medians(rows, name, NO_SNAPSHOTS), 0.97))
    targets.append(Target(BLOCKED, rows[BLOCKED].median, 100.0, is_limit=True))
    ours = rows[f"{PROCESS}, next step after"].median
    for name in (EPOCH_BACKUP, STEP_BACKUP):
        theirs = rows[f"{name}, next step after"].median
        ratios.append(Row(f"{name}, time to the next step to ours", "x", (theirs / ours,)))
    return ratios, targets


def main() -> int:
    """Measure, print, write; returns the exit status."""
    options = arguments("What a failure costs, and what guards against it.").parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-recovery-") as folder:
        trials = Trials(Path(folder), options.quick)
        trials.write_files()
        with LookOut(0.0 if options.quick else 120.0) as look_out:
            look_out.wait_for_quiet()
            rows = trials.kills(look_out)
            repeats, retries = (1, 0) if options.quick else (options.repeats, 2)
            rows |= measure(trials.peers(), repeats, look_out, retries)
            rows[LONGER] = Row(LONGER, "ms", tuple(trials.longer_ms))
    ratios, targets = compare(rows)
    return Report(
        topic="recovery",
        is_quick=options.quick,
        rows=[*rows.values(), *ratios],
        targets=targets,
        about=_ABOUT,
        not_measured=_NOT_MEASURED,
        conditions=conditions(_PACKAGES),
    ).conclude()


def _run(module: str, program: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return run_fresh([(f"benchmarks.{module}", program, json.dumps(options))], [_ENVIRONMENT])


if __name__ == "__main__":
    sys.exit(main())
