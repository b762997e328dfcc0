"""The coordinator's side of training: stages, checkpoints, records. No TensorFlow.

A delegate of `cluster.coordinator`: it receives what workers report, commits checkpoints and the
artifact (the only writer of both), and keeps the run folder. Nothing of a generation that has been
given up reaches it.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.channel import Message
from cluster.coordinator import Stage
from cluster.errors import GangFailure
from configs.load import job_digest
from trainer.account import Account
from trainer.checkpoint_store import CheckpointStore, Origin
from trainer.errors import CheckpointError, RecordsError
from trainer.files import RecordLog, write_json, write_text
from trainer.keeper import CheckpointKeeper
from trainer.payloads import ExportPayload, TrainingPayload, TrainingSettings
from trainer.possession import Possession
from trainer.report import write_report
from trainer.tracking import TrackedRun, Tracker

_PROGRESS_EVERY_S = 0.2
_FLUSH_S = 60.0
_FLUSH_FAILED_S = 20.0


class TrainingSupervisor:
    """Stages "train" and "export" of one run; see `cluster.coordinator.Delegate`."""

    def __init__(self, settings: TrainingSettings, emit: Callable[[dict[str, Any]], None]) -> None:
        self._settings = settings
        self._emit = emit
        self._folder = Path(settings.run_folder)
        self._events = RecordLog(self._folder / "events.jsonl")
        self._epochs = RecordLog(self._folder / "metrics.jsonl")
        self._possession = Possession(self._folder)
        origin = Origin(settings.run_id, job_digest(settings.job))
        store = CheckpointStore(settings.checkpoints, origin)
        self._keeper = CheckpointKeeper(store, settings.job.checkpoint, self.on_event)
        self._tracker: Tracker | None = None
        self._account = Account(self._folder)
        self._stages = [
            Stage("train", settings.job.cluster.workers, "trainer.worker:main", is_elastic=True),
            Stage("export", 1, "trainer.export:main"),
        ]
        self._finished: dict[int, dict[str, Any]] = {}
        self._metrics: dict[str, dict[str, float]] = {}
        self._last_progress_s = 0.0
        self._has_warned = False
        self._workers = settings.job.cluster.workers

    def begin(self) -> int:
        """Own the run folder, and find what to go on from; returns the newest generation."""
        generation = self._possession.acquire()
        if self._settings.is_resumed:
            self._account.go_on(self._settings.lost_at)
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
        self._tracker.begin(self._epochs.records() if settings.is_resumed else ())

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
            # Epochs after it will be trained to their end once more.
            trained = 0 if latest is None else len(latest.meta["history"])
            self._epochs.cut(lambda record: record["epoch"] < trained)
            return TrainingPayload(
                settings.job, settings.data, settings.run_folder, latest is not None
            )
        self._account.began("export")
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
        return self._account.step

    def on_message(self, message: Message) -> None:
        """Record, commit, pass on."""
        handler = getattr(self, f"_on_{message.kind}", None)
        if handler is not None:
            handler(message)

    def on_event(self, event: dict[str, Any]) -> None:
        """One line in events.jsonl, and the same to the driver; from any thread."""
        record = {"time": time.time(), "run_id": self._settings.run_id, **event}
        self._events.append(record)
        self._emit(record)

    def on_failure(self, failure: GangFailure, silent_s: float) -> None:
        """Begin the account of a recovery."""
        self._account.failed(failure.kind, failure.rank, silent_s)

    def on_stacks(self, generation: int, stacks: dict[int, str]) -> None:
        """One file a rank."""
        folder = self._folder / "stacks"
        try:
            folder.mkdir(exist_ok=True)
            for rank, text in stacks.items():
                write_text(folder / f"generation-{generation}-rank-{rank}.txt", text)
        except OSError as error:  # the gang is replaced all the same
            self.on_event(_warning(f"stacks cannot be written into {folder}: {error}"))
            return
        self.on_event({"event": "stacks", "generation": generation, "path": str(folder)})

    def result(self, stopped: str | None) -> dict[str, Any]:
        """Write summary.json and report.html; returns the summary."""
        if stopped:
            self._keeper.take_latest()
            self._keeper.flush(_FLUSH_S)
        summary = self._summary("interrupted" if stopped else "done")
        if stopped:
            summary["stopped_by"] = stopped
        return self._conclude(summary)

    def failed(self, error: Exception) -> None:
        """Keep the newest state, and write summary.json and report.html of a run that failed."""
        self._keeper.take_latest()
        with contextlib.suppress(CheckpointError):  # told already, and `error` is to be raised
            self._keeper.flush(_FLUSH_FAILED_S)
        summary = self._summary("failed")
        summary |= {"error": str(error), "traceback": getattr(error, "traceback", "")}
        with contextlib.suppress(RecordsError):
            self._conclude(summary)

    def _conclude(self, summary: dict[str, Any]) -> dict[str, Any]:
        self._keeper.close()
        try:
            self._write_records(summary)
        except OSError as error:
            summary = {**summary, "status": "failed"}
            raise RecordsError(
                f"the records of the run cannot be written into {self._folder}: {error}. Make room "
                "there; --resume goes on from the newest checkpoint."
            ) from error
        finally:
            self.on_event({"event": summary["status"]})
            self._possession.release()
        return summary

    def _write_records(self, summary: dict[str, Any]) -> None:
        write_json(self._folder / "summary.json", summary)
        write_report(self._folder)
        if self._tracker is not None:  # these two files are sent too
            summary["tracking"] = self._tracker.finish(summary)
            write_json(self._folder / "summary.json", summary)

    def _on_ready(self, message: Message) -> None:
        if message.rank == 0:
            self._account.formed(None if message.body is None else int(message.body["step"]))

    def _on_progress(self, message: Message) -> None:
        body = message.body
        self._tell_recovered(self._account.progressed(body))
        now = time.monotonic()
        if now - self._last_progress_s >= _PROGRESS_EVERY_S:
            self._last_progress_s = now
            shown = ("epoch", "step", "loss", "rows", "seconds")
            self._emit({"event": "progress", **{name: body[name] for name in shown}})

    def _on_times(self, message: Message) -> None:
        self._account.worked(message.body)

    def _tell_recovered(self, recoveries: list[dict[str, Any]]) -> None:
        for recovery in recoveries:
            self.on_event({"event": "recovered", **recovery})

    def _on_epoch(self, message: Message) -> None:
        body = dict(message.body)
        self._epochs.append(body)
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

    def _on_warning(self, message: Message) -> None:
        self.on_event(_warning(message.body))

    def _on_snapshot(self, message: Message) -> None:
        self._keeper.take(message.body, message.generation)

    def _on_final(self, message: Message) -> None:
        self._keeper.take_weights(message.body, message.generation)

    def _on_test(self, message: Message) -> None:
        self._metrics |= {name: values for name, values in message.body.items() if values}

    def _on_finished(self, message: Message) -> None:
        if message.body is not None:
            self._finished[message.rank] = message.body
        self._tell_recovered(self._account.recovered())

    def _on_paused(self, message: Message) -> None:
        self._on_finished(message)
        self._account.began("restart")

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
            "data": settings.files,
        }

    def _summary(self, status: str) -> dict[str, Any]:
        settings = self._settings
        artifact = self._folder / "artifact"
        first = self._finished.get(0, {})
        return {
            "status": status,
            "job": settings.job.name,
            "run_id": settings.run_id,
            "run_folder": settings.run_folder,
            "workers": self._workers,
            "epochs": settings.job.train.epochs,
            "steps": first.get("step", self._account.step),
            "rows_seen": first.get("rows_seen", 0),
            "ended_by": first.get("ended_by"),
            "metrics": self._metrics,
            "weights_sha256": [self._finished[r]["weights_sha256"] for r in sorted(self._finished)],
            **self._account.summary(),
            "tracking": None,
            "artifact": str(artifact) if artifact.exists() and status == "done" else None,
        }


def _warning(text: str) -> dict[str, Any]:
    return {"event": "warning", "warning": text}


_NOT_METRICS = {"epoch", "step", "learning_rate", "epoch_s", "rows_per_s"}
