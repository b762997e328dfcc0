"""Runs over Ray's jobs: attempts, ids, and files on their way, with Ray's jobs as a dictionary."""

import base64
import hashlib
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from cluster.desk_client import ANSWER, END, FILE, PART, Desk
from cluster.errors import DeskFailure, JobRefused, RunUnknown
from cluster.jobs_api import JobsApi, JobView
from cluster.room import Shape, Worker
from cluster.submit import Packed, RayJobs
from configs.errors import EnvironmentFailure, UserError


class FakeApi:
    """What `JobsApi` does, without a cluster. A desk's job prints `answer`."""

    address = "http://head:8265"

    def __init__(self) -> None:
        self.all: dict[str, JobView] = {}
        self.commands: dict[str, str] = {}
        self.stopped: list[str] = []
        self.uploads: list[bytes] = []
        self.answer: str = ANSWER + "{}"
        self.queued: list[dict[str, Any]] | None = None

    def start(
        self, name: str, entrypoint: str, folder: Any, metadata: Any, environment: Any
    ) -> None:
        status = "SUCCEEDED" if name.startswith("lockstep-desk") else "RUNNING"
        self.commands[name] = entrypoint
        self.all.setdefault(name, JobView(name, status, "", None, len(self.all), metadata))

    def jobs(self) -> list[JobView]:
        return list(self.all.values())

    def status(self, name: str) -> JobView:
        return self.all[name]

    def logs(self, name: str) -> str:
        if not name.startswith("lockstep-desk"):
            return f"log of {name}\n"
        if self.queued is not None and " queued " in self.commands[name]:
            return ANSWER + json.dumps({"runs": self.queued})
        return f"some noise\n{self.answer}\n"

    async def tail(self, name: str) -> AsyncGenerator[str, None]:
        log = self.logs(name)
        for at in range(0, len(log), 1000):
            yield log[at : at + 1000]

    def stop(self, name: str) -> None:
        self.stopped.append(name)
        if name in self.all and not name.startswith("lockstep-desk"):
            self.end(name, "STOPPED", None)

    def forget(self, name: str) -> None:
        del self.all[name]

    def upload(self, content: bytes) -> str:
        self.uploads.append(content)
        return "gcs://unguessable"

    def has_queue(self) -> bool:
        return self.queued is not None

    def end(self, name: str, status: str, code: int | None) -> None:
        before = self.all[name]
        self.all[name] = JobView(name, status, "why", code, before.started_at, before.metadata)


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def jobs(api: FakeApi) -> RayJobs:
    return RayJobs(api.address, api=api, sleep=lambda _: None)  # type: ignore[arg-type]


def packed(run_id: str = "run", **changes: Any) -> Packed:
    return Packed(
        run_id, "job", Path("/sent"), "true", "/runs/run", Shape(1, Worker(1.0)), **changes
    )


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [
        ("PENDING", None, False),
        ("RUNNING", None, False),
        ("SUCCEEDED", 0, False),
        ("STOPPED", None, True),
        ("FAILED", 130, True),
        ("FAILED", 3, True),
    ],
)
def test_a_run_is_started_again_only_where_it_had_not_come_to_its_end(
    api, jobs, status, code, again
):
    jobs.submit(packed())
    api.end("run", status, code)
    jobs.submit(packed())
    assert list(api.all) == (["run", "run.2"] if again else ["run"])


def test_what_a_run_is_called_by_how_it_ended(api, jobs):
    for run_id, status, code in (
        ("a", "PENDING", None),
        ("b", "FAILED", 130),
        ("c", "FAILED", 2),
        ("d", "SUCCEEDED", 0),
    ):
        jobs.submit(packed(run_id), "ann")
        api.end(run_id, status, code)
    views = {view.run_id: (view.status, view.user, view.message) for view in jobs.list()}
    assert views == {
        "a": ("starting", "ann", ""),
        "b": ("stopped", "ann", ""),
        "c": ("failed", "ann", "why"),
        "d": ("done", "ann", ""),
    }


def test_logs_are_those_of_all_attempts(api, jobs):
    jobs.submit(packed())
    api.end("run", "STOPPED", None)
    jobs.submit(packed())
    assert "".join(jobs.logs("run")) == "log of run\nlog of run.2\n"
    api.end("run.2", "SUCCEEDED", 0)
    assert "".join(jobs.logs("run", follow=True)) == "log of run\nlog of run.2\n"


def test_a_stop_is_of_the_newest_attempt_and_happens_once(api, jobs):
    jobs.submit(packed())
    api.end("run", "STOPPED", None)
    jobs.submit(packed())
    assert jobs.stop("run").status == "stopped"
    assert jobs.stop("run").status == "stopped"
    assert api.stopped == ["run.2"]


def test_a_stop_that_takes_too_long_is_told(api):
    now = iter(range(0, 10_000, 100))
    jobs = RayJobs(api.address, api=api, sleep=lambda _: None, clock=lambda: float(next(now)))
    jobs.submit(packed())
    api.stop = lambda name: None
    with pytest.raises(EnvironmentFailure, match="was asked to stop 180 s ago and is running"):
        jobs.stop("run")


def test_secrets_travel_beside_the_job(api, jobs):
    jobs.submit(packed(secrets={"TOKEN": "hunter22"}))
    assert api.uploads == [b'{"TOKEN": "hunter22"}']
    assert "hunter22" not in repr(api.commands) + repr(api.all)
    assert any("gcs://unguessable" in command for command in api.commands.values())


def test_a_submission_that_is_refused_leaves_no_secrets(api, jobs):
    start = api.start

    def refused(name: str, *others: Any) -> None:
        if not name.startswith("lockstep-desk"):
            raise JobRefused("bad name")
        start(name, *others)

    api.start = refused
    with pytest.raises(JobRefused):
        jobs.submit(packed(secrets={"TOKEN": "hunter22"}))
    verbs = [command.split()[5] for command in api.commands.values()]
    assert verbs == ["keep", "drop"]


def test_the_queue_knows_whether_a_run_that_was_stopped_goes_on(api, jobs):
    record = {
        "run_id": "run",
        "name": "job",
        "user": "ann",
        "status": "waiting",
        "attempt": 1,
        "run_folder": "/runs/run",
        "message": "made room for other.",
        "submitted_at": 1.0,
    }
    api.queued = [record]
    view = jobs.status("run")
    assert (view.status, view.is_queued, view.is_final) == ("waiting", True, False)
    with pytest.raises(RunUnknown, match="no run 'rum' .* Did you mean 'run'"):
        jobs.status("rum")


def queued_record(**changes: Any) -> dict[str, Any]:
    return {
        "run_id": "run",
        "name": "job",
        "user": "ann",
        "status": "waiting",
        "attempt": 1,
        "run_folder": "/runs/run",
        "message": "",
        "submitted_at": 1.0,
        **changes,
    }


@pytest.mark.parametrize(("status", "code"), [("STOPPED", None), ("FAILED", 3)])
def test_a_run_that_ended_without_the_queue_and_waits_in_it_is_stopped_there(
    api, jobs, status, code
):
    jobs.submit(packed())
    api.end("run", status, code)
    api.queued = [queued_record()]
    assert (jobs.status("run").status, jobs.status("run").is_queued) == ("waiting", True)

    ask, asked = jobs._desk.ask, []

    def cancelled(verb: str, question: dict[str, Any], **others: Any) -> dict[str, Any]:
        asked.append((verb, question))
        if verb == "cancel":
            api.queued[0]["status"] = "stopped"
        return ask(verb, question, **others)

    jobs._desk.ask = cancelled
    assert jobs.stop("run").status == "stopped"
    assert ("cancel", {"run_id": "run"}) in asked
    assert api.stopped == []


def test_an_attempt_after_the_queues_last_one_is_the_runs(api, jobs):
    jobs.submit(packed())
    api.end("run", "STOPPED", None)
    jobs.submit(packed())
    api.end("run.2", "FAILED", 3)
    api.queued = [queued_record(status="stopped")]
    view = jobs.status("run")
    assert (view.status, view.attempt, view.is_queued) == ("failed", 2, False)
    assert jobs.list() == [view]


@pytest.mark.parametrize("status", [400, 500])
def test_a_job_of_that_name_is_the_one_that_was_to_be_started(status):
    """Of two clients that start a run at the same time the second one is told so by Ray."""

    class Client:
        def submit_job(self, **_: Any) -> None:
            text = "Job with submission_id a already exists. Please use a different one."
            raise RuntimeError(f"Request failed with status code {status}: {text}")

    api = JobsApi("http://head:8265")
    api._connected = Client()  # type: ignore[assignment]
    api.start("a", "true", None, {}, {})


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ("Request failed with status code 500: timed out.", EnvironmentFailure),
        ("Request failed with status code 503: .", EnvironmentFailure),
        ("Request failed with status code 400: bad name.", JobRefused),
        ("Version check failed", JobRefused),
    ],
)
def test_a_failure_of_rays_own_is_no_refusal(told, kind):
    class Client:
        def submit_job(self, **_: Any) -> None:
            raise RuntimeError(told)

        list_jobs = stop_job = lambda self, *_: self.submit_job()

    api = JobsApi("http://head:8265")
    api._connected = Client()  # type: ignore[assignment]
    for ask in (api.jobs, lambda: api.stop("a"), lambda: api.start("a", "true", None, {}, {})):
        with pytest.raises(kind):
            ask()


def test_no_queue_is_an_empty_one(jobs):
    assert jobs.queue() == []


def test_what_the_desk_refuses_is_the_users(api, jobs):
    api.answer = 'lockstep-refusal:"ann may have 1"'
    with pytest.raises(UserError, match="ann may have 1"):
        jobs.look(packed())


@pytest.mark.parametrize("log", ["python: not found", "No module named 'cluster'"])
def test_a_cluster_without_lockstep_is_told(api, jobs, log):
    api.answer = log
    with pytest.raises(DeskFailure, match=r"Lockstep is not installed for the `python` of http"):
        jobs.look(packed())


def arriving(name: str, content: bytes, digest: str | None = None) -> str:
    parts = [content[at : at + 700] for at in range(0, len(content), 700)]
    lines = [FILE + json.dumps(name), *(PART + base64.b64encode(part).decode() for part in parts)]
    return "\n".join([*lines, END + json.dumps(digest or hashlib.sha256(content).hexdigest())])


def test_files_arrive_whole(api, tmp_path):
    content = bytes(range(256)) * 40
    answer = ANSWER + json.dumps({"summary": {"status": "done"}, "files": ["a/b", "c"]})
    api.answer = "\n".join([arriving("a/b", content), arriving("c", b""), answer])
    Desk(api).fetch("/runs/run", tmp_path / "got")
    assert (tmp_path / "got" / "a" / "b").read_bytes() == content
    assert (tmp_path / "got" / "c").read_bytes() == b""
    assert [path.name for path in tmp_path.iterdir()] == ["got"]
    assert len(api.stopped) == 1  # it empties its log
    assert api.all == {}


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (arriving("a", b"x", "0" * 64), "did not arrive as it was sent"),
        (arriving("../a", b"x"), "outside of the folder"),
        (arriving("a", b"x"), "gave no answer"),
    ],
)
def test_files_that_do_not_arrive_whole_leave_nothing(api, tmp_path, sent, message):
    api.answer = sent
    with pytest.raises(EnvironmentFailure, match=message):
        Desk(api).fetch("/runs/run", tmp_path / "got")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_written_over(api, tmp_path):
    with pytest.raises(UserError, match="which exists"):
        Desk(api).fetch("/runs/run", tmp_path)
