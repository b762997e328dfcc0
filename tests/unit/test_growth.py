"""What a cluster that grows may become, and what is asked of its autoscaler."""

from typing import Any

import pytest
import ray

from cluster import growth as module
from cluster import runtime
from cluster.errors import CapacityError
from cluster.growth import Growth, nodes_to_come
from cluster.lines import QueuedRun
from cluster.queue import Queue
from cluster.queue_actor import gangs_placed
from cluster.room import Shape, Worker
from configs.errors import EnvironmentFailure


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, float]]]:
    """What the autoscaler was asked for."""
    calls: list[list[dict[str, float]]] = []
    monkeypatch.setattr(
        module.ray.autoscaler.sdk, "request_resources", lambda bundles: calls.append(bundles)
    )
    return calls


def grows(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LOCKSTEP_GROWS_TO", text)


def test_nothing_comes_where_nobody_says_so(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    monkeypatch.delenv("LOCKSTEP_GROWS_TO", raising=False)
    assert nodes_to_come() == []
    Growth().ask([Shape(2, Worker(1.0))])
    assert asked == []


@pytest.mark.parametrize(
    "text", ["8x2", '{"CPU": 2}', '[{"CPU": 2}]', '[{"nodes": "many"}]', "[3]"]
)
def test_what_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    grows(monkeypatch, text)
    with pytest.raises(
        EnvironmentFailure, match=r"LOCKSTEP_GROWS_TO received .* is allowed"
    ) as told:
        nodes_to_come()
    assert text in str(told.value)


def test_gangs_are_asked_for_until_something_changes(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    grows(monkeypatch, '[{"nodes": 2, "CPU": 4, "GPU": 1}]')
    assert nodes_to_come() == [{"CPU": 4.0, "GPU": 1.0}] * 2
    growth = Growth()
    for _ in range(3):
        growth.ask([Shape(2, Worker(1.0)), Shape(1, Worker(2.0, 1.0))])
    growth.ask([])
    assert asked == [[{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}], []]


def test_a_gang_that_the_nodes_to_come_would_hold_is_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = {"Alive": True, "Resources": {"CPU": 0.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    need = runtime.Need(3, 1, 0)
    monkeypatch.delenv("LOCKSTEP_GROWS_TO", raising=False)
    with pytest.raises(CapacityError, match=r"1 node\(s\) with 0 CPU"):
        runtime._check_capacity(need)
    grows(monkeypatch, '[{"nodes": 2, "CPU": 2}]')
    runtime._check_capacity(need)
    with pytest.raises(CapacityError, match="room for 4"):
        runtime._check_capacity(runtime.Need(5, 1, 0))
    runtime._check_capacity(runtime.Need(5, 1, 0, fewest=4))


def test_the_queue_wants_what_runs_and_one_gang_of_each_kind_that_waits() -> None:
    queue = Queue()
    queue.set_nodes({}, {}, 0.0)
    for number, workers in enumerate((2, 2, 4)):
        shape = Shape(workers, Worker(1.0))
        queue.submit(QueuedRun(f"r{number}", "ann", shape, 0, number), 0.0)
    assert queue.decide(0.0) == []
    assert [shape.workers for shape in queue.wanted()] == [2, 4]
    queue.set_nodes({"n": Worker(2.0)}, {}, 1.0)
    assert [start.run_id for start in queue.decide(1.0)] == ["r0"]
    assert [shape.workers for shape in queue.wanted()] == [2, 2, 4]


def test_a_gang_that_lost_a_node_holds_what_it_has_on_the_others() -> None:
    def group(name: str, state: str, *nodes: str) -> dict[str, Any]:
        return {"name": name, "state": state, "bundles_to_node_id": dict(enumerate(nodes))}

    groups = [
        group("lockstep-a-b-1234", "CREATED", "n1", "n1", "n2"),
        group("lockstep-c-1234", "RESCHEDULING", "n1", "gone", ""),
        group("lockstep-d-1234", "PENDING", "", ""),
        group("somebody-else", "CREATED", "n1"),
    ]
    assert gangs_placed(groups, {"n1", "n2"}) == {"a-b": {"n1": 2, "n2": 1}, "c": {"n1": 1}}
