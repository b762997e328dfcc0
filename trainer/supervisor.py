"""The coordinator's side of training: stages, checkpoints, records. No TensorFlow.

A delegate of `cluster.coordinator`: it receives what workers report, commits checkpoints and the
artifact (the only writer of both), and keeps the run folder.
"""

import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.channel import Message
from cluster.coordinator import Stage
from cluster.errors import GangFailure
from configs.load import job_digest
from trainer.checkpoint import (
    checkpoint_name,
    newest_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from trainer.payloads import ExportPayload, TrainingPayload, TrainingSettings
from trainer.report import write_report

_PROGRESS_EVERY_S = 0.2
_FINAL = "final"


class TrainingSupervisor:
    """Stages "train" and "export" of one run; see `cluster.coordinator.Delegate`."""

    def __init__(self, settings: TrainingSettings, emit: Callable[[dict[str, Any]], None]) -> None:
        self._settings = settings
        self._emit = emit
        self._folder = Path(settings.run_folder)
        self._checkpoints = self._folder / "checkpoints"
        self._begin = time.monotonic()
        self._stages = [
            Stage("train", settings.job.cluster.workers, "trainer.worker:main"),
            Stage("export", 1, "trainer.export:main"),
        ]
        self._finished: dict[int, dict[str, Any]] = {}
        self._metrics: dict[str, dict[str, float]] = {}
        self._recoveries: list[dict[str, Any]] = []
        self._times_s: defaultdict[str, float] = defaultdict(float)
        self._trained_rows = 0
        self._trained_s = 0.0
        self._last_progress_s = 0.0
        self._last_step = 0
        self._resumed_step = 0

    def next_stage(self) -> Stage | None:
        """Train, then export."""
        return self._stages.pop(0) if self._stages else None

    def payload(self, stage: Stage, generation: int) -> TrainingPayload | ExportPayload:
        """What the workers of a new generation are given."""
        settings = self._settings
        if stage.name == "train":
            newest = self._newest_checkpoint(generation)
            return TrainingPayload(settings.job, settings.data, settings.run_folder, newest)
        return ExportPayload(
            settings.job,
            settings.data.layout,
            settings.data.statistics,
            str(self._checkpoints / f"{_FINAL}.h5"),
            str(self._folder / f".artifact-{generation}"),
            self._lineage(),
        )

    def on_message(self, message: Message) -> None:
        """Record, commit, pass on."""
        handler = getattr(self, f"_on_{message.kind}", None)
        if handler is not None:
            handler(message)

    def on_event(self, event: dict[str, Any]) -> None:
        """One line in events.jsonl, and the same to the driver."""
        record = {"time": time.time(), "run_id": self._settings.run_id, **event}
        append_json(self._folder / "events.jsonl", record)
        self._emit(record)

    def on_recovered(self, failure: GangFailure, detected_s: float, recovered_s: float) -> None:
        """Keep for the summary."""
        recovery = {
            "kind": failure.kind,
            "rank": failure.rank,
            "detected_s": detected_s,
            "recovered_s": recovered_s,
            "steps_replayed": max(0, self._last_step - self._resumed_step),
        }
        self._recoveries.append(recovery)
        self.on_event({"event": "recovered", **recovery})

    def result(self, stopped: str | None) -> dict[str, Any]:
        """Write summary.json and report.html; returns the summary."""
        summary = self._summary("interrupted" if stopped else "done")
        if stopped:
            summary["stopped_by"] = stopped
        return self._conclude(summary)

    def failed(self, error: Exception) -> None:
        """Write summary.json and report.html of a run that failed."""
        summary = self._summary("failed")
        summary |= {"error": str(error), "traceback": getattr(error, "traceback", "")}
        self._conclude(summary)

    def _conclude(self, summary: dict[str, Any]) -> dict[str, Any]:
        write_json(self._folder / "summary.json", summary)
        write_report(self._folder)
        self.on_event({"event": summary["status"]})
        return summary

    def _on_ready(self, message: Message) -> None:
        if message.rank == 0 and message.body is not None:
            self._resumed_step = int(message.body["step"])

    def _on_progress(self, message: Message) -> None:
        body = message.body
        self._last_step = int(body["step"])
        self._trained_rows += int(body["rows"])
        self._trained_s += float(body["seconds"])
        now = time.monotonic()
        if now - self._last_progress_s >= _PROGRESS_EVERY_S:
            self._last_progress_s = now
            self._emit({"event": "progress", **body})

    def _on_epoch(self, message: Message) -> None:
        body = dict(message.body)
        append_json(self._folder / "metrics.jsonl", body)
        names = [name for name in body if name not in _NOT_METRICS]
        self._metrics["train"] = {n: body[n] for n in names if not n.startswith("val_")}
        validation = {n.removeprefix("val_"): body[n] for n in names if n.startswith("val_")}
        if validation:
            self._metrics["validation"] = validation
        self._emit({"event": "epoch", **body})

    def _on_snapshot(self, message: Message) -> None:
        snapshot = message.body
        meta = {
            **snapshot.meta,
            "step": snapshot.step,
            "job": job_digest(self._settings.job),
            "generation": message.generation,
        }
        write_checkpoint(self._checkpoints, checkpoint_name(snapshot.step), snapshot.arrays, meta)
        prune_checkpoints(self._checkpoints, self._settings.job.checkpoint.keep)
        self.on_event(
            {"event": "checkpoint", "generation": message.generation, "step": snapshot.step}
        )

    def _on_final(self, message: Message) -> None:
        meta = {"job": job_digest(self._settings.job), "generation": message.generation}
        write_checkpoint(self._checkpoints, _FINAL, message.body, meta)

    def _on_test(self, message: Message) -> None:
        self._metrics |= {name: values for name, values in message.body.items() if values}

    def _on_finished(self, message: Message) -> None:
        if message.body is None:
            return
        self._finished[message.rank] = message.body
        if message.rank == 0:
            for name, seconds in message.body["times_s"].items():
                self._times_s[name] += seconds

    def _on_artifact(self, message: Message) -> None:
        """Commit: the finished folder takes its name, an earlier one goes."""
        target = self._folder / "artifact"
        old = self._folder / ".artifact-old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(self._folder / f".artifact-{message.generation}", target)
        shutil.rmtree(old, ignore_errors=True)
        self.on_event({"event": "artifact", "path": str(target), **message.body})

    def _newest_checkpoint(self, generation: int) -> str | None:
        if generation == 1 and not self._settings.is_resumed:
            return None
        newest, skipped = newest_checkpoint(self._checkpoints)
        for reason in skipped:
            self.on_event({"event": "checkpoint_skipped", "reason": reason})
        return None if newest is None else str(newest)

    def _lineage(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "run_id": settings.run_id,
            "job": settings.job.name,
            "job_digest": job_digest(settings.job),
            "metrics": self._metrics,
            "weights_sha256": self._finished[0]["weights_sha256"],
            "data": {
                role: [
                    {"path": file.path, "size_bytes": file.size_bytes, "rows": file.rows}
                    for file in source.files
                ]
                for role, source in settings.data.sources.items()
            },
        }

    def _summary(self, status: str) -> dict[str, Any]:
        settings = self._settings
        wall_s = time.monotonic() - self._begin
        artifact = self._folder / "artifact"
        first = self._finished.get(0, {})
        return {
            "status": status,
            "job": settings.job.name,
            "run_id": settings.run_id,
            "run_folder": settings.run_folder,
            "workers": settings.job.cluster.workers,
            "epochs": settings.job.train.epochs,
            "steps": first.get("step", self._last_step),
            "rows_seen": first.get("rows_seen", 0),
            "ended_by": first.get("ended_by"),
            "rows_per_s": self._trained_rows / self._trained_s if self._trained_s else 0.0,
            "wall_s": wall_s,
            "metrics": self._metrics,
            "weights_sha256": [self._finished[r]["weights_sha256"] for r in sorted(self._finished)],
            "recoveries": self._recoveries,
            "goodput": self._goodput(wall_s),
            "artifact": str(artifact) if artifact.exists() and status == "done" else None,
        }

    def _goodput(self, wall_s: float) -> dict[str, dict[str, float]]:
        """Seconds and share of the wall time; "other" is start-up, export and the rest."""
        seconds = {
            name: self._times_s[name]
            for name in ("productive", "data_wait", "evaluation", "checkpoint")
        }
        seconds["detect"] = sum(r["detected_s"] for r in self._recoveries)
        seconds["restart"] = sum(r["recovered_s"] for r in self._recoveries)
        seconds["other"] = max(0.0, wall_s - sum(seconds.values()))
        return {
            name: {"seconds": value, "share": value / wall_s} for name, value in seconds.items()
        }


_NOT_METRICS = {"epoch", "step", "learning_rate", "epoch_s", "rows_per_s"}


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a .jsonl file."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
