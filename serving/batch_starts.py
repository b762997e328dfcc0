"""How jobs begin, and go on after an owner has died: what each needs before its next turn.

That is its shards in accord with its output, and its model's artifact on this machine. Either may
fail, or be long in coming, for one job: it is tried again after a while, and nobody else waits.
Artifacts are fetched and hashed by threads of their own; all else is the loop's.
"""

import json
import logging
import math
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import EnvironmentFailure, UserError
from serving.batch_commit import FATAL, STORAGE_ERRORS
from serving.batch_seams import Models, RunnerSettings
from serving.batch_store import BatchStore
from serving.batch_tables import Job
from serving.batch_turns import PLAN, Known, Turns, delay_s, described, model_name, problem

_THREADS = 4

log = logging.getLogger(__name__)

_Found = tuple[str, Path | Exception]


class Artifacts:
    """Fetches artifacts of models; `ask`, `take` and `close` are called by one thread.

    Args:
        models: The registry.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self._asked: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[_Found] = queue.SimpleQueue()
        self._coming: set[str] = set()
        self._threads: list[threading.Thread] = []

    def ask(self, job: Job) -> None:
        """Have a job's artifact fetched; `take` tells the outcome. Idempotent until then."""
        name = model_name(job)
        if name in self._coming:
            return
        self._coming.add(name)
        if len(self._threads) < min(_THREADS, len(self._coming)):
            # Daemons: a store that does not answer must not keep the process from ending.
            self._threads.append(threading.Thread(target=self._fetch, daemon=True))
            self._threads[-1].start()
        self._asked.put(job)

    def take(self) -> list[_Found]:
        """What has come since: names of models with their folder, or with what was raised."""
        found: list[_Found] = []
        while True:
            try:
                found.append(self._found.get_nowait())
            except queue.Empty:
                self._coming.difference_update(name for name, _ in found)
                return found

    def close(self) -> None:
        """Have the threads end when they can."""
        for _ in self._threads:
            self._asked.put(None)

    def _fetch(self) -> None:
        while (job := self._asked.get()) is not None:
            outcome: Path | Exception
            try:
                outcome = self._models.fetch(self._models.version(job.model, job.version))
            except Exception as error:  # the thread's main: the job would wait for ever
                outcome = error
            self._found.put((model_name(job), outcome))


class Starts:
    """Jobs between being taken up and their next turn. Used by the loop's thread.

    Args:
        turns: Receives the jobs.
        store: Files and jobs.
        models: The registry.
        settings: How the loop behaves.
        monotonic: Seconds that never go back.
    """

    def __init__(
        self,
        turns: Turns,
        store: BatchStore,
        models: Models,
        settings: RunnerSettings,
        monotonic: Callable[[], float],
    ) -> None:
        self._turns, self._store = turns, store
        self._settings, self._monotonic = settings, monotonic
        self._artifacts = Artifacts(models)
        self._here: dict[str, Path] = {}
        self._waiting: dict[str, Known] = {}

    def adopt(self, job: Job) -> Known:
        """Take a job up; it begins with one of the next calls of `advance`."""
        state = self._turns.state
        known = Known(job, json.loads(job.request), json.loads(job.plan or "{}"))
        state.jobs[job.id] = known
        state.dispatcher.add_job(job.id, job.user_name, model_name(job), priority=job.priority)
        if job.status != "cancelling":
            self._waiting[job.id] = known
        return known

    def advance(self) -> None:
        """Begin the jobs that can begin.

        Raises:
            OwnershipLost: There is a newer owner.
            DatabaseFailure: The database failed.
        """
        for model, outcome in self._artifacts.take():
            if isinstance(outcome, Path):
                self._here[model] = outcome
            for known in [k for k in self._waiting.values() if model_name(k.job) == model]:
                known.begin_at_s = 0.0
                if isinstance(outcome, Exception):
                    self._failed(known, outcome, self._model_problem(known, outcome))
        now_s = self._monotonic()
        for name, known in list(self._waiting.items()):
            if known.ending is not None:
                del self._waiting[name]
            elif known.begin_at_s <= now_s:
                self._begin(known)

    def close(self) -> None:
        """End what is under way."""
        self._artifacts.close()

    # -- inside --------------------------------------------------------------------------------

    def _begin(self, known: Known) -> None:
        job = known.job
        if known.left is None:
            try:
                known.left = self._left_to_do(job)
            except FATAL:
                raise
            except STORAGE_ERRORS as error:
                self._failed(known, error, described(error))
                return
        if not known.left:
            del self._waiting[job.id]
            self._turns.check_progress(known)
            return
        artifact = self._here.get(model_name(job))
        if artifact is None or not artifact.is_dir():
            known.begin_at_s = math.inf
            self._artifacts.ask(job)
            return
        del self._waiting[job.id]
        known.artifact = str(artifact)
        self._turns.state.dispatcher.add_shards(job.id, known.left)

    def _left_to_do(self, job: Job) -> list[tuple[int, int]]:
        """Shards that wait, with their rows; planning is one of no rows."""
        if job.status == "validating":
            return [(PLAN, 0)]
        self._turns.state.committer.reconcile(job)
        waiting = self._store.shards(job.id, "pending")
        return [(shard.number, shard.row_count) for shard in waiting]

    def _failed(self, known: Known, error: BaseException, told: dict[str, Any]) -> None:
        known.begin_failures += 1
        log.warning("job %s cannot begin: %s", known.job.id, error, exc_info=_unexpected(error))
        is_last = known.begin_failures >= self._settings.begin_attempts
        if is_last or isinstance(error, UserError):
            self._turns.set_ending(known, "failed", [told])
            return
        known.begin_at_s = self._monotonic() + delay_s(known.begin_failures)

    def _model_problem(self, known: Known, error: BaseException) -> dict[str, Any]:
        job = known.job
        if isinstance(error, UserError):
            return problem("model_unavailable", str(error))
        # Where the registry keeps its files is no matter of users'; the log has it.
        text = (
            f"the files of {job.model}/{job.version} cannot be read, or are damaged. Ask an "
            "administrator of the service to look at its log, or use another version."
        )
        return problem("model_unavailable", text)


def _unexpected(error: BaseException) -> BaseException | None:
    """An error whose traceback belongs into the log."""
    return None if isinstance(error, (EnvironmentFailure, UserError, OSError)) else error
