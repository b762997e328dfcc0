"""The coordinator's side of a run's state: the newest snapshot in memory, checkpoints on storage.

A thread writes, so that neither training nor the watch over it waits for storage. Storage that
fails does not end a run: the write is tried again, with a newer checkpoint if there is one by then,
while snapshots in memory go on to cover the workers' deaths. The end of an epoch that is the best
so far waits for its turn, whatever comes after it. Only what a run is ended for must be on storage
in the end: `flush` says so, or fails.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs.schema import CheckpointConfig
from trainer.checkpoint_store import CheckpointStore
from trainer.errors import CheckpointError
from trainer.metric_names import is_more_better
from trainer.payloads import Arrays, Snapshot

_RETRY_S = 5.0
_CLOSE_S = 30.0

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class _Waiting:
    snapshot: Snapshot
    generation: int

    @property
    def metrics(self) -> dict[str, float] | None:
        """Of the epoch that ended here; None inside one."""
        history = self.snapshot.meta.get("history") or [{}]
        return history[-1] if self.snapshot.meta.get("reason") == "epoch" else None

    def score(self, name: str) -> float:
        """The metric of that name; not a number where there is none."""
        return float((self.metrics or {}).get(name, math.nan))


class CheckpointKeeper:
    """Keeps the newest snapshot, and has checkpoints written in their order.

    Args:
        store: Where checkpoints go.
        config: How many are kept.
        on_event: Is told of each one that was written or failed; called in the thread.
    """

    def __init__(self, store: CheckpointStore, config: CheckpointConfig, on_event: OnEvent) -> None:
        self._store = store
        self._config = config
        self._on_event = on_event
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []  # at most one being written, the best, and the newest
        self._error: CheckpointError | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._latest_generation = 0
        self._is_latest_taken = True
        self.latest: Snapshot | None = None
        self.weights: Arrays | None = None

    def recover(self, most_generation: int | None) -> list[str]:
        """Take the newest whole checkpoint from storage; returns what was wrong with others.

        Args:
            most_generation: No writer had a later generation; None where nobody knows.

        Raises:
            CheckpointError: All that is there belongs to another job, or storage does not answer.
        """
        found, skipped = self._store.newest(most_generation)
        if found is not None:
            self.latest = Snapshot(found.step, found.arrays, found.meta)
        with contextlib.suppress(CheckpointError):  # leftovers of the dead are in nobody's way
            self._store.clean()
        return skipped

    def last_generation(self) -> int:
        """The latest generation that left a file on storage; 0 without one."""
        return self._store.last_generation()

    def take(self, snapshot: Snapshot, generation: int) -> None:
        """Keep a snapshot, and have it written if it is to last; returns at once."""
        self.latest, self._latest_generation = snapshot, generation
        self._is_latest_taken = snapshot.is_durable
        if snapshot.is_durable:
            self._submit(_Waiting(snapshot, generation))

    def take_latest(self) -> None:
        """Have the newest snapshot written even if it was to stay in memory; returns at once."""
        if self.latest is not None and not self._is_latest_taken:
            self._is_latest_taken = True
            self._submit(_Waiting(self.latest, self._latest_generation))

    def _submit(self, waiting: _Waiting) -> None:
        with self._changed:
            self._waiting = [*self._best_of_waiting(waiting), waiting]
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._write_all, name="checkpoints", daemon=True
                )
                self._thread.start()

    def _best_of_waiting(self, newest: _Waiting) -> list[_Waiting]:
        """The best end of an epoch among those that wait, unless the newest one is as good."""
        name = self._config.best_by
        if name is None:
            return []
        is_more = is_more_better(name) if self._config.best_mode == "auto" else False
        is_more = is_more or self._config.best_mode == "max"
        scored = [one for one in [*self._waiting, newest] if math.isfinite(one.score(name))]
        if not scored:
            return []
        best = (max if is_more else min)(scored, key=lambda one: one.score(name))
        return [] if best is newest else [best]

    def take_weights(self, weights: Arrays, generation: int) -> None:
        """Keep the trained weights, on storage too; blocks.

        Raises:
            CheckpointError: Storage refuses them.
        """
        self.weights = weights
        self._store.save_final(generation, weights, {})

    def flush(self, timeout_s: float) -> None:
        """Wait until all that was taken is written.

        Raises:
            CheckpointError: It is not, within the time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._waiting, timeout_s):
                raise self._error or CheckpointError(
                    f"the newest checkpoint was not written within {timeout_s:g} s: storage does "
                    "not keep up. Go on with --resume: an earlier checkpoint is there."
                )

    def close(self) -> None:
        """End the thread, after what it is writing. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._is_closed)
                if self._is_closed:
                    return
                waiting, newest = self._waiting[0], self._waiting[-1]
            is_written = self._write(waiting)
            with self._changed:
                if is_written:
                    self._waiting = [one for one in self._waiting if one is not waiting]
                self._changed.notify_all()
                if not is_written:
                    self._wait_for_news(newest)

    def _wait_for_news(self, newest: _Waiting) -> None:
        """Until the next try; a newer checkpoint, or the end, is worth one at once."""
        self._changed.wait_for(lambda: self._waiting[-1] is not newest or self._is_closed, _RETRY_S)

    def _write(self, waiting: _Waiting) -> bool:
        snapshot, generation = waiting.snapshot, waiting.generation
        begin = time.monotonic()
        try:
            path = self._store.save(
                snapshot.step,
                generation,
                snapshot.arrays,
                snapshot.meta,
                kind=str(snapshot.meta.get("reason")),
                metrics=waiting.metrics,
            )
        except CheckpointError as error:
            self._error = error
            self._on_event(
                {
                    "event": "checkpoint_failed",
                    "generation": generation,
                    "step": snapshot.step,
                    "error": str(error),
                }
            )
            return False
        self._error = None
        with contextlib.suppress(CheckpointError):  # the next one tries again
            self._store.prune(self._config.keep, self._config.best_by, self._config.best_mode)
        self._on_event(
            {
                "event": "checkpoint",
                "generation": generation,
                "step": snapshot.step,
                "path": path,
                "seconds": time.monotonic() - begin,
            }
        )
        return True
