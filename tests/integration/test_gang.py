"""The process layer with stand-ins for training: forming, failing, stopping, leaving nothing."""

import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.coordinator import RunSpec
from cluster.errors import RetriesExhausted
from cluster.gang import GangSpec
from cluster.handle import RunHandle
from configs.errors import UserCodeError, UserError
from tests.support.listening import listening

pytestmark = pytest.mark.usefixtures("ray_session")
ROOT = Path(__file__).parents[2]
RECORDER = "tests.support.tasks:Recorder"


def temporary_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("lockstep-*"))


def start(
    tmp_path: Path,
    faults: dict[tuple[int, int], str],
    workers: int = 2,
    stages: Any = (("train", 2), ("export", 1)),
    stall_after_s: float = 60.0,
    max_failures: int = 2,
    standbys: int = 0,
) -> RunHandle:
    gang = GangSpec(
        name=f"gang-{tmp_path.name}",
        workers=workers,
        cpus=1,
        gpus=0,
        preload=("tests.support.tasks",),
        environment={"PYTHONPATH": str(ROOT)},
        log_dir=str(tmp_path / "logs"),
        start_timeout_s=60,
        standbys=standbys,
    )
    settings = {"stages": stages, "faults": faults}
    spec = RunSpec(gang, stall_after_s, max_failures, 600.0, RECORDER, settings)
    return RunHandle(spec)


def processes_of_ours() -> set[int]:
    """Templates and their forks, of this working copy: others may test theirs beside it."""
    found = set()
    for process in psutil.process_iter(["pid", "cmdline", "environ"]):
        is_template = "cluster.template" in (process.info["cmdline"] or [])
        if is_template and (process.info["environ"] or {}).get("PYTHONPATH") == str(ROOT):
            found.add(process.info["pid"])
    return found


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def assert_nothing_left(before: set[int]) -> None:
    deadline = time.monotonic() + 10
    while processes_of_ours() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of_ours() - before == set()


def messages(result: dict[str, Any], kind: str) -> list[Any]:
    return [entry for entry in result["log"] if isinstance(entry, tuple) and entry[2] == kind]


def test_stages_run_with_their_ranks_and_leave_nothing(tmp_path: Path) -> None:
    before = processes_of_ours()
    result = start(tmp_path, {}).result()
    assert [entry[:2] for entry in sorted(messages(result, "said"))] == [(1, 0), (1, 1), (2, 0)]
    addresses = {entry[3]["addresses"] for entry in messages(result, "ready") if entry[0] == 1}
    assert len(addresses) == 1
    assert len(set(next(iter(addresses)))) == 2
    assert_nothing_left(before)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("fault", "kind"), [("kill", "exited"), ("exit", "exited")])
def test_a_dead_rank_brings_a_new_generation(
    tmp_path: Path, rank: int, fault: str, kind: str
) -> None:
    result = start(tmp_path, {(1, rank): fault}, stages=[("train", 2)]).result()
    failures = [e for e in result["log"] if isinstance(e, dict) and e["event"] == "failure"]
    assert [(f["failure"], f["rank"], f["generation"]) for f in failures] == [(kind, rank, 1)]
    assert sorted(entry[:2] for entry in messages(result, "said")) == [(2, 0), (2, 1)]
    assert ("failed", kind, rank) in result["log"]
    first, second = (
        {entry[3]["pid"] for entry in messages(result, "ready") if entry[0] == generation}
        for generation in (1, 2)
    )
    assert not first & second


def test_too_many_failures_end_the_run_with_the_reason(tmp_path: Path) -> None:
    faults = {(1, 0): "kill", (2, 1): "exit", (3, 1): "kill"}
    with pytest.raises(RetriesExhausted, match=r"2 are allowed.*rank 1 was killed by signal 9"):
        start(tmp_path, faults).result()


def test_the_same_exception_three_times_is_the_users_and_ends_the_run(tmp_path: Path) -> None:
    before = processes_of_ours()
    faults = {(generation, generation % 2): "raise" for generation in (1, 2, 3)}
    with pytest.raises(UserCodeError, match=r"3 times.*broken worker") as caught:
        start(tmp_path, faults, max_failures=5).result()
    assert 'raise RuntimeError("broken worker")' in caught.value.traceback
    assert "broken worker" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert_nothing_left(before)


def test_the_users_mistake_is_not_retried(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="your mistake"):
        start(tmp_path, {(1, 0): "user"}).result()


def test_silence_is_a_failure_with_a_bound(tmp_path: Path) -> None:
    faults = {(1, 0): "silent", (1, 1): "silent"}
    handle = start(tmp_path, faults, stages=[("train", 2)], stall_after_s=3)
    result = handle.result()
    failures = [e for e in result["log"] if isinstance(e, dict) and e["event"] == "failure"]
    assert [failure["failure"] for failure in failures] == ["stalled"]
    assert "cluster.stall_after_s" in failures[0]["error"]
    assert sorted(entry[:2] for entry in messages(result, "said")) == [(2, 0), (2, 1)]


def test_a_stop_reaches_all_ranks(tmp_path: Path) -> None:
    faults = {(1, 0): "until stopped", (1, 1): "until stopped"}
    handle = start(tmp_path, faults)
    while not any(event["event"] == "step" for event in handle.events(1.0)):
        pass
    handle.request_stop("enough")
    result = handle.result()
    assert result["stopped"] == "enough"
    assert sorted(entry[:2] for entry in messages(result, "said")) == [(1, 0), (1, 1)]


def test_nothing_listens_beyond_loopback(tmp_path: Path) -> None:
    handle = start(tmp_path, {(1, 0): "until stopped", (1, 1): "until stopped"})
    while not any(event["event"] == "step" for event in handle.events(1.0)):
        pass
    this = psutil.Process()
    of_all = [listening(process) for process in (this, *this.children(recursive=True))]
    handle.request_stop("enough")
    handle.result()
    assert sum(bool(addresses) for addresses in of_all) >= 4  # Ray's own, the driver and the actors
    assert set().union(*of_all) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("standbys", [0, 1])
def test_a_killed_coordinator_takes_everything_along(tmp_path: Path, standbys: int) -> None:
    before = processes_of_ours()
    folders = temporary_folders()
    faults = {(1, 0): "until stopped", (1, 1): "until stopped"}
    handle = start(tmp_path, faults, standbys=standbys)
    pids: list[int] = []
    while not pids:
        pids = [pid for event in handle.events(1.0) for pid in event.get("pids", [])]
    assert all(is_running(pid) for pid in pids)
    deadline = time.monotonic() + 20
    while len(processes_of_ours() - before) < 4 + standbys and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(processes_of_ours() - before) == 4 + standbys  # templates, and their two forks
    handle.kill()
    assert_nothing_left(before)
    assert not any(is_running(pid) for pid in pids)
    assert temporary_folders() <= folders
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == 4
