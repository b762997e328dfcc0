"""The queue's keeper against a cluster of fakes: it may die at any moment, nothing runs twice."""

import random
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import JobRefused
from cluster.jobs_api import ATTEMPT, RUN, JobView
from cluster.queue_keeper import Keeper
from cluster.queue_store import QueueStore, Record
from cluster.room import Worker
from cluster.shares import Policy, Terms
from configs.errors import EnvironmentFailure, UserError

POLICY = Policy(horizon_s=10.0, priority_s=1000.0)


class Death(BaseException):
    """The keeper's process ends here."""


class FakeCluster:
    """Ray Jobs, nodes and a clock; jobs take `length_s` in all, over all their attempts."""

    def __init__(self, cpus: float, length_s: float = 5.0) -> None:
        self.now = 1000.0
        self.cpus, self.length_s = cpus, length_s
        self.jobs: dict[str, dict[str, Any]] = {}
        self.work: dict[str, float] = {}
        self.overlaps: list[str] = []
        self.most_used = 0.0
        self.ended_runs: list[str] = []
        self.is_down = False
        self.silent_starts = 0  # answered by 500, those of jobs that begin all the same
        self.broken: set[str] = set()  # runs whose jobs do not begin, and 500 is the answer
        self.dies_at = -1  # the number of the call in which the keeper dies
        self.calls = 0

    # Jobs

    def states(self) -> dict[str, JobView]:
        self._called()
        return {
            name: JobView(
                name,
                job["status"],
                "",
                job["code"],
                metadata={RUN: job["run"], ATTEMPT: name.partition(".")[2] or "1"},
            )
            for name, job in self.jobs.items()
        }

    def start(self, name: str, record: Record, package: bytes) -> None:
        self._called()
        assert package == b"files"
        if record.run_id in self.broken:
            raise EnvironmentFailure("status code 500")
        if name not in self.jobs:
            alive = [job for job in self._alive() if job["run"] == record.run_id]
            if alive:
                self.overlaps.append(name)
            shape = record.shape
            self.jobs[name] = {
                "run": record.run_id,
                "status": "RUNNING",
                "code": None,
                "cpus": shape.cpus,
                "stop": None,
            }
            self.most_used = max(self.most_used, sum(job["cpus"] for job in self._alive()))
        self._called()  # dies after the job has begun
        if self.silent_starts:
            self.silent_starts -= 1
            raise EnvironmentFailure("status code 500")

    def stop(self, name: str) -> None:
        self._called()
        if self.jobs[name]["status"] == "RUNNING" and self.jobs[name]["stop"] is None:
            self.jobs[name]["stop"] = self.now + 1.0  # writes its checkpoint
        self._called()

    def ended(self, run_id: str) -> None:
        self.ended_runs.append(run_id)

    # Nodes

    def whole(self) -> dict[str, Worker]:
        return {"n0": Worker(self.cpus)}

    def used(self) -> dict[str, Worker]:
        return {"n0": Worker(sum(job["cpus"] for job in self._alive()))}

    def placed(self) -> dict[str, dict[str, int]]:
        return {job["run"]: {"n0": int(job["cpus"])} for job in self._alive()}

    def want(self, shapes: Any) -> None:
        self.wanted = list(shapes)

    # Time

    def advance(self, seconds: float = 1.0) -> None:
        self.now += seconds
        for job in self._alive():
            done = self.work[job["run"]] = self.work.get(job["run"], 0.0) + seconds
            if done >= self.length_s:
                job.update(status="SUCCEEDED", code=0)
            elif job["stop"] is not None and self.now >= job["stop"]:
                job.update(status="STOPPED", code=130)

    def end(self, name: str, status: str, code: int | None) -> None:
        self.jobs[name].update(status=status, code=code)

    def _alive(self) -> list[dict[str, Any]]:
        return [job for job in self.jobs.values() if job["status"] == "RUNNING"]

    def _called(self) -> None:
        if self.is_down:
            raise EnvironmentFailure("no answer")
        self.calls += 1
        if self.calls == self.dies_at:
            raise Death


class Life:
    """Keepers of one file, one after the other."""

    def __init__(self, folder: Path, cluster: FakeCluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.restarts = -1
        self.restart()

    def restart(self) -> None:
        if self.restarts >= 0:
            self.store.close()
        self.restarts += 1
        self.store = QueueStore(self.folder / "queue.db")
        cluster = self.cluster
        self.keeper = Keeper(self.store, cluster, cluster, lambda: cluster.now, POLICY)

    def submit(self, run_id: str, user: str = "ann", workers: int = 1, priority: int = 0) -> str:
        asked = {
            "run_id": run_id,
            "name": "small",
            "user": user,
            "priority": priority,
            "shape": {"workers": workers, "worker": {"cpus": 1.0, "gpus": 0.0}},
            "entrypoint": "true",
            "run_folder": f"/runs/{run_id}",
        }
        return self.keeper.submit(asked, b"files")

    def step(self) -> None:
        try:
            self.keeper.step()
        except EnvironmentFailure:
            pass
        except Death:
            self.restart()

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.step()
            self.cluster.advance()

    def status(self, run_id: str) -> str:
        return next(one.status for one in self.keeper.records() if one.run_id == run_id)


@pytest.fixture
def life(tmp_path):
    life = Life(tmp_path, FakeCluster(2.0))
    yield life
    life.store.close()


def test_runs_start_end_and_are_remembered(life):
    life.submit("a")
    life.submit("b", workers=2)
    life.run(3)
    assert (life.status("a"), life.status("b")) == ("running", "waiting")
    life.run(12)
    assert (life.status("a"), life.status("b")) == ("done", "done")
    assert life.cluster.ended_runs == ["a", "b"]
    life.restart()
    assert life.status("b") == "done"


def test_a_run_is_taken_in_once(life):
    assert life.submit("a") == life.submit("a") == "a"
    life.run(2)
    life.submit("a")
    life.run(10)
    life.submit("a")  # it is done
    life.run(3)
    assert list(life.cluster.jobs) == ["a"]


def test_a_run_that_makes_room_goes_on_and_loses_nothing(life):
    life.submit("low", workers=2)
    life.run(2)
    life.submit("urgent", workers=2, priority=1)
    life.run(4)
    assert (life.status("low"), life.status("urgent")) == ("waiting", "running")
    low = next(one for one in life.keeper.records() if one.run_id == "low")
    assert low.message == "made room for urgent."
    life.run(12)
    assert (life.status("low"), life.status("urgent")) == ("done", "done")
    assert list(life.cluster.jobs) == ["low", "urgent", "low.2"]
    assert life.cluster.jobs["low.2"]["status"] == "SUCCEEDED"


def test_a_stop_is_clean_and_a_new_submission_resumes(life):
    life.submit("a")
    life.run(2)
    life.keeper.cancel("a")
    assert life.status("a") == "stopping"
    life.run(3)
    assert life.status("a") == "stopped"
    life.submit("a")
    life.run(8)
    assert life.status("a") == "done"
    assert list(life.cluster.jobs) == ["a", "a.2"]


def test_a_waiting_run_is_taken_out_at_once(life):
    life.submit("a", workers=2)
    life.submit("b", workers=2)
    life.run(1)
    life.keeper.cancel("b")
    assert life.status("b") == "stopped"
    life.keeper.cancel("b")
    life.run(10)
    assert list(life.cluster.jobs) == ["a"]


def test_a_run_that_was_started_without_the_queue_keeps_its_attempts(life):
    job = {"run": "a", "status": "RUNNING", "code": None, "cpus": 1.0, "stop": None}
    life.cluster.jobs["a"] = job
    with pytest.raises(UserError, match="a was started without the queue and is running"):
        life.submit("a")
    life.cluster.end("a", "STOPPED", None)
    life.submit("a")
    life.run(9)
    assert life.status("a") == "done"
    assert list(life.cluster.jobs) == ["a", "a.2"]


def test_an_unknown_run_is_refused(life):
    with pytest.raises(UserError, match="knows no run 'x'"):
        life.keeper.cancel("x")


def test_a_run_that_no_quota_could_hold_is_refused(life):
    life.keeper.set_terms("ann", Terms(max_cpus=1))
    with pytest.raises(UserError, match="asks for 2 CPUs; ann may have 1 at a time"):
        life.submit("a", workers=2)


@pytest.mark.parametrize(
    ("code", "status"), [(2, "failed"), (1, "failed"), (3, "failed"), (130, "stopped")]
)
def test_how_a_run_ended_is_believed(life, code, status):
    life.submit("a")
    life.run(2)
    life.cluster.end("a", "FAILED", code)
    life.run(2)
    assert life.status("a") == status
    assert list(life.cluster.jobs) == ["a"]


@pytest.mark.parametrize("code", [None, -9, 137])
def test_a_run_whose_process_was_lost_goes_on(life, code):
    life.submit("a")
    life.run(2)
    life.cluster.end("a", "FAILED", code)
    life.run(8)
    assert life.status("a") == "done"
    assert list(life.cluster.jobs) == ["a", "a.2"]


def test_a_run_that_is_lost_again_and_again_is_given_up(life):
    life.cluster.length_s = 1e6
    life.submit("a")
    for _ in range(10):
        life.run(3)
        for name in list(life.cluster.jobs):
            if life.cluster.jobs[name]["status"] == "RUNNING":
                life.cluster.end(name, "FAILED", -9)
    assert life.status("a") == "failed"
    assert len(life.cluster.jobs) == 6


def test_a_new_head_knows_no_jobs_and_all_runs_go_on(life):
    life.submit("a")
    life.run(2)
    life.cluster.jobs.clear()
    life.restart()
    life.run(10)
    assert life.status("a") == "done"
    assert list(life.cluster.jobs) == ["a.2"]


def test_what_has_been_had_survives(life):
    life.submit("a")
    life.run(4)
    had = life.store.users()["ann"][1]
    assert had > 0
    life.restart()
    assert life.keeper.records()[0].run_id == "a"
    life.run(2)
    assert life.store.users()["ann"][1] > had


def test_a_cluster_that_does_not_answer_loses_nothing(life):
    life.submit("a")
    life.submit("b")
    life.cluster.is_down = True
    life.run(5)
    life.cluster.is_down = False
    life.run(9)
    assert (life.status("a"), life.status("b")) == ("done", "done")
    assert len(life.cluster.jobs) == 2


def test_a_job_that_begins_while_ray_answers_by_500_is_neither_lost_nor_begun_twice(life):
    life.cluster.silent_starts = 2
    life.submit("a")
    life.submit("b")
    life.run(9)
    assert (life.status("a"), life.status("b")) == ("done", "done")
    assert list(life.cluster.jobs) == ["a", "b"]
    assert [record.losses for record in life.keeper.records()] == [0, 0]
    assert life.restarts == 0


def test_a_run_that_ray_cannot_start_holds_nobody_up_and_is_told(life):
    life.cluster.broken = {"bad"}
    life.submit("bad")
    life.submit("good", user="bob")
    life.run(8)
    assert (life.status("bad"), life.status("good")) == ("starting", "done")
    life.cluster.broken = set()
    life.run(8)
    assert life.status("bad") == "done"
    life.cluster.broken = {"worse"}
    life.submit("worse")
    life.run(15)
    assert life.status("worse") == "failed"
    assert "500" in next(o.message for o in life.keeper.records() if o.run_id == "worse")


def test_a_job_that_is_gone_when_it_is_asked_to_end_ends_no_queue(life, monkeypatch):
    life.submit("a")
    life.run(2)

    def refused(name: str) -> None:
        raise JobRefused(f"{name} does not exist")

    monkeypatch.setattr(life.cluster, "stop", refused)
    life.keeper.cancel("a")
    life.cluster.end("a", "STOPPED", None)
    life.run(2)
    assert life.status("a") == "stopped"


def test_a_file_is_one_queues(tmp_path, life):
    with pytest.raises(EnvironmentFailure, match="belongs to the queue of another cluster"):
        QueueStore(tmp_path / "queue.db")


def test_who_was_to_make_room_is_asked_by_the_next_keeper(life):
    life.cluster.length_s = 100.0
    life.submit("low", workers=2)
    life.run(2)
    life.submit("urgent", workers=2, priority=1)
    life.cluster.dies_at = life.cluster.calls + 2  # states, then the request to end
    life.cluster.jobs["low"]["stop"] = None
    life.run(1)
    assert life.restarts == 1
    life.cluster.jobs["low"]["stop"] = None  # as if it had not arrived
    life.run(5)
    assert (life.status("low"), life.status("urgent")) == ("waiting", "running")


def test_a_job_that_was_to_be_submitted_is_submitted_by_the_next_keeper(life):
    life.submit("a")
    life.cluster.dies_at = life.cluster.calls + 2  # states, then the job's start
    life.run(1)
    assert life.restarts == 1
    assert life.cluster.jobs == {}
    assert life.status("a") == "starting"
    life.run(8)
    assert list(life.cluster.jobs) == ["a"]
    assert life.keeper.records()[0].losses == 0


@pytest.mark.parametrize("seed", range(6))
def test_it_may_die_at_any_moment(tmp_path, seed):
    """Three users' runs, of any priority, and deaths in the middle of what is being done."""
    draw = random.Random(seed)
    cluster = FakeCluster(3.0, length_s=4.0)
    life = Life(tmp_path, cluster)
    for number in range(8):
        life.submit(f"r{number}", draw.choice("abc"), draw.randint(1, 3), draw.randint(0, 2))
    for _ in range(120):
        if draw.random() < 0.3:
            cluster.dies_at = cluster.calls + draw.randint(1, 6)
        life.run(1)
        if all(one.is_ended for one in life.keeper.records()):
            break
    assert {one.status for one in life.keeper.records()} == {"done"}
    assert life.restarts > 0
    assert cluster.overlaps == []
    assert cluster.most_used <= 3.0
    for number in range(8):  # each did its work once
        assert cluster.work[f"r{number}"] <= 4.0 + 1.0
    life.store.close()


@pytest.mark.parametrize("priority", [11, -11])
def test_priorities_are_bounded_so_that_everybody_comes_first_in_the_end(life, priority):
    with pytest.raises(UserError, match=f"received the priority {priority}; -10 to 10"):
        life.submit("a", priority=priority)
    assert life.submit("a", priority=10) == "a"
