"""The queue on a real cluster: thirty runs of three users, its process killed twice meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.room import Shape, Worker
from cluster.submit import Packed, RayJobs
from tests.support.ray_cluster import Cluster

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
STAND_IN = Path(__file__).parents[1] / "support" / "stand_in.py"
TICKS = 20
USERS = ("ann", "bob", "cat")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(head_cpus=2, environment={"LOCKSTEP_QUEUE_HORIZON_S": "20"}) as cluster:
        yield cluster


class Asking:
    """A process that has joined the cluster and calls its queue."""

    def __init__(self, cluster: Cluster) -> None:
        program = (
            "import json, sys, ray; from cluster import queue_actor\n"
            "ray.init('auto', namespace='lockstep', log_to_driver=False, logging_level=40)\n"
            "queue_actor.start()\n"
            "for line in sys.stdin:\n"
            "    method, arguments = json.loads(line)\n"
            "    arguments = [a.encode('latin1') if i and method == 'submit' else a\n"
            "                 for i, a in enumerate(arguments)]\n"
            "    print('answer:' + json.dumps(queue_actor.call(method, *arguments)), flush=True)\n"
        )
        environment = {**cluster.environment, "RAY_ADDRESS": f"127.0.0.2:{cluster.port}"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, method: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, arguments]) + "\n")
        self.process.stdin.flush()
        while True:  # Ray tells of dead workers in between
            line = self.process.stdout.readline()
            assert line, "the asking process has ended"
            if line.startswith("answer:"):
                return json.loads(line.removeprefix("answer:"))

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)


def traces(cluster: Cluster, run_id: str) -> list[tuple[float, str]]:
    path = cluster.folder / "runs" / run_id / "trace"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(float(line.split()[0]), line.split()[1]) for line in lines]


def test_thirty_runs_of_three_users(cluster: Cluster) -> None:
    import io
    import zipfile

    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("stand_in.py", STAND_IN.read_text())
    content = package.getvalue().decode("latin1")
    asking = Asking(cluster)

    def submit(run_id: str, user: str, priority: int = 0, workers: int = 1) -> None:
        folder = str(cluster.folder / "runs" / run_id)
        asked = {
            "run_id": run_id,
            "name": "counting",
            "user": user,
            "priority": priority,
            "shape": {"workers": workers, "worker": {"cpus": 1.0, "gpus": 0.0}},
            "entrypoint": f"exec python stand_in.py {folder} {TICKS}",
            "run_folder": folder,
        }
        asking.call("submit", asked, content)

    try:
        for number in range(27):
            submit(f"r{number}", USERS[number // 9])  # all of ann's first
        killed = 0
        urgent = False
        deadline = time.monotonic() + 800
        while True:
            runs = asking.call("runs")
            ended = [run for run in runs if run["status"] in ("done", "failed", "stopped")]
            if len(ended) >= 6 + 8 * killed and killed < 2:
                os.kill(asking.call("pid"), signal.SIGKILL)
                killed += 1
            if len(ended) >= 4 and not urgent:
                urgent = True
                for number, user in enumerate(USERS):  # three more: a gang of two each, urgent
                    submit(f"u{number}", user, priority=1, workers=2)
            if len(ended) == 30:
                break
            assert time.monotonic() < deadline, runs
            time.sleep(1.0)
        runs = asking.call("runs")
        assert asking.call("standings") == []
    finally:
        asking.close()

    assert killed == 2
    assert {run["run_id"]: run["status"] for run in runs} == {
        **{f"r{number}": "done" for number in range(27)},
        **{f"u{number}": "done" for number in range(3)},
    }
    for run in runs:  # none was lost, none ran twice, none did its work again
        trace = [what for _, what in traces(cluster, run["run_id"])]
        assert "TWICE" not in trace
        assert trace.count("done") == 1
        assert trace.count("start") == run["attempt"]
    ends = {run["run_id"]: traces(cluster, run["run_id"])[-1][0] for run in runs}
    usual = sorted((ends[f"r{number}"], USERS[number // 9]) for number in range(27))
    first_half = [user for _, user in usual[:13]]
    assert all(first_half.count(user) >= 3 for user in USERS), first_half  # shared, not in turn
    urgent_by = max(ends[f"u{number}"] for number in range(3))
    assert sum(end < urgent_by for end, _ in usual) <= 14, usual  # the urgent went first


def test_a_queue_that_is_asked_over_http_answers(cluster: Cluster) -> None:
    job = cluster.folder / "sent"
    job.mkdir()
    shutil.copy(STAND_IN, job)
    told = cluster.run("jobs", "quota", "ann", "--weight", "2", "--address", cluster.address)
    assert told.returncode == 0, told.stderr
    listed = cluster.run("jobs", "list", "--address", cluster.address, "--json")
    assert len(json.loads(listed.stdout)["runs"]) == 30
    queued = cluster.run("jobs", "queue", "--address", cluster.address, "--json")
    assert json.loads(queued.stdout) == {"queue": []}


def test_runs_make_room_by_their_checkpoints_and_go_on(cluster: Cluster) -> None:
    """Two runs hold all CPUs; an urgent gang of two comes. Without preemption it would wait."""
    jobs = RayJobs(cluster.address)

    def submitted(run_id: str, ticks: int, workers: int, priority: int) -> None:
        sent = cluster.folder / "sent"
        sent.mkdir(exist_ok=True)
        shutil.copy(STAND_IN, sent)
        folder = str(cluster.folder / "runs" / run_id)
        command = f"exec python stand_in.py {folder} {ticks}"
        shape = Shape(workers, Worker(1.0))
        jobs.enqueue(Packed(run_id, "counting", sent, command, folder, shape), "ann", priority)

    def until(is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not is_so():
            assert time.monotonic() < deadline, jobs.list()
            time.sleep(0.5)

    calm = ("calm0", "calm1")
    for run_id in calm:
        submitted(run_id, 300, 1, 0)
    until(lambda: all((cluster.folder / "runs" / one / "count").exists() for one in calm))
    submitted("urgent", 5, 2, 1)
    until(lambda: jobs.status("urgent").status == "done")
    assert [jobs.status(one).is_final for one in calm] == [False, False]
    until(lambda: all(jobs.status(one).is_final for one in calm))
    assert [(jobs.status(one).status, jobs.status(one).attempt) for one in calm] == [
        ("done", 2)
    ] * 2
    resumed = ["start", "end", "start", "done", "end"]  # asked to end; what was counted stayed
    for run_id in calm:
        assert [what for _, what in traces(cluster, run_id)] == resumed
    assert list((cluster.folder / "home").rglob("packages/*")) == []
