"""The queue's keeper: carries out what the queue decides, and tells it what has become of runs.

What is to be done is kept before it is done, so that a keeper that dies at any moment has a
successor that finds where it was: a run whose job may or may not have been submitted is submitted
again under the same name, which Ray refuses if it was; a run that was asked to go is asked again. A
new attempt begins only when Ray says that the one before has ended. Hence no run is lost, and none
runs twice. Knows Ray through two seams: `jobs` and `cluster`.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cluster.jobs_api import JobView, newest_attempts, submission_id
from cluster.lines import RUNNING, WAITING, YIELDING, QueuedRun
from cluster.queue import Decision, Queue, Yield
from cluster.queue_store import QueueStore, Record, shape_from
from cluster.room import Placed, Shape, Worker
from cluster.shares import MOST_PRIORITY, Policy, Terms
from cluster.standing import Standing, standings
from configs.errors import EnvironmentFailure, UserError

_MOST_LOSSES = 5
_MOST_STARTS = 10
_USERS_FAULT, _GAVE_UP, _INTERRUPTED = 2, 3, 130


class Jobs(Protocol):
    """Ray Jobs, as the keeper needs it."""

    def states(self) -> Mapping[str, JobView]:
        """All jobs of runs, by their names."""
        ...

    def start(self, name: str, record: Record, package: bytes) -> None:
        """Start a job, unless there is one of this name."""
        ...

    def stop(self, name: str) -> None:
        """Ask a job to end. Idempotent."""
        ...

    def ended(self, run_id: str) -> None:
        """Nothing of this run will be started any more."""
        ...


class Nodes(Protocol):
    """The cluster's nodes, as the keeper needs them."""

    def whole(self) -> Mapping[str, Worker]:
        """What each node has in all."""
        ...

    def used(self) -> Mapping[str, Worker]:
        """What of it is reserved, by whomever."""
        ...

    def placed(self) -> Mapping[str, Placed]:
        """Where the gangs of runs are, by run id."""
        ...

    def want(self, shapes: Sequence[Shape]) -> None:
        """Have nodes come, where the cluster grows, until there is room for all of these."""
        ...


class Keeper:
    """One cluster's queue. Not thread-safe. Call `step` again and again."""

    def __init__(
        self,
        store: QueueStore,
        jobs: Jobs,
        nodes: Nodes,
        clock: Callable[[], float],
        policy: Policy | None = None,
    ) -> None:
        self._store, self._jobs, self._nodes, self._clock = store, jobs, nodes, clock
        self._queue = Queue(policy)
        self._records = {record.run_id: record for record in store.records()}
        self._next = 1 + max((one.sequence for one in self._records.values()), default=0)
        self._users = users = store.users()
        for name, (terms, _) in users.items():
            self._queue.set_terms(name, terms, clock())
        self._queue.shares.restore({name: had for name, (_, had) in users.items()})
        for record in self._records.values():
            if not record.is_ended:
                self._queue.submit(_queued(record), clock())
        self._asked: set[str] = set()  # names of jobs that this keeper has asked to end
        self._unanswered: dict[str, int] = {}  # starts of jobs of which nobody knows whether
        self._others: list[dict[str, Worker]] = []

    def submit(self, asked: Mapping[str, Any], package: bytes) -> str:
        """Take a run in; returns its id. One that is known and not stopped or failed stays as is.

        Raises:
            UserError: The run asks for more than its user may ever have, or goes on without the
                queue.
        """
        known = self._records.get(str(asked["run_id"]))
        if known is not None and known.status not in ("failed", "stopped"):
            return known.run_id
        shape = shape_from(asked["shape"])
        if abs(int(asked["priority"])) > MOST_PRIORITY:
            raise UserError(
                f"received the priority {asked['priority']}; {-MOST_PRIORITY} to {MOST_PRIORITY} "
                "are allowed. Take a smaller one."
            )
        self._check_quota(str(asked["user"]), asked)
        attempt = self._newest_attempt(str(asked["run_id"]), known)
        record = Record(
            str(asked["run_id"]),
            str(asked["name"]),
            str(asked["user"]),
            int(asked["priority"]),
            self._next,
            shape,
            str(asked["entrypoint"]),
            str(asked["run_folder"]),
            "",
            attempt=attempt,
            submitted_at=self._clock(),
        )
        self._next += 1
        self._store.add(record, package)
        self._records[record.run_id] = record
        self._queue.submit(_queued(record), self._clock())
        return record.run_id

    def cancel(self, run_id: str) -> None:
        """Take a run out: one that waits at once, one that runs by a clean stop. Idempotent.

        Raises:
            UserError: There is no such run.
        """
        record = self._records.get(run_id)
        if record is None:
            raise UserError(f"the queue knows no run {run_id!r}. `lockstep jobs list` shows all.")
        if record.status == "waiting":
            self._end(record, "stopped", "stopped before it had started." if not record.attempt
                      else "stopped while it waited; it can be resumed.")  # fmt: skip
        elif not record.is_ended:
            record.status = "stopping"
            self._store.save(record)
            self._queue.asked_to_go(run_id, self._clock())
            self._ask_to_end(record)

    def set_terms(self, user: str, terms: Terms) -> dict[str, Terms]:
        """Say what a user may have; returns all users' terms."""
        self._queue.set_terms(user, terms, self._clock())
        self._save_users()
        return {name: self._queue.shares.terms(name) for name in self._queue.shares.virtual_times()}

    def records(self) -> list[Record]:
        """All runs that are remembered, by submission."""
        return sorted(self._records.values(), key=lambda record: record.sequence)

    def standings(self) -> list[Standing]:
        """Where runs stand that have not ended."""
        return standings(self._queue, self._clock())

    def step(self) -> None:
        """Look at nodes and jobs, decide, and act.

        Raises:
            EnvironmentFailure: Ray Jobs does not answer; nothing is lost, step again.
        """
        states = self._jobs.states()
        for record in list(self._records.values()):
            if not record.is_ended and record.status != "waiting":
                self._follow(record, states.get(submission_id(record.run_id, record.attempt)))
        self._look_at_nodes()
        while decisions := self._queue.decide(self._clock()):
            # All are kept before the first is done; what is not done for want of an answer is
            # found again by the next step.
            for act in [self._note(decision) for decision in decisions]:
                act()
        self._nodes.want(self._queue.wanted())
        self._save_users()

    # What has become of runs.

    def _follow(self, record: Record, job: JobView | None) -> None:
        if job is None:
            if record.status in ("starting", "stopping"):
                self._lost_before_start(record)
            else:  # the head is a new one, and its Ray knows nothing of the run
                self._lost(record, "its job is gone with the cluster's head.")
        elif not job.is_final:
            if record.status == "starting":
                record.status = "running"
                self._store.save(record)
            elif record.status in ("yielding", "stopping"):
                self._ask_to_end(record)
        elif job.status == "SUCCEEDED":
            self._end(record, "done", "")
        elif record.status == "stopping":
            self._end(record, "stopped", "stopped; it can be resumed.")
        elif record.status == "yielding":
            self._return(record)
        elif job.status == "STOPPED" or job.exit_code == _INTERRUPTED:
            self._end(record, "stopped", "stopped by hand; it can be resumed.")
        else:
            self._failed(record, job)

    def _lost_before_start(self, record: Record) -> None:
        if record.status == "stopping":
            self._end(record, "stopped", "stopped; it can be resumed.")
        else:
            self._submit_job(record)

    def _failed(self, record: Record, job: JobView) -> None:
        code = job.exit_code
        if code == _USERS_FAULT or (code == _GAVE_UP and record.was_placed) or code == 1:
            self._end(record, "failed", job.message)
        elif code == _GAVE_UP:
            self._lost(record, "its workers did not get the room that was free for them.")
        else:
            self._lost(record, "its process was lost.")

    def _lost(self, record: Record, reason: str) -> None:
        record.losses += 1
        if record.losses > _MOST_LOSSES:
            self._end(record, "failed", f"{reason} That happened {record.losses} times.")
            return
        record.message = reason
        self._return(record)

    def _return(self, record: Record) -> None:
        self._forget_asking(record)
        record.status, record.placed, record.lent_by = "waiting", {}, ""
        self._store.save(record)
        self._queue.returned(record.run_id, self._clock())

    def _end(self, record: Record, status: str, message: str) -> None:
        self._forget_asking(record)
        record.status, record.message, record.ended_at = status, message, self._clock()
        record.placed = {}
        self._store.save(record)
        self._queue.remove(record.run_id, self._clock())
        self._jobs.ended(record.run_id)
        for run_id in self._store.tidy():
            del self._records[run_id]

    def _forget_asking(self, record: Record) -> None:
        name = submission_id(record.run_id, record.attempt)
        self._asked.discard(name)
        self._unanswered.pop(name, None)

    # What is to become of them.

    def _note(self, decision: Decision) -> Callable[[], None]:
        """Keep what was decided; returns what does it."""
        record, run = self._records[decision.run_id], self._queue.run(decision.run_id)
        if isinstance(decision, Yield):
            record.status, record.message = "yielding", f"made room for {decision.for_run}."
            self._store.save(record)
            return lambda: self._ask_to_end(record)
        record.attempt += 1
        record.status, record.was_placed, record.message = "starting", False, ""
        record.placed, record.started_at = dict(decision.placed), self._clock()
        record.lent_by = run.lent_by if run else ""
        self._store.save(record)
        return lambda: self._submit_job(record)

    def _submit_job(self, record: Record) -> None:
        name = submission_id(record.run_id, record.attempt)
        try:
            self._jobs.start(name, record, self._store.package(record.package))
        except UserError as error:
            self._end(record, "failed", str(error))
        except EnvironmentFailure as error:
            # It may have begun all the same. Where the next look does not show it, it is started
            # again under this name; what cannot be started holds nobody else up.
            self._unanswered[name] = self._unanswered.get(name, 0) + 1
            if self._unanswered[name] >= _MOST_STARTS:
                self._end(record, "failed", str(error))

    def _ask_to_end(self, record: Record) -> None:
        """Once by each keeper: Ray Jobs passes on the first request and no other."""
        name = submission_id(record.run_id, record.attempt)
        if name not in self._asked:
            with contextlib.suppress(UserError):  # it has gone meanwhile
                self._jobs.stop(name)
            self._asked.add(name)

    # What the queue decides by.

    def _look_at_nodes(self) -> None:
        whole, placed = self._nodes.whole(), self._nodes.placed()
        used = dict(self._nodes.used())
        for run_id, places in placed.items():
            record = self._records.get(run_id)
            if record is None or record.is_ended or record.status == "waiting":
                continue  # somebody else's, or not yet gone
            for node, count in places.items():
                held = used.get(node, Worker(0.0))
                used[node] = Worker(
                    max(0.0, held.cpus - count * record.shape.worker.cpus),
                    max(0.0, held.gpus - count * record.shape.worker.gpus),
                )
            if places != record.placed or not record.was_placed:
                record.placed, record.was_placed = dict(places), True
                self._store.save(record)
                self._queue.moved(run_id, record.placed)
        self._others = [*self._others[-2:], used]
        self._queue.set_nodes(whole, self._used_throughout(), self._clock())

    def _used_throughout(self) -> dict[str, Worker]:
        """What others used at each of the last looks: Ray's reports of a change come apart."""
        first, *rest = self._others
        throughout = dict(first)
        for look in rest:
            for node, used in throughout.items():
                now = look.get(node, Worker(0.0))
                throughout[node] = Worker(min(used.cpus, now.cpus), min(used.gpus, now.gpus))
        return throughout

    def _newest_attempt(self, run_id: str, known: Record | None) -> int:
        """The number of the last attempt, be it the queue's or not."""
        there = newest_attempts(self._jobs.states().values()).get(run_id)
        if there is not None and (not there.is_final or there.status == "SUCCEEDED"):
            raise UserError(
                f"{run_id} was started without the queue and is {there.status.lower()}; runs that "
                "are new, stopped or failed are allowed. Choose another --run-id, or wait."
            )
        return max(known.attempt if known else 0, there.attempt if there else 0)

    def _check_quota(self, user: str, asked: Mapping[str, Any]) -> None:
        terms, shape = self._queue.shares.terms(user), shape_from(asked["shape"])
        for unit, most, wanted in (
            ("CPUs", terms.max_cpus, shape.cpus),
            ("GPUs", terms.max_gpus, shape.gpus),
            ("runs", terms.max_runs, 1),
        ):
            if most is not None and wanted > most:
                raise UserError(
                    f"the run asks for {wanted:g} {unit}; {user} may have {most:g} at a time. Use "
                    "fewer workers, or have the quota raised."
                )

    def _save_users(self) -> None:
        shares = self._queue.shares
        users = {name: (shares.terms(name), had) for name, had in shares.virtual_times().items()}
        if users != self._users:
            self._store.save_users(users)
            self._users = users


def _queued(record: Record) -> QueuedRun:
    state = {"waiting": WAITING, "yielding": YIELDING, "stopping": YIELDING}
    return QueuedRun(
        record.run_id,
        record.user,
        record.shape,
        record.priority,
        record.sequence,
        state.get(record.status, RUNNING),
        record.placed,
        record.lent_by,
        record.started_at,
    )
