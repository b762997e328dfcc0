"""Ray's jobs API over HTTP, its replies as plain values, its failures as ours."""

import contextlib
import json
import logging
import os
import re
import secrets
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors

from cluster.errors import JobRefused
from configs.errors import EnvironmentFailure, UserError

RUN = "lockstep_run"
ATTEMPT = "lockstep_attempt"
QUEUE_CLASS = "QueueActor"
_ADDRESS = "RAY_API_SERVER_ADDRESS"
_NO_ANSWER = re.compile(r"status code 5\d\d")


@dataclass(frozen=True)
class JobView:
    """One Ray job.

    Attributes:
        submission_id: Its name.
        status: PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED.
        message: Ray's, with the end of the log of a job that failed.
        exit_code: Of its command; None where there was none, or Ray lost it.
        started_at: Unix time.
        metadata: As it was submitted.
    """

    submission_id: str
    status: str
    message: str = ""
    exit_code: int | None = None
    started_at: float = 0.0
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.status in ("SUCCEEDED", "STOPPED", "FAILED")

    @property
    def attempt(self) -> int:
        """Of its run; 0 where it is none of a run's."""
        return int(self.metadata.get(ATTEMPT, "0"))

    @property
    def shown(self) -> dict[str, Any]:
        """What `run_metadata` put in besides."""
        with contextlib.suppress(ValueError):
            shown = json.loads(self.metadata.get("lockstep_shown", "{}"))
            return shown if isinstance(shown, dict) else {}
        return {}

    @property
    def is_queued(self) -> bool:
        """Whether the queue started it."""
        return bool(self.shown.get("is_queued"))


def submission_id(run_id: str, attempt: int) -> str:
    """The name of the Ray job of an attempt."""
    return run_id if attempt == 1 else f"{run_id}.{attempt}"


def newest_attempts(jobs: Iterable[JobView]) -> dict[str, JobView]:
    """The last job of each run, by run id."""
    newest: dict[str, JobView] = {}
    for job in jobs:
        run_id = job.metadata.get(RUN)
        if run_id and (run_id not in newest or newest[run_id].attempt < job.attempt):
            newest[run_id] = job
    return newest


class JobsApi:
    """Requests to one cluster. Connects at the first one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._connected: JobSubmissionClient | None = None

    def start(
        self,
        name: str,
        entrypoint: str,
        folder: str | None,
        metadata: dict[str, str],
        environment: dict[str, str],
    ) -> None:
        """Start a job, in a copy of `folder` where one is given. A job that exists is left alone.

        Raises:
            JobRefused: Ray does not take it.
            EnvironmentFailure: Ray does not answer, or with a failure of its own (a status of 500
                or more): the job may have begun. Start it again under the same name.
        """
        runtime: dict[str, Any] = {"env_vars": environment}
        if folder is not None:
            runtime["working_dir"] = folder
        with self._explained():
            try:
                self._client().submit_job(
                    entrypoint=entrypoint,
                    submission_id=name,
                    runtime_env=runtime,
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise

    def jobs(self) -> list[JobView]:
        """All jobs that were submitted and that Ray remembers."""
        with self._explained():
            details = self._client().list_jobs()
        return [
            JobView(
                str(one.submission_id),
                str(getattr(one.status, "value", one.status)),
                one.message or "",
                one.driver_exit_code,
                (one.start_time or 0) / 1000,
                dict(one.metadata or {}),
            )
            for one in details
            if one.submission_id
        ]

    def status(self, name: str) -> JobView:
        """One job, which must exist."""
        with self._explained():
            one = self._client().get_job_info(name)
        return JobView(name, str(one.status.value), one.message or "", one.driver_exit_code)

    def logs(self, name: str) -> str:
        """What a job has printed."""
        with self._explained():
            logs: str = self._client().get_job_logs(name)
        return logs

    async def tail(self, name: str) -> AsyncGenerator[str, None]:
        """What a job prints, in pieces as it comes, to its end."""
        pieces = self._client().tail_job_logs(name)
        try:
            async for piece in pieces:
                yield piece
        except (RuntimeError, OSError) as error:
            raise EnvironmentFailure(self._lost(error)) from error

    def stop(self, name: str) -> None:
        """Ask a job to end. Idempotent."""
        with self._explained():
            self._client().stop_job(name)

    def forget(self, name: str) -> None:
        """Take a job that has ended out of Ray's list."""
        with self._explained():
            self._client().delete_job(name)

    def upload(self, content: bytes) -> str:
        """Hand a few bytes to the cluster, under a name that nobody can guess; returns the name."""
        name = f"_ray_pkg_{secrets.token_hex(16)}.zip"
        with self._explained():
            reply = self._client()._do_request("PUT", f"/api/packages/gcs/{name}", data=content)
            if reply.status_code != 200:
                raise EnvironmentFailure(f"{self.address} did not take an upload: {reply.reason}.")
        return f"gcs://{name}"

    def has_queue(self) -> bool:
        """Whether the cluster has a queue."""
        with self._explained(), _addressed(self.address):
            found = list_actors(
                self.address,
                filters=[("class_name", "=", QUEUE_CLASS), ("state", "!=", "DEAD")],
                raise_on_missing_output=False,
            )
        return bool(found)

    def _client(self) -> JobSubmissionClient:
        if self._connected is None:
            if "://" not in self.address:
                raise UserError(
                    f"--address received {self.address!r}; the URL of the cluster's dashboard is "
                    f"allowed. Use http://{self.address.partition(':')[0] or 'HEAD'}:8265."
                )
            for name in (
                "dashboard.modules.dashboard_sdk",
                "dashboard.modules.job.sdk",
                "_private",
            ):
                logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
            with _addressed(self.address):
                self._connected = JobSubmissionClient(self.address)
        return self._connected

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (ConnectionError, OSError) as error:
            raise EnvironmentFailure(self._lost(error)) from error
        except RuntimeError as error:
            if _NO_ANSWER.search(str(error)):  # what was asked for may have been done
                raise EnvironmentFailure(self._lost(error)) from error
            reason = (
                str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
            )
            raise JobRefused(f"the cluster at {self.address} refused: {reason}") from error

    def _lost(self, error: Exception) -> str:
        reason = " ".join(str(error).split())[:200]
        return (
            f"no answer from the cluster at {self.address} ({reason}). Check that its head runs, "
            "and that this machine reaches the dashboard's port, through a tunnel if need be."
        )


@contextlib.contextmanager
def _addressed(address: str) -> Iterator[None]:
    """Let an address count that is given: Ray prefers those of the environment."""
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = before
