"""What a schedule starts, on clocks that run, stop, and are changed."""

import random
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cron import Cron
from cluster.schedule import LONGEST_WAIT_S, Schedule, State, decide, wait_s

BEGIN = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
NIGHTLY = Schedule("nightly", Cron.parse("30 2 * * *", "Europe/Zurich"))
MINUTELY = Schedule("minutely", Cron.parse("* * * * *"))


class Driver:
    """Asks as the daemon does, and keeps what it keeps."""

    def __init__(self, schedule: Schedule, now: float) -> None:
        self.schedule = schedule
        self.looked_until = now
        self.decisions = {}
        self.started_at = {}
        self.is_running = self.is_queued = False

    def look(self, now: float):
        state = State(self.looked_until, self.is_running, self.is_queued)
        decision = decide(self.schedule, state, now, self.decisions.__contains__)
        self.looked_until = now
        if decision is not None:
            assert decision.tick not in self.decisions
            self.decisions[decision.tick] = decision
            self.started_at[decision.tick] = now
        return decision

    def go(self, now: float, until: float) -> float:
        while now < until:
            now = min(until, now + wait_s([self.schedule], now))
            self.look(now)
        return now


def runs(driver: Driver) -> list[int]:
    return [each.tick for each in driver.decisions.values() if each.action == "run"]


@pytest.mark.parametrize(
    "zone", ["Europe/Zurich", "America/New_York", "Australia/Lord_Howe", "UTC"]
)
def test_two_years_of_a_simulated_clock_start_each_tick_once(zone):
    schedule = Schedule("weekly", Cron.parse("30 2 * * sun", zone))
    driver, now, end = Driver(schedule, BEGIN), BEGIN, BEGIN + 2 * 365 * 86400
    while now < end:
        now += min(6 * 3600.0, schedule.next_start(now)[1] - now)  # clocks are changed on Sundays
        driver.look(now)
    local = [datetime.fromtimestamp(tick, ZoneInfo(zone)) for tick in runs(driver)]
    assert len({day.date() for day in local}) == len(local) == 104
    assert all(day.weekday() == 6 for day in local)
    odd = {f"{day:%H:%M}" for day in local} - {"02:30"}
    assert odd == ({"03:00"} if zone in ("Europe/Zurich", "America/New_York") else set())
    assert all(at == tick for tick, at in driver.started_at.items())
    assert all(each.missed == 0 for each in driver.decisions.values())


def test_a_new_schedule_waits_for_its_first_tick():
    driver = Driver(MINUTELY, BEGIN + 30)
    assert driver.look(BEGIN + 31) is None
    assert driver.look(BEGIN + 60).tick == BEGIN + 60


def test_missed_ticks_become_one_run_of_the_newest():
    driver = Driver(MINUTELY, BEGIN)
    decision = driver.look(BEGIN + 10 * 60 + 5)
    assert (decision.tick, decision.action, decision.missed) == (BEGIN + 600, "run", 9)
    assert driver.look(BEGIN + 10 * 60 + 6) is None


def test_a_machine_that_was_off_for_years_is_quick_to_decide():
    driver = Driver(MINUTELY, BEGIN)
    assert driver.look(BEGIN + 10 * 365 * 86400).missed == 10 * 365 * 1440 - 1


def test_a_clock_put_back_repeats_nothing_and_loses_nothing_that_is_to_come():
    driver = Driver(MINUTELY, BEGIN)
    driver.go(BEGIN, BEGIN + 600)
    assert len(runs(driver)) == 10
    driver.go(BEGIN + 300, BEGIN + 600)
    assert len(runs(driver)) == 10
    driver.go(BEGIN + 600, BEGIN + 900)
    assert len(runs(driver)) == 15


def test_a_clock_that_was_years_ahead_does_not_silence_a_schedule():
    driver = Driver(NIGHTLY, BEGIN)
    assert driver.look(BEGIN + 4 * 365 * 86400).missed == 4 * 365 - 1
    driver.look(BEGIN)
    for hour in range(10 * 24):
        driver.look(BEGIN + hour * 3600)
    assert len(runs(driver)) == 11
    assert [each.missed for each in driver.decisions.values()][1:] == [0] * 10


def test_a_tick_that_came_while_the_clock_was_put_back_is_run():
    driver = Driver(MINUTELY, BEGIN)
    driver.look(BEGIN + 3600)
    assert driver.look(BEGIN + 65).tick == BEGIN + 60
    assert driver.look(BEGIN + 66) is None


def test_a_tick_is_skipped_while_a_run_goes_on():
    driver = Driver(MINUTELY, BEGIN)
    driver.is_running = True
    decision = driver.look(BEGIN + 60)
    assert (decision.action, decision.reason) == ("skip", "the run before it had not ended")


def test_one_tick_waits_and_more_change_nothing():
    driver = Driver(Schedule("q", MINUTELY.cron, overlap="queue"), BEGIN)
    driver.is_running = True
    assert driver.look(BEGIN + 60).action == "run"
    driver.is_queued = True
    assert driver.look(BEGIN + 120).action == "skip"
    driver.is_running = False
    assert driver.look(BEGIN + 180).reason == "another run was waiting for its start"


def test_jitter_is_decided_by_name_and_tick():
    one, other = (Schedule(name, NIGHTLY.cron, 3600.0) for name in ("one", "other"))
    ticks = [tick for tick, _ in zip(NIGHTLY.cron.ticks(BEGIN), range(200), strict=False)]
    late = [one.start_of(tick) - tick for tick in ticks]
    assert late == [Schedule("one", NIGHTLY.cron, 3600.0).start_of(t) - t for t in ticks]
    assert late != [other.start_of(tick) - tick for tick in ticks]
    assert 0 <= min(late) < 180 < 3420 < max(late) < 3600
    assert 1500 < sum(late) / len(late) < 2100


def test_with_jitter_nothing_is_early_and_nothing_passes_its_successor():
    schedule = Schedule("jittered", MINUTELY.cron, 3600.0)
    driver = Driver(schedule, BEGIN)
    driver.go(BEGIN, BEGIN + 1800)
    assert list(driver.decisions) == [BEGIN + 60 * n for n in range(len(driver.decisions))]
    for tick, at in driver.started_at.items():
        assert at == schedule.start_of(tick)
        assert tick <= at < tick + 60
    assert all(each.missed == 0 for each in driver.decisions.values())


def test_a_wait_is_short_enough_to_notice_a_changed_clock():
    assert wait_s([NIGHTLY], BEGIN) == LONGEST_WAIT_S
    assert wait_s([], BEGIN) == LONGEST_WAIT_S
    assert wait_s([NIGHTLY, MINUTELY], BEGIN + 50) == 10
    assert wait_s([MINUTELY], BEGIN + 59.99) == pytest.approx(0.01, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(
    jitter_s=st.sampled_from([0.0, 20.0, 500.0]),
    cron=st.sampled_from(["* * * * *", "*/7 * * * *", "0 2,3 * * *"]),
    seed=st.integers(0, 2**32),
)
def test_on_any_clock_that_runs_forward_each_tick_is_run_or_counted_once(jitter_s, cron, seed):
    zone = "Europe/Zurich"
    begin = datetime(2026, 3, 28, 20, tzinfo=UTC).timestamp()
    schedule = Schedule("any", Cron.parse(cron, zone), jitter_s)
    driver, now, chance = Driver(schedule, begin), begin, random.Random(seed)
    for _ in range(40):
        now += chance.choice([0.1, 5.0, 30.0, 700.0, 40_000.0]) * chance.random()
        driver.look(now)
    newest = schedule.cron.newest(now)
    pending = newest is not None and newest > begin and schedule.start_of(newest) > now
    before = schedule.cron.newest(begin)
    started_before = int(before is not None and schedule.start_of(before) > begin)
    ran = sum(1 + each.missed for each in driver.decisions.values())
    assert ran == schedule.cron.count(begin, now) + started_before - pending
