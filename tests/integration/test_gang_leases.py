"""A host by itself, without Ray: its lease, its fence against older generations, its bounds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import StaleGeneration
from cluster.host import Host
from cluster.template import Launch
from tests.integration.test_gang import is_running

ROOT = Path(__file__).parents[2]
LEASE_S = 1.0


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    before = signal.getsignal(signal.SIGTERM)
    host = Host(("tests.support.gang_tasks",), {"PYTHONPATH": str(ROOT)}, LEASE_S)
    host.start(60, str(tmp_path / "logs" / "template.log"))
    yield host
    host.close()
    signal.signal(signal.SIGTERM, before)


def launch(host: Host, tmp_path: Path, generation: int, entry: str = "work") -> int:
    task = f"tests.support.gang_tasks:{entry}"
    return host.launch(Launch(generation, 0, ("x:1",), task, None, str(tmp_path / "rank.log")))


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


def test_a_host_that_nobody_asks_ends_its_training_process(host: Host, tmp_path: Path) -> None:
    pid = launch(host, tmp_path, 1)
    begin = time.monotonic()
    while time.monotonic() - begin < 2 * LEASE_S:
        host.poll(0.1)
    assert is_running(pid)
    begin = time.monotonic()
    wait_for_end(pid)
    assert LEASE_S / 2 < time.monotonic() - begin < LEASE_S + 0.5
    exits = [message.body for message in host.poll(1).messages if message.kind == "exited"]
    while not exits:
        exits = [message.body for message in host.poll(1).messages if message.kind == "exited"]
    assert exits == [-signal.SIGKILL]


def test_a_renewed_lease_needs_no_poll(host: Host, tmp_path: Path) -> None:
    pid = launch(host, tmp_path, 1)
    begin = time.monotonic()
    while time.monotonic() - begin < 3 * LEASE_S:
        host.renew()
        time.sleep(0.05)
    assert is_running(pid)


def test_an_older_generation_is_not_launched(host: Host, tmp_path: Path) -> None:
    pid = launch(host, tmp_path, 5)
    with pytest.raises(StaleGeneration, match="generation 4 was to be launched after 5"):
        launch(host, tmp_path, 4)
    assert is_running(pid)
    assert host.prepare(7)[0]
    assert not is_running(pid)
    with pytest.raises(StaleGeneration):
        launch(host, tmp_path, 6)
    assert is_running(launch(host, tmp_path, 7))


def test_what_a_given_up_generation_said_is_not_heard(host: Host, tmp_path: Path) -> None:
    pid = launch(host, tmp_path, 1)
    host.poll(5)
    assert host.strike(1, "kill")
    wait_for_end(pid)
    host.prepare(2)
    launch(host, tmp_path, 2)
    assert {message.generation for message in host.poll(5).messages} == {2}


def test_a_poll_carries_64_mb_at_most(host: Host, tmp_path: Path) -> None:
    host.launch(
        Launch(1, 0, ("x:1",), "tests.support.gang_tasks:send_much", 20, str(tmp_path / "log"))
    )
    time.sleep(1)
    sizes: list[list[int]] = []
    while sum(map(len, sizes)) < 20 and len(sizes) < 40:
        sizes.append([len(m.body) for m in host.poll(1).messages if m.kind == "part"])
    assert sum(map(len, sizes)) == 20
    assert max(sum(poll) for poll in sizes) <= 64 * 2**20
    assert max(len(poll) for poll in sizes) > 1


def test_strikes_hit_the_generation_that_is_meant(host: Host, tmp_path: Path) -> None:
    pid = launch(host, tmp_path, 3)
    assert not host.strike(2, "kill")
    assert is_running(pid)
    assert host.strike(3, "kill")
    wait_for_end(pid)
    host.kill()
    assert not host.strike(3, "kill")


def test_a_host_told_to_end_does_so_when_its_grace_is_over(tmp_path: Path) -> None:
    told = (
        "import os, signal, sys, time, cluster.host as host\n"
        "host.GRACE_S = 1.0\n"
        "kept = host.Host(('tests.support.gang_tasks',), {}, 60.0)\n"
        "kept.start(60, sys.argv[1])\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(kept.poll(5).is_leaving, kept.poll(0.1).can_fork, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", told, str(tmp_path / "logs" / "template.log")]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=40, check=False
    )
    assert done.stdout.split() == ["True", "True"]
    assert done.returncode == 0
    assert not list((tmp_path / "logs").glob(".scratch-*"))
