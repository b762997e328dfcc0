"""Secrets on the head, which is a dictionary: kept for a run that is to come, and nobody else."""

import base64
import json
from typing import Any

import pytest

from cluster import desk, secret_keeping
from cluster.desk_client import ANSWER, REFUSAL
from cluster.jobs_api import RUN, JobView
from configs.errors import EnvironmentFailure, UserError


class Memory:
    """Keys and values of the head, as Ray's client shows them."""

    def __init__(self) -> None:
        self.values: dict[tuple[bytes | None, bytes], bytes] = {}

    def internal_kv_get(self, key: bytes, namespace: bytes | None) -> bytes | None:
        return self.values.get((namespace, key))

    def internal_kv_put(self, key: bytes, value: bytes, _: bool, namespace: bytes | None) -> None:
        self.values[(namespace, key)] = value

    def internal_kv_del(self, key: bytes, _: bool, namespace: bytes | None) -> None:
        self.values.pop((namespace, key), None)

    def internal_kv_keys(self, prefix: bytes, namespace: bytes | None) -> list[bytes]:
        return [key for place, key in self.values if place == namespace and key.startswith(prefix)]


@pytest.fixture
def memory(monkeypatch) -> Memory:
    memory = Memory()
    monkeypatch.setattr(secret_keeping, "_client", lambda: memory)
    monkeypatch.setattr(desk, "_join", lambda: None)
    return memory


@pytest.fixture
def ask(memory, monkeypatch, capsys, tmp_path):
    """A question to the desk, with a secret that was uploaded; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def ask(verb: str, run_id: str = "run", value: str = "hunter22") -> str:
        memory.values[(None, b"gcs://x")] = json.dumps({"TOKEN": value}).encode()
        asked = base64.b64encode(json.dumps({"run_id": run_id}).encode()).decode()
        monkeypatch.setattr("sys.argv", ["desk", verb, asked, "gcs://x"])
        desk.main()
        return capsys.readouterr().out

    return ask


def refusing(*_: Any) -> dict[str, Any]:
    raise UserError("no")


def test_what_is_taken_is_kept_for_its_run_until_it_is_dropped(memory, ask):
    assert ask("keep").startswith(ANSWER)
    assert secret_keeping.secrets_of("run") == {"TOKEN": "hunter22"}
    assert secret_keeping.secrets_of("other") == {}
    secret_keeping.drop_secrets("run")
    assert memory.values == {}


def test_a_submission_that_is_refused_leaves_what_was_there(memory, ask, monkeypatch):
    monkeypatch.setitem(desk._VERBS, "enqueue", refusing)
    assert ask("enqueue").startswith(REFUSAL)
    assert memory.values == {}
    ask("keep", value="of the run under way")
    assert ask("enqueue").startswith(REFUSAL)
    assert secret_keeping.secrets_of("run") == {"TOKEN": "of the run under way"}


class Cluster:
    """Ray's jobs and the queue's runs, as the desk sees them."""

    def __init__(self, jobs: dict[str, str], queued: dict[str, str] | None) -> None:
        self._jobs, self._queued = jobs, queued

    def jobs(self) -> list[JobView]:
        return [JobView(name, status, metadata={RUN: name}) for name, status in self._jobs.items()]

    def has_queue(self) -> bool:
        return self._queued is not None

    def call(self, _: str) -> list[dict[str, str]]:
        assert self._queued is not None
        return [{"run_id": name, "status": status} for name, status in self._queued.items()]


@pytest.fixture
def kept(memory, ask, monkeypatch):
    """Secrets of five runs, kept long ago, and of one that is about to start."""
    now = [1000.0]
    monkeypatch.setattr(secret_keeping.time, "time", lambda: now[0])
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(desk, "_sweep", lambda: None)
        for run_id in ("runs", "killed", "waits", "ended", "unknown"):
            ask("keep", run_id)
        now[0] += 3600
        ask("keep", "new")
    return memory


def runs(memory: Memory) -> set[str]:
    return {key.decode() for place, key in memory.values if place is not None}


def test_secrets_of_runs_that_ended_without_dropping_them_are_swept_out(kept, monkeypatch):
    jobs = {"runs": "RUNNING", "killed": "FAILED", "waits": "STOPPED", "ended": "STOPPED"}
    cluster = Cluster(jobs, {"waits": "waiting", "ended": "stopped"})
    monkeypatch.setattr(desk, "JobsApi", lambda _: cluster)
    monkeypatch.setattr(desk, "_api_address", lambda: "http://head:8265")
    monkeypatch.setattr(desk.queue_actor, "call", cluster.call)
    desk._sweep()
    assert runs(kept) == {"runs", "waits", "new"}


def test_where_ray_does_not_answer_nothing_is_swept_out(kept, monkeypatch):
    def silent() -> set[str]:
        raise EnvironmentFailure("no answer")

    before = runs(kept)
    monkeypatch.setattr(desk, "_live_runs", silent)
    desk._sweep()
    assert runs(kept) == before
