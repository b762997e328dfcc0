"""One model version at work: a bounded queue, and the one thread that owns the predictor.

Owns how requests become batches. When the thread is free it takes what waits, at once: no request
waits for company, and under load batches grow by themselves. A request of more rows than a batch
comes in slices. Users take turns, one request or slice each, and no user holds more than half of
the queue, so a flood of one, or a large request, delays others by one batch.

A request whose caller has gone, or whose deadline has passed, is left out when a batch is taken: it
is never computed. Where a batch fails, its requests are computed one by one, so that only the one
at fault is answered with the failure.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.features import Array
from serving.errors import DeadlineExceeded, Overloaded, PredictionFailure

_USER_SHARE = 0.5
_SMOOTHING = 0.1


class LaneClosed(Overloaded):
    """The lane takes no more requests; another lane of the same version may."""


@dataclass(frozen=True)
class LaneLimits:
    """Bounds of a lane.

    Attributes:
        queue_rows: The most rows that wait. A single request may be greater, if nothing waits.
        batch_rows: Requests are added to a batch while it holds fewer rows; the most of one
            request that are computed at once.
    """

    queue_rows: int = 16_384
    batch_rows: int = 4_096


@dataclass(frozen=True)
class BatchFacts:
    """What one batch took.

    Attributes:
        requests: Requests in it.
        seconds: Time of computation.
        waited_s: Longest time that one of them had waited.
        rows: Rows by user.
    """

    requests: int
    seconds: float
    waited_s: float
    rows: dict[str, int]


@dataclass(slots=True, eq=False)
class _Work:
    rows: Array
    user: str
    future: "asyncio.Future[Array]"
    since: float
    is_waiting: bool = True


@dataclass(slots=True)
class _Turns:
    """Waiting requests by user; users take turns."""

    queues: dict[str, deque[_Work]] = field(default_factory=dict)
    order: deque[str] = field(default_factory=deque)

    def add(self, work: _Work) -> None:
        queue = self.queues.get(work.user)
        if queue is None:
            self.queues[work.user] = deque([work])
            self.order.append(work.user)
        else:
            queue.append(work)

    def next(self) -> _Work | None:
        if not self.order:
            return None
        user = self.order.popleft()
        queue = self.queues[user]
        work = queue.popleft()
        if queue:
            self.order.append(user)
        else:
            del self.queues[user]
        return work


class Lane:
    """The queue and the thread of one predictor.

    `predict` belongs to an event loop; `close` may be called from anywhere.

    Args:
        name: Of the model version, for messages.
        compute: From `(rows, ...)` to `(rows, ...)`; called by the lane's thread alone.
        limits: Bounds of the queue.
        observe: Is told of each batch, in the event loop of its requests.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[[Array], Array],
        limits: LaneLimits,
        observe: Callable[[BatchFacts], None],
    ) -> None:
        self.name = name
        self._compute = compute
        self._limits = limits
        self._observe = observe
        self._changed = threading.Condition()
        self._turns = _Turns()
        self._waiting_rows = 0
        self._rows_of: dict[str, int] = {}
        self._in_work = 0
        self._is_closed = False
        self._row_s = 0.0
        self._thread = threading.Thread(target=self._own, name=f"lane {name}", daemon=True)
        self._thread.start()

    @property
    def waiting_rows(self) -> int:
        """Rows that wait for their turn."""
        return self._waiting_rows

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is computed."""
        return not self._waiting_rows and not self._in_work

    async def predict(self, rows: Array, user: str, deadline: float) -> Array:
        """Predictions for checked rows, together with what else waits.

        Args:
            rows: `(rows, *input_shape) float32`, at least one.
            user: Whose turn it takes.
            deadline: By `time.monotonic()`.

        Raises:
            Overloaded: The queue is full, or this user's half of it.
            LaneClosed: The lane takes no more requests.
            DeadlineExceeded: The deadline passed before the answer was there.
            PredictionFailure: The model failed with these rows alone.
        """
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        if deadline <= now:
            raise _late(self.name)
        size = self._limits.batch_rows
        slices = [
            _Work(rows[start : start + size], user, loop.create_future(), now)
            for start in range(0, len(rows), size)
        ]
        self._enqueue(slices)
        timer = loop.call_later(deadline - now, self._expire, slices)
        try:
            answers = [await work.future for work in slices]
        finally:
            timer.cancel()
            self._withdraw(slices)
        return answers[0] if len(answers) == 1 else np.concatenate(answers)

    def close(self) -> None:
        """Take no more requests; those that wait are answered, then the thread ends."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread of a closed lane; whether it ended in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _enqueue(self, slices: Sequence[_Work]) -> None:
        """All slices of a request, or none."""
        count, user = sum(len(work.rows) for work in slices), slices[0].user
        with self._changed:
            if self._is_closed:
                raise LaneClosed(f"{self.name} is being unloaded; send the request again.", 1.0)
            mine = self._rows_of.get(user, 0)
            is_full = self._waiting_rows + count > self._limits.queue_rows
            is_greedy = mine + count > self._limits.queue_rows * _USER_SHARE
            if (is_full and self._waiting_rows) or (is_greedy and mine):
                raise Overloaded(
                    f"{self.name}: {self._waiting_rows} rows wait already, {mine} of them yours; "
                    f"{self._limits.queue_rows} in all are allowed and half of them for one user. "
                    "Send the request again later.",
                    self._waiting_rows * self._row_s,
                )
            self._waiting_rows += count
            self._rows_of[user] = mine + count
            for work in slices:
                self._turns.add(work)
            self._changed.notify()

    def _expire(self, slices: Sequence[_Work]) -> None:
        for work in slices:
            if not work.future.done():
                work.future.set_exception(_late(self.name))

    def _withdraw(self, slices: Sequence[_Work]) -> None:
        """Nobody waits for them any more: what has not been computed never is."""
        for work in slices:
            if not work.future.cancel() and not work.future.cancelled():
                work.future.exception()  # of a slice behind the one that failed: told once
        if any(work.is_waiting for work in slices):
            with self._changed:
                for work in slices:
                    if work.is_waiting:
                        self._left(work)

    def _left(self, work: _Work) -> None:
        """Count a request as waiting no longer."""
        work.is_waiting = False
        self._waiting_rows -= len(work.rows)
        rest = self._rows_of[work.user] - len(work.rows)
        if rest:
            self._rows_of[work.user] = rest
        else:
            del self._rows_of[work.user]

    def _own(self) -> None:
        while True:
            with self._changed:
                batch = self._take()
                while not batch:
                    if self._is_closed:
                        return
                    self._changed.wait()
                    batch = self._take()
                self._in_work = len(batch)
            self._answer(batch)
            self._in_work = 0

    def _take(self) -> list[_Work]:
        batch: list[_Work] = []
        rows = 0
        while rows < self._limits.batch_rows:
            work = self._turns.next()
            if work is None:
                break
            if not work.is_waiting:
                continue  # its caller has gone
            self._left(work)
            if work.future.done():
                continue
            batch.append(work)
            rows += len(work.rows)
        return batch

    def _answer(self, batch: list[_Work]) -> None:
        start = time.monotonic()
        answers = self._answers(batch)
        seconds = time.monotonic() - start
        rows: dict[str, int] = {}
        for work in batch:
            rows[work.user] = rows.get(work.user, 0) + len(work.rows)
        row_s = seconds / sum(rows.values())
        self._row_s += (row_s - self._row_s) * (_SMOOTHING if self._row_s else 1.0)
        waited_s = start - min(work.since for work in batch)
        facts = BatchFacts(len(batch), seconds, waited_s, rows)
        for loop in {work.future.get_loop() for work in batch}:
            with contextlib.suppress(RuntimeError):  # a loop that was closed has no callers left
                loop.call_soon_threadsafe(self._deliver, loop, batch, answers, facts)

    def _answers(self, batch: list[_Work]) -> Sequence[Array | PredictionFailure]:
        try:
            if len(batch) == 1:
                return [self._compute(batch[0].rows)]
            out = self._compute(np.concatenate([work.rows for work in batch]))
        except Exception as error:
            if len(batch) == 1:
                return [PredictionFailure(f"{self.name} failed with these rows: {_short(error)}.")]
            return [answer for work in batch for answer in self._answers([work])]
        answers: list[Array | PredictionFailure] = []
        start = 0
        for work in batch:
            answers.append(out[start : start + len(work.rows)])
            start += len(work.rows)
        return answers

    def _deliver(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[_Work],
        answers: Sequence[Array | PredictionFailure],
        facts: BatchFacts,
    ) -> None:
        for work, answer in zip(batch, answers, strict=True):
            if work.future.done() or work.future.get_loop() is not loop:
                continue
            if isinstance(answer, PredictionFailure):
                work.future.set_exception(answer)
            else:
                work.future.set_result(answer)
        self._observe(facts)


def _late(name: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{name}: the deadline passed before the predictions were there. Allow more time, or send "
        "fewer rows at once."
    )


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
