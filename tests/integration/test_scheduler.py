"""The scheduler with real processes, on a clock that the tests move."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from lockstep.run_process import ProcessName, host_name, is_alive, process_name
from lockstep.schedule_view import sentence_of
from registry.errors import DatabaseFailure, SchedulerSuperseded
from registry.schedules import Holder, TickRecord
from tests.support.scheduling import BEGIN, Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def wait_for(path: Path) -> str:
    for _ in range(500):
        if path.exists() and path.read_text().endswith("\n"):
            return path.read_text().strip()
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come")


def test_a_tick_is_run_and_told(bench: Bench) -> None:
    bench.write("p", "echo hello from $PPID; echo warning >&2")
    scheduler = bench.scheduler()
    with scheduler.at_work():
        assert scheduler.work() == 10  # looks now and then, however far the next tick is
        assert bench.store.history("p", 1) == []
        bench.now = BEGIN + 59
        assert scheduler.work() == 1
        bench.now = BEGIN + 60
        tick = bench.work_until(scheduler, "done")
    assert (tick.planned_at, tick.exit_status, tick.missed) == (BEGIN + 60, 0, 0)
    assert (tick.started_at, tick.attempt, tick.host) == (BEGIN + 60, 1, host_name())
    assert Path(tick.log).read_text() == f"hello from {tick.pid}\nwarning\n"
    assert bench.events() == ["at_work", "due", "started", "done"]
    assert bench.store.holder() is None


def test_a_run_that_fails_keeps_its_status_and_the_next_tick_comes(bench: Bench) -> None:
    bench.write("p", "exit 7")
    scheduler = bench.scheduler()
    with scheduler.at_work():
        scheduler.work()
        for number in (1, 2):
            bench.now = BEGIN + 60 * number
            tick = bench.work_until(scheduler, "failed")
            assert (tick.planned_at, tick.exit_status) == (bench.now, 7)
    assert bench.outcomes() == ["failed", "failed"]


def test_missed_ticks_are_one_run_after_a_restart(bench: Bench) -> None:
    bench.write("p", "true")
    with (first := bench.scheduler()).at_work():
        first.work()
    bench.now = BEGIN + 605
    with (second := bench.scheduler()).at_work():
        tick = bench.work_until(second, "done")
    assert (tick.planned_at, tick.missed) == (BEGIN + 600, 9)
    assert bench.outcomes() == ["done"]


@pytest.mark.parametrize(
    ("overlap", "outcomes"),
    [("skip", ["done", "skipped", "skipped"]), ("queue", ["done", "done", "skipped"])],
)
def test_ticks_meet_a_run_that_goes_on(bench: Bench, overlap: str, outcomes: list[str]) -> None:
    gate = bench.root / "gate"
    bench.write("p", f"while [ ! -e {gate} ]; do sleep 0.02; done", more=f", overlap: {overlap}")
    scheduler = bench.scheduler()
    with scheduler.at_work():
        scheduler.work()
        for number in (1, 2, 3):
            bench.now = BEGIN + 60 * number
            scheduler.work()
        gate.touch()
        for _ in range(500):
            scheduler.work()
            if bench.outcomes() == outcomes:
                break
            time.sleep(0.02)
    assert bench.outcomes() == outcomes


def test_a_stopped_scheduler_ends_its_run_and_the_next_one_goes_on(bench: Bench) -> None:
    ready = bench.root / "ready"
    again = f"[ -e {ready} ] && exit 0; echo $$ > {ready}"
    bench.write("p", f"trap 'exit 130' TERM; {again}; while :; do sleep 0.05; done")
    scheduler = bench.scheduler()
    with scheduler.at_work():
        scheduler.work()
        bench.now = BEGIN + 60
        scheduler.work()
        pid = int(wait_for(ready))
    assert process_name(pid) is None
    (tick,) = bench.store.history("p", 5)
    assert (tick.outcome, tick.reason) == ("queued", "interrupted by the end of the scheduler")
    with (second := bench.scheduler()).at_work():
        tick = bench.work_until(second, "done")
    assert (tick.planned_at, tick.attempt) == (BEGIN + 60, 1)
    assert bench.events()[2:5] == ["started", "stopping", "interrupted"]


def test_a_run_that_ends_well_when_it_is_asked_to_is_done(bench: Bench) -> None:
    ready = bench.root / "ready"
    bench.write("p", f"trap 'exit 0' TERM; echo $$ > {ready}; while :; do sleep 0.05; done")
    with (scheduler := bench.scheduler()).at_work():
        scheduler.work()
        bench.now = BEGIN + 60
        scheduler.work()
        wait_for(ready)
    assert bench.outcomes() == ["done"]


def test_a_run_that_does_not_end_is_ended(bench: Bench) -> None:
    ready = bench.root / "ready"
    bench.write("p", f"trap '' TERM; echo $$ > {ready}; while :; do sleep 0.05; done")
    scheduler = bench.scheduler(grace_s=0.3)
    with scheduler.at_work():
        scheduler.work()
        bench.now = BEGIN + 60
        scheduler.work()
        pid = int(wait_for(ready))
    assert process_name(pid) is None
    assert bench.outcomes() == ["queued"]


DRIVER = """
import sys, time
from pathlib import Path
from tests.support.scheduling import BEGIN, Bench

bench = Bench(Path(sys.argv[1]))
with (scheduler := bench.scheduler()).at_work():
    scheduler.work()
    bench.now = BEGIN + 60
    scheduler.work()
    print("started", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def killed(bench: Bench) -> TickRecord:
    """A run whose scheduler was killed."""
    gate = bench.root / "gate"
    bench.write("p", f"while [ ! -e {gate} ]; do sleep 0.02; done; exit 5")
    command = [sys.executable, "-c", DRIVER, str(bench.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.kill()
    bench.now = BEGIN + 70
    (tick,) = bench.store.history("p", 5)
    assert tick.outcome == "running"
    return tick


def test_a_run_outlives_a_killed_scheduler_and_is_found(bench: Bench, killed: TickRecord) -> None:
    scheduler = bench.scheduler()
    with scheduler.at_work():
        assert scheduler.work() == 2  # nobody tells of its end: looks often
        assert bench.outcomes() == ["running"]
        (bench.root / "gate").touch()
        tick = bench.work_until(scheduler, "failed")
    assert (tick.exit_status, tick.attempt, tick.pid) == (5, 1, killed.pid)
    assert bench.events() == ["at_work", "found", "failed"]


@pytest.mark.long
def test_a_run_that_ended_without_a_scheduler_is_told(bench: Bench, killed: TickRecord) -> None:
    (bench.root / "gate").touch()
    assert killed.pid is not None
    while is_alive(ProcessName(killed.pid, killed.process)):
        time.sleep(0.02)
    with (scheduler := bench.scheduler()).at_work():
        tick = bench.work_until(scheduler, "failed")
    assert (tick.exit_status, tick.attempt) == (5, 1)


@pytest.mark.long
def test_a_run_that_was_killed_too_is_started_once_more(bench: Bench, killed: TickRecord) -> None:
    assert killed.pid is not None
    os.killpg(killed.pid, signal.SIGKILL)
    (bench.root / "gate").touch()
    with (scheduler := bench.scheduler()).at_work():
        tick = bench.work_until(scheduler, "failed")
    assert (tick.exit_status, tick.attempt) == (5, 2)
    assert "lost" in bench.events()


def test_a_run_that_was_on_record_but_never_started_is_started(bench: Bench) -> None:
    bench.write("p", "true")
    with (scheduler := bench.scheduler()).at_work():
        scheduler.work()
    bench.store.ask(
        TickRecord("p", int(BEGIN), outcome="running", attempt=1, host=host_name(), log="/x.log")
    )
    with (scheduler := bench.scheduler()).at_work():
        tick = bench.work_until(scheduler, "done")
    assert (tick.attempt, tick.exit_status) == (1, 0)


def test_a_run_that_is_lost_again_and_again_is_given_up(bench: Bench) -> None:
    bench.write("p", "kill -KILL 0")
    with (scheduler := bench.scheduler()).at_work():
        scheduler.work()
        bench.now = BEGIN + 60
        tick = bench.work_until(scheduler, "failed")
    assert (tick.attempt, tick.exit_status, tick.reason) == (3, None, "the run was killed")


def test_a_run_of_another_machine_is_lost_with_its_scheduler(bench: Bench) -> None:
    bench.write("p", "true")
    bench.store.claim(Holder("other", "elsewhere", 1, "", lease_s=0.1))
    bench.store.ask(
        TickRecord("p", int(BEGIN), outcome="running", attempt=1, host="elsewhere", pid=1)
    )
    with (scheduler := bench.scheduler()).at_work():  # waits until the other one is silent
        tick = bench.work_until(scheduler, "done")
    assert tick.attempt == 2
    assert bench.events()[:3] == ["waiting", "at_work", "lost"]


def test_a_second_scheduler_is_refused_while_the_first_lives(bench: Bench) -> None:
    bench.write("p", "true")
    first, second = bench.scheduler(), bench.scheduler()
    with first.at_work():
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* one is allowed"):
            second.run()
        first.work()
    dead = Holder("dead", host_name(), os.getpid(), "long ago", 60.0)
    bench.store.claim(dead)
    with second.at_work():
        second.work()


def test_a_superseded_scheduler_ends_its_runs_and_decides_nothing(bench: Bench) -> None:
    ready = bench.root / "ready"
    bench.write("p", f"echo $$ > {ready}; while :; do sleep 0.05; done")
    scheduler = bench.scheduler()

    def be_superseded() -> None:
        with scheduler.at_work():
            scheduler.work()
            bench.now = BEGIN + 60
            scheduler.work()
            wait_for(ready)
            bench.store.claim(Holder("new", "elsewhere", 1, "", 60.0), bench.store.holder())
            bench.now = BEGIN + 120
            scheduler.work()

    with pytest.raises(SchedulerSuperseded):
        be_superseded()
    pid = int(wait_for(ready))
    assert process_name(pid) is None
    assert bench.outcomes() == ["running"]
    holder = bench.store.holder()
    assert holder is not None
    assert holder.key == "new"


def test_a_database_that_fails_for_a_while_costs_no_tick(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write("p", "true")
    scheduler = bench.scheduler()
    with scheduler.at_work():
        scheduler.work()
        bench.now = BEGIN + 60
        with monkeypatch.context() as broken:
            broken.setattr(bench.store, "round", failing)
            assert scheduler.work() == 5
        bench.now = BEGIN + 65
        tick = bench.work_until(scheduler, "done")
    assert tick.planned_at == BEGIN + 60
    assert "database" in bench.events()


def failing(_holder: Holder) -> None:
    raise DatabaseFailure("it is locked")


def test_a_clock_put_back_starts_nothing_twice(bench: Bench) -> None:
    bench.write("p", "true")
    scheduler = bench.scheduler()
    with scheduler.at_work():
        scheduler.work()
        for minute in (1, 2, 0.5, 1, 2, 3):
            bench.now = BEGIN + 60 * minute
            scheduler.work()
            bench.work_until(scheduler, "done") if minute >= 1 else None
    assert [t.planned_at - BEGIN for t in bench.store.history("p", 9)] == [180, 120, 60]


def test_a_changed_schedule_begins_anew_and_a_removed_one_ends(bench: Bench) -> None:
    path = bench.write("p", "true", cron="0 0 1 1 *")
    scheduler = bench.scheduler()
    with scheduler.at_work():
        scheduler.work()
        bench.now = BEGIN + 40 * 86400
        bench.write("p", "true", cron="* * * * *")
        scheduler.work()
        assert bench.outcomes() == []  # what would have been due before is not made good
        bench.now += 60
        assert bench.work_until(scheduler, "done").missed == 0
        path.unlink()
        bench.now += 60
        scheduler.work()
    assert bench.outcomes() == ["done"]
    assert not bench.store.schedule("p").is_active


def test_a_schedule_that_has_another_name_now_is_not_due_any_more(bench: Bench) -> None:
    path = bench.write("p", "true")
    scheduler = bench.scheduler()
    with scheduler.at_work():
        scheduler.work()
        path.write_text(path.read_text().replace("name: p", "name: renamed"))
        scheduler.work()
        assert not bench.store.schedule("p").is_active
        assert bench.store.schedule("renamed").is_active
        path.write_text("name: renamed\n")
        scheduler.work()
        assert not bench.store.schedule("renamed").is_active


def test_schedulers_that_take_turns_make_good_what_was_missed(bench: Bench) -> None:
    """`schedule run --once` of one file and another one, as the system's cron calls it."""
    paths = {name: bench.write(name, "true") for name in ("p", "q")}
    for minute, name in enumerate(("p", "q", "p", "q"), start=1):
        bench.now = BEGIN + 60 * minute
        assert bench.scheduler(paths=[paths[name]]).run_once() == 0
        assert bench.store.schedule(name).is_active
    for name in ("p", "q"):
        assert [(t.outcome, t.missed) for t in bench.store.history(name, 9)] == [("done", 1)]


@pytest.mark.parametrize("is_once", [False, True])
def test_a_scheduler_that_is_stopped_while_it_waits_does_nothing(
    bench: Bench, is_once: bool
) -> None:
    bench.write("p", "true")
    bench.store.claim(Holder("other", "elsewhere", 1, "", lease_s=60.0))
    scheduler = bench.scheduler()
    threading.Timer(0.2, scheduler.stop).start()
    assert not (scheduler.run_once() if is_once else scheduler.run())
    assert bench.events() == ["waiting", "stopped"]
    assert [sentence_of(said) for said in bench.said][1].startswith("stopped while another")
    holder = bench.store.holder()
    assert holder is not None
    assert holder.key == "other"


def test_a_run_by_hand_is_started(bench: Bench) -> None:
    bench.write("p", "true", cron="0 0 1 1 *")
    scheduler = bench.scheduler()
    with scheduler.at_work():
        scheduler.work()
        assert bench.store.ask(TickRecord("p", int(bench.now), is_by_hand=True))
        tick = bench.work_until(scheduler, "done")
    assert tick.is_by_hand
    assert tick.log.endswith("-hand-1.log")


def test_once_starts_what_is_due_waits_and_says_how_it_went(bench: Bench) -> None:
    bench.write("good", "sleep 0.1")
    bench.write("bad", "exit 4")
    assert bench.scheduler().run_once() == 0
    assert bench.outcomes("good") == []
    bench.now = BEGIN + 3600
    assert bench.scheduler().run_once() == 1
    assert (bench.outcomes("good"), bench.outcomes("bad")) == (["done"], ["failed"])
    assert bench.store.holder() is None
