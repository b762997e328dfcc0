"""The driver's view of a run, with a coordinator whose connection breaks; Ray is stood in for."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster import handle as handles
from cluster.errors import CoordinatorLost
from cluster.handle import RunHandle

CUT = ray.exceptions.ActorUnavailableError("the connection broke", actor_id=None)
DEAD = ray.exceptions.ActorDiedError()


class Actor:
    """Answers in the order given, an error among them is raised; the last one stays."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self.asked.append((name, arguments))
            waiting = self.answers[name]
            return waiting.pop(0) if len(waiting) > 1 else waiting[0]

        return SimpleNamespace(remote=remote)


def handle_of(actor: Actor, monkeypatch: pytest.MonkeyPatch) -> RunHandle:
    def get(answer: Any, timeout: float | None = None) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: (asked, []))
    monkeypatch.setattr(handles, "release", lambda name: None)
    monkeypatch.setattr(handles, "_UNREACHABLE_S", 0.3)
    monkeypatch.setattr(ray, "kill", lambda actor: actor.asked.append(("kill", ())))
    handle = RunHandle.__new__(RunHandle)
    handle._actor, handle._name, handle._next_event = actor, "gang", 7
    handle._result = actor.run.remote()
    return handle


def test_a_connection_that_broke_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Actor(run=[None], events=[CUT, CUT, (9, [{"event": "done"}])])
    assert handle_of(actor, monkeypatch).events(5.0) == [{"event": "done"}]
    asked = [arguments for name, arguments in actor.asked if name == "events"]
    assert asked == [(7, 5.0), (7, 0), (7, 0)]


def test_a_coordinator_out_of_reach_is_lost_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Actor(run=[None], events=[CUT])
    with pytest.raises(CoordinatorLost, match="ActorUnavailableError"):
        handle_of(actor, monkeypatch).events(5.0)
    assert len(actor.asked) > 3


def test_a_dead_coordinator_is_lost_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Actor(run=[None], events=[DEAD])
    with pytest.raises(CoordinatorLost, match="ActorDiedError"):
        handle_of(actor, monkeypatch).events(5.0)
    assert [name for name, _ in actor.asked] == ["run", "events", "kill"]


def test_a_result_whose_call_was_cut_off_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actor = Actor(run=[CUT, CUT, {"status": "done"}])
    handle = handle_of(actor, monkeypatch)
    assert [handle.is_finished() for _ in range(3)] == [False, False, True]
    assert handle.result() == {"status": "done"}


def test_a_coordinator_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would go on holding the run folder, and its successor would find it taken."""
    actor = Actor(run=[None], events=[ray.exceptions.GetTimeoutError()])
    with pytest.raises(CoordinatorLost, match="GetTimeoutError"):
        handle_of(actor, monkeypatch).events(5.0)
    assert actor.asked[-1] == ("kill", ())
