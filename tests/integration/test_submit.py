"""Submission to a real cluster: Ray Jobs and the desk, with runs that learn nothing."""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RunUnknown
from cluster.look import versions
from cluster.room import Shape, Worker
from cluster.submit import Packed, RayJobs
from configs.errors import EnvironmentFailure, UserError
from lockstep.submit import check
from tests.support.ray_cluster import Cluster

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray's own call
STAND_IN = Path(__file__).parents[1] / "support" / "stand_in.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(head_cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> RayJobs:
    return RayJobs(cluster.address)


def packed(cluster: Cluster, run_id: str, ticks: int = 5, **changes: Any) -> Packed:
    folder = cluster.folder / "sent" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(STAND_IN, folder / "stand_in.py")
    run_folder = str(cluster.folder / "runs" / run_id)
    fields: dict[str, Any] = {
        "entrypoint": f"exec python stand_in.py {run_folder} {ticks}",
        "run_folder": run_folder,
        "shape": Shape(1, Worker(1.0)),
        "versions": versions(),
        **changes,
    }
    return Packed(run_id, "counting", folder, **fields)


def trace(run: Packed) -> list[str]:
    path = Path(run.run_folder) / "trace"
    return [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []


def until(is_true: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_from_submission_to_result(cluster: Cluster, jobs: RayJobs, tmp_path: Path) -> None:
    run = packed(cluster, "first")
    assert jobs.submit(run, "ann") == "first"
    assert jobs.submit(run, "ann") == "first"  # the same again: no second run
    assert "counted to 5" in "".join(jobs.logs("first", follow=True))
    view = jobs.status("first")
    assert (view.status, view.user, view.name, view.attempt) == ("done", "ann", "counting", 1)
    jobs.submit(run, "ann")
    answer = jobs.result("first", tmp_path / "got")
    assert answer["summary"] == {"status": "done", "ticks": 5}
    sent = Path(run.run_folder) / "artifact" / "model.bin"
    assert (tmp_path / "got" / "artifact" / "model.bin").read_bytes() == sent.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["got"]
    assert trace(run) == ["start", "done", "end"]


@pytest.mark.long
def test_a_stop_waits_for_the_clean_end_and_a_new_submission_goes_on(
    cluster: Cluster, jobs: RayJobs
) -> None:
    run = packed(cluster, "stopped", ticks=60)
    jobs.submit(run)
    until(lambda: (Path(run.run_folder) / "count").exists())
    assert jobs.stop("stopped").status == "stopped"
    assert jobs.stop("stopped").status == "stopped"
    assert trace(run) == ["start", "end"]
    counted = int((Path(run.run_folder) / "count").read_text())
    assert 0 < counted < 60
    jobs.submit(run)
    list(jobs.logs("stopped", follow=True))
    view = jobs.status("stopped")
    assert (view.status, view.attempt) == ("done", 2)
    assert trace(run) == ["start", "end", "start", "done", "end"]


@pytest.mark.long
def test_many_clients_at_the_same_time_start_one_run(cluster: Cluster) -> None:
    run = packed(cluster, "shared")
    with ThreadPoolExecutor(6) as pool:
        started = pool.map(lambda _: RayJobs(cluster.address).submit(run), range(6))
        assert set(started) == {"shared"}
    jobs = RayJobs(cluster.address)
    list(jobs.logs("shared", follow=True))
    assert (jobs.status("shared").status, jobs.status("shared").attempt) == ("done", 1)
    assert trace(run) == ["start", "done", "end"]


@pytest.mark.long
def test_paths_and_versions_are_looked_at_there(cluster: Cluster, jobs: RayJobs) -> None:
    run = packed(
        cluster,
        "looking",
        inputs={"data.train": ["/nowhere/train", str(cluster.folder), str(cluster.folder / "*")]},
        outputs={"runs_dir": "/proc/none", "checkpoint.uri": str(cluster.folder / "new" / "er")},
    )
    seen = jobs.look(run)
    assert seen["nodes"][0]["missing"] == [["data.train", "/nowhere/train"]]
    assert seen["nodes"][0]["unwritable"] == [["runs_dir", "/proc/none"]]
    assert seen["nodes"][0]["versions"] == versions()
    with pytest.raises(UserError, match="data.train: /nowhere/train is not there"):
        check(run, seen)
    run = packed(cluster, "content")
    assert check(run, jobs.look(run)) == []


@pytest.mark.long
def test_a_secret_reaches_its_run_and_nothing_else(cluster: Cluster, jobs: RayJobs) -> None:
    value = "hunter22-and-more"
    run = packed(cluster, "secret", secrets={"TOKEN": value})
    jobs._desk.ask("keep", {"run_id": "secret"}, secrets=run.secrets)
    look = (
        "import os; from cluster.secret_keeping import secrets_of, drop_secrets; "
        "print(len(secrets_of('secret')['TOKEN'])); drop_secrets('secret'); "
        "print(secrets_of('secret'))"
    )
    reading = packed(cluster, "reading", entrypoint=f'exec python -c "{look}"')
    jobs.submit(reading)
    assert f"{len(value)}\n{{}}" in "".join(jobs.logs("reading", follow=True))
    told = [path for path in (cluster.folder / "ray").rglob("*") if path.is_file()]
    told = [path for path in told if value.encode() in path.read_bytes()]
    assert told == []
    assert value not in repr(jobs._api.jobs())


@pytest.mark.long
def test_what_is_not_there_is_told(cluster: Cluster, jobs: RayJobs) -> None:
    jobs.submit(packed(cluster, "known"))
    with pytest.raises(RunUnknown, match="no run 'knwon' .* Did you mean 'known'"):
        jobs.status("knwon")
    with pytest.raises(EnvironmentFailure, match="no answer from the cluster at http"):
        RayJobs("http://127.0.0.1:9").list()
    with pytest.raises(UserError, match="the URL of the cluster's dashboard is allowed"):
        RayJobs("127.0.0.1:6379").list()


@pytest.mark.long
def test_a_run_that_fails_says_how(cluster: Cluster, jobs: RayJobs) -> None:
    jobs.submit(packed(cluster, "failing", entrypoint="echo broken; exit 2"))
    list(jobs.logs("failing", follow=True))
    view = jobs.status("failing")
    assert view.status == "failed"
    assert "exit code 2" in view.message
    with pytest.raises(RunUnknown, match="failing is failed and has no summary"):
        jobs.result("failing")


def test_no_process_of_a_run_is_left(cluster: Cluster) -> None:
    until(lambda: not [p for p in cluster.ours() if "stand_in.py" in " ".join(p.cmdline())])
