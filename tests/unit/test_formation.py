"""Whose failure it was, when several ranks tell of one."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import formation as formation_module
from cluster.channel import Message
from cluster.errors import GangFailure
from cluster.formation import Formation
from configs.errors import UserCodeError


class Clock:
    """Stands for `time` in the module; a silent quarter of a second passes it on."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


class Gang:
    """Stands for the gang: says what a test has it say; None is a quarter second of silence."""

    told_stacks: dict[int, str] = {}

    def __init__(self, clock: Clock, said: list[Message | None]) -> None:
        self.spec = SimpleNamespace(start_timeout_s=60.0)
        self._clock = clock
        self._said = said

    def messages(self) -> Iterator[Message | None]:
        for message in self._said:
            if message is None:
                self._clock.now += 0.25
            yield message
        raise AssertionError("nothing came of all that was said")

    def stacks(self, timeout_s: float) -> dict[int, str]:
        return self.told_stacks


def said(rank: int, kind: str, body: Any = None) -> Message:
    return Message(1, rank, kind, body)


def raised(
    rank: int, error: str, is_user_error: bool = False, users_traceback: str = ""
) -> Message:
    body = {
        "error": error,
        "message": error,
        "traceback": users_traceback,
        "full_traceback": "all of it",
        "is_user_error": is_user_error,
    }
    return said(rank, "exception", body)


def failure_of(
    monkeypatch: pytest.MonkeyPatch, messages: list[Message | None], workers: int = 3
) -> tuple[GangFailure, list[Message | None]]:
    """What the formation makes of it, and what it passes on before."""
    clock = Clock()
    monkeypatch.setattr(formation_module, "time", clock)
    formation = Formation(Gang(clock, messages), 1, workers, stall_after_s=300.0)
    passed: list[Message | None] = []
    with pytest.raises(GangFailure) as caught:
        passed.extend(formation.follow())
    return caught.value, passed


def test_a_death_explains_the_exceptions_of_those_it_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = raised(1, "UnavailableError: the peer is gone")
    failure, _ = failure_of(monkeypatch, [lost, said(1, "exited", 1), None, said(2, "exited", -9)])
    assert (failure.kind, failure.rank) == ("exited", 2)
    assert "rank 2 was killed by signal 9" in str(failure)


def test_an_exception_that_nothing_explains_is_its_ranks_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [raised(1, "ValueError: no"), said(1, "exited", 1), None, None]
    failure, _ = failure_of(monkeypatch, own)
    assert (failure.kind, failure.rank) == ("exception", 1)
    assert (failure.cause, failure.traceback) == ("ValueError: no", "all of it")


def test_where_the_users_own_traceback_is_known_it_is_the_one_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [raised(0, "CallbackFailed: no", users_traceback="theirs"), said(0, "exited", 1), None]
    failure, _ = failure_of(monkeypatch, [*own, None])
    assert failure.traceback == "theirs"


def test_where_nobody_gives_a_sign_the_one_that_is_stopped_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, stopped = "process 7: S (sleeping)\nall", "process 8: T (stopped)\nall"
    for stacks, rank in (
        ({0: running, 1: stopped, 2: running}, 1),
        ({0: running, 1: stopped, 2: stopped}, -1),
        ({0: running, 1: running, 2: running}, -1),
    ):
        monkeypatch.setattr(Gang, "told_stacks", stacks)
        failure, _ = failure_of(monkeypatch, [None] * 700)
        assert (failure.kind, failure.rank) == ("not_formed", rank)
        assert ("rank 1 is stopped" in str(failure)) == (rank == 1)


def pulses_of(ranks: tuple[int, ...], seconds: int) -> list[Message | None]:
    second = [*[said(rank, "pulse", (0, "step 7")) for rank in ranks], *[None] * 4]
    return second * seconds


def test_an_exception_of_one_that_waited_for_a_frozen_rank_is_the_frozen_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TensorFlow tires of waiting in a time of its own, at times before `stall_after_s`."""
    ready = [said(rank, "ready") for rank in range(3)]
    waited = [raised(0, "UnavailableError: no answer"), said(0, "exited", 1), None, None]
    messages = [*ready, *pulses_of((0, 2), seconds=5), *waited]
    failure, _ = failure_of(monkeypatch, messages)
    assert (failure.kind, failure.rank) == ("stalled", 1)
    assert "rank 1 was last heard 5 s ago" in str(failure)
    assert "UnavailableError" in str(failure)


def test_a_frozen_rank_that_raises_after_all_was_not_the_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ready = [said(rank, "ready") for rank in range(2)]
    messages = [*ready, *pulses_of((0,), seconds=5), raised(0, "first"), raised(1, "second")]
    failure, _ = failure_of(monkeypatch, messages, workers=2)
    assert (failure.kind, failure.rank, failure.cause) == ("exception", 0, "first")


def test_where_all_ranks_raised_the_first_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    failure, _ = failure_of(monkeypatch, [raised(1, "first"), raised(0, "second")], workers=2)
    assert (failure.rank, failure.cause) == (1, "first")


def test_what_was_done_before_counts_though_it_is_told_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the same exception would seem to come after another step each time."""
    late = said(0, "progress", {"step": 10})
    _, passed = failure_of(monkeypatch, [raised(1, "no"), late, raised(0, "no")], workers=2)
    assert late in passed


def test_the_users_mistake_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(formation_module, "time", clock)
    gang = Gang(clock, [raised(1, "theirs", is_user_error=True)])
    with pytest.raises(UserCodeError, match="theirs"):
        list(Formation(gang, 1, 3, stall_after_s=300.0).follow())
