"""Snapshots are sent one at a time, whole, and what goes wrong reaches the loop."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from trainer import snapshots as snapshots_module
from trainer.payloads import IN_MEMORY, Snapshot
from trainer.snapshots import SnapshotSender

BOUND_S = 10.0


class Link:
    """Stands for the channel: notes what is said, in order, behind a gate that a test opens."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()

    def send(self, kind: str, body: Any = None) -> None:
        raise AssertionError("snapshots are large")

    def send_large(self, kind: str, body: Any) -> None:
        self.began.set()
        assert self.gate.wait(BOUND_S)
        if self.error is not None:
            raise self.error
        self.said.append((kind, body))

    def mark(self, phase: str, step: int = -1) -> None:
        self.said.append((phase, step))

    def has_command(self, command: str) -> bool:
        return False


class Held:
    """Stands for a tensor: its value is read when it is asked for."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.readers: list[str] = []

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        self.readers.append(threading.current_thread().name)
        return np.full(3, self.value, dtype)


class Clock:
    """Stands for `time` in the module; moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    yield made
    made.gate.set()


def snapshot(step: int, reason: str = "step", value: Any = 1.0) -> Snapshot:
    return Snapshot(step, {"model/value": value}, {"reason": reason})


def test_values_are_read_and_sent_by_a_thread_of_its_own(link):
    sender, held = SnapshotSender(link), Held(2.0)
    sender.submit(snapshot(8, value=held))
    sender.flush()
    assert held.readers == ["snapshot"]
    (phase, step), (kind, sent) = link.said
    assert (phase, step, kind, sent.step) == ("checkpoint", 8, "snapshot", 8)
    np.testing.assert_array_equal(sent.arrays["model/value"], np.full(3, 2.0))
    assert sent.meta == {"reason": "step"}


def test_a_snapshot_in_memory_is_no_checkpoint(link):
    sender = SnapshotSender(link)
    sender.submit(snapshot(8, IN_MEMORY))
    sender.flush()
    assert [kind for kind, _ in link.said] == ["snapshot"]


def test_training_goes_on_while_one_is_on_its_way(link):
    sender = SnapshotSender(link)
    link.gate.clear()
    sender.submit(snapshot(8))
    assert link.began.wait(BOUND_S)
    assert not sender.is_idle
    link.gate.set()
    sender.flush()


def test_snapshots_arrive_in_their_order(link):
    sender = SnapshotSender(link)
    for step in range(1, 6):
        sender.submit(snapshot(step, IN_MEMORY))
    sender.flush()
    assert [body.step for _, body in link.said] == [1, 2, 3, 4, 5]


def test_flush_without_a_snapshot_returns_at_once(link):
    sender = SnapshotSender(link)
    sender.flush()
    assert sender.is_idle


def test_what_sending_raised_reaches_the_loop(link):
    sender = SnapshotSender(link)
    link.error = BrokenPipeError("the host is gone")
    sender.submit(snapshot(8))
    with pytest.raises(BrokenPipeError, match="the host is gone"):
        sender.submit(snapshot(9))


def test_a_link_that_takes_nothing_has_a_bound(link, monkeypatch):
    monkeypatch.setattr(snapshots_module, "_SENT_S", 0.01)
    sender = SnapshotSender(link)
    link.gate.clear()
    sender.submit(snapshot(8))
    with pytest.raises(TimeoutError, match="not sent within 0.01 s"):
        sender.flush()


def test_after_a_long_one_there_is_a_rest(link, monkeypatch):
    """Sending has a twentieth of the time: after two seconds of it come 38 of rest."""
    clock = Clock()
    monkeypatch.setattr(snapshots_module, "time", clock)
    sender = SnapshotSender(link)
    link.gate.clear()
    sender.submit(snapshot(8, IN_MEMORY))
    assert link.began.wait(BOUND_S)
    clock.now += 2.0
    link.gate.set()
    sender.flush()
    clock.now += 37.9
    assert not sender.is_idle
    clock.now += 0.2
    assert sender.is_idle
