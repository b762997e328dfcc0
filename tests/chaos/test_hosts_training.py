"""Training on several hosts, one of which is killed, cut off or slow: the weights tell nothing."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support.jobs import assert_same_bits, final_weights, make_job, write_data
from tests.support.netns import Network, Node

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(280)]
EPOCHS = 40
SLOW = """
import time
import keras

class Slow(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        time.sleep(0.7)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("rows"))


class Training:
    """`lockstep train` on the head's host, seen through its run folder."""

    def __init__(self, network: Network, rows: Path, runs: Path, **changes: Any) -> None:
        self.folder = runs / "small" / "run"
        job = make_job(
            rows,
            runs,
            train__epochs=EPOCHS,
            train__steps_per_execution=2,
            checkpoint__snapshot_every_s=1.0,
            cluster__stall_after_s=6.0,
            export={"h5": False, "saved_model": False},
            **changes,
        )
        self._job = runs / "job.yaml"
        runs.mkdir(exist_ok=True)
        self._job.write_text(yaml.safe_dump(job))
        self._network = network
        self._log = runs / "driver.log"
        self.process = self.start()

    def start(self, *options: str) -> "subprocess.Popen[Any]":
        command = ["python", "-m", "lockstep.cli", "train", str(self._job), "--run-id", "run"]
        with self._log.open("ab") as log:
            self.process = self._network.head.popen(
                [*command, "--address", self._network.ray_address, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self.process

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def until_epoch(self, epoch: int, timeout_s: float = 120.0) -> None:
        path = self.folder / "metrics.jsonl"
        self._until(lambda: path.exists() and path.read_text().count("\n") >= epoch, timeout_s)

    def until_event(self, kind: str, timeout_s: float = 60.0) -> None:
        self._until(lambda: bool(self.of(kind)), timeout_s)

    def node_of(self, rank: int) -> Node:
        address = self.of("placed")[-1]["nodes"][rank]
        return next(node for node in self._network.nodes if node.address == address)

    def finish(self, timeout_s: float = 150.0) -> Any:
        assert self.process.wait(timeout_s) == 0, self._log.read_text()[-4000:]
        summary = json.loads((self.folder / "summary.json").read_text())
        return SimpleNamespace(folder=self.folder, summary=summary)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _until(self, is_true: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_true():
            assert self.process.poll() is None, self._log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.events[-5:]
            time.sleep(0.1)


@contextlib.contextmanager
def training(network: Network, rows: Path, runs: Path, **changes: Any) -> Iterator[Training]:
    started = Training(network, rows, runs, **changes)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def undisturbed(hosts: Network, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with training(hosts, rows, tmp_path_factory.mktemp("undisturbed")) as run:
        return run.finish()


def assert_equal_up_to_rounding(run: Any, other: Any) -> None:
    ours, theirs = final_weights(run), final_weights(other)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=4e-5, atol=4e-5, err_msg=name)


def test_a_killed_host_is_replaced_by_a_standby(
    network: Network, rows: Path, undisturbed: Any, tmp_path: Path
) -> None:
    with training(network, rows, tmp_path, cluster__standbys=1) as run:
        run.until_epoch(10)
        run.node_of(1).kill()
        done = run.finish()
    assert_same_bits(done, undisturbed)
    assert run.of("failure")
    assert done.summary["workers"] == 2
    print(done.summary["recoveries"])


def test_a_dead_raylet_takes_its_host_along_and_another_takes_its_place(
    network: Network, rows: Path, undisturbed: Any, tmp_path: Path
) -> None:
    with training(network, rows, tmp_path) as run:
        run.until_epoch(10)
        run.node_of(1).kill_raylet()
        done = run.finish()
    assert_same_bits(done, undisturbed)
    assert run.of("failure")
    assert done.summary["workers"] == 2


def test_a_host_that_is_not_replaced_is_done_without_until_it_returns(
    network: Network, rows: Path, undisturbed: Any, tmp_path: Path
) -> None:
    spare = network.nodes[2]
    spare.kill()
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW)  # there is time to come back
    changes = {"cluster__min_workers": 1, "train__callbacks": [f"{slow}:Slow"]}
    with training(network, rows, tmp_path, cluster__replace_timeout_s=3.0, **changes) as run:
        run.until_epoch(5)
        gone = run.node_of(1)
        gone.kill()
        run.until_event("hosts")
        run.until_epoch(12)
        gone.restore()
        run.until_event("pausing")
        done = run.finish()
    assert_equal_up_to_rounding(done, undisturbed)
    workers = [event["workers"] for event in run.of("forming") if event["stage"] == "train"]
    assert workers[0] == 2
    assert 1 in workers
    assert workers[-1] == 2


def test_a_cut_between_two_hosts_is_a_stall_that_is_named(
    network: Network, rows: Path, undisturbed: Any, tmp_path: Path
) -> None:
    """Both still reach the head: nobody is dead, and nothing goes on."""
    with training(network, rows, tmp_path) as run:
        run.until_epoch(5)
        first, second = run.node_of(0), run.node_of(1)
        first.cut_from(second)
        run.until_event("failure")
        first.reconnect()
        second.reconnect()
        done = run.finish()
    assert_same_bits(done, undisturbed)
    print(run.of("failure"))


def test_a_slow_link_is_no_failure(
    network: Network, rows: Path, undisturbed: Any, tmp_path: Path
) -> None:
    with training(network, rows, tmp_path) as run:
        run.until_epoch(2)
        run.node_of(1).slow(rate_mbit=2)
        done = run.finish(200)
    assert_same_bits(done, undisturbed)
    assert not run.of("failure")


def test_the_head_may_die_and_the_same_command_goes_on(
    network: Network, rows: Path, undisturbed: Any, tmp_path: Path
) -> None:
    with training(network, rows, tmp_path) as run:
        run.until_epoch(8)
        network.head.kill()
        run.process.wait(30)  # the driver was on it
        for node in (network.head, *network.nodes):
            node.kill()
        for node in (network.head, *network.nodes):
            node.restore()
        run.start("--resume")
        done = run.finish()
    assert_same_bits(done, undisturbed)
    assert done.summary["rows_seen"] == undisturbed.summary["rows_seen"]
