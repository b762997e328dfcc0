"""What becomes of a gang whose hosts end, lose their templates or are told to leave."""

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.bulk import split
from cluster.channel import Message
from cluster.errors import GangFailure
from cluster.faults import FaultPlan
from cluster.gang import Gang, GangSpec
from tests.integration.test_gang import is_running

pytestmark = pytest.mark.usefixtures("ray_session")
ROOT = Path(__file__).parents[2]
WORK = "tests.support.gang_tasks:work"
Start = Callable[..., Gang]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    gangs = []

    def create(**changes: Any) -> Gang:
        spec: dict[str, Any] = {
            "name": f"hosts-{tmp_path.name}",
            "workers": 2,
            "cpus": 1,
            "gpus": 0,
            "preload": ("tests.support.gang_tasks",),
            "environment": {"PYTHONPATH": str(ROOT)},
            "log_dir": str(tmp_path / "logs"),
            "start_timeout_s": 60,
            **changes,
        }
        gang = Gang(GangSpec(**spec))
        gangs.append(gang)
        gang.place()
        return gang

    yield create
    for gang in gangs:
        gang.close()


def form(gang: Gang, generation: int) -> list[int]:
    """Form a generation of all ranks; their process ids, once all are ready."""
    pids = gang.form(generation, gang.restore().workers, WORK, None)
    ready = {message.rank: message.body for message in heard(gang, "ready", len(pids))}
    assert [ready[rank]["pid"] for rank in range(len(pids))] == pids
    return pids


def heard(gang: Gang, kind: str, times: int, timeout_s: float = 20) -> list[Message]:
    deadline = time.monotonic() + timeout_s
    found: list[Message] = []
    for message in gang.messages():
        found += [message] if message is not None and message.kind == kind else []
        if len(found) == times:
            return found
        assert time.monotonic() < deadline, f"{len(found)} of {times} {kind}"
    raise AssertionError("unreachable")


def failure_of(gang: Gang) -> GangFailure:
    with pytest.raises(GangFailure) as caught:
        heard(gang, "never", 1)
    return caught.value


def wait_for_spare(gang: Gang) -> None:
    deadline = time.monotonic() + 20
    while not gang._roster.spares and time.monotonic() < deadline:
        gang.can_grow()
        time.sleep(0.02)
    assert gang._roster.spares


@pytest.mark.parametrize("rank", [0, 1])
def test_a_standby_takes_the_rank_of_a_killed_host(start: Start, rank: int) -> None:
    gang = start(standbys=1)
    first = form(gang, 1)
    wait_for_spare(gang)
    spare = gang._roster.spares[0]
    assert gang.strike(rank, "host")
    failure = failure_of(gang)
    assert (failure.kind, failure.rank) == ("host_lost", rank)
    gang.kill()
    restored = gang.restore()
    assert [entry["rank"] for entry in restored.replaced] == [rank]
    assert (restored.workers, restored.lost) == (2, [])
    assert gang._roster.hosts[rank] is spare
    form(gang, 2)
    assert not any(is_running(pid) for pid in first)
    wait_for_spare(gang)  # another one stands by


def test_without_a_standby_a_new_host_comes(start: Start) -> None:
    gang = start()
    form(gang, 1)
    kept = gang._roster.hosts[1]
    assert gang.strike(0, "host")
    assert failure_of(gang).rank == 0
    gang.kill()
    restored = gang.restore()
    assert [entry["rank"] for entry in restored.replaced] == [0]
    assert gang._roster.hosts[1] is kept
    form(gang, 2)


def test_a_standby_that_dies_is_started_again(start: Start) -> None:
    gang = start(standbys=1)
    form(gang, 1)
    wait_for_spare(gang)
    spare = gang._roster.spares[0]
    spare.actor.strike.remote(0, "host")
    deadline = time.monotonic() + 20
    while spare in gang._roster.spares and time.monotonic() < deadline:
        gang.can_grow()
        time.sleep(0.02)
    wait_for_spare(gang)
    assert gang._roster.spares[0] is not spare
    assert len(gang._roster.spares) == 1
    assert not gang._roster.starting
    heard(gang, "step", 10)  # and nobody else noticed


def test_a_host_without_template_starts_another(start: Start) -> None:
    gang = start()
    pids = form(gang, 1)
    hosts = list(gang._roster.hosts)
    assert gang.strike(1, "template")
    assert [(m.rank, m.body) for m in heard(gang, "exited", 1)] == [(1, -signal.SIGKILL)]
    assert not is_running(pids[1])
    gang.kill()
    assert gang.restore().workers == 2
    assert gang._roster.hosts == hosts
    form(gang, 2)


def test_a_host_told_to_end_stays_until_it_is_replaced(start: Start) -> None:
    gang = start()
    pids = form(gang, 1)
    leaver = gang._roster.hosts[1]
    host = psutil.Process(pids[1]).parents()[1].pid  # above it, its template
    os.kill(host, signal.SIGTERM)
    told_at = time.monotonic()
    while not gang.leaving() and time.monotonic() < told_at + 10:
        heard(gang, "step", 1)
    assert gang.leaving() == {1}
    assert time.monotonic() - told_at < 1
    heard(gang, "step", 50)  # it trains on
    gang.kill()
    restored = gang.restore()
    assert [entry["rank"] for entry in restored.replaced] == [1]
    assert gang._roster.hosts[1] is not leaver
    assert gang.leaving() == set()
    form(gang, 2)
    deadline = time.monotonic() + 20
    while is_running(host) and time.monotonic() < deadline:
        gang.can_grow()
        time.sleep(0.05)
    assert not is_running(host)


def test_each_rank_gets_its_own_faults(start: Start) -> None:
    gang = start()
    plan = FaultPlan.parse("kill:0@step=5; exit:1@step=7; raise:1@step=9").faults
    gang.form(1, 2, WORK, None, [plan[:1], plan[1:]])
    ready = {message.rank: message.body["faults"] for message in heard(gang, "ready", 2)}
    assert ready == {0: plan[:1], 1: plan[1:]}


def test_stacks_tell_where_each_worker_is_and_which_is_stopped(start: Start) -> None:
    gang = start()
    pids = form(gang, 1)
    assert gang.strike(1, "stop")
    deadline = time.monotonic() + 5
    while psutil.Process(pids[1]).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
    stacks = gang.stacks(5)
    assert sorted(stacks) == [0, 1]
    assert "gang_tasks.py" in stacks[0]
    assert "(stopped)" not in stacks[0].splitlines()[0]
    assert "(stopped)" in stacks[1].splitlines()[0]
    assert "in work" in stacks[1]
    assert gang.strike(0, "host")
    assert "did not answer" in gang.stacks(1)[0]


def test_large_commands_arrive_whole_and_in_order(start: Start) -> None:
    gang = start()
    gang.form(1, 2, "tests.support.gang_tasks:take_large", None)
    heard(gang, "ready", 2)
    body = random.Random(1).randbytes(150 * 2**20)
    gang.send_large(split("state", body))
    expected = hashlib.sha256(body).hexdigest()
    assert [message.body for message in heard(gang, "hash", 2)] == [expected] * 2


def test_more_than_a_poll_may_carry_comes_in_several(start: Start) -> None:
    gang = start(workers=1)
    gang.form(1, 1, "tests.support.gang_tasks:send_much", 20)
    parts = [message.body[:4] for message in heard(gang, "part", 20)]
    assert parts == [b"%04d" % number for number in range(20)]


def test_a_busy_coordinator_keeps_its_leases(start: Start) -> None:
    gang = start(lease_s=1.0)
    pids = form(gang, 1)
    time.sleep(3)
    assert all(is_running(pid) for pid in pids)
    heard(gang, "step", 10)
