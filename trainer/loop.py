"""The loop: epochs and calls of the compiled step, with everything ranks do in common.

All ranks take the same path through this file: how many steps a call has, when to stop and when to
snapshot follow from the plan and from values that were summed over all ranks.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from configs.schema import Job
from data_pipeline.dataset import chunk_dataset
from data_pipeline.features import InputLayout
from data_pipeline.plan import Share
from data_pipeline.reader import ChunkRows, TrainingChunks
from trainer import keras_adapter
from trainer.callbacks import CallbackRunner
from trainer.curves import CurveWriter
from trainer.evaluate import Abandoned, metric_results, reset_metrics
from trainer.payloads import IN_MEMORY, Snapshot
from trainer.snapshots import Link, SnapshotSender
from trainer.state import (
    capture_ranks,
    hold,
    restore,
    restore_ranks,
    seed_dropout,
)
from trainer.step import CallResult, TrainingStep, Vote
from trainer.strategy import Group

_CALL_TARGET_S = 0.33
_FIRST_CALL_STEPS = 8
_GROWTH = 4

TIME_BUDGET = "train.max_time_s"
CALLBACK = "a callback"


@dataclass
class Progress:
    """Where the run is; rows and times are of this process unless a name says otherwise.

    `elapsed_s` are the seconds of training before this process, `ended_by` says what ended it
    before its last epoch: a field of the job, or a callback. `times_s` are those since the last
    report.
    """

    step: int = 0
    elapsed_s: float = 0.0
    ended_by: str | None = None
    epoch_rows: int = 0
    rows_seen_all: int = 0
    times_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class LoopParts:
    """What the loop works with.

    Attributes:
        job: The job.
        layout: How rows lie in memory.
        group: Who takes part.
        model: Built and compiled in the group's scope.
        step: Its compiled training step.
        share: This worker's rows.
        chunks: Their chunks.
        callbacks: The job's callbacks.
        curves: Receives each epoch's values, on rank 0.
        validate: Metrics on the validation rows, with `hooks` and `may_go_on` as
            `trainer.evaluate.Evaluator` takes them; None without such rows; a collective.
        link: The connection to the coordinator.
    """

    job: Job
    layout: InputLayout
    group: Group
    model: keras.Model
    step: TrainingStep
    share: Share
    chunks: TrainingChunks
    callbacks: CallbackRunner
    curves: CurveWriter
    validate: Callable[..., dict[str, float]] | None
    link: Link


class TrainingLoop:
    """Trains from wherever the restored state stands to the last epoch or an agreed stop."""

    def __init__(self, parts: LoopParts) -> None:
        self._parts = parts
        self._progress = Progress()
        self._call_steps = parts.job.train.steps_per_execution or _FIRST_CALL_STEPS
        self._last_call = (0, 0.0)
        self._restored: Snapshot | None = None
        self._left_logs: dict[str, float] | None = None  # of an epoch left while it was validated
        self._begin_s = self._snapshot_s = time.monotonic()
        self._sender = SnapshotSender(parts.link)
        self._has_called = False
        self.is_stopped = False

    @property
    def progress(self) -> Progress:
        """Where the run is."""
        return self._progress

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; call before `run`."""
        restore(self._parts.model, snapshot.arrays)
        meta = snapshot.meta
        self._progress = Progress(
            step=snapshot.step,
            elapsed_s=float(meta.get("elapsed_s", 0.0)),
            rows_seen_all=int(meta["rows_seen"]),
            history=list(meta["history"]),
        )
        self._restored = snapshot
        self._left_logs = meta.get("left_logs")

    def run(self) -> None:
        """Train; a collective. Afterwards `is_stopped` tells whether a stop was requested.

        All snapshots are sent when it returns.
        """
        self._run()
        self._sender.flush()

    def report_times(self) -> None:
        """Tell how the time since the last report was spent."""
        if self._parts.group.rank == 0:
            self._parts.link.send("times", dict(self._progress.times_s))
            self._progress.times_s.clear()

    def _run(self) -> None:
        parts, progress = self._parts, self._progress
        plan, epochs = parts.share.plan, parts.job.train.epochs
        state = self._restored.meta["callbacks"] if self._restored else {}
        arrays = self._restored.arrays if self._restored else {}
        parts.link.mark("callbacks", progress.step)
        parts.callbacks.on_train_begin(state, arrays)
        if self._restored and self._restored.meta.get("stopped_by_callback"):
            progress.ended_by = CALLBACK
        if self._is_spent(progress.elapsed_s):  # of the snapshot: the same on all ranks
            progress.ended_by = TIME_BUDGET
        if parts.group.rank == 0:
            self._sender.make_room(hold(parts.model))
        chunks = ChunkCursor(parts.chunks, parts.layout, progress.step)
        first_epoch = progress.step // plan.steps_per_epoch - (self._left_logs is not None)
        for epoch in range(first_epoch, epochs):
            if parts.callbacks.should_stop:
                progress.ended_by = CALLBACK
            if progress.ended_by is not None:
                break
            self._train_epoch(epoch, chunks)
            if self.is_stopped:
                return
        if parts.callbacks.should_stop and progress.ended_by is None:
            progress.ended_by = CALLBACK
        finish_training(parts.model, parts.group)
        parts.callbacks.on_train_end(progress.history[-1] if progress.history else {})

    def _train_epoch(self, epoch: int, chunks: "ChunkCursor") -> None:
        progress, plan = self._progress, self._parts.share.plan
        begin_s, first = time.monotonic(), progress.step
        is_cut = self._left_logs is None and self._take_steps(epoch, chunks)
        if self.is_stopped and is_cut:
            return
        first_of_epoch = epoch * plan.steps_per_epoch
        rows = plan.rows_before_step(progress.step - first_of_epoch)
        rows -= plan.rows_before_step(first - first_of_epoch)
        is_whole = progress.step == first_of_epoch + plan.steps_per_epoch
        try:
            self._end_epoch(epoch, rows, begin_s, may_leave=is_whole)
        except Abandoned:
            self.is_stopped = True
            self._snapshot("stop")
            return
        if not is_cut:
            self._snapshot("epoch")

    def _take_steps(self, epoch: int, chunks: "ChunkCursor") -> bool:
        """All steps of an epoch that are left; returns whether it was cut short from outside."""
        parts, progress = self._parts, self._progress
        plan, seed = parts.share.plan, parts.job.train.seed
        reset_metrics(parts.model, parts.group)
        is_inside = progress.step % plan.steps_per_epoch != 0
        if is_inside and self._restored is not None:
            arrays = self._restored.arrays
            restore_ranks(parts.model, parts.group, arrays, seed, progress.step)
        else:
            seed_dropout(parts.model, seed, progress.step, parts.group.first_replica)
            parts.callbacks.on_epoch_begin(epoch)
        progress.epoch_rows = 0
        last = (epoch + 1) * plan.steps_per_epoch
        while progress.step < last:
            self._train_call(epoch, last, chunks)
            if self.is_stopped or progress.ended_by or parts.callbacks.should_stop:
                break
        self._count_rows()
        is_cut = progress.step < last and not parts.callbacks.should_stop
        if is_cut:
            # Inside an epoch: what goes on from here goes on with its metrics.
            self._snapshot("stop" if self.is_stopped else "time")
        return is_cut

    def _train_call(self, epoch: int, last: int, chunks: "ChunkCursor") -> None:
        parts, progress = self._parts, self._progress
        first_of_epoch = epoch * parts.share.plan.steps_per_epoch
        parts.link.mark("data", progress.step)
        with self._timed("data_wait"):
            chunk, index, left = chunks.at(progress.step)
        steps = min(self._call_steps, left, last - progress.step, self._to_checkpoint())
        step_of_epoch = progress.step - first_of_epoch
        with self._timed("callbacks"):
            parts.callbacks.on_train_batch_begin(step_of_epoch)
        if not self._has_called:
            parts.link.mark("trace", progress.step)
        parts.link.mark("step", progress.step + steps)
        begin = time.monotonic()
        result = parts.step.run(
            chunk,
            index,
            steps,
            parts.share.may_be_empty(step_of_epoch, step_of_epoch + steps),
            Vote(
                self._is_asked,
                self._is_spent(self._elapsed_s()),
                self._last_call[1],
                self._is_snapshot_due(),
            ),
        )
        self._choose_call_steps(result.seconds, self._last_call[0])
        self._last_call = (steps, time.monotonic() - begin)
        progress.step += steps
        offsets = chunks.offsets
        progress.epoch_rows += int(offsets[index + steps] - offsets[index])
        self.is_stopped = result.stop
        if result.time_is_up:
            progress.ended_by = TIME_BUDGET
        self._report_call(epoch, steps, step_of_epoch, result)
        if parts.callbacks.wants_batches:
            with self._timed("callbacks"):
                logs = metric_results(parts.model, parts.group)
                parts.callbacks.on_train_batch_end(step_of_epoch + steps - 1, logs)
        is_inside = progress.step < last and not self._is_ending
        if is_inside and (self._is_checkpoint_step() or result.snapshot):
            self._count_rows()
            self._snapshot("step" if self._is_checkpoint_step() else IN_MEMORY)

    def _end_epoch(self, epoch: int, rows: int, begin_s: float, may_leave: bool) -> None:
        """Validate, tell and record; where ranks are asked to go in validation, they leave it.

        Raises:
            Abandoned: They left. What was measured in training is in `_left_logs`.
        """
        parts, progress = self._parts, self._progress
        parts.link.mark("epoch_end", progress.step)
        logs = self._left_logs
        if logs is None:
            logs = metric_results(parts.model, parts.group)
        if parts.validate is not None and (epoch + 1) % parts.job.train.validation_freq == 0:
            parts.link.mark("evaluation", progress.step)
            self._left_logs = logs
            may_go_on = (lambda: not self._is_asked) if may_leave else None
            with self._timed("evaluation"):
                validation = parts.validate(hooks=parts.callbacks, may_go_on=may_go_on)
            self._left_logs = None
            logs = logs | {f"val_{name}": value for name, value in validation.items()}
        parts.link.mark("callbacks", progress.step)
        with self._timed("callbacks"):
            parts.callbacks.on_epoch_end(epoch, logs)
        progress.history.append(logs)
        if parts.group.rank == 0:
            epoch_s = time.monotonic() - begin_s
            body = {
                "epoch": epoch,
                "step": progress.step,
                **logs,
                "learning_rate": learning_rate(parts.model),
                "epoch_s": epoch_s,
                "rows_per_s": rows / epoch_s,
            }
            parts.link.send("epoch", body)
            parts.curves.write(epoch, logs, body["learning_rate"])
        reset_metrics(parts.model, parts.group)

    @property
    def _is_asked(self) -> bool:
        """Whether this rank knows that all are to leave."""
        return self._parts.link.has_command("stop") or self._parts.link.has_command("pause")

    @property
    def _is_ending(self) -> bool:
        return self.is_stopped or self._progress.ended_by is not None

    def _elapsed_s(self) -> float:
        return self._progress.elapsed_s + time.monotonic() - self._begin_s

    def _is_spent(self, elapsed_s: float) -> bool:
        """Whether training has taken as long as the job allows."""
        budget_s = self._parts.job.train.max_time_s
        return budget_s is not None and elapsed_s >= budget_s

    def _snapshot(self, reason: str) -> None:
        """Copy the state and hand it to the coordinator; a collective."""
        with self._timed("checkpoint"):
            self._take_snapshot(reason)
        self._snapshot_s = time.monotonic()

    def _take_snapshot(self, reason: str) -> None:
        parts, progress = self._parts, self._progress
        if parts.group.rank != 0 and reason != IN_MEMORY:
            parts.link.mark("checkpoint", progress.step)  # rank 0's sender says it meanwhile
        ranks = capture_ranks(parts.model, parts.group)
        if parts.group.rank != 0:
            return
        callbacks, callback_arrays = parts.callbacks.state()
        for warning in parts.callbacks.take_warnings():
            parts.link.send("warning", warning)
        meta = {
            "reason": reason,
            "rows_seen": progress.rows_seen_all,
            "elapsed_s": self._elapsed_s(),
            "history": list(progress.history),
            "callbacks": callbacks,
            "stopped_by_callback": parts.callbacks.should_stop,
            "left_logs": self._left_logs,
        }
        arrays = hold(parts.model) | ranks | callback_arrays
        self._sender.submit(Snapshot(progress.step, arrays, meta))

    def _is_snapshot_due(self) -> bool:
        """Whether rank 0 wants a snapshot after the next call."""
        every_s = self._parts.job.checkpoint.snapshot_every_s
        is_time = time.monotonic() - self._snapshot_s >= every_s > 0
        return is_time and self._sender.is_idle

    def _count_rows(self) -> None:
        """Add the rows of all ranks since the last count; a collective."""
        own = np.array([self._progress.epoch_rows], np.int64)
        self._progress.rows_seen_all += int(self._parts.group.sum(own)[0])
        self._progress.epoch_rows = 0

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self._progress.times_s[name] += time.monotonic() - begin

    def _report_call(self, epoch: int, steps: int, step_of_epoch: int, result: CallResult) -> None:
        is_first, self._has_called = not self._has_called, True
        if self._parts.group.rank != 0:
            return
        plan = self._parts.share.plan
        rows = plan.rows_before_step(step_of_epoch + steps) - plan.rows_before_step(step_of_epoch)
        body = {
            "epoch": epoch,
            "step": self._progress.step,
            "loss": result.loss_sum / rows,
            "rows": rows,
            "steps": steps,
            "seconds": self._last_call[1],
            "is_first": is_first,
            "times_s": dict(self._progress.times_s),
        }
        self._progress.times_s.clear()
        self._parts.link.send("progress", body)

    def _choose_call_steps(self, seconds: float, steps: int) -> None:
        """Aim at calls of a third of a second, from the last call's time, which all ranks know."""
        if self._parts.job.train.steps_per_execution or seconds <= 0 or steps == 0:
            return
        wanted = steps * _CALL_TARGET_S / seconds
        self._call_steps = int(max(1, min(wanted, self._call_steps * _GROWTH)))

    def _to_checkpoint(self) -> int:
        every = self._parts.job.checkpoint.every_steps
        return every - self._progress.step % every if every else self._call_steps

    def _is_checkpoint_step(self) -> bool:
        every = self._parts.job.checkpoint.every_steps
        return bool(every) and self._progress.step % every == 0


class ChunkCursor:
    """The chunk that holds the present step, read ahead by tf.data."""

    def __init__(self, chunks: TrainingChunks, layout: InputLayout, step: int) -> None:
        self._chunks = chunks
        first, _ = chunks.chunk_of(step)
        self._number = first - 1
        self._iterator: Iterator[Any] = iter(chunk_dataset(chunks, layout, first))
        self._chunk: ChunkRows | None = None
        self.offsets: Any = None

    def at(self, step: int) -> tuple[ChunkRows, int, int]:
        """The chunk of a step, the step's index in it, and the steps left in it from there."""
        number, index = self._chunks.chunk_of(step)
        while self._chunk is None or self._number < number:
            self._chunk = ChunkRows(*next(self._iterator))
            self._number += 1
            self.offsets = self._chunk.offsets.numpy()
        return self._chunk, index, len(self.offsets) - 1 - index


def finish_training(model: keras.Model, group: Group) -> None:
    """What `fit` does after its last epoch; not a collective."""
    for device in range(group.devices):
        with group.copies(keras_adapter.all_variables(model), device):
            keras_adapter.finish_training(model)


def learning_rate(model: keras.Model) -> float:
    """The present learning rate."""
    return float(np.asarray(keras_adapter.present_learning_rate(model.optimizer)))
