"""Pools of stations: one suite for processes, actors of Ray, and what tests use instead."""

import os
import signal
import time
from pathlib import Path

import pytest

from cluster.pool import ProcessPool
from tests.support.pool_work import TARGET

TIMEOUT_S = 60.0


def processes(tmp_path):
    return ProcessPool(TARGET, {"mark": "x"}, {"POOL_WORD": "told"}, str(tmp_path / "logs/log"))


def actors(tmp_path):
    import ray

    from cluster.actors import ActorPool

    if not ray.is_initialized():
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return ActorPool(TARGET, {"mark": "x"}, cpus=1, environment={"POOL_WORD": "told"})


@pytest.fixture(params=[processes, pytest.param(actors, marks=pytest.mark.long)])
def pool(request, tmp_path):
    made = request.param(tmp_path)
    yield made
    made.close()
    if request.param is actors:
        import ray

        ray.shutdown()


def until(pool, count=1):
    """So many ends of tasks."""
    ended, deadline = [], time.monotonic() + TIMEOUT_S
    while len(ended) < count:
        assert time.monotonic() < deadline
        ended += pool.poll(0.5)
    return ended


def test_a_pool_keeps_its_promises(pool, tmp_path):
    assert pool.poll(0.0) == []
    began = time.monotonic()
    assert pool.poll(0.1) == []
    assert time.monotonic() - began >= 0.1  # who polls in a loop does not spin
    pool.resize(2)
    first, second = sorted(pool.idle())
    pool.give(first, {"do": "echo", "value": [1, "two"]})
    pool.give(second, {"do": "fail"})
    assert pool.idle() == []
    by_station = {ended.station: ended for ended in until(pool, 2)}
    done = by_station[first].result
    assert (done["value"], done["mark"], done["word"]) == ([1, "two"], "x", "told")
    assert done["nice"] >= 10  # requests go first
    failed = by_station[second]
    assert (failed.result, failed.is_lost) == (None, False)
    assert failed.failure == "ValueError: as told"

    # A station keeps what it has made, and is ended in the middle of a task.
    pool.give(first, {"do": "echo", "value": 1})
    (ended,) = until(pool)
    assert (ended.result["pid"], ended.result["tasks"]) == (done["pid"], 2)
    pool.give(second, {"do": "die"})
    (ended,) = until(pool)
    assert (ended.station, ended.is_lost) == (second, True)
    pool.give(first, {"do": "sleep"})
    time.sleep(0.2)
    pool.kill(first)
    (ended,) = until(pool)
    assert (ended.station, ended.is_lost) == (first, True)
    assert pool.idle() == []

    # Others in their place, under new numbers.
    pool.resize(1)
    (third,) = pool.idle()
    assert third not in (first, second)
    pool.give(third, {"do": "echo", "value": 2})
    (ended,) = until(pool)
    assert ended.result["value"] == 2
    pool.resize(0)
    assert pool.idle() == []
    pool.close()
    deadline = time.monotonic() + TIMEOUT_S
    while _is_running(ended.result["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_idle_process_that_died_is_told_with_its_next_task(tmp_path):
    pool = processes(tmp_path)
    pool.resize(1)
    (station,) = pool.idle()
    pool.give(station, {"do": "echo", "value": 1})
    until(pool)
    os.kill(pool.pids[station], signal.SIGKILL)
    time.sleep(0.1)
    pool.give(station, {"do": "echo", "value": 2})
    (ended,) = until(pool)
    assert (ended.station, ended.is_lost) == (station, True)
    pool.close()


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
