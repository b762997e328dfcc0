"""The coordinator: takes a run through its stages, forms gangs, and answers their failures.

It knows processes, not learning: what workers do is a callable named by a `Stage`, and what their
messages mean is told by a *delegate*, an object of the layer above, created in the coordinator's
process. States and what each permits:

    PLACING   resources and templates are awaited        -> FORMING, FAILED
    FORMING   hosts are replaced, processes are forked   -> RUNNING, FORMING again (failure)
    RUNNING   messages are passed to the delegate        -> PAUSING, FORMING (next stage, failure),
                                                            DONE
    PAUSING   ranks take a snapshot and leave            -> FORMING (other hosts, or more of them)
    DONE      the delegate's result is there             final
    FAILED    an error is there                          final
"""

import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.bulk import split
from cluster.channel import CHAOS, Message
from cluster.errors import GangFailure, RetriesExhausted
from cluster.faults import COORDINATOR, COORDINATOR_RANK, HOST, Fault, FaultPlan, strike
from cluster.formation import Formation
from cluster.gang import Gang, GangSpec
from cluster.retry import Failed, RetryPolicy
from cluster.template import resolve
from configs.errors import UserCodeError

_EVENTS_KEPT = 20_000
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Stage:
    """One thing that the workers do together.

    Attributes:
        name: Shown in events.
        workers: How many ranks take part.
        entry: `module:function`, called in each training process with (Channel, Launch).
        is_elastic: Whether fewer ranks may take part where hosts are lost, and whether the ranks
            heed the command "pause".
    """

    name: str
    workers: int
    entry: str
    is_elastic: bool = False


class Delegate(Protocol):
    """What the layer above knows: stages, payloads, and the meaning of messages.

    Called by the coordinator's main thread only.
    """

    def begin(self) -> int:
        """Take possession of the run; returns the newest generation it ever had, or 0."""
        ...

    def next_stage(self) -> Stage | None:
        """The stage to run now, or None at the end."""
        ...

    def payload(self, stage: Stage, generation: int, workers: int) -> Any:
        """Plain values for the workers of a new generation."""
        ...

    def attachment(self, stage: Stage) -> tuple[str, Any] | None:
        """A command and its body, of any size, that every rank gets after the payload."""
        ...

    def position(self) -> int:
        """How far the run is, a number that only grows with work done: steps completed."""
        ...

    def on_message(self, message: Message) -> None:
        """A message of the present generation."""
        ...

    def on_event(self, event: dict[str, Any]) -> None:
        """A state change of the run, to be recorded."""
        ...

    def on_failure(self, failure: GangFailure, silent_s: float) -> None:
        """A generation failed, `silent_s` after its last message, and another will follow."""
        ...

    def on_stacks(self, generation: int, stacks: dict[int, str]) -> None:
        """What each rank of a stalled generation was doing."""
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
        stall_after_s: Standstill that counts as a failure.
        max_failures: Failures within the window that are answered by a new generation.
        failure_window_s: The window.
        delegate: `module:Class`, created with `settings` and a function that emits live
            events.
        settings: Plain values.
        chaos: A plan of faults (`cluster.faults`), or nothing.
        chaos_seed: Of what the plan leaves to chance.
        chaos_fired: What of the plan earlier coordinators of the run have seen fire, as text.
        environment: Added to the coordinator's environment; may hold secrets.
    """

    gang: GangSpec
    stall_after_s: float
    max_failures: int
    failure_window_s: float
    delegate: str
    settings: Any
    chaos: str = ""
    chaos_seed: int = 0
    chaos_fired: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict, repr=False)


class Coordinator:
    """Runs one run. `run` blocks in one thread; `events` and `request_stop` come from others."""

    def __init__(self, spec: RunSpec) -> None:
        os.environ.update(spec.environment)
        self._spec = spec
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._first_event = 0
        self._changed = threading.Condition()
        self._stop_reason: str | None = None
        self._generation = 0
        self._policy = RetryPolicy(spec.max_failures, spec.failure_window_s)
        self._chaos = FaultPlan(())
        if spec.chaos:
            self._chaos = FaultPlan.parse(spec.chaos, spec.chaos_seed)
            self._chaos.fired_before(spec.chaos_fired)
        self._running: Future[Any] | None = None
        self._ready_since: float | None = None
        self._looked_at = 0.0
        self._began_at = 0

    def run(self) -> Any:
        """Take the run to its end and return the delegate's result.

        Whoever calls again, because the first call was cut off, gets the same.

        Raises:
            UserCodeError: The user's code raised.
            RetriesExhausted: More failures than `max_failures` within the window.
            StartTimeout: The gang could not be placed, or not be kept together.
        """
        with self._changed:
            self._running = self._running or ThreadPoolExecutor(1, "run").submit(self._run)
        return self._running.result()

    def _run(self) -> Any:
        delegate: Delegate = resolve(self._spec.delegate)(self._spec.settings, self._emit)
        self._generation = delegate.begin()
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
        """Form generations until one has brought the stage to its end."""
        while True:
            self._generation += 1
            formation: Formation | None = None
            try:
                formation = self._form(gang, stage, delegate)
                for message in formation.follow():
                    if message is not None and message.kind == "fault":
                        self._note_fault(message, gang, delegate)
                    elif message is not None:
                        delegate.on_message(message)
                    self._look_around(gang, stage, delegate, formation)
                if not formation.is_paused or self._stop_reason is not None:
                    return
            except GangFailure as failure:
                self._answer(failure, gang, delegate, formation)
                if self._stop_reason is not None:
                    return

    def _form(self, gang: Gang, stage: Stage, delegate: Delegate) -> Formation:
        restored = gang.restore()
        if restored.replaced or restored.lost:
            self._record(delegate, "hosts", replaced=restored.replaced, lost=restored.lost)
        workers = min(stage.workers, restored.workers) if stage.is_elastic else stage.workers
        self._record(delegate, "forming", stage=stage.name, workers=workers)
        self._began_at = delegate.position()
        payload = delegate.payload(stage, self._generation, workers)
        faults = tuple(self._chaos.for_rank(rank, workers) for rank in range(workers))
        pids = gang.form(self._generation, workers, stage.entry, payload, faults)
        attachment = delegate.attachment(stage)
        if attachment is not None:
            gang.send_large(split(*attachment))
        self._record(delegate, "formed", stage=stage.name, pids=pids)
        return Formation(gang, self._generation, workers, self._spec.stall_after_s)

    def _look_around(
        self, gang: Gang, stage: Stage, delegate: Delegate, formation: Formation
    ) -> None:
        """What may have to be asked of the ranks, for a reason that is not in their messages."""
        if self._stop_reason is not None:
            formation.ask("stop", self._stop_reason)
        if not formation.is_ready:
            return
        now = time.monotonic()
        self._ready_since = self._ready_since or now
        self._strike(gang, delegate, formation, now - self._ready_since)
        if not stage.is_elastic:
            return
        leaving, reason = set(formation.leaving), ""
        if now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            leaving |= gang.leaving()
            reason = "there is room for more workers" if gang.can_grow() else ""
        if leaving:
            reason = f"ranks {sorted(leaving)} are to go"
        if reason and formation.ask("pause", reason):
            self._record(delegate, "pausing", reason=reason)

    def _note_fault(self, message: Message, gang: Gang, delegate: Delegate) -> None:
        """A rank does to itself what the plan had for it, or has this process do it."""
        fault: Fault = message.body
        self._chaos.fired(fault.number)
        self._record(delegate, "chaos", fault=str(fault), rank=message.rank)
        if fault.kind == COORDINATOR:
            strike("kill")
        elif fault.kind == HOST:
            gang.strike(message.rank, HOST)

    def _strike(self, gang: Gang, delegate: Delegate, formation: Formation, now_s: float) -> None:
        """Do what the chaos plan has for this moment."""
        for fault, rank in self._chaos.due(now_s, gang.size):
            self._record(delegate, "chaos", fault=str(fault), rank=rank)
            formation.struck.append(fault.number)
            if rank == COORDINATOR_RANK:
                strike("kill")
            elif fault.kind in Gang.STRIKES:
                gang.strike(rank, fault.kind)
            else:
                gang.send(CHAOS, (rank, fault))

    def _answer(
        self, failure: GangFailure, gang: Gang, delegate: Delegate, formation: Formation | None
    ) -> None:
        """End what is left of a generation, and wait as long as the policy says.

        Raises:
            UserCodeError: The failure is the user's.
            RetriesExhausted: There were too many.
        """
        silent_s = time.monotonic() - formation.last_said if formation else 0.0
        gang.kill()
        struck = formation.struck if formation else []
        if formation and formation.stacks:
            delegate.on_stacks(self._generation, formation.stacks)
        self._record(
            delegate,
            "failure",
            failure=failure.kind,
            rank=failure.rank,
            error=str(failure),
            is_injected=bool(struck),
        )
        verdict = self._policy.judge(
            Failed(
                failure.kind,
                failure.rank,
                failure.cause,
                failure.traceback,
                delegate.position(),
                bool(struck),
                self._began_at,
            ),
            time.monotonic(),
        )
        if verdict.action == "users":
            raise UserCodeError(verdict.reason, verdict.traceback)
        if verdict.action == "give_up":
            raise RetriesExhausted(
                f"{verdict.reason} The last: {failure} The logs of the workers are in "
                f"{self._spec.gang.log_dir}; --resume goes on from the newest checkpoint."
            )
        delegate.on_failure(failure, silent_s)
        self._wait(verdict.delay_s)

    def _wait(self, delay_s: float) -> None:
        end = time.monotonic() + delay_s
        while time.monotonic() < end and self._stop_reason is None:
            time.sleep(min(0.1, delay_s))

    def _record(self, delegate: Delegate, state: str, **fields: Any) -> None:
        event = {"event": state, "generation": self._generation, **fields}
        delegate.on_event(event)

    def _emit(self, event: dict[str, Any]) -> None:
        with self._changed:
            if len(self._events) == self._events.maxlen:
                self._first_event += 1
            self._events.append(event)
            self._changed.notify_all()
