"""The coordinator: takes a run through its stages, forms gangs, and answers their failures.

It knows processes, not learning: what workers do is a callable named by a `Stage`, and what their
messages mean is told by a *delegate*, an object of the layer above, created in the coordinator's
process. States and what each permits:

    PLACING   resources and templates are awaited      -> FORMING, FAILED
    FORMING   training processes are being forked      -> RUNNING, FORMING again after a failure
    RUNNING   messages are passed to the delegate      -> FORMING (next stage, failure), DONE
    DONE      the delegate's result is there           final
    FAILED    an error is there                        final
"""

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from cluster.channel import Message
from cluster.errors import CoordinatorLost, GangFailure, RetriesExhausted
from cluster.gang import Gang, GangSpec, release
from cluster.template import resolve
from configs.errors import UserCodeError

_STOP_GRACE_S = 60.0
_EVENTS_KEPT = 20_000


@dataclass(frozen=True)
class Stage:
    """One thing that the workers do together.

    Attributes:
        name: Shown in events.
        workers: How many ranks take part.
        entry: `module:function`, called in each training process with (Channel, Launch).
    """

    name: str
    workers: int
    entry: str


class Delegate(Protocol):
    """What the layer above knows: stages, payloads, and the meaning of messages.

    Called by the coordinator's main thread only.
    """

    def next_stage(self) -> Stage | None:
        """The stage to run now, or None at the end."""
        ...

    def payload(self, stage: Stage, generation: int) -> Any:
        """Plain values for the workers of a new generation."""
        ...

    def on_message(self, message: Message) -> None:
        """A message of the present generation."""
        ...

    def on_event(self, event: dict[str, Any]) -> None:
        """A state change of the run, to be recorded."""
        ...

    def on_recovered(self, failure: GangFailure, detected_s: float, recovered_s: float) -> None:
        """A failure was answered by a new generation."""
        ...

    def result(self, stopped: str | None) -> Any:
        """Plain values for the driver; `stopped` is the reason of a requested stop."""
        ...

    def failed(self, error: Exception) -> None:
        """The run failed; `error` is raised to the driver afterwards."""
        ...


@dataclass(frozen=True)
class RunSpec:
    """A run as the coordinator needs it.

    Attributes:
        gang: What to place.
        stall_after_s: Silence that counts as a failure.
        max_failures: Failures that are answered by a new generation.
        delegate: `module:Class`, created with `settings` and a function that emits live
            events.
        settings: Plain values.
    """

    gang: GangSpec
    stall_after_s: float
    max_failures: int
    delegate: str
    settings: Any


class Coordinator:
    """Runs one run. `run` blocks in one thread; `events` and `request_stop` come from others."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._first_event = 0
        self._changed = threading.Condition()
        self._stop_reason: str | None = None
        self._generation = 0
        self._failures = 0

    def run(self) -> Any:
        """Take the run to its end and return the delegate's result.

        Raises:
            UserCodeError: The user's code raised.
            RetriesExhausted: More than `max_failures` failures.
            StartTimeout: The gang could not be placed.
        """
        delegate: Delegate = resolve(self._spec.delegate)(self._spec.settings, self._emit)
        gang = Gang(self._spec.gang)
        try:
            self._record(delegate, "placing", workers=self._spec.gang.workers)
            hosts = gang.place()
            self._record(delegate, "placed", nodes=[host["node"] for host in hosts])
            while self._stop_reason is None and (stage := delegate.next_stage()) is not None:
                self._run_stage(gang, stage, delegate)
            return delegate.result(self._stop_reason)
        except Exception as error:  # the run's main: recorded, then the driver's to tell
            delegate.failed(error)
            raise
        finally:
            gang.close()

    def events(self, after: int, timeout_s: float) -> tuple[int, list[dict[str, Any]]]:
        """Events from number `after` on, and the number to ask with next; waits for the first."""
        with self._changed:
            self._changed.wait_for(lambda: self._first_event + len(self._events) > after, timeout_s)
            skip = max(0, after - self._first_event)
            news = list(self._events)[skip:]
            return self._first_event + len(self._events), news

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to stop at a common step and to leave a checkpoint. Idempotent."""
        self._stop_reason = self._stop_reason or reason

    def _run_stage(self, gang: Gang, stage: Stage, delegate: Delegate) -> None:
        failure: GangFailure | None = None
        failed_at = 0.0
        while True:
            self._generation += 1
            begin = time.monotonic()
            try:
                self._form(gang, stage, delegate)
                for message in self._follow(gang, stage):
                    delegate.on_message(message)
                    if message.kind == "ready" and message.rank == 0 and failure is not None:
                        delegate.on_recovered(failure, begin - failed_at, time.monotonic() - begin)
                        failure = None
                return
            except GangFailure as error:
                failure, failed_at = error, time.monotonic()
                gang.kill()
                self._count_failure(error, delegate)
                if self._stop_reason is not None:
                    return

    def _form(self, gang: Gang, stage: Stage, delegate: Delegate) -> None:
        self._record(delegate, "forming", stage=stage.name)
        payload = delegate.payload(stage, self._generation)
        pids = gang.form(self._generation, stage.workers, stage.entry, payload)
        self._record(delegate, "formed", stage=stage.name, pids=pids)

    def _follow(self, gang: Gang, stage: Stage) -> "Any":
        """Yield the delegate's messages until all ranks have finished and left."""
        finished: set[int] = set()
        left: set[int] = set()
        stop_sent_at: float | None = None
        for message in gang.messages(self._spec.stall_after_s):
            if self._stop_reason is not None and stop_sent_at is None:
                gang.send("stop", self._stop_reason)
                stop_sent_at = time.monotonic()
            if stop_sent_at is not None and time.monotonic() - stop_sent_at > _STOP_GRACE_S:
                raise GangFailure(
                    f"the workers did not stop within {_STOP_GRACE_S:g} s.", "stalled"
                )
            if message is None:
                continue
            if message.kind == "exception":
                _raise_worker_error(message)
            elif message.kind == "exited":
                if message.rank not in finished:
                    raise _exit_failure(message)
                left.add(message.rank)
                if len(left) == stage.workers:
                    return
            elif message.kind == "finished":
                finished.add(message.rank)
                yield message
                if len(finished) == stage.workers:
                    gang.send("leave")  # together: an early one would fail the others
            else:
                yield message

    def _count_failure(self, failure: GangFailure, delegate: Delegate) -> None:
        self._failures += 1
        self._record(
            delegate, "failure", failure=failure.kind, rank=failure.rank, error=str(failure)
        )
        if self._failures > self._spec.max_failures:
            raise RetriesExhausted(
                f"{self._failures} failures, {self._spec.max_failures} are allowed "
                f"(cluster.max_failures). The last: {failure} The logs of the workers are in "
                f"{self._spec.gang.log_dir}; --resume goes on from the newest checkpoint."
            )

    def _record(self, delegate: Delegate, state: str, **fields: Any) -> None:
        event = {"event": state, "generation": self._generation, **fields}
        delegate.on_event(event)

    def _emit(self, event: dict[str, Any]) -> None:
        with self._changed:
            if len(self._events) == self._events.maxlen:
                self._first_event += 1
            self._events.append(event)
            self._changed.notify_all()


def _raise_worker_error(message: Message) -> None:
    body = message.body
    if body["is_user_error"]:
        raise UserCodeError(body["message"], body["traceback"])
    raise GangFailure(f"rank {message.rank} raised {body['error']}", "exception", message.rank)


def _exit_failure(message: Message) -> GangFailure:
    code = message.body
    how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
    return GangFailure(
        f"the training process of rank {message.rank} {how}.", "exited", message.rank
    )


def _coordinator_lost(error: Exception) -> CoordinatorLost:
    return CoordinatorLost(
        f"the coordinator was lost: {type(error).__name__}. Its node or its Ray has ended; "
        "--resume goes on from the newest checkpoint."
    )


class RunHandle:
    """A started run as its driver sees it."""

    def __init__(self, spec: RunSpec) -> None:
        actor = ray.remote(Coordinator).options(num_cpus=0, max_concurrency=8)
        self._actor = actor.remote(spec)
        self._result = self._actor.run.remote()
        self._name = spec.gang.name
        self._next_event = 0

    def events(self, timeout_s: float) -> list[dict[str, Any]]:
        """Events since the last call; waits for the first one."""
        try:
            self._next_event, news = ray.get(
                self._actor.events.remote(self._next_event, timeout_s), timeout=timeout_s + 30
            )
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            release(self._name)
            raise _coordinator_lost(error) from error
        return list(news)

    def is_finished(self) -> bool:
        """Whether `result` returns at once."""
        return bool(ray.wait([self._result], timeout=0)[0])

    def request_stop(self, reason: str) -> None:
        """Ask for a clean stop."""
        self._actor.request_stop.remote(reason)

    def result(self) -> Any:
        """The delegate's result; blocks. Raises what the coordinator raised."""
        try:
            return ray.get(self._result)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if cause is not None:
                raise cause from None
            raise
        except ray.exceptions.RayActorError as error:
            release(self._name)
            raise _coordinator_lost(error) from error

    def kill(self) -> None:
        """End the coordinator at once; hosts follow, and what they held is given back."""
        ray.kill(self._actor)
        release(self._name)
