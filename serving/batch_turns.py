"""Turns: a shard, or a job's plan, given to a predictor, and what becomes of it.

Works for the loop of `serving.batch_runner`, in its thread, on what the owner of the dispatching
knows. A failure that may pass is tried again: at once where the predictor was lost, after a while
where storage failed; one that lies in the job ends it.
"""

import heapq
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.pool import Ended, Pool
from configs.errors import EnvironmentFailure, UserError
from serving.batch_commit import FATAL, STORAGE_ERRORS, Committer
from serving.batch_output import OutputSpec, PartFile, prepare_folder
from serving.batch_seams import RunnerSettings, Users
from serving.batch_store import BatchStore
from serving.batch_tables import Job, StoredShard
from serving.dispatcher import Dispatcher, Turn
from serving.errors import QuotaExceeded, RequestError

PLAN = -1
_PROBLEMS = 50
_PATIENCE = 4.0  # so much longer may a plan take after each time that it was ended
_SLOWEST = 30.0

log = logging.getLogger(__name__)


@dataclass
class Known:
    """A job that the loop works on."""

    job: Job
    request: dict[str, Any]
    plan: dict[str, Any]
    artifact: str = ""
    left: list[tuple[int, int]] | None = None  # (shard, rows) that wait, when it begins
    begin_failures: int = 0
    begin_at_s: float = 0.0
    plan_failures: int = 0
    finish_failures: int = 0
    finish_at_s: float = 0.0
    ending: tuple[str, list[dict[str, Any]]] | None = None
    turns: int = 0


@dataclass
class Out:
    """A turn at a station."""

    turn: Turn
    shard: StoredShard | None
    begun_s: float


@dataclass
class State:
    """What an owner knows; thrown away with the ownership."""

    epoch: int
    dispatcher: Dispatcher
    committer: Committer
    jobs: dict[str, Known] = field(default_factory=dict)
    out: dict[int, Out] = field(default_factory=dict)
    loaded: dict[int, frozenset[str]] = field(default_factory=dict)
    delayed: list[tuple[float, str, int, int]] = field(default_factory=list)
    told: dict[str, tuple[int | None, float | None]] = field(default_factory=dict)
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)  # predicted, by model version


class Turns:
    """Gives turns to stations and takes what they give. Used by one thread.

    Args:
        state: What the owner knows.
        store: Files and jobs.
        users: The accounts.
        settings: How the loop behaves.
        clock: Seconds since 1970.
        monotonic: Seconds that never go back.
    """

    def __init__(
        self,
        state: State,
        store: BatchStore,
        users: Users,
        settings: RunnerSettings,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self.state, self._store, self._users = state, store, users
        self._settings, self._clock, self._monotonic = settings, clock, monotonic

    def dispatch(self, pool: Pool) -> None:
        """Give shards to idle stations, as long as there are both."""
        idle = pool.idle()
        while idle:
            station = idle[-1]
            turn = self.state.dispatcher.next(self.state.loaded.get(station, frozenset()))
            if turn is None:
                return
            if self._give(pool, station, turn):
                idle.pop()

    def _give(self, pool: Pool, station: int, turn: Turn) -> bool:
        """Begin a turn at a station; False where there is nothing to begin any more."""
        known = self.state.jobs[turn.job]
        shard = None
        task: dict[str, Any] = {"model": model_name(known.job), "artifact": known.artifact}
        try:
            if turn.shard == PLAN:
                task |= self._plan_task(known)
            else:
                shard = self.state.committer.leases.lease(
                    turn.job, turn.shard, station, self._clock()
                )
                if shard is None:
                    self.state.dispatcher.give_back(turn, waits=False)
                    return False
                task |= _shard_task(known, shard, self._allowed(known))
        except (UserError, OSError) as error:
            self.state.dispatcher.give_back(turn, waits=False)
            self.set_ending(known, "failed", [described(error)])
            return False
        known.turns += 1
        self.state.out[station] = Out(turn, shard, self._monotonic())
        pool.give(station, task)
        return True

    def _plan_task(self, known: Known) -> dict[str, Any]:
        request, allowed = dict(known.request["plan"]), self._allowed(known)
        request |= {"allowed": allowed, "predictors": self._settings.max_predictors}
        s_a_row = self.state.dispatcher.s_a_row(model_name(known.job))
        return {"kind": "plan", "request": request, "s_a_row": s_a_row}

    def _allowed(self, known: Known) -> list[str] | None:
        """Where the user's files may be now; uploads are the service's own."""
        if known.request["is_upload"]:
            return None
        return list(self._users.allowed_inputs(known.job.user_name))

    def end_slow(self, pool: Pool) -> None:
        """Kill stations that have been at a task for far too long."""
        now_s = self._monotonic()
        for station, out in self.state.out.items():
            bound_s = max(self._settings.task_timeout_s, _SLOWEST * out.turn.estimate_s)
            if out.shard is None:  # nobody knows the size of an input before it is planned
                bound_s *= _PATIENCE ** self.state.jobs[out.turn.job].plan_failures
            if now_s - out.begun_s > bound_s:
                log.warning(
                    "job %s: a predictor has not answered for %.0f s", out.turn.job, bound_s
                )
                pool.kill(station)

    def wake_delayed(self) -> None:
        """Have shards wait again whose delay is over."""
        while self.state.delayed and self.state.delayed[0][0] <= self._monotonic():
            _, job, shard, rows = heapq.heappop(self.state.delayed)
            known = self.state.jobs.get(job)
            if known is not None and known.ending is None:
                self.state.dispatcher.add_shards(job, [(shard, rows)])

    def take(self, ended: Ended) -> None:
        """What a station has given, or that it is gone."""
        out = self.state.out.pop(ended.station)
        known = self.state.jobs[out.turn.job]
        known.turns -= 1
        result = ended.result or {}
        self.state.loaded.pop(ended.station, None)
        if not ended.is_lost:
            self.state.loaded[ended.station] = frozenset(result.get("loaded", ()))
        failure = result.get("error")
        if ended.failure is not None:
            failure = {**problem("predictor_lost", ended.failure), "is_retryable": True}
        if failure is not None:
            is_lost = ended.failure is not None
            self._failed(known, out, failure, result.get("seconds", 0.0), is_lost)
        elif out.shard is None:
            self._planned(known, out, result)
        else:
            self._computed(known, out.turn, out.shard, result)

    def _planned(self, known: Known, out: Out, result: dict[str, Any]) -> None:
        job, turn, dispatcher = known.job, out.turn, self.state.dispatcher
        if dispatcher.s_a_row(turn.model) is None:
            dispatcher.learn(turn.model, result["s_a_row"], 1)
        try:
            if known.ending is None:
                prepare_folder(known.job.folder)
                self._begin(known, result)
        except FATAL:
            raise
        except EnvironmentFailure as error:
            failure = {**problem("output_unavailable", str(error)), "is_retryable": True}
            self._failed(known, out, failure, result["seconds"], is_lost=False)
            return
        except (OSError, UserError) as error:
            code = f"quota_{error.code}" if isinstance(error, QuotaExceeded) else "output_refused"
            self.set_ending(known, "failed", [problem(code, str(error))])
        dispatcher.complete(turn, result["seconds"])
        if known.ending is None and known.plan:
            rows = [(number, shard["rows"]) for number, shard in enumerate(result["shards"])]
            dispatcher.add_shards(job.id, rows)

    def _begin(self, known: Known, result: dict[str, Any]) -> None:
        """Record the plan and have its rows paid for, both or neither."""
        plan = {name: result[name] for name in ("source", "output_format", "digests")}
        plan |= {"output_shape": result["output_shape"], "column": known.request["plan"]["column"]}
        plan["source"]["allowed"] = None  # looked up at each attempt
        user, rows = known.job.user_name, result["rows"]
        is_begun = self._store.planned(
            self.state.epoch,
            known.job.id,
            plan,
            result["shards"],
            self._clock(),
            lambda connection: self._users.charge_rows_in(connection, user, rows),
        )
        if is_begun:  # else cancelled meanwhile: the next look at the jobs ends it
            known.plan = plan

    def _computed(
        self,
        known: Known,
        turn: Turn,
        shard: StoredShard,
        result: dict[str, Any],
    ) -> None:
        seconds = result["seconds"]
        files = [PartFile(**file) for file in result["files"]]
        try:
            is_done = self.state.committer.commit(
                known.job, shard, files, result["bad_rows"], seconds
            )
        except FATAL:
            raise
        except STORAGE_ERRORS as error:
            failure = {**problem("commit_failed", str(error)), "is_retryable": True}
            out = Out(turn, shard, 0.0)
            self._failed(known, out, failure, seconds, is_lost=False)
            return
        self.state.dispatcher.complete(turn, seconds)
        if is_done:
            self.state.rows[known.job.model, str(known.job.version)] += shard.row_count
        if is_done and known.ending is None:
            self.check_progress(known)

    def check_progress(self, known: Known) -> None:
        """Complete a job, or fail it for its bad rows."""
        job = self._store.job(known.job.id)
        if job is None or job.status not in ("in_progress", "finalizing"):
            return
        known.job = job
        request = known.request
        most = request["max_error_rate"] * job.row_total
        if job.row_bad and (request["on_error"] == "fail_fast" or job.row_bad > most):
            text = f"{job.row_bad} bad rows of {job.row_done}; see the error files of the output"
            self.set_ending(known, "failed", [problem("too_many_bad_rows", text)])
        elif job.shard_done == job.shard_total:
            self.set_ending(known, "completed", [])
        elif text := self._too_many_bytes(job):
            self.set_ending(known, "failed", [problem("quota_bytes", text)])

    def _too_many_bytes(self, job: Job) -> str:
        """Why no more may be stored for the user of a job, or nothing."""
        try:
            most = self._users.account(job.user_name).quotas.bytes
        except UserError:
            return ""  # removed since: what was accepted is finished
        if most is None or self._store.stored_bytes(job.user_name) <= most:
            return ""
        return f"more than the {most:,} bytes that may be stored; give an output of your own"

    def _failed(
        self,
        known: Known,
        out: Out,
        failure: dict[str, Any],
        seconds: float,
        is_lost: bool,
    ) -> None:
        """An attempt has not worked: again, at once or later, or the job fails."""
        turn = out.turn
        log.warning("job %s, shard %d: %s", turn.job, turn.shard, failure["message"])
        if out.shard is None:
            known.plan_failures += 1
            failures = known.plan_failures
        else:
            failures = self.state.committer.leases.give_back(
                out.shard, self._clock(), failure["code"], is_failure=True
            )
        is_last = not failure["is_retryable"] or failures >= self._settings.attempts
        waits = is_lost and not is_last and known.ending is None
        self.state.dispatcher.give_back(turn, seconds, waits=waits)
        if is_last:
            problems = failure.get("problems") or [failure]
            self.set_ending(known, "failed", [_public(each) for each in problems])
        elif not waits and known.ending is None:
            due_s = self._monotonic() + delay_s(failures)
            heapq.heappush(self.state.delayed, (due_s, turn.job, turn.shard, turn.rows))

    def set_ending(self, known: Known, status: str, problems: list[dict[str, Any]]) -> None:
        """End a job as soon as no attempt of it runs."""
        if known.ending is None:
            known.ending = (status, problems[:_PROBLEMS])
            self.state.dispatcher.drop_job(known.job.id)

    def finish_ending(self) -> None:
        """End the jobs that are to end and of which nothing runs any more.

        Raises:
            OwnershipLost: There is a newer owner.
            DatabaseFailure: The database failed.
        """
        for known in [k for k in self.state.jobs.values() if k.ending and not k.turns]:
            if known.finish_at_s <= self._monotonic():
                self._finish(known)

    def _finish(self, known: Known) -> None:
        status, problems = known.ending or ("failed", [])
        job = self._store.job(known.job.id)
        try:
            if job is not None and job.is_active:
                self.state.committer.finish(job, status, problems)
        except FATAL:
            raise
        except STORAGE_ERRORS as error:
            log.warning("job %s cannot be ended: %s", known.job.id, error)
            known.finish_failures += 1
            known.finish_at_s = self._monotonic() + delay_s(known.finish_failures)
            if known.finish_failures < self._settings.attempts:
                return
            self.state.committer.fail(known.job, [described(error)])
        self.state.jobs.pop(known.job.id, None)
        log.info("job %s %s", known.job.id, status)


def _shard_task(known: Known, shard: StoredShard, allowed: list[str] | None) -> dict[str, Any]:
    fills_null = known.request["on_error"] == "null_fill"
    plan, job = known.plan, known.job
    output = OutputSpec(job.folder, plan["output_format"], plan["column"], fills_null, job.id)
    return {
        "kind": "shard",
        "shard": shard.number,
        "epoch": shard.epoch,
        "record": json.loads(shard.record),
        "source": {**plan["source"], "allowed": allowed},
        "output": vars(output),
    }


def delay_s(failures: int) -> float:
    """How long to wait before the next try: 1, 2, 4, 8, 16, then 30 seconds."""
    return min(30.0, 0.5 * 2.0 ** min(failures, 10))


def model_name(job: Job) -> str:
    """What tells the version of a model from all others."""
    return f"{job.model}/{job.version}@{job.digest[:16]}"


def problem(code: str, message: str) -> dict[str, Any]:
    """What is wrong with a job, as OpenAI's batches tell it."""
    return {"code": code, "message": message, "line": None, "param": None}


def _public(found: dict[str, Any]) -> dict[str, Any]:
    """A problem as users see it."""
    param = found.get("param") or found.get("column")
    return {**problem(found["code"], found["message"]), "line": found["line"], "param": param}


def described(error: BaseException) -> dict[str, Any]:
    """An error as a problem."""
    code = error.code if isinstance(error, RequestError) else "environment_failure"
    return problem(code, str(error))
