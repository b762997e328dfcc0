"""A run's record in MLflow: best effort, at no cost to the run.

Whoever trains hands over what there is to tell and goes on at once; a thread feeds it to a process
of its own (`trainer.mlflow_sender`), from a queue that has a bound. A dead, slow or refusing MLflow
costs a warning, and a count of what was not delivered. At the end of a run the wait for it has a
bound, and then the process is ended. TensorBoard's files are `trainer.curves`'.
"""

import contextlib
import importlib.util
import json
import math
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import Job, TrackingConfig

_QUEUE_ITEMS = 10_000
_PARAMS = 300
_KEY_CHARACTERS = 250
_VALUE_CHARACTERS = 500
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_\-. /]")
_LEAVE_S = 0.5
_STATUS = {"done": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_DESCRIPTIONS = ("report.html", "job.yaml", "summary.json")
_OF_ARTIFACT = ("signature.json", "manifest.json")
BOUNDS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow's own patience is minutes; the sender tries again itself, and later."""


def tracking_address(config: TrackingConfig) -> str | None:
    """Where MLflow is, or None; read by the process that starts a run.

    Raises:
        UserError: The extra is missing, or the environment variable that is named is not set.
    """
    uri = config.mlflow_uri
    if uri is None:
        return None
    if importlib.util.find_spec("mlflow") is None:
        raise UserError(
            f"tracking.mlflow_uri is {uri}, and MLflow is not installed. Install "
            "lockstep[mlflow], or remove it."
        )
    if not uri.startswith("env:"):
        return uri
    name = uri.removeprefix("env:")
    if not os.environ.get(name):
        raise UserError(
            f"tracking.mlflow_uri names the environment variable {name}, which is not set; it is "
            "to hold MLflow's address. Set it, or give the address itself."
        )
    return os.environ[name]


@dataclass(frozen=True)
class TrackedRun:
    """What a run is, for its record.

    Attributes:
        job: The job.
        run_id: Of the run folder.
        folder: The run folder.
        address: MLflow's; may hold a password.
        is_resumed: Whether it goes on with a record that may be there.
    """

    job: Job
    run_id: str
    folder: Path
    address: str
    is_resumed: bool


class Tracker:
    """The record of one run. No method blocks or raises for MLflow's sake, except `finish`.

    `warn` is told once why nothing is delivered at present, from another thread.
    """

    def __init__(self, run: TrackedRun, warn: Callable[[str], None]) -> None:
        self._run = run
        self._warn = warn
        self._items: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_ITEMS)
        self._has_warned = False
        self._given = self._sent = 0
        self._reason = ""
        self._mlflow_run: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._threads: list[threading.Thread] = []

    def begin(self, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """Start the sender; `earlier` are the records of the epochs before a resumption."""
        environment = {**BOUNDS, "MLFLOW_ALLOW_FILE_STORE": "true", **os.environ}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.mlflow_sender"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what is written there may show the address
                env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                text=True,
            )
        except OSError as error:
            self._failed(f"the sender could not be started: {error}")
            return
        for part in (self._feed, self._listen):
            thread = threading.Thread(target=part, name="tracking", daemon=True)
            thread.start()
            self._threads.append(thread)
        for record in earlier:
            self.epoch(record)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Hand over what an epoch gave: `epoch`, and numbers by name."""
        values = {name: value for name, value in record.items() if name not in ("epoch", "step")}
        self._give_metrics(values, int(record["epoch"]))

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Hand over the end of a run, wait for what is not delivered yet, and end the sender.

        Waits for `tracking.timeout_s` at most. Returns what summary.json says of it.
        """
        final = {
            f"final_{role}_{name}": value
            for role, metrics in summary["metrics"].items()
            for name, value in metrics.items()
        }
        final |= {name: summary[name] for name in ("rows_seen", "rows_per_s", "wall_s")}
        final["recoveries"] = len(summary["recoveries"])
        self._give_metrics(final, int(summary["steps"]))
        self._give({"kind": "end", "status": _STATUS[summary["status"]]})
        for path, folder in self._files():
            self._give({"kind": "file", "path": str(path), "folder": folder})
        self._end(self._run.job.tracking.timeout_s)
        told = {
            "mlflow_run": self._mlflow_run,
            "experiment": self._experiment,
            "delivered": self._sent,
            "undelivered": self._given - self._sent,
        }
        return {**told, "reason": self._reason} if self._reason else told

    @property
    def _experiment(self) -> str:
        return self._run.job.tracking.experiment or self._run.job.name

    def _files(self) -> list[tuple[Path, str | None]]:
        folder = self._run.folder
        artifact = folder / "artifact"
        files: list[tuple[Path, str | None]] = [(folder / name, None) for name in _DESCRIPTIONS]
        if self._run.job.tracking.log_model:
            inner = sorted(path for path in artifact.rglob("*") if path.is_file())
            files += [(path, str(path.parent.relative_to(folder))) for path in inner]
        else:
            files += [(artifact / name, "artifact") for name in _OF_ARTIFACT]
        return [(path, place) for path, place in files if path.exists()]

    def _give_metrics(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {
            _NOT_IN_NAMES.sub("_", name): float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        now_ms = int(time.time() * 1000)
        self._give({"kind": "metrics", "values": numbers, "step": step, "time_ms": now_ms})

    def _give(self, item: dict[str, Any]) -> None:
        self._given += 1
        try:
            self._items.put_nowait(item)
        except queue.Full:
            self._failed("more is waiting than is kept")

    def _opening(self) -> dict[str, Any]:
        run = self._run
        ours = {"lockstep_run_id": run.run_id, "lockstep_job": run.job.name}
        tags = {**run.job.tracking.tags, **ours, "mlflow.runName": run.run_id}
        return {
            "uri": run.address,
            "experiment": self._experiment,
            "tags": tags,
            "params": parameters_of(run.job),
            "find": ours if run.is_resumed else None,
            "leave_s": run.job.tracking.timeout_s,
        }

    def _feed(self) -> None:
        """A thread's main: what was handed over goes to the sender, which may be slow to read."""
        process = self._process
        if process is None or process.stdin is None:
            return
        try:
            process.stdin.write(json.dumps(self._opening()) + "\n")
            process.stdin.flush()
            while (item := self._items.get()) is not None:
                process.stdin.write(json.dumps(item) + "\n")
                process.stdin.flush()
            process.stdin.close()
        except (OSError, ValueError):
            self._failed("the sender has ended")

    def _listen(self) -> None:
        """A thread's main: what became of it."""
        process = self._process
        if process is None or process.stdout is None:
            return
        for line in process.stdout:
            if not line.startswith("{"):  # printed while MLflow was imported
                continue
            answer = json.loads(line)
            self._mlflow_run = answer.get("run", self._mlflow_run)
            self._sent += answer.get("sent", 0)
            reason = answer.get("reason") or answer.get("waiting")
            if reason:
                self._failed(reason)

    def _failed(self, reason: str) -> None:
        self._reason = reason
        if not self._has_warned:
            self._has_warned = True
            self._warn(
                f"MLflow does not take what it is sent ({reason}). The run goes on; what is not "
                "delivered is counted in summary.json."
            )

    def _end(self, timeout_s: float) -> None:
        process = self._process
        if process is None:
            return
        end = time.monotonic() + timeout_s
        try:
            self._items.put(None, timeout=timeout_s)
            process.wait(max(0.0, end - time.monotonic()))
        except (queue.Full, subprocess.TimeoutExpired):
            self._reason = self._reason or f"it was not delivered within {timeout_s:g} s"
        process.kill()
        process.wait()
        for thread in self._threads:
            thread.join(_LEAVE_S)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def parameters_of(job: Job) -> dict[str, str]:
    """A job as MLflow's parameters: a value for each field, by its dotted name; long ones are cut.

    Fields at their defaults are among them, empty ones are not; `tracking` is not. Of more than are
    sent, the last entries of lists (layers, features) are left out.
    """
    flat: dict[str, str] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                visit(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            for number, inner in enumerate(value):
                visit(inner, f"{name}.{number}")
        elif value not in (None, {}, []):
            flat[_NOT_IN_NAMES.sub("_", name)[:_KEY_CHARACTERS]] = _shown(value)

    visit(job.model_dump(mode="json", exclude={"tracking"}), "")
    first = sorted(flat, key=lambda name: any(part.isdigit() for part in name.split(".")))
    return {name: flat[name] for name in first[:_PARAMS]}


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _VALUE_CHARACTERS else f"{text[: _VALUE_CHARACTERS - 1]}…"
