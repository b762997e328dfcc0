"""Which snapshots become checkpoints, in which order, and what storage that fails does to them."""

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from configs.schema import CheckpointConfig
from trainer import keeper as keeper_module
from trainer.checkpoint_store import Found
from trainer.errors import CheckpointError
from trainer.keeper import CheckpointKeeper
from trainer.payloads import IN_MEMORY, Snapshot

BOUND_S = 10.0


class Store:
    """Stands for the store of checkpoints: a gate that a test opens, and failures it asks for."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, int, str]] = []
        self.metrics: list[Mapping[str, float] | None] = []
        self.pruned: list[tuple[int, str | None, str]] = []
        self.finals: list[int] = []
        self.cleaned = 0
        self.failures = 0
        self.begun: queue.Queue[int] = queue.Queue()
        self.gate = threading.Event()
        self.gate.set()
        self.found: Found | None = None
        self.skipped: list[str] = []

    def save(
        self,
        step: int,
        generation: int,
        arrays: Any,
        meta: Any,
        kind: str = "step",
        metrics: Mapping[str, float] | None = None,
    ) -> str:
        self.begun.put(step)
        assert self.gate.wait(BOUND_S)
        if self.failures:
            self.failures -= 1
            raise CheckpointError(f"no room for step {step}")
        self.saved.append((step, generation, kind))
        self.metrics.append(metrics)
        return f"step-{step}"

    def save_final(self, generation: int, arrays: Any, meta: Any, step: int = 0) -> str:
        if self.failures:
            raise CheckpointError("no room for weights")
        self.finals.append(generation)
        return "final"

    def clean(self) -> None:
        self.cleaned += 1

    def last_generation(self) -> int:
        return 7

    def prune(self, keep: int, best_by: str | None, best_mode: str) -> list[str]:
        self.pruned.append((keep, best_by, best_mode))
        return []

    def newest(self, most_generation: int | None = None) -> tuple[Found | None, list[str]]:
        return self.found, self.skipped


class Events:
    """What the keeper told, to be waited for."""

    def __init__(self) -> None:
        self._told: queue.Queue[dict[str, Any]] = queue.Queue()

    def __call__(self, event: dict[str, Any]) -> None:
        self._told.put(event)

    def next(self) -> dict[str, Any]:
        return self._told.get(timeout=BOUND_S)

    @property
    def is_empty(self) -> bool:
        return self._told.empty()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def keeper(store: Store, events: Events) -> Iterator[CheckpointKeeper]:
    config = CheckpointConfig(keep=2, best_by="val_mae")
    kept = CheckpointKeeper(store, config, events)
    yield kept
    store.gate.set()
    kept.close()


def snapshot(step: int, reason: str = "step", **meta: Any) -> Snapshot:
    return Snapshot(step, {"model/value": np.zeros(2)}, {"reason": reason, **meta})


def test_a_snapshot_that_is_to_last_becomes_a_checkpoint(keeper, store, events):
    keeper.take(snapshot(8), generation=3)
    event = events.next()
    assert (event["event"], event["step"], event["generation"]) == ("checkpoint", 8, 3)
    assert event["path"] == "step-8"
    assert store.saved == [(8, 3, "step")]
    assert store.pruned == [(2, "val_mae", "auto")]


def test_a_snapshot_in_memory_is_kept_and_not_written(keeper, store, events):
    keeper.take(snapshot(5, IN_MEMORY), generation=1)
    keeper.flush(BOUND_S)
    assert keeper.latest.step == 5
    assert store.begun.empty()
    assert events.is_empty


def test_only_the_end_of_an_epoch_is_judged_by_its_metrics(keeper, store, events):
    history = [{"val_mae": 3.0}, {"val_mae": 2.0}]
    keeper.take(snapshot(16, "epoch", history=history), 1)
    events.next()
    keeper.take(snapshot(20, "step", history=history), 1)
    events.next()
    assert store.metrics == [{"val_mae": 2.0}, None]


def test_training_does_not_wait_for_storage_and_only_the_newest_is_written_next(
    keeper, store, events
):
    store.gate.clear()
    keeper.take(snapshot(8), 1)
    assert store.begun.get(timeout=BOUND_S) == 8  # being written, and it takes for ever
    for step in (16, 24, 32):
        keeper.take(snapshot(step), 1)
    assert keeper.latest.step == 32
    store.gate.set()
    keeper.flush(BOUND_S)
    assert [step for step, _, _ in store.saved] == [8, 32]


def test_a_snapshot_in_memory_does_not_take_the_place_of_one_that_is_to_be_written(
    keeper, store, events
):
    store.gate.clear()
    keeper.take(snapshot(8), 1)
    store.begun.get(timeout=BOUND_S)
    keeper.take(snapshot(16), 1)
    keeper.take(snapshot(17, IN_MEMORY), 1)
    store.gate.set()
    keeper.flush(BOUND_S)
    assert [step for step, _, _ in store.saved] == [8, 16]
    assert keeper.latest.step == 17


def test_what_could_not_be_written_is_told_and_tried_again(keeper, store, events, monkeypatch):
    monkeypatch.setattr(keeper_module, "_RETRY_S", 0.001)
    store.failures = 2
    keeper.take(snapshot(8), 4)
    for _ in range(2):
        failed = events.next()
        assert (failed["event"], failed["step"]) == ("checkpoint_failed", 8)
        assert failed["error"] == "no room for step 8"
    assert events.next()["event"] == "checkpoint"
    keeper.flush(BOUND_S)
    assert store.saved == [(8, 4, "step")]


def test_a_newer_checkpoint_is_tried_at_once_after_a_failure(keeper, store, events, monkeypatch):
    monkeypatch.setattr(keeper_module, "_RETRY_S", 1000.0)
    store.failures = 1
    keeper.take(snapshot(8), 1)
    assert events.next()["event"] == "checkpoint_failed"
    keeper.take(snapshot(16), 2)
    assert events.next()["event"] == "checkpoint"
    assert store.saved == [(16, 2, "step")]


def test_flush_says_why_there_is_no_checkpoint(keeper, store, events, monkeypatch):
    monkeypatch.setattr(keeper_module, "_RETRY_S", 1000.0)
    store.failures = 1
    keeper.take(snapshot(8), 1)
    events.next()
    with pytest.raises(CheckpointError, match="no room for step 8"):
        keeper.flush(0.0)


def test_flush_has_a_bound_when_storage_does_not_answer(keeper, store, events):
    store.gate.clear()
    keeper.take(snapshot(8), 1)
    with pytest.raises(CheckpointError, match="not written within 0 s: storage does not keep up"):
        keeper.flush(0.0)


def test_close_ends_a_keeper_whose_storage_never_came_back(keeper, store, events, monkeypatch):
    monkeypatch.setattr(keeper_module, "_RETRY_S", 1000.0)
    store.failures = 1
    keeper.take(snapshot(8), 1)
    events.next()
    keeper.close()
    keeper.close()
    names = [thread.name for thread in threading.enumerate()]
    assert "checkpoints" not in names


def test_what_is_found_on_storage_is_gone_on_from(keeper, store):
    store.found = Found("p", 24, 2, {"model/value": np.ones(2)}, {"history": [{}]})
    store.skipped = ["p2 is damaged"]
    assert keeper.recover(2) == ["p2 is damaged"]
    assert keeper.latest.step == 24
    assert keeper.latest.meta == {"history": [{}]}
    assert store.cleaned == 1
    assert keeper.last_generation() == 7


def test_trained_weights_are_on_storage_when_the_call_returns(keeper, store):
    weights = {"model/value": np.ones(2)}
    keeper.take_weights(weights, 7)
    assert keeper.weights is weights
    assert store.finals == [7]


def epoch_end(step: int, value: float) -> Snapshot:
    return snapshot(step, "epoch", history=[{"val_mae": value}])


def test_the_best_epoch_waits_for_its_turn_and_others_give_way(keeper, store, events):
    store.gate.clear()
    keeper.take(snapshot(4), 1)
    store.begun.get(timeout=BOUND_S)
    for step, value in ((8, 3.0), (16, 1.0), (24, 2.0), (32, 5.0)):
        keeper.take(epoch_end(step, value), 1)
    keeper.take(snapshot(36), 1)
    store.gate.set()
    keeper.flush(BOUND_S)
    assert [step for step, _, _ in store.saved] == [4, 16, 36]


def test_the_newest_in_memory_is_written_when_a_run_ends(keeper, store, events):
    keeper.take(snapshot(8), 1)
    keeper.take(snapshot(13, IN_MEMORY), 2)
    keeper.take_latest()
    keeper.take_latest()
    keeper.flush(BOUND_S)
    assert store.saved[-1] == (13, 2, IN_MEMORY)
    assert [step for step, _, _ in store.saved].count(13) == 1


def test_what_is_on_storage_already_is_not_written_again(keeper, store, events):
    keeper.take_latest()
    keeper.take(snapshot(8), 1)
    keeper.flush(BOUND_S)
    keeper.take_latest()
    keeper.flush(BOUND_S)
    assert store.saved == [(8, 1, "step")]
