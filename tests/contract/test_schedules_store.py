"""Schedules, ticks and the lease of the scheduler, on every database."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy.exc import IntegrityError

from registry.database import Database
from registry.errors import RegistryError, SchedulerSuperseded
from registry.schedules import Holder, ScheduleRecord, Schedules, TickRecord

ME = Holder("me", "here", 1, "boot 1", 60.0)
OTHER = Holder("other", "there", 2, "boot 2", 60.0)
NIGHTLY = ScheduleRecord("nightly", "/p.yaml", "0 2 * * *", "Europe/Zurich", 1.5, "queue", 1e9)


@pytest.fixture
def store(database_url: str) -> Iterator[Schedules]:
    database = Database(database_url)
    yield Schedules(database)
    database.close()


def test_what_is_put_is_found(store: Schedules) -> None:
    store.claim(ME)
    with store.round(ME) as round_:
        round_.put(replace(NIGHTLY, cron="@daily"))
        round_.put(NIGHTLY)
        round_.looked("nightly", 1_764_000_000.125)
        assert list(round_.schedules()) == ["nightly"]
    assert store.schedule("nightly") == replace(NIGHTLY, looked_until=1_764_000_000.125)
    with pytest.raises(RegistryError, match=r"no schedule 'nigthly' .* Did you mean 'nightly'"):
        store.schedule("nigthly")


def test_a_tick_goes_its_way_and_is_decided_once(store: Schedules) -> None:
    store.claim(ME)
    tick = TickRecord("nightly", 1_900_000_000, missed=3)
    with store.round(ME) as round_:
        round_.add(tick)
        round_.change(tick, outcome="running", attempt=1, started_at=2e9, pid=2**40, process="p")
        decided = round_.decided("nightly")
        assert decided(1_900_000_000)
        assert not decided(1_900_000_060)
        assert not round_.decided("weekly")(1_900_000_000)
        assert [each.pid for each in round_.open_ticks("nightly")] == [2**40]
    with pytest.raises(IntegrityError), store.round(ME) as round_:
        round_.add(tick)
    with store.round(ME) as round_:
        round_.change(tick, outcome="failed", ended_at=2e9 + 5.5, exit_status=3, reason="no")
        assert round_.open_ticks() == []
    (found,) = store.history("nightly", 10)
    assert (found.outcome, found.exit_status, found.ended_at) == ("failed", 3, 2e9 + 5.5)
    assert store.newest("nightly", ("done", "failed")) == found
    assert store.newest("nightly", ("running",)) is None


def test_a_round_that_fails_changes_nothing(store: Schedules) -> None:
    def fail() -> None:
        with store.round(ME) as round_:
            round_.put(NIGHTLY)
            raise KeyError

    store.claim(ME)
    with pytest.raises(KeyError):
        fail()
    assert store.schedules() == []


def test_one_scheduler_is_at_work(store: Schedules) -> None:
    assert store.claim(ME) is None
    assert store.claim(ME) is None
    seen = store.claim(OTHER)
    assert seen == ME
    with pytest.raises(SchedulerSuperseded, match="another one has taken over"), store.round(OTHER):
        pass
    store.release(OTHER)
    store.release(ME)
    store.release(ME)
    assert store.holder() is None
    assert store.claim(OTHER) is None


def test_a_holder_that_ended_is_replaced_unless_it_said_something_since(store: Schedules) -> None:
    store.claim(ME)
    seen = store.claim(OTHER)
    with store.round(ME):
        pass
    again = store.claim(OTHER, ended=seen)
    assert again == replace(ME, beat=1)
    assert store.claim(OTHER, ended=again) is None
    with pytest.raises(SchedulerSuperseded), store.round(ME) as round_:
        round_.put(NIGHTLY)
    assert store.schedules() == []


def test_of_many_claims_at_once_one_succeeds(store: Schedules) -> None:
    won: list[int] = []

    def claim(number: int) -> None:
        if store.claim(replace(ME, key=str(number))) is None:
            won.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.holder() == replace(ME, key=str(won[0]))


def test_one_run_at_a_time_waits_for_a_scheduler(store: Schedules) -> None:
    assert store.ask(TickRecord("nightly", 1_900_000_001, is_by_hand=True))
    assert not store.ask(TickRecord("nightly", 1_900_000_002, is_by_hand=True))
    assert store.ask(TickRecord("weekly", 1_900_000_002, is_by_hand=True))
    store.claim(ME)
    with store.round(ME) as round_:
        assert not round_.decided("nightly")(1_900_000_001)  # a tick of the same second is another


def test_runs_by_hand_in_one_second_are_told_apart(store: Schedules) -> None:
    asked = TickRecord("nightly", 1_900_000_001, is_by_hand=True)
    me = Holder("me", "host", 1, "", 60.0)
    store.claim(me)
    for _ in range(3):
        assert store.ask(asked)
        with store.round(me) as round_:
            round_.change(store.history("nightly", 1)[0], outcome="done")
    planned = [tick.planned_at for tick in store.history("nightly", 9)]
    assert planned == [1_900_000_003, 1_900_000_002, 1_900_000_001]


def test_old_ticks_are_forgotten_but_not_open_ones(store: Schedules) -> None:
    store.claim(ME)
    with store.round(ME) as round_:
        for number in range(6):
            round_.add(TickRecord("nightly", number, outcome="running" if not number else "done"))
        round_.add(TickRecord("weekly", 0, outcome="done"))
        assert [tick.planned_at for tick in round_.forget("nightly", keep=2)] == [3, 2, 1]
        assert round_.forget("nightly", keep=2) == []
    assert [tick.planned_at for tick in store.history("nightly", 10)] == [5, 4, 0]
    assert len(store.history("weekly", 10)) == 1
