"""The course of a pipeline's run: which step follows which, and where a rerun goes on.

    discover   what is new, and who is champion          nothing new: straight to notify
    prepare    the rows that judge are frozen, the job is settled
    train      the candidate
    evaluate   candidate and champion on the frozen rows
    decide     the gate's verdict, once for all
    register   the candidate becomes a version, whatever the verdict
    promote    it becomes champion, or the champion stays
    report     the page
    notify     the webhook

Owns order, resumption and what an ending means; the steps themselves are given. A step may be done
twice where its process died before it was recorded, so each must be safe to repeat; `promote`
records itself in the transaction that moves the alias, and is never repeated.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from configs.errors import EnvironmentFailure, LockstepError
from registry.leases import Heartbeat
from registry.pipelines import PipelineRun, PipelineStore, Result

Decision = Literal["promoted", "kept", "nothing_new"]
Done = Mapping[str, Result]
"""Results of the steps before, by name."""

Commit = Callable[[Any, Result], None]
"""Given a connection, records the step's result in its transaction; refuses where another process
took the pipeline over."""

STEPS = (
    *("discover", "prepare", "train", "evaluate", "decide"),
    *("register", "promote", "report", "notify"),
)
_WITHOUT_NEWS = ("discover", "notify")
_USERS_MISTAKE = 2


class Steps(Protocol):
    """The steps of one run. Each returns what is worth remembering, as plain JSON values."""

    def stale(self, done: Done) -> str:
        """Why an unfinished run must not be gone on with, or nothing."""

    def discover(self, done: Done) -> Result:
        """Gives `is_new` and `reason`."""

    def prepare(self, done: Done) -> Result:
        """Freezes rows."""

    def train(self, done: Done) -> Result:
        """Trains, or goes on with what was begun."""

    def evaluate(self, done: Done) -> Result:
        """Measures."""

    def decide(self, done: Done) -> Result:
        """Gives `is_passed` and `reasons`."""

    def register(self, done: Done) -> Result:
        """Gives `version`; registers one version a run, however often it is called."""

    def promote(self, done: Done, commit: Commit) -> Result:
        """Gives `decision` and `reasons`; calls `commit` in the transaction of a move."""

    def report(self, done: Done) -> Result:
        """Writes the page."""

    def notify(self, done: Done) -> Result:
        """Tells whoever wants to know; never fails."""


class Told(Protocol):
    """What is told while a run goes on."""

    def run(self, run_id: str, given_up: str, resumed_at: str) -> None:
        """A run begins, or goes on at a step; an earlier one may have been given up."""

    def step(self, name: str, result: Result) -> None:
        """A step is done."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run_id: The run.
        decision: What it came to.
        reasons: Why, a sentence each.
        is_resumed: Whether an earlier process had begun it.
        done: Results of all steps.
    """

    run_id: str
    decision: Decision
    reasons: tuple[str, ...]
    is_resumed: bool
    done: Done


@dataclass(frozen=True)
class Course:
    """A pipeline and where its runs are remembered.

    Attributes:
        pipeline: Its name.
        digest: Of all in its file that a run depends on; an unfinished run of another one is given
            up.
        store: The memory.
        heartbeat: Keeps the lease of the pipeline.
        clock: Seconds since 1970.
    """

    pipeline: str
    digest: str
    store: PipelineStore
    heartbeat: Heartbeat
    clock: Callable[[], float]

    def run(
        self,
        new_run_id: str,
        steps_of: Callable[[str], Steps],
        told: Told,
        is_fresh: bool = False,
    ) -> Outcome:
        """Go on with the unfinished run, or begin one, and take it to its end.

        Args:
            new_run_id: The id of a run that is begun.
            steps_of: The steps of the run of an id.
            told: Is told.
            is_fresh: Give up an unfinished run.

        Raises:
            LeaseLost: Another process took over; the run is its.
            LockstepError: A step failed. After a mistake of the user's the run has ended, else the
                next call goes on with it.
        """
        unfinished, given_up = self._unfinished(steps_of, is_fresh)
        run_id = new_run_id if unfinished is None else unfinished.run_id
        if unfinished is None:
            self.store.begin(self.heartbeat.lease, self.pipeline, run_id, self.digest, self.clock())
        done = {} if unfinished is None else self.store.results(run_id)
        waiting = [name for name in STEPS if name not in done]
        told.run(run_id, given_up, waiting[0] if done and waiting else "")
        try:
            self._take(run_id, steps_of(run_id), done, told)
        except LockstepError as error:
            if error.exit_status == _USERS_MISTAKE:
                self._end(run_id, "failed", None, str(error))
            raise
        decision, reasons = _ending(done)
        self._end(run_id, "done", decision, "\n".join(reasons))
        return Outcome(run_id, decision, reasons, unfinished is not None, done)

    def _unfinished(
        self, steps_of: Callable[[str], Steps], is_fresh: bool
    ) -> tuple[PipelineRun | None, str]:
        """The run to go on with, or why the one there was is given up."""
        runs = self.store.runs(self.pipeline, "running")
        if not runs:
            return None, ""
        run = runs[0]
        reason = ""
        if is_fresh:
            reason = "a fresh run was asked for"
        elif run.digest != self.digest:
            reason = "the pipeline file has changed since"
        else:
            with _failures_of("stale"):
                reason = steps_of(run.run_id).stale(self.store.results(run.run_id))
        if not reason:
            return run, ""
        self._end(run.run_id, "abandoned", None, reason)
        return None, f"run {run.run_id} is given up: {reason}"

    def _take(self, run_id: str, steps: Steps, done: dict[str, Result], told: Told) -> None:
        for name in STEPS:
            is_needed = name in _WITHOUT_NEWS or done["discover"]["is_new"]
            if name in done or not is_needed:
                continue
            self.heartbeat.check()
            if name == "promote":
                with _failures_of(name):
                    result = self._promote(run_id, steps, done)
            else:
                with _failures_of(name):
                    result = getattr(steps, name)(done)
                self.store.record(self.heartbeat.lease, run_id, name, result, self.clock())
            done[name] = result
            told.step(name, result)

    def _promote(self, run_id: str, steps: Steps, done: Done) -> Result:
        """The one step that must not be repeated: someone may have moved the alias since."""
        committed: list[Result] = []
        lease, now = self.heartbeat.lease, self.clock()

        def commit(connection: Any, result: Result) -> None:
            self.store.record_within(connection, lease, run_id, "promote", result, now)
            committed.append(result)

        result = steps.promote(done, commit)
        if not committed or result != committed[-1]:
            self.store.record(lease, run_id, "promote", result, now)
        return result

    def _end(
        self,
        run_id: str,
        status: Literal["done", "failed", "abandoned"],
        decision: Decision | None,
        said: str,
    ) -> None:
        self.store.end(self.heartbeat.lease, run_id, status, decision, said, self.clock())


@contextlib.contextmanager
def _failures_of(step: str) -> Iterator[None]:
    """What the machine refuses to a step: a folder that is not writable, a full disk."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(
            f"the step {step} failed: {error}. Mend the place or name another one (runs_dir), and "
            "run again: it goes on from this step."
        ) from error


def _ending(done: Done) -> tuple[Decision, tuple[str, ...]]:
    if not done["discover"]["is_new"]:
        return "nothing_new", (str(done["discover"]["reason"]),)
    promoted = done["promote"]
    return promoted["decision"], tuple(promoted["reasons"])
