"""Runs on a cluster, seen from any machine: Ray Jobs is the only door, and this file its only user.

Everything goes through the one HTTP address of the cluster's head, with the authentication that
Ray has. What Ray Jobs itself cannot answer (versions and paths there, the queue, a run's files) is
asked by a small job of its own, the *desk* (`cluster.desk`). A run may take several Ray jobs, one
an attempt; each carries the run's id and is named `RUN` or `RUN.ATTEMPT`, and Ray refuses a name
that was used: nothing is started twice, whoever asks how often.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.desk_client import Desk
from cluster.errors import JobRefused, RunUnknown
from cluster.jobs_api import ATTEMPT, RUN, JobsApi, JobView, newest_attempts, submission_id
from cluster.room import Shape
from cluster.shares import Terms
from configs.errors import EnvironmentFailure, did_you_mean

_Rows = list[dict[str, Any]]

_POLL_S = 0.5
_WAITING_POLL_S = 5.0
STOP_GRACE_S = 150
"""Within which a run that is asked to stop writes its checkpoint and ends; then it is killed."""


@dataclass(frozen=True)
class Packed:
    """A job as it travels.

    Attributes:
        run_id: Names the run, here and there.
        name: Of the job.
        folder: All files that are sent; nothing outside of it is.
        entrypoint: The command that runs it there, in a copy of the folder.
        run_folder: Where it writes, on the cluster.
        shape: What its workers reserve.
        versions: Of this side, by package.
        inputs: Paths that must be there, by the field of the job that names them.
        outputs: Folders that it must be able to make, by field.
        secrets: Environment variables; they are in no file and no record.
    """

    run_id: str
    name: str
    folder: Path
    entrypoint: str
    run_folder: str
    shape: Shape
    versions: Mapping[str, str | None] = field(default_factory=dict)
    inputs: Mapping[str, list[str]] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class RunView:
    """A run as commands show it.

    Attributes:
        run_id: Its id.
        name: Of its job.
        user: Who submitted it, as far as told.
        status: waiting, starting, running, yielding, stopping, done, failed or stopped.
        attempt: How often it has been started.
        run_folder: Where it writes, on the cluster.
        message: Why it waits, or how it ended.
        submitted_at: Unix time; 0 where unknown.
        is_queued: Whether the queue decides about it.
    """

    run_id: str
    name: str
    user: str
    status: str
    attempt: int
    run_folder: str
    message: str
    submitted_at: float
    is_queued: bool = False

    @property
    def is_final(self) -> bool:
        """Whether nothing will change any more by itself."""
        return self.status in ("done", "failed", "stopped")


class RayJobs:
    """The runs of the cluster at `address`, `http://HEAD:8265`. Any number of clients may exist.

    All methods wait for the cluster with a bound, and raise EnvironmentFailure where it does not
    answer.
    """

    def __init__(
        self,
        address: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        api: JobsApi | None = None,
    ) -> None:
        self._api = api or JobsApi(address)
        self._desk = Desk(self._api)
        self._clock, self._sleep = clock, sleep

    def look(self, packed: Packed) -> dict[str, Any]:
        """What the cluster has: `nodes`, each with `versions`, `missing` and `unwritable` paths."""
        question = {"inputs": dict(packed.inputs), "outputs": dict(packed.outputs)}
        return self._desk.ask("look", question, folder=packed.folder)

    def submit(self, packed: Packed, user: str = "") -> str:
        """Start a run now, and return its id. One that runs or is done is left as it is.

        A run that had stopped or failed goes on from its newest checkpoint.
        """
        known = self._attempts().get(packed.run_id)
        if known is not None and _status(known) in ("starting", "running", "done"):
            return packed.run_id
        attempt = known.attempt + 1 if known else 1
        if packed.secrets:
            self._desk.ask("keep", {"run_id": packed.run_id}, secrets=packed.secrets)
        try:
            self._api.start(
                submission_id(packed.run_id, attempt),
                packed.entrypoint,
                str(packed.folder),
                run_metadata(packed.run_id, packed.name, user, packed.run_folder, attempt),
                {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)},
            )
        except JobRefused:
            if packed.secrets:
                self._desk.ask("drop", {"run_id": packed.run_id})
            raise
        return packed.run_id

    def enqueue(self, packed: Packed, user: str, priority: int = 0) -> RunView:
        """Put a run into the cluster's queue. Idempotent by run id.

        The first one starts the queue.
        """
        question = {
            "run_id": packed.run_id,
            "name": packed.name,
            "user": user,
            "priority": priority,
            "shape": asdict(packed.shape),
            "entrypoint": packed.entrypoint,
            "run_folder": packed.run_folder,
        }
        return _queued_view(
            self._desk.ask("enqueue", question, folder=packed.folder, secrets=packed.secrets)
        )

    def list(self) -> list[RunView]:
        """All runs that the cluster remembers, by submission."""
        views = {run_id: _view(job) for run_id, job in self._attempts().items()}
        if self._api.has_queue():
            for record in self._desk.ask("queued", {})["runs"]:
                there = views.get(record["run_id"])
                if there is None or there.attempt <= record["attempt"]:  # else started without it
                    views[record["run_id"]] = _queued_view(record)
        return sorted(views.values(), key=lambda view: (view.submitted_at, view.run_id))

    def status(self, run_id: str) -> RunView:
        """One run.

        Raises:
            RunUnknown: The cluster remembers no such run.
        """
        job = self._attempts().get(run_id)
        if job is not None and (not job.is_final or _status(job) == "done"):
            return _view(job)  # else the queue, if there is one, knows whether it goes on
        views = {view.run_id: view for view in self.list()}
        if run_id not in views:
            raise RunUnknown(
                f"no run {run_id!r} on {self._api.address}; `lockstep jobs list` shows all."
                f"{did_you_mean(run_id, views)}"
            )
        return views[run_id]

    def logs(self, run_id: str, follow: bool = False) -> Iterator[str]:
        """What a run prints, in pieces, over all its attempts; with `follow` until its end."""
        seen = 0
        while True:
            view = self.status(run_id)
            jobs = [job for job in self._api.jobs() if job.metadata.get(RUN) == run_id]
            for job in sorted(jobs, key=lambda job: job.attempt):
                if job.attempt <= seen:
                    continue
                if follow:
                    yield from self._tail(job.submission_id)
                else:
                    yield self._api.logs(job.submission_id)
                seen = job.attempt
            if not follow or (view.is_final and view.attempt <= seen):
                return
            self._sleep(_WAITING_POLL_S if view.status == "waiting" else _POLL_S)

    def stop(self, run_id: str, timeout_s: float = STOP_GRACE_S + 30.0) -> RunView:
        """Ask a run to write a checkpoint and end, and wait until it has. Idempotent.

        Raises:
            RunUnknown: There is no such run.
            EnvironmentFailure: It has not ended within `timeout_s`.
        """
        view = self.status(run_id)
        if view.is_queued:
            self._desk.ask("cancel", {"run_id": run_id})
        elif not view.is_final:
            self._api.stop(submission_id(run_id, view.attempt))
        deadline = self._clock() + timeout_s
        while not (view := self.status(run_id)).is_final:
            if self._clock() > deadline:
                raise EnvironmentFailure(
                    f"{run_id} was asked to stop {timeout_s:g} s ago and is {view.status}. See its "
                    "logs, or ask again."
                )
            self._sleep(_POLL_S)
        return view

    def result(self, run_id: str, output: Path | None = None) -> dict[str, Any]:
        """A run's summary; with `output` its artifact and records are written there, whole.

        Raises:
            RunUnknown: There is no such run, or it has no summary yet.
        """
        view = self.status(run_id)
        answer = self._desk.fetch(view.run_folder, output)
        if answer.get("summary") is None:
            raise RunUnknown(
                f"{run_id} is {view.status} and has no summary in {view.run_folder}. "
                f"{view.message} `lockstep jobs logs {run_id}` says more."
            )
        return answer

    def queue(self) -> _Rows:
        """Standings of all runs in the queue, those that wait in their order."""
        if not self._api.has_queue():
            return []
        standings: _Rows = self._desk.ask("standings", {})["standings"]
        return standings

    def set_terms(self, user: str, terms: Terms) -> dict[str, Any]:
        """Say what a user may have; returns the terms of all users."""
        return self._desk.ask("terms", {"user": user, "terms": asdict(terms)})

    def _tail(self, submission: str) -> Iterator[str]:
        loop = asyncio.new_event_loop()
        pieces = self._api.tail(submission)
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(pieces))
                except StopAsyncIteration:
                    return
        finally:
            loop.run_until_complete(pieces.aclose())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _attempts(self) -> dict[str, JobView]:
        return newest_attempts(self._api.jobs())


def run_metadata(
    run_id: str, name: str, user: str, run_folder: str, attempt: int, is_queued: bool = False
) -> dict[str, str]:
    """What a Ray job of a run carries for all to see."""
    shown = {"name": name, "user": user, "run_folder": run_folder, "is_queued": is_queued}
    return {RUN: run_id, ATTEMPT: str(attempt), "lockstep_shown": json.dumps(shown)}


def _status(job: JobView) -> str:
    return {
        "PENDING": "starting",
        "RUNNING": "running",
        "SUCCEEDED": "done",
        "STOPPED": "stopped",
    }.get(job.status, "stopped" if job.exit_code == 130 else "failed")


def _view(job: JobView) -> RunView:
    shown = job.shown
    message = "" if _status(job) != "failed" else job.message
    return RunView(
        job.metadata[RUN],
        shown.get("name", ""),
        shown.get("user", ""),
        _status(job),
        job.attempt,
        shown.get("run_folder", ""),
        message,
        job.started_at,
        job.is_queued,
    )


def _queued_view(record: Mapping[str, Any]) -> RunView:
    return RunView(**{**record, "is_queued": True})
