"""Several hosts: one is killed, cut off, slowed or drained, and the gang goes on without it.

The workers are stand-ins; what is shown is who replaces whom, and how long it takes.
"""

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gang_tasks import last_beat
from tests.support.netns import RAY, Network, Node

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

Event = dict[str, Any]


class Driver:
    """A gang in a process on the head's host, seen through what it says."""

    def __init__(self, network: Network, folder: Path, **spec: Any) -> None:
        self.beats = folder / "beats"
        self.beats.mkdir(exist_ok=True)
        self.events: list[Event] = []
        settings = {
            "name": f"hosts-{folder.name}",
            "cpus": 1,
            "gpus": 0,
            "preload": ["tests.support.gang_tasks"],
            "environment": {},
            "log_dir": str(folder / "logs"),
            "start_timeout_s": 60,
            "beats": str(self.beats),
            **spec,
        }
        self._said: queue.Queue[str] = queue.Queue()
        self._errors = open(folder / "driver.log", "wb")  # noqa: SIM115
        self.process = network.head.popen(
            [
                "python",
                "-m",
                "tests.support.gang_driver",
                network.ray_address,
                json.dumps(settings),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def until(self, event: str, timeout_s: float = 60.0) -> Event:
        """The next event of this name."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(queue.Empty):
                told: Event = json.loads(self._said.get(timeout=deadline - time.monotonic()))
                self.events.append(told)
                if told["event"] == event:
                    return told
                continue
            raise AssertionError(f"no {event} within {timeout_s:g} s, only {self.events}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(40)
        finally:
            self.process.kill()
            self.process.wait()
            self._errors.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # Ray has something to say as well
                self._said.put(line)
        self.process.stdout.close()


@contextlib.contextmanager
def driving(network: Network, folder: Path, **spec: Any) -> Iterator[Driver]:
    driver = Driver(network, folder, **spec)
    try:
        yield driver
    finally:
        driver.close()


def node_at(network: Network, address: str) -> Node:
    return next(node for node in network.nodes if node.address == address)


def report(what: str, **seconds: float) -> None:
    figures = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    print(f"\n{what}: {figures}", file=sys.stderr)


def wait_for_spare(driver: Driver) -> None:
    """The standby is warm when the first generation has run for some seconds."""
    time.sleep(6)
    assert driver.process.poll() is None


def test_a_killed_host_is_replaced_by_a_standby_on_another_one(
    network: Network, tmp_path: Path
) -> None:
    with driving(network, tmp_path, workers=2, standbys=1) as driver:
        first = driver.until("formed")
        driver.until("running")
        wait_for_spare(driver)
        killed_at = time.monotonic()
        node_at(network, first["nodes"][1]).kill()
        failure = driver.until("failure")
        assert failure["kind"] in ("host_lost", "exited")
        second = driver.until("formed")
        running = driver.until("running")
    assert second["nodes"][0] == first["nodes"][0]
    assert second["nodes"][1] not in first["nodes"]
    assert [entry["rank"] for entry in second["replaced"]] == [1]
    assert second["lost"] == []
    seen, back = failure["t"] - killed_at, running["t"] - killed_at
    report("killed host, standby", seen=seen, running=back)
    assert seen < 1
    assert back < 5


def test_a_killed_host_is_replaced_by_a_new_one(network: Network, tmp_path: Path) -> None:
    with driving(network, tmp_path, workers=2) as driver:
        first = driver.until("formed")
        driver.until("running")
        killed_at = time.monotonic()
        node_at(network, first["nodes"][0]).kill()
        failure = driver.until("failure")
        second = driver.until("formed")
        running = driver.until("running")
    assert second["nodes"][1] == first["nodes"][1]
    assert second["nodes"][0] not in first["nodes"]
    seen, back = failure["t"] - killed_at, running["t"] - killed_at
    report("killed host, new one elsewhere", seen=seen, running=back)
    assert seen < 1
    assert back < 8


def test_the_gang_shrinks_and_grows_again_when_the_host_is_back(
    network: Network, tmp_path: Path
) -> None:
    spec = {"workers": 3, "min_workers": 2, "replace_timeout_s": 3.0}
    with driving(network, tmp_path, **spec) as driver:
        first = driver.until("formed")
        driver.until("running")
        node = node_at(network, first["nodes"][1])
        killed_at = time.monotonic()
        node.kill()
        failure = driver.until("failure")
        second = driver.until("formed")
        assert second["workers"] == 2
        assert second["nodes"] == [first["nodes"][0], first["nodes"][2]]
        assert second["lost"] == [{"rank": 1, "node": node.address}]
        waited = second["t"] - failure["t"]
        assert 3 <= waited < 8
        back_at = time.monotonic()
        node.restore()
        driver.until("growing", 90)
        third = driver.until("formed")
        running = driver.until("running")
    assert third["nodes"] == [*second["nodes"], node.address]
    report(
        "shrink and grow",
        seen=failure["t"] - killed_at,
        gave_up=waited,
        grown=running["t"] - back_at,
    )
    assert running["t"] - back_at < 12


def test_too_few_hosts_end_the_run_and_say_what_was_awaited(
    network: Network, tmp_path: Path
) -> None:
    with driving(network, tmp_path, workers=3, replace_timeout_s=2.0) as driver:
        first = driver.until("formed")
        driver.until("running")
        node_at(network, first["nodes"][2]).kill()
        error = driver.until("error")
    assert error["kind"] == "StartTimeout"
    assert "2 of 3 workers are left" in error["error"]
    assert "cluster.min_workers to 2" in error["error"]


def test_a_cut_link_ends_bounded_and_nobody_trains_behind_it(
    network: Network, tmp_path: Path
) -> None:
    lease_s = 6.0
    with driving(network, tmp_path, workers=2, lease_s=lease_s) as driver:
        first = driver.until("formed")
        driver.until("running")
        node = node_at(network, first["nodes"][1])
        cut_at = time.monotonic()
        node.cut()
        failure = driver.until("failure")
        assert failure["kind"] == "host_lost"
        last_alive = last_beat(driver.beats, 1, 1)
        second = driver.until("formed")
        running = driver.until("running")
        ended = last_beat(driver.beats, 1, 1)
    assert second["nodes"][0] == first["nodes"][0]
    assert second["nodes"][1] not in first["nodes"]
    assert ended == last_alive, "it went on after it was given up"
    assert ended - cut_at <= lease_s + 0.5
    report(
        "cut link",
        ended_itself=ended - cut_at,
        seen=failure["t"] - cut_at,
        running=running["t"] - cut_at,
    )
    assert failure["t"] - cut_at < lease_s + 5


def test_a_slow_link_is_no_failure(network: Network, tmp_path: Path) -> None:
    with driving(network, tmp_path, workers=2, lease_s=6.0) as driver:
        first = driver.until("formed")
        driver.until("running")
        node_at(network, first["nodes"][1]).slow(rate_mbit=1)
        with pytest.raises(AssertionError, match="no failure"):
            driver.until("failure", 12)
        assert last_beat(driver.beats, 1, 1) > time.monotonic() - 1


def test_a_draining_host_is_left_before_it_ends(network: Network, tmp_path: Path) -> None:
    with driving(network, tmp_path, workers=2) as driver:
        first = driver.until("formed")
        driver.until("running")
        node = node_at(network, first["nodes"][0])
        drain_at = time.monotonic()
        drain(network, node)
        leaving = driver.until("leaving")
        assert leaving["ranks"] == [0]
        second = driver.until("formed")
        running = driver.until("running")
    assert second["nodes"][1] == first["nodes"][1]
    assert second["nodes"][0] not in first["nodes"]
    assert not [event for event in driver.events if event["event"] == "failure"]
    report("drain", seen=leaving["t"] - drain_at, running=running["t"] - drain_at)


def drain(network: Network, node: Node) -> None:
    """What an autoscaler or a SIGTERM to `ray start --block` does."""
    find = (
        f"import ray; ray.init(address='{network.ray_address}', logging_level='ERROR');"
        f"print([n['NodeID'] for n in ray.nodes() if n['Alive'] and "
        f"n['NodeManagerAddress'] == '{node.address}'][0])"
    )
    done = network.head.popen(["python", "-c", find], stdout=subprocess.PIPE, text=True)
    node_id = done.communicate(timeout=60)[0].split()[-1]
    command = [RAY, "drain-node", "--address", network.ray_address, "--node-id", node_id,
               "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test",
               "--deadline-remaining-seconds", "30"]  # fmt: skip
    drained = network.head.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = drained.communicate(timeout=60)[0]
    assert drained.returncode == 0, said
