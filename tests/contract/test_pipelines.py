"""Leases and the memory of pipelines, on SQLite and on PostgreSQL."""

import contextlib
import os
import subprocess
import sys
import threading

import pytest

from registry.database import Database
from registry.errors import LeaseHeld, LeaseLost, RegistryError
from registry.leases import Heartbeat, Lease, Leases, describe_holder, is_dead, this_process
from registry.pipelines import PipelineStore
from tests.support.clock import Clock


@pytest.fixture
def leases(database: Database, clock: Clock) -> Leases:
    return Leases(database, clock)


@pytest.fixture
def store(database: Database, leases: Leases) -> PipelineStore:
    return PipelineStore(database, leases)


def test_a_lease_has_one_holder_until_it_runs_out(leases: Leases, clock: Clock) -> None:
    first = leases.acquire("p", "a", 10.0)
    with pytest.raises(LeaseHeld, match="a holds it for another 10 s"):
        leases.acquire("p", "b", 10.0)
    leases.acquire("another", "b", 10.0)
    clock.now += 9
    leases.renew(first)
    clock.now += 9
    with pytest.raises(LeaseHeld):
        leases.acquire("p", "b", 10.0)
    clock.now += 2
    second = leases.acquire("p", "b", 10.0)
    assert second.fence == first.fence + 1
    with pytest.raises(LeaseLost, match="b took it over after 10 s"):
        leases.renew(first)
    leases.release(first)  # is no longer its own to give up
    with pytest.raises(LeaseHeld):
        leases.acquire("p", "c", 10.0)
    leases.release(second)
    assert leases.acquire("p", "c", 10.0).fence == 3


def test_a_lease_that_ran_out_and_nobody_took_goes_on(leases: Leases, clock: Clock) -> None:
    lease = leases.acquire("p", "a", 10.0)
    clock.now += 60
    leases.renew(lease)
    with pytest.raises(LeaseHeld):
        leases.acquire("p", "b", 10.0)


def test_the_time_of_a_dead_holder_is_not_awaited(leases: Leases) -> None:
    leases.acquire("p", "dead", 1_000.0)
    assert leases.acquire("p", "b", 10.0, lambda holder: holder == "dead").fence == 2


def test_a_process_is_known_to_be_dead_when_it_is() -> None:
    code = "from registry.owners import own_mark; print(own_mark())"
    mark = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()
    assert is_dead(f"host|1|token|{mark}")
    assert not is_dead(this_process())
    assert not is_dead("somebody else")
    assert this_process() != this_process()
    assert describe_holder(this_process()).startswith(f"process {os.getpid()} on ")


def test_many_want_the_same_lease_and_one_gets_it(database_url: str) -> None:
    granted: list[Lease] = []
    ready = threading.Barrier(6)

    def want(name: str) -> None:
        database = Database(database_url)
        leases = Leases(database)
        ready.wait(20)
        try:
            granted.append(leases.acquire("p", name, 60.0))
        except LeaseHeld:
            pass
        finally:
            database.close()

    threads = [threading.Thread(target=want, args=(f"t{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [lease.fence for lease in granted] == [1]


def check_until_lost(heartbeat: Heartbeat) -> None:
    for _ in range(100):
        threading.Event().wait(0.05)
        heartbeat.check()


def test_a_heartbeat_keeps_a_lease_and_notices_its_loss(database: Database) -> None:
    leases = Leases(database)  # by the database's own clock
    lease = leases.acquire("p", "a", 0.3)
    with Heartbeat(leases, lease) as heartbeat:
        waiting = threading.Event()
        for _ in range(8):
            waiting.wait(0.1)
            with pytest.raises(LeaseHeld):
                leases.acquire("p", "b", 60.0)
            heartbeat.check()
        leases.acquire("p", "b", 60.0, lambda _: True)
        with pytest.raises(LeaseLost):
            check_until_lost(heartbeat)
    with pytest.raises(LeaseHeld):  # b's, which a's end does not touch
        leases.acquire("p", "c", 1.0)


def test_runs_and_steps_are_remembered(store: PipelineStore, leases: Leases) -> None:
    lease = leases.acquire("p", "a", 10.0)
    store.begin(lease, "fresh", "r1", "d", 1.0)
    store.begin(lease, "fresh", "r1", "d", 2.0)
    store.record(lease, "r1", "discover", {"is_new": True, "files": {"ü": [1, None]}}, 3.0)
    store.record(lease, "r1", "prepare", {"rows": 1.5}, 4.0)
    assert store.results("r1") == {
        "discover": {"is_new": True, "files": {"ü": [1, None]}},
        "prepare": {"rows": 1.5},
    }
    assert store.result("r1", "prepare") == {"rows": 1.5}
    assert store.result("r1", "train") is None
    store.end(lease, "r1", "done", "kept", "too bad", 5.0)
    store.end(lease, "r1", "done", "promoted", "again", 6.0)
    store.begin(lease, "fresh", "r2", "d", 7.0)
    newest, oldest = store.runs("fresh")
    assert (newest.run_id, newest.status, newest.decision) == ("r2", "running", None)
    assert (oldest.status, oldest.decision, oldest.said) == ("done", "kept", "too bad")
    assert (oldest.started_at, oldest.ended_at) == (1.0, 5.0)
    assert [run.run_id for run in store.runs("fresh", "running")] == ["r2"]
    assert store.runs("other") == []
    with pytest.raises(RegistryError, match="fresh has a run of this id"):
        store.begin(lease, "other", "r1", "d", 8.0)


def test_who_lost_the_lease_writes_nothing(store: PipelineStore, leases: Leases) -> None:
    lost = leases.acquire("p", "a", 10.0)
    store.begin(lost, "fresh", "r1", "d", 1.0)
    leases.acquire("p", "b", 10.0, lambda _: True)
    with pytest.raises(LeaseLost):
        store.record(lost, "r1", "discover", {}, 2.0)
    with pytest.raises(LeaseLost):
        store.end(lost, "r1", "done", "kept", "", 2.0)
    with pytest.raises(LeaseLost):
        store.begin(lost, "fresh", "r2", "d", 2.0)
    assert store.results("r1") == {}
    assert [run.status for run in store.runs("fresh")] == ["running"]


def test_a_lease_cannot_change_hands_within_a_write_that_it_guards(
    database: Database, store: PipelineStore, leases: Leases
) -> None:
    """Whoever takes over while a step is being recorded waits, and sees the step."""
    lease = leases.acquire("p", "a", 10.0)
    store.begin(lease, "fresh", "r1", "d", 1.0)
    taken: list[Lease] = []
    taker = threading.Thread(
        target=lambda: taken.append(leases.acquire("p", "b", 10.0, lambda _: True))
    )
    with database.writing("pipelines") as connection:
        store.record_within(connection, lease, "r1", "promote", {"decision": "promoted"}, 2.0)
        taker.start()
        taker.join(0.3)
        assert taken == []
    taker.join()
    assert [each.fence for each in taken] == [2]
    assert store.result("r1", "promote") == {"decision": "promoted"}


def test_what_a_broken_transaction_recorded_is_gone(
    database: Database, store: PipelineStore, leases: Leases
) -> None:
    lease = leases.acquire("p", "a", 10.0)
    store.begin(lease, "fresh", "r1", "d", 1.0)
    with contextlib.suppress(KeyboardInterrupt), database.writing("models") as connection:
        store.record_within(connection, lease, "r1", "promote", {}, 2.0)
        raise KeyboardInterrupt
    assert store.results("r1") == {}
