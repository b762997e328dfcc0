"""The queue's promises, on any workload: gangs whole, nothing over-committed, idle or forgotten."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.lines import RUNNING, WAITING, YIELDING, QueuedRun
from cluster.queue import Queue, Start, Yield
from cluster.room import Room, Shape, Worker
from cluster.shares import Policy, Terms
from cluster.standing import standings
from tests.support.queue_simulation import Simulation, Work

FAIR = Policy(horizon_s=100.0, priority_s=1000.0)


def gang(name: str, user: str = "ann", workers: int = 1, cpus: float = 1, **more: Any) -> QueuedRun:
    gpus = more.pop("gpus", 0)
    return QueuedRun(name, user, Shape(workers, Worker(cpus, gpus)), **more)


def queue_on(*cpus: float, policy: Policy = FAIR) -> Queue:
    queue = Queue(policy)
    queue.set_nodes({f"n{i}": Worker(c, 0) for i, c in enumerate(cpus)}, {}, 0.0)
    return queue


def submit(queue: Queue, *runs: QueuedRun, now: float = 0.0) -> None:
    for run in runs:
        run.sequence = run.sequence or len(queue.runs()) + 1
        queue.submit(run, now)


def decide(queue: Queue, now: float = 0.0) -> list[Any]:
    made = []
    while new := queue.decide(now):
        made += new
    return made


def started(decisions: list[Any]) -> list[str]:
    return [one.run_id for one in decisions if isinstance(one, Start)]


def yielding(decisions: list[Any]) -> list[str]:
    return [one.run_id for one in decisions if isinstance(one, Yield)]


# ---- examples


def test_a_gang_starts_whole_or_not():
    queue = queue_on(2, 2)
    submit(queue, gang("three", workers=3), gang("two", workers=2))
    assert started(decide(queue)) == ["three"]
    assert sum(queue.run("three").placed.values()) == 3
    assert queue.run("two").state == WAITING
    queue.remove("three", 1.0)
    assert started(decide(queue, 1.0)) == ["two"]


def test_workers_do_not_fit_into_room_that_is_scattered():
    queue = queue_on(3, 3)
    submit(queue, gang("wide", workers=2, cpus=2), gang("more", workers=1, cpus=2))
    assert started(decide(queue)) == ["wide"]  # one CPU is free on each node
    assert queue.places(Worker(2)) == 0


def test_users_share_what_is_free_at_one_moment():
    queue = queue_on(4)
    submit(queue, *(gang(f"a{i}") for i in range(4)), *(gang(f"b{i}", "bob") for i in range(4)))
    assert sorted(started(decide(queue))) == ["a0", "a1", "b0", "b1"]


def test_weights_share_in_proportion():
    queue = queue_on(4)
    queue.set_terms("bob", Terms(weight=3.0), 0.0)
    submit(queue, *(gang(f"a{i}") for i in range(4)), *(gang(f"b{i}", "bob") for i in range(4)))
    assert sorted(started(decide(queue))) == ["a0", "b0", "b1", "b2"]


def test_who_comes_later_gets_the_share_without_waiting_for_an_end():
    queue = queue_on(4)
    submit(queue, *(gang(f"a{i}") for i in range(4)))
    decide(queue)
    submit(queue, gang("b0", "bob"), now=5.0)
    made = decide(queue, 5.0)
    assert yielding(made) == ["a3"]  # the youngest, who loses least
    queue.returned("a3", 6.0)
    assert started(decide(queue, 6.0)) == ["b0"]


def test_a_higher_priority_makes_room_and_an_equal_one_does_not():
    queue = queue_on(2)
    submit(queue, gang("low", workers=2))
    decide(queue)
    submit(queue, gang("equal", workers=2), now=1.0)
    assert decide(queue, 1.0) == []
    submit(queue, gang("urgent", workers=2, priority=1), now=2.0)
    assert decide(queue, 2.0) == [Yield("low", "urgent")]
    assert queue.run("low").state == YIELDING
    assert decide(queue, 3.0) == []  # waits for the checkpoint, asks nobody twice
    queue.returned("low", 4.0)
    assert started(decide(queue, 4.0)) == ["urgent"]


def test_a_run_that_made_room_has_its_old_place():
    queue = queue_on(1)
    submit(queue, gang("first"))
    decide(queue)
    submit(queue, gang("second"), gang("urgent", priority=1), now=1.0)
    decide(queue, 1.0)
    queue.returned("first", 2.0)
    assert started(decide(queue, 2.0)) == ["urgent"]
    queue.remove("urgent", 3.0)
    assert started(decide(queue, 3.0)) == ["first"]


def test_only_as_many_make_room_as_are_needed():
    queue = queue_on(4)
    submit(queue, gang("small"), gang("large", workers=3))
    decide(queue)
    submit(queue, gang("urgent", workers=3, priority=1), now=1.0)
    assert yielding(decide(queue, 1.0)) == ["large"]


def test_smaller_runs_borrow_what_the_head_cannot_use_yet():
    queue = queue_on(4)
    submit(queue, gang("long", workers=3))
    decide(queue)
    submit(queue, gang("wide", workers=4), gang("small"), now=1.0)
    assert started(decide(queue, 1.0)) == ["small"]
    assert queue.head == "wide"
    assert queue.run("small").lent_by == "wide"
    queue.remove("long", 2.0)
    made = decide(queue, 2.0)
    assert made == [Yield("small", "wide")]  # the head can start but for what it lent
    queue.returned("small", 3.0)
    assert started(decide(queue, 3.0)) == ["wide"]


def test_what_is_free_is_kept_for_a_run_that_others_make_room_for():
    queue = queue_on(4)
    submit(queue, gang("low", workers=2))
    decide(queue)
    submit(queue, gang("urgent", workers=4, priority=1), gang("small"), now=1.0)
    assert decide(queue, 1.0) == [Yield("low", "urgent")]
    assert queue.run("small").state == WAITING
    queue.returned("low", 2.0)
    assert started(decide(queue, 2.0)) == ["urgent"]


def test_a_quota_holds_its_user_back_and_nobody_else():
    queue = queue_on(4)
    queue.set_terms("ann", Terms(max_cpus=2), 0.0)
    submit(queue, *(gang(f"a{i}") for i in range(3)), gang("b", "bob"))
    assert sorted(started(decide(queue))) == ["a0", "a1", "b"]
    reasons = {one.run_id: one.reason for one in standings(queue, 0.0)}
    assert reasons["a2"] == (
        "waits for the user's own runs: ann holds 2 of at most 2 CPUs, this asks for 1."
    )


def test_a_run_that_no_node_could_hold_blocks_nobody():
    queue = queue_on(2, 2)
    submit(queue, gang("huge", cpus=3), gang("small"))
    assert started(decide(queue)) == ["small"]
    assert queue.head == ""
    assert "the cluster, were it empty, has room for 0" in standings(queue, 0.0)[1].reason
    queue.set_nodes({"n0": Worker(4)}, {}, 1.0)
    queue.remove("small", 1.0)
    assert started(decide(queue, 1.0)) == ["huge"]


def test_what_others_use_is_not_given_away():
    queue = queue_on(4)
    queue.set_nodes({"n0": Worker(4)}, {"n0": Worker(3)}, 0.0)
    submit(queue, gang("two", workers=2))
    assert decide(queue) == []
    queue.set_nodes({"n0": Worker(4)}, {}, 1.0)
    assert started(decide(queue, 1.0)) == ["two"]


def test_gpus_are_shared_by_the_greater_share():
    queue = Queue(FAIR)
    queue.set_nodes({"n0": Worker(8, 2)}, {}, 0.0)
    submit(
        queue, *(gang(f"a{i}", gpus=1) for i in range(2)), *(gang(f"b{i}", "bob") for i in range(8))
    )
    decide(queue)
    assert queue.shares.holds("ann") == (2.0, 2.0, 2)
    assert queue.shares.holds("bob") == (6.0, 0.0, 6)


def test_who_returns_after_a_pause_has_not_saved_up():
    queue = queue_on(1)
    submit(queue, gang("a"))
    decide(queue)
    queue.remove("a", 10.0)
    submit(queue, gang("b", "bob"), now=1000.0)
    decide(queue, 1000.0)
    submit(queue, gang("a2"), now=5000.0)
    assert decide(queue, 5000.0) == []  # 4000 s of bob's are not held against him
    assert queue.decide(5000.0 + FAIR.margin_s + 1.0) != []


def test_an_empty_queue_decides_nothing():
    assert Queue().decide(0.0) == []


@pytest.mark.parametrize("seen", [WAITING, RUNNING, YIELDING])
def test_a_run_that_an_earlier_queue_knew_goes_on(seen):
    queue = queue_on(2)
    placed = {} if seen == WAITING else {"n0": 2}
    submit(queue, gang("old", workers=2, state=seen, placed=placed, sequence=1))
    submit(queue, gang("new", workers=2, sequence=2))
    assert started(decide(queue)) == (["old"] if seen == WAITING else [])
    queue.remove("old", 1.0)
    assert started(decide(queue, 1.0)) == ["new"]


def test_positions_follow_the_order_of_starts():
    queue = queue_on(1)
    submit(queue, gang("now"))
    decide(queue)
    submit(queue, gang("a"), gang("a2"), gang("b", "bob"), gang("top", "bob", priority=2))
    waiting = [one for one in standings(queue, 0.0) if one.position]
    assert [one.position for one in waiting] == [1, 2, 3, 4]
    assert [one.run_id for one in waiting] == ["top", "a", "b", "a2"]
    assert (
        waiting[0].reason
        == "first in line: asks for 1 worker with 1 CPU; 0 of them would find room now."
    )


# ---- any workload

users = st.sampled_from(["ann", "bob", "cat"])
runs = st.tuples(
    users,
    st.integers(1, 4),  # workers
    st.integers(1, 3),  # CPUs of each
    st.integers(0, 1),  # GPUs of each
    st.integers(-1, 2),  # priority
    st.integers(0, 200),  # when it comes
    st.integers(1, 300),  # how long it takes
)
clusters = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=4)


def simulate(nodes, drawn, look=lambda _: None, policy=FAIR, checkpoint_s=5.0) -> Simulation:
    whole = {f"n{i}": Worker(float(c), float(g)) for i, (c, g) in enumerate(nodes)}
    work = []
    for number, (user, workers, cpus, gpus, priority, at, length) in enumerate(drawn, start=1):
        shape = Shape(workers, Worker(float(cpus), float(gpus)))
        if Room(whole).has(shape):
            run = QueuedRun(f"r{number}", user, shape, priority, number)
            work.append(Work(run, float(at), float(length)))
    simulation = Simulation(Queue(policy), whole, work, checkpoint_s, look=look)
    simulation.run(max_events=50_000)
    return simulation


@settings(max_examples=40, deadline=None)
@given(clusters, st.lists(runs, max_size=12))
def test_no_node_is_over_committed_and_gangs_are_whole(nodes, drawn):
    def look(simulation: Simulation) -> None:
        for node, used in simulation.used().items():
            whole = simulation.nodes[node]
            assert used.cpus <= whole.cpus
            assert used.gpus <= whole.gpus
        for run in simulation.queue.runs():
            assert sum(run.placed.values()) == (0 if run.state == WAITING else run.shape.workers)

    simulate(nodes, drawn, look)


@settings(max_examples=40, deadline=None)
@given(clusters, st.lists(runs, max_size=12))
def test_nobody_is_forgotten_and_no_work_is_lost(nodes, drawn):
    simulation = simulate(nodes, drawn)
    for one in simulation.work.values():
        assert one.ended_at >= 0  # everyone ends, whatever the priorities
    assert simulation.queue.runs() == []
    assert all(held == (0.0, 0.0, 0) for held in map(simulation.queue.shares.holds, ("ann", "bob")))


@settings(max_examples=40, deadline=None)
@given(clusters, st.lists(runs, max_size=12))
def test_no_room_is_idle_that_a_waiting_run_could_use(nodes, drawn):
    """But for what is kept for a run that starts when the checkpoints are written."""

    def look(simulation: Simulation) -> None:
        if simulation.queue.awaited:
            return
        free = Room(simulation.nodes)
        for run in simulation.queue.runs():
            free.take(run.shape.worker, run.placed)
        for run in simulation.queue.runs():
            assert run.state != WAITING or not free.has(run.shape), run

    simulate(nodes, drawn, look)


@settings(max_examples=40, deadline=None)
@given(clusters, st.lists(runs, max_size=12))
def test_what_is_lent_never_keeps_the_head_from_starting(nodes, drawn):
    """Were all that the head has lent away, it would still not fit; else it is being given back."""

    def look(simulation: Simulation) -> None:
        queue = simulation.queue
        if not queue.head or queue.awaited:  # others before it may be awaiting room
            return
        without = Room(simulation.nodes)
        for run in queue.runs():
            if run.lent_by != queue.head:
                without.take(run.shape.worker, run.placed)
        assert not without.has(queue.run(queue.head).shape)

    simulate(nodes, drawn, look)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(2, 6), st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_users_who_always_wait_have_had_alike(cpus, jobs, weights):
    """Virtual times of backlogged users differ by no more than the policy says."""
    names = [f"u{i}" for i in range(len(weights))]
    queue = queue_on(float(cpus))
    work = []
    for number, name in enumerate(names * (jobs + cpus), start=1):
        run = QueuedRun(f"r{number}", name, Shape(1, Worker(1.0)), 0, number)
        work.append(Work(run, 0.0, 1e6))
    for name, weight in zip(names, weights, strict=True):
        queue.set_terms(name, Terms(weight=float(weight)), 0.0)
    worst = 0.0

    def look(simulation: Simulation) -> None:
        nonlocal worst
        had = [queue.shares.virtual_times()[name] for name in names]
        worst = max(worst, max(had) - min(had))

    Simulation(queue, {"n0": Worker(float(cpus))}, work, 1.0, look=look).run(until=2000.0)
    # The margin, what counts in advance, and what a tick and a checkpoint may add.
    assert worst <= FAIR.margin_s + FAIR.horizon_s + 2 * (10.0 + 1.0)


def test_two_runs_do_not_replace_each_other_in_turn():
    """On one CPU two endless runs take turns, no more often than the margin allows."""
    queue = queue_on(1)
    work = [
        Work(gang("a", "ann", sequence=1), 0.0, 1e6),
        Work(gang("b", "bob", sequence=2), 0.0, 1e6),
    ]
    simulation = Simulation(queue, {"n0": Worker(1.0)}, work, 1.0, tick_s=1.0)
    simulation.run(until=1000.0)
    assert 1000.0 / (2 * FAIR.margin_s) - 2 <= simulation.yields <= 1000.0 / FAIR.margin_s


@settings(max_examples=30, deadline=None)
@given(clusters, st.lists(runs, max_size=10))
def test_the_same_workload_is_decided_alike(nodes, drawn):
    first, second = simulate(nodes, drawn), simulate(nodes, drawn)
    assert [one.starts for one in first.work.values()] == [
        one.starts for one in second.work.values()
    ]


def test_a_decision_looks_at_lines_not_at_runs():
    """A full cluster with a hundred times the runs waiting costs the same."""

    def looked_at(runs: int) -> int:
        queue = queue_on(*[4.0] * 50)
        for number in range(runs):
            user, cpus = f"u{number % 10}", float(1 + number % 3)
            queue.submit(QueuedRun(f"r{number}", user, Shape(1, Worker(cpus)), 0, number), 0.0)
        decide(queue)
        before = queue.looked_at
        queue.decide(1.0)
        return queue.looked_at - before

    assert looked_at(30_000) <= looked_at(300) * 1.2


@settings(max_examples=60, deadline=None)
@given(
    clusters,
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 1), st.integers(1, 2)),
        max_size=15,
    ),
)
def test_places_follow_every_change(nodes, changes):
    room = Room({f"n{i}": Worker(float(c), float(g)) for i, (c, g) in enumerate(nodes)})
    kinds = {Worker(float(c), float(g)) for c in (1, 2, 3) for g in (0, 1)}
    for kind in kinds:
        room.places(kind)
    for node, cpus, gpus, count in changes:
        room.take(Worker(float(cpus), float(gpus)), {f"n{node % len(nodes)}": count})
    fresh = Room({f"n{i}": room.free(f"n{i}") for i in range(len(nodes))})
    assert {kind: room.places(kind) for kind in kinds} == {
        kind: fresh.places(kind) for kind in kinds
    }
