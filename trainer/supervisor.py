"""The coordinator's side of training: stages, checkpoints, records. No TensorFlow.

A delegate of `cluster.coordinator`: it receives what workers report, commits checkpoints and the
artifact (the only writer of both), and keeps the run folder. Nothing of a generation that has been
given up reaches it.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.channel import Message
from cluster.coordinator import Stage
from cluster.errors import GangFailure
from configs.load import job_digest
from trainer.checkpoint_store import CheckpointStore, Origin
from trainer.files import append_json, write_json, write_text
from trainer.goodput import Goodput
from trainer.keeper import CheckpointKeeper
from trainer.payloads import ExportPayload, TrainingPayload, TrainingSettings
from trainer.possession import Possession
from trainer.report import write_report
from trainer.tracking import TrackedRun, Tracker

_PROGRESS_EVERY_S = 0.2
_FLUSH_S = 60.0


class TrainingSupervisor:
    """Stages "train" and "export" of one run; see `cluster.coordinator.Delegate`."""

    def __init__(self, settings: TrainingSettings, emit: Callable[[dict[str, Any]], None]) -> None:
        self._settings = settings
        self._emit = emit
        self._folder = Path(settings.run_folder)
        self._possession = Possession(self._folder)
        origin = Origin(settings.run_id, job_digest(settings.job))
        store = CheckpointStore(settings.checkpoints, origin)
        self._keeper = CheckpointKeeper(store, settings.job.checkpoint, self.on_event)
        self._tracker: Tracker | None = None
        self._recording = threading.Lock()
        self._begin = time.monotonic()
        self._goodput = Goodput(self._begin)
        self._stages = [
            Stage("train", settings.job.cluster.workers, "trainer.worker:main", is_elastic=True),
            Stage("export", 1, "trainer.export:main"),
        ]
        self._finished: dict[int, dict[str, Any]] = {}
        self._metrics: dict[str, dict[str, float]] = {}
        self._recoveries: list[dict[str, Any]] = []
        self._open_recoveries: list[tuple[float, dict[str, Any]]] = []
        self._speed = _Speed()
        self._last_progress_s = 0.0
        self._furthest_step = 0
        self._resumed_step = 0
        self._has_warned = False
        self._workers = settings.job.cluster.workers

    def begin(self) -> int:
        """Own the run folder, and find what to go on from; returns the newest generation."""
        generation = self._possession.acquire()
        lost_at = self._settings.lost_at
        if lost_at is not None:
            lost = {"kind": "coordinator_lost", "rank": -1, "detected_s": 0.0}
            self._open_recoveries.append((time.monotonic() - (time.time() - lost_at), lost))
        if self._settings.is_resumed:
            # A run folder that was lost has no count; then what is on storage has.
            for reason in self._keeper.recover(generation or None):
                self.on_event({"event": "checkpoint_skipped", "reason": reason})
            generation = max(generation, self._keeper.last_generation())
        self._begin_tracking()
        return generation

    def _begin_tracking(self) -> None:
        settings = self._settings
        if settings.tracking_address is None:
            return
        run = TrackedRun(
            settings.job,
            settings.run_id,
            self._folder,
            settings.tracking_address,
            settings.is_resumed,
        )
        self._tracker = Tracker(run, lambda text: self.on_event(_warning(text)))
        self._tracker.begin(self._epochs() if settings.is_resumed else ())

    def _epochs(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds."""
        path = self._folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def next_stage(self) -> Stage | None:
        """Train, then export."""
        return self._stages.pop(0) if self._stages else None

    def payload(
        self, stage: Stage, generation: int, workers: int
    ) -> TrainingPayload | ExportPayload:
        """What the workers of a new generation are given."""
        settings = self._settings
        self._possession.record(generation)
        if stage.name == "train":
            self._workers = workers
            self._finished = {}
            latest = self._keeper.latest
            self._forget_epochs_after(0 if latest is None else len(latest.meta["history"]))
            return TrainingPayload(
                settings.job, settings.data, settings.run_folder, latest is not None
            )
        self._goodput.began("export", time.monotonic())
        return ExportPayload(
            settings.job,
            settings.data.layout,
            settings.data.statistics,
            str(self._folder / f".artifact-{generation}"),
            self._lineage(),
        )

    def attachment(self, stage: Stage) -> tuple[str, Any] | None:
        """The snapshot to go on from, or the weights to export."""
        if stage.name == "export":
            return "weights", self._keeper.weights
        latest = self._keeper.latest
        return None if latest is None else ("snapshot", latest)

    def position(self) -> int:
        """Steps completed, as far as the run ever was."""
        return self._furthest_step

    def on_message(self, message: Message) -> None:
        """Record, commit, pass on."""
        handler = getattr(self, f"_on_{message.kind}", None)
        if handler is not None:
            handler(message)

    def on_event(self, event: dict[str, Any]) -> None:
        """One line in events.jsonl, and the same to the driver; from any thread."""
        record = {"time": time.time(), "run_id": self._settings.run_id, **event}
        with self._recording:
            append_json(self._folder / "events.jsonl", record)
        self._emit(record)

    def on_failure(self, failure: GangFailure, silent_s: float) -> None:
        """Begin the account of a recovery; it ends with the next step, whoever else dies before."""
        now = time.monotonic()
        self._goodput.failed(now, silent_s)
        recovery = {"kind": failure.kind, "rank": failure.rank, "detected_s": silent_s}
        self._open_recoveries.append((now, recovery))

    def on_stacks(self, generation: int, stacks: dict[int, str]) -> None:
        """One file a rank."""
        folder = self._folder / "stacks"
        folder.mkdir(exist_ok=True)
        for rank, text in stacks.items():
            write_text(folder / f"generation-{generation}-rank-{rank}.txt", text)
        self.on_event({"event": "stacks", "generation": generation, "path": str(folder)})

    def result(self, stopped: str | None) -> dict[str, Any]:
        """Write summary.json and report.html; returns the summary."""
        if stopped:
            self._keeper.flush(_FLUSH_S)
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
        self._keeper.close()
        write_json(self._folder / "summary.json", summary)
        write_report(self._folder)
        if self._tracker is not None:  # these two files are sent too
            summary["tracking"] = self._tracker.finish(summary)
            write_json(self._folder / "summary.json", summary)
        self.on_event({"event": summary["status"]})
        self._possession.release()
        return summary

    def _on_ready(self, message: Message) -> None:
        if message.rank == 0:
            step = self._furthest_step if message.body is None else int(message.body["step"])
            self._resumed_step = step

    def _on_progress(self, message: Message) -> None:
        body = message.body
        now = time.monotonic()
        steps, step, seconds = body["steps"], int(body["step"]), float(body["seconds"])
        replayed = min(steps, max(0, self._furthest_step - (step - steps))) / steps
        parts = dict(body["times_s"])
        if body["is_first"]:  # most of it is the trace: a part of start or restart
            self._goodput.passed(now, parts)
            parts = {}
        else:
            parts |= {"productive": seconds * (1 - replayed), "replay": seconds * replayed}
        self._goodput.worked(now, parts)
        self._speed.add(int(body["rows"]), seconds, body["is_first"])
        self._close_recoveries(now)
        self._furthest_step = max(self._furthest_step, step)
        if now - self._last_progress_s >= _PROGRESS_EVERY_S:
            self._last_progress_s = now
            shown = ("epoch", "step", "loss", "rows", "seconds")
            self._emit({"event": "progress", **{name: body[name] for name in shown}})

    def _on_times(self, message: Message) -> None:
        self._goodput.worked(time.monotonic(), message.body)

    def _close_recoveries(self, now: float) -> None:
        """Work goes on: the steps between where it was and where it resumed are done again."""
        recoveries, self._open_recoveries = self._open_recoveries, []
        for number, (failed_at, recovery) in enumerate(recoveries, 1):
            replayed = self._furthest_step - self._resumed_step if number == len(recoveries) else 0
            recovery["recovered_s"] = now - failed_at
            recovery["steps_replayed"] = max(0, replayed)
            self._recoveries.append(recovery)
            self.on_event({"event": "recovered", **recovery})

    def _on_epoch(self, message: Message) -> None:
        body = dict(message.body)
        append_json(self._folder / "metrics.jsonl", body)
        names = [name for name in body if name not in _NOT_METRICS]
        self._metrics["train"] = {n: body[n] for n in names if not n.startswith("val_")}
        validation = {n.removeprefix("val_"): body[n] for n in names if n.startswith("val_")}
        if validation:
            self._metrics["validation"] = validation
        self._emit({"event": "epoch", **body})
        if self._tracker is not None:
            self._tracker.epoch(body)
        best_by = self._settings.job.checkpoint.best_by
        if best_by is not None and best_by not in body and not self._has_warned:
            self._has_warned = True
            self.on_event(
                _warning(
                    f"checkpoint.best_by received {best_by!r}, which no epoch gives; "
                    f"{', '.join(names)} are there. The newest checkpoints are kept, no best one."
                )
            )

    def _forget_epochs_after(self, epochs: int) -> None:
        """Take back the lines of epochs that will be trained to their end once more."""
        path = self._folder / "metrics.jsonl"
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["epoch"] < epochs]
        if len(kept) < len(lines):
            write_text(path, "".join(kept))

    def _on_snapshot(self, message: Message) -> None:
        self._keeper.take(message.body, message.generation)

    def _on_final(self, message: Message) -> None:
        self._keeper.take_weights(message.body, message.generation)

    def _on_test(self, message: Message) -> None:
        self._metrics |= {name: values for name, values in message.body.items() if values}

    def _on_finished(self, message: Message) -> None:
        if message.body is not None:
            self._finished[message.rank] = message.body
        self._close_recoveries(time.monotonic())

    def _on_paused(self, message: Message) -> None:
        self._on_finished(message)
        self._goodput.began("restart", time.monotonic())

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
            "workers": self._workers,
            "epochs": settings.job.train.epochs,
            "steps": first.get("step", self._furthest_step),
            "rows_seen": first.get("rows_seen", 0),
            "ended_by": first.get("ended_by"),
            "rows_per_s": self._speed.rows_per_s,
            "wall_s": wall_s,
            "metrics": self._metrics,
            "weights_sha256": [self._finished[r]["weights_sha256"] for r in sorted(self._finished)],
            "recoveries": self._recoveries,
            "goodput": self._goodput.summary(self._begin + wall_s),
            "tracking": None,
            "artifact": str(artifact) if artifact.exists() and status == "done" else None,
        }


def _warning(text: str) -> dict[str, Any]:
    return {"event": "warning", "warning": text}


class _Speed:
    """Rows a second over all calls of the compiled loop; first ones, which trace, if no others."""

    def __init__(self) -> None:
        self._sums = {True: (0, 0.0), False: (0, 0.0)}

    def add(self, rows: int, seconds: float, is_first: bool) -> None:
        all_rows, all_s = self._sums[is_first]
        self._sums[is_first] = (all_rows + rows, all_s + seconds)

    @property
    def rows_per_s(self) -> float:
        rows, seconds = self._sums[False] if self._sums[False][0] else self._sums[True]
        return rows / seconds if seconds else 0.0


_NOT_METRICS = {"epoch", "step", "learning_rate", "epoch_s", "rows_per_s"}
