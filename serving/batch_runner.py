"""The dispatching of batch jobs: the loop that owns it, one for each database.

Takes jobs that were submitted, has them planned and their shards computed by a pool of predictors,
in the order that `serving.dispatcher` decides, and commits what comes back. All state that matters
is in the database and the output folders: a loop that starts where another has died goes on.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster.pool import Pool
from configs.errors import EnvironmentFailure, UserError
from serving.batch_commit import Committer
from serving.batch_owner import holder_name, is_dead
from serving.batch_seams import Models, RunnerSettings, Users
from serving.batch_starts import Starts
from serving.batch_store import BatchStore
from serving.batch_turns import State, Turns, problem
from serving.dispatcher import Dispatcher
from serving.errors import OwnershipLost

_AGAIN = 4  # refreshes until a loop that failed begins anew

log = logging.getLogger(__name__)


class BatchRunner:
    """The loop. `run` is called by one thread; `snapshot` by any.

    Args:
        store: Files and jobs.
        models: The registry.
        users: The accounts.
        make_pool: Gives the predictors' pool; called anew when an ownership begins.
        settings: How it behaves.
        sweep: Removes files whose time is over; called now and then by the owner.
        clock: Seconds since 1970.
        monotonic: Seconds that never go back.
    """

    def __init__(
        self,
        store: BatchStore,
        models: Models,
        users: Users,
        make_pool: Callable[[], Pool],
        settings: RunnerSettings,
        *,
        sweep: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._models, self._users = store, models, users
        self._make_pool, self._settings, self._sweep = make_pool, settings, sweep
        self._clock, self._monotonic = clock, monotonic
        self._pool: Pool | None = None
        self._turns: Turns | None = None
        self._starts: Starts | None = None
        self._lease_until_s = self._refresh_at_s = self._needed_at_s = self._sweep_at_s = 0.0
        self._holder = holder_name()

    def run(self, stop: threading.Event, drain_s: float = 10.0) -> None:
        """Own the dispatching whenever it is free, until `stop` is set; then finish what runs.

        A failure, of the database or of any other kind, ends the ownership, not the loop: it
        begins anew from what is recorded.
        """
        while not stop.is_set():
            try:
                if self._turns is None and not self.begin():
                    stop.wait(min(1.0, self._settings.lease_s / 4))
                    continue
                self.step(self._settings.refresh_s)
            except EnvironmentFailure as error:
                log.warning("dispatching stops: %s", error)
                self.abandon()
                stop.wait(_AGAIN * self._settings.refresh_s)
            except Exception as error:  # the loop's main: without it, all jobs would stand still
                log.error("dispatching failed and begins anew", exc_info=error)
                self.abandon()
                stop.wait(_AGAIN * self._settings.refresh_s)
        self.end(drain_s)

    def begin(self) -> bool:
        """Become the owner if nobody is, and take over where the last one has left.

        Raises:
            DatabaseFailure: The database failed.
        """
        settings = self._settings
        now_s = self._monotonic()
        epoch = self._store.acquire(self._holder, self._clock(), settings.lease_s, is_dead)
        if epoch is None:
            return False
        self._lease_until_s = now_s + settings.lease_s
        dispatcher = Dispatcher(settings.max_predictors)
        committer = Committer(self._store, epoch, self._keep, self._clock)
        self._turns = Turns(
            State(epoch, dispatcher, committer),
            self._store,
            self._users,
            settings,
            self._clock,
            self._monotonic,
        )
        self._starts = Starts(self._turns, self._store, self._models, settings, self._monotonic)
        self._pool = self._make_pool()
        self._refresh_at_s = 0.0
        log.info("dispatching batch jobs, epoch %d", epoch)
        return True

    def step(self, timeout_s: float) -> None:
        """One turn of the loop: look for jobs, give out shards, take what has ended.

        Args:
            timeout_s: How long to wait for something to end, at most.

        Raises:
            OwnershipLost: Another owns the dispatching now.
            DatabaseFailure: The database failed.
        """
        turns, pool, starts = self._owned()
        self._keep()
        if self._monotonic() >= self._refresh_at_s:
            self._refresh(turns, starts)
        starts.advance()
        turns.wake_delayed()
        self._scale(turns.state, pool)
        turns.dispatch(pool)
        turns.end_slow(pool)
        for ended in pool.poll(timeout_s):
            turns.take(ended)
        turns.finish_ending()

    def end(self, drain_s: float) -> None:
        """Give out nothing more, take what runs for at most `drain_s`, and let another begin."""
        if self._turns is None:
            return
        until_s = self._monotonic() + drain_s
        try:
            turns, pool, _ = self._owned()
            while turns.state.out and self._monotonic() < until_s:
                self._keep()
                for ended in pool.poll(0.1):
                    turns.take(ended)
            turns.finish_ending()
            self._store.release(turns.state.epoch)
        except EnvironmentFailure as error:
            log.warning("dispatching ends: %s", error)
        self.abandon()

    def abandon(self) -> None:
        """End all predictors and forget everything; the database has it. Idempotent."""
        if self._pool is not None:
            self._pool.close()
        if self._starts is not None:
            self._starts.close()
        self._pool = self._turns = self._starts = None

    def snapshot(self) -> dict[str, Any]:
        """Figures for metrics: seconds by user, rows by model, shards that wait and run, jobs."""
        turns = self._turns
        if turns is None:
            return {"is_owner": False}
        dispatcher = turns.state.dispatcher
        return {
            "is_owner": True,
            "served_s": dispatcher.served_s(),
            "rows": dict(turns.state.rows),
            "running": dispatcher.running,
            "waiting": dispatcher.waiting,
            "jobs": len(turns.state.jobs),
        }

    # -- inside ----------------------------------------------------------------------------------

    def _owned(self) -> tuple[Turns, Pool, Starts]:
        if self._turns is None or self._pool is None or self._starts is None:
            raise OwnershipLost("the dispatching is not owned. Call begin first.")
        return self._turns, self._pool, self._starts

    def _keep(self) -> None:
        """Renew the ownership in time; raise where it has run out meanwhile."""
        turns, _, _ = self._owned()
        now_s, lease_s = self._monotonic(), self._settings.lease_s
        if now_s < self._lease_until_s - lease_s * 2 / 3:
            return
        self._store.renew(turns.state.epoch, self._clock(), lease_s)
        self._lease_until_s = now_s + lease_s

    def _refresh(self, turns: Turns, starts: Starts) -> None:
        """Take up new jobs, end those that are cancelled or too late, tell progress."""
        begun_s, now = self._monotonic(), self._clock()
        state = turns.state
        for job in self._store.active_jobs():
            known = state.jobs.get(job.id)
            if known is None:
                known = starts.adopt(job)
            if job.status == "cancelling":
                turns.set_ending(known, "cancelled", [])
            elif job.expires_at <= now:
                text = "the job was not completed within its window"
                turns.set_ending(known, "expired", [problem("expired", text)])
        self._set_users(state)
        self._tell(state)
        if begun_s >= self._sweep_at_s:
            self._sweep()
            self._sweep_at_s = begun_s + self._settings.sweep_s
        # However many jobs there are, a tenth of the time goes into looking at them.
        spent_s = self._monotonic() - begun_s
        self._refresh_at_s = self._monotonic() + max(self._settings.refresh_s, 10 * spent_s)

    def _set_users(self, state: State) -> None:
        for user in {known.job.user_name for known in state.jobs.values()}:
            try:
                account = self._users.account(user)
            except UserError:
                continue  # removed since: what was accepted is finished
            state.dispatcher.set_user(user, account.weight, account.quotas.concurrent_shards)

    def _tell(self, state: State) -> None:
        """Record places and times to the end that have changed."""
        standings = state.dispatcher.standings()
        told = {
            name: (place, _rounded(eta_s))
            for name in state.jobs
            for place, eta_s in (standings.get(name, (None, None)),)
        }
        changed = {name: values for name, values in told.items() if state.told.get(name) != values}
        self._store.tell_progress(state.epoch, changed)
        state.told = told

    def _scale(self, state: State, pool: Pool) -> None:
        """As many predictors as there is work for, within bounds; fewer only after a while."""
        settings, now_s = self._settings, self._monotonic()
        least, held = settings.min_predictors, len(pool.idle()) + len(state.out)
        work = state.dispatcher.waiting + state.dispatcher.running
        wanted = max(least, min(settings.max_predictors, work))
        if wanted >= held:
            self._needed_at_s = now_s
            pool.resize(wanted)
        elif now_s - self._needed_at_s > settings.idle_s:
            pool.resize(wanted)


def _rounded(seconds: float | None) -> float | None:
    """Two digits are all that an estimate has."""
    return None if seconds is None else float(f"{seconds:.2g}")
