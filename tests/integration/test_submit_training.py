"""A training job on a cluster of several nodes, submitted by a process that is not part of it."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.submit import RayJobs, run_metadata
from tests.support.jobs import make_job, write_data
from tests.support.ray_cluster import Cluster, RayNode

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
EPOCHS = 25
CODE = """
import keras
from layers.middle import UNITS

def build():
    model = keras.Sequential([keras.layers.Dense(UNITS, activation="tanh"), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model

def build_with_secret():
    import os
    assert len(os.environ["LOCKSTEP_TEST_TOKEN"]) == 17, "the secret has not come"
    return build()

class Slow(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        import time
        time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and three nodes of one CPU: the gang takes two."""
    with Cluster(head_cpus=0) as cluster:
        for _ in range(3):
            cluster.add_node(1)
        write_data(cluster.folder / "data")
        (cluster.folder / "model.py").write_text(CODE)
        (cluster.folder / "layers").mkdir()
        (cluster.folder / "layers" / "middle.py").write_text("UNITS = 8\n")
        job = make_job(
            Path("data"),
            Path("runs"),
            model={"builder": "model.py:build"},
            train__epochs=EPOCHS,
            train__callbacks=["model.py:Slow"],
            train__steps_per_execution=2,
            checkpoint__snapshot_every_s=1.0,
            export={"h5": False, "saved_model": False},
        )
        del job["compile"]
        (cluster.folder / "job.yaml").write_text(yaml.safe_dump(job))
        yield cluster


def lockstep(cluster: Cluster, *arguments: str) -> Any:
    done = cluster.run(*arguments, "--address", cluster.address, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def events(cluster: Cluster, run_id: str, kind: str) -> list[dict[str, Any]]:
    path = cluster.folder / "runs" / "small" / run_id / "events.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event for event in told if event["event"] == kind]


def until_epoch(cluster: Cluster, run_id: str, epoch: int, timeout_s: float = 240.0) -> None:
    path = cluster.folder / "runs" / "small" / run_id / "metrics.jsonl"
    deadline = time.monotonic() + timeout_s
    while not path.exists() or path.read_text().count("\n") < epoch:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def until_ended(cluster: Cluster, run_id: str, timeout_s: float = 300.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while (view := lockstep(cluster, "jobs", "status", run_id))["status"] in (
        *("starting", "running", "waiting", "yielding"),
    ):
        assert time.monotonic() < deadline, view
        time.sleep(1.0)
    assert isinstance(view, dict)
    return view


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, Any]:
    """Submitted, followed for a while by a client that then is gone; fetched by another."""
    submitted = lockstep(cluster, "submit", "job.yaml", "--run-id", "first")
    assert {"model.py", "layers/middle.py", "job.yaml"} <= set(submitted["sent"])
    with (cluster.folder / "followed").open("wb") as log:
        client = subprocess.Popen(
            cluster.command("jobs", "logs", "-f", "first", "--address", cluster.address),
            env=cluster.client_environment,
            stdout=log,
            stderr=log,
        )
        until_epoch(cluster, "first", 3)
        client.send_signal(signal.SIGKILL)
        client.wait()
    assert until_ended(cluster, "first")["status"] == "done"
    assert "epoch 1/" in (cluster.folder / "followed").read_text()
    got = lockstep(cluster, "jobs", "result", "first", "--output", "got")
    assert (cluster.folder / "got" / "artifact" / "model.keras").stat().st_size > 0
    summary = got["summary"]
    assert summary["epochs"] == EPOCHS
    assert isinstance(summary, dict)
    return summary


def test_it_runs_to_its_end_without_its_client(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["status"] == "done"
    assert undisturbed["workers"] == 2


def test_a_secret_reaches_all_processes_of_its_run_and_no_file(
    cluster: Cluster, undisturbed: dict[str, Any]
) -> None:
    """The builder runs in the driver and in each worker; it refuses to go on without it."""
    value = "hunter22-and-more"
    environment = {**cluster.client_environment, "LOCKSTEP_TEST_TOKEN": value}
    words = ["submit", "job.yaml", "--run-id", "secret", "--env", "LOCKSTEP_TEST_TOKEN"]
    changes = ["--set", "model.builder=model.py:build_with_secret", "--set", "train.epochs=2"]
    done = cluster.run(*words, *changes, "--address", cluster.address, env=environment)
    assert done.returncode == 0, done.stderr
    assert until_ended(cluster, "secret")["status"] == "done"
    files = [path for path in cluster.folder.rglob("*") if path.is_file()]
    assert [path for path in files if value.encode() in path.read_bytes()] == []
    look = "from cluster.secret_keeping import secrets_of; print(secrets_of('secret'))"
    jobs = RayJobs(cluster.address)
    about = run_metadata("looking", "looking", "", "", 1)
    jobs._api.start("looking", f'exec python -c "{look}"', None, about, {})
    assert "{}" in "".join(jobs.logs("looking", follow=True))  # dropped at its end


def test_a_node_that_is_killed_leaves_no_trace_in_the_result(
    cluster: Cluster, undisturbed: dict[str, Any]
) -> None:
    lockstep(cluster, "submit", "job.yaml", "--run-id", "second")
    until_epoch(cluster, "second", 5)
    node = _node_of_rank(cluster, "second", 1)
    node.kill()
    assert until_ended(cluster, "second")["status"] == "done"
    summary = lockstep(cluster, "jobs", "result", "second")["summary"]
    assert summary["weights_sha256"] == undisturbed["weights_sha256"]
    assert events(cluster, "second", "failure")
    cluster.add_node(1)


def test_a_stop_leaves_a_checkpoint_and_the_same_submission_goes_on(
    cluster: Cluster, undisturbed: dict[str, Any]
) -> None:
    lockstep(cluster, "submit", "job.yaml", "--run-id", "third")
    until_epoch(cluster, "third", 4)
    assert lockstep(cluster, "jobs", "stop", "third")["status"] == "stopped"
    assert not [p for p in cluster.ours() if "cluster.template" in " ".join(_command(p))]
    lockstep(cluster, "submit", "job.yaml", "--run-id", "third")
    view = until_ended(cluster, "third")
    assert (view["status"], view["attempt"]) == ("done", 2)
    summary = lockstep(cluster, "jobs", "result", "third")["summary"]
    assert summary["weights_sha256"] == undisturbed["weights_sha256"]


def test_the_queue_preempts_by_checkpoint_and_nothing_is_lost(
    cluster: Cluster, undisturbed: dict[str, Any]
) -> None:
    """A gang of two and an urgent gang of three, on three CPUs."""
    lockstep(cluster, "submit", "job.yaml", "--run-id", "low", "--queue", "--user", "ann")
    until_epoch(cluster, "low", 4)
    urgent = ("--run-id", "urgent", "--queue", "--user", "bob", "--priority", "2")
    small = ("--set", "train.epochs=2", "--workers", "3")
    lockstep(cluster, "submit", "job.yaml", *urgent, *small)
    assert until_ended(cluster, "urgent")["status"] == "done"
    view = until_ended(cluster, "low")
    assert (view["status"], view["attempt"]) == ("done", 2)
    summary = lockstep(cluster, "jobs", "result", "low")["summary"]
    assert summary["weights_sha256"] == undisturbed["weights_sha256"]


def _node_of_rank(cluster: Cluster, run_id: str, rank: int) -> RayNode:
    pid = events(cluster, run_id, "formed")[-1]["pids"][rank]
    for node in cluster.nodes[1:]:
        if pid in [process.pid for process in node.processes()]:
            return node
    raise AssertionError(f"no node has the process {pid}")


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
