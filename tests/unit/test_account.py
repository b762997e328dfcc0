"""The account of a run goes on from one coordinator to the next."""

import time
from pathlib import Path

import pytest

from trainer import account as account_module
from trainer.account import Account


class Clock:
    """Both clocks of the module, which begin apart."""

    def __init__(self) -> None:
        self._passed_s = 0.0

    def pass_(self, seconds: float) -> None:
        self._passed_s += seconds

    def monotonic(self) -> float:
        return 50.0 + self._passed_s

    def time(self) -> float:
        return 1_700_000_000.0 + self._passed_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(account_module, "time", made)
    return made


def call(step: int, steps: int = 10, seconds: float = 2.0, is_first: bool = False):
    return {
        **{"step": step, "steps": steps, "rows": 100 * steps, "seconds": seconds},
        **{"is_first": is_first, "times_s": {}},
    }


def test_a_successor_goes_on_with_what_was_done_and_adds_what_was_lost(
    tmp_path: Path, clock: Clock
) -> None:
    first = Account(tmp_path)
    clock.pass_(5.0)
    first.progressed(call(10, is_first=True))
    clock.pass_(2.0)
    first.progressed(call(20))
    first.failed("exited", 1, 0.0)
    clock.pass_(3.0)
    first.formed(20)
    clock.pass_(2.0)
    first.progressed(call(30))
    lost_at = clock.time() + 4.0
    clock.pass_(6.0)

    second = Account(tmp_path)
    second.go_on(lost_at)
    assert second.step == 30
    clock.pass_(1.0)
    second.formed(20)
    clock.pass_(2.0)
    recovered = second.progressed(call(30))
    summary = second.summary()
    assert [one["kind"] for one in summary["recoveries"]] == ["exited", "coordinator_lost"]
    assert recovered[0]["steps_replayed"] == 10
    assert recovered[0]["recovered_s"] == pytest.approx(5.0)
    seconds = {name: part["seconds"] for name, part in summary["goodput"].items()}
    assert seconds["start"] == pytest.approx(5.0)
    assert seconds["productive"] == pytest.approx(4.0)
    assert seconds["restart"] == pytest.approx(3.0 + 3.0)
    assert seconds["detect"] == pytest.approx(4.0)
    assert seconds["replay"] == pytest.approx(2.0)
    assert sum(seconds.values()) == pytest.approx(summary["wall_s"]) == pytest.approx(21.0)


def test_between_a_run_and_the_one_that_resumes_it_nobody_was_at_work(
    tmp_path: Path, clock: Clock
) -> None:
    first = Account(tmp_path)
    clock.pass_(3.0)
    first.progressed(call(10))
    first.summary()
    clock.pass_(3600.0)
    second = Account(tmp_path)
    second.go_on(None)
    clock.pass_(4.0)
    second.progressed(call(20))
    assert second.summary()["wall_s"] == pytest.approx(7.0)
    assert second.summary()["rows_per_s"] == pytest.approx(2000 / 4.0)


def test_a_run_folder_without_an_account_begins_one(tmp_path: Path, clock: Clock) -> None:
    account = Account(tmp_path)
    account.go_on(clock.time() - 2.0)
    clock.pass_(1.0)
    account.formed(0)
    (recovery,) = account.progressed(call(1, steps=1, seconds=0.5))
    assert recovery["recovered_s"] == pytest.approx(3.0)
    assert account.summary()["wall_s"] == pytest.approx(3.0)


def test_a_full_disk_costs_the_account_nothing_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(account_module, "write_json", full)
    account = Account(tmp_path)
    account.progressed(call(10))
    assert account.step == 10
    assert account.summary()["wall_s"] < time.monotonic()
