"""How models are named, who is at work, and what an alias can be rolled back to."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import owners
from registry.aliases import earlier
from registry.errors import RegistryError
from registry.records import AliasMove
from registry.references import Reference, is_reference, parse_reference

LETTERS = "abzAZ019._-"
NAMES = st.builds(str.__add__, st.sampled_from("azAZ09"), st.text(LETTERS, max_size=99))
ALIASES = st.builds(str.__add__, st.sampled_from("azAZ"), st.text(LETTERS, max_size=99))


@settings(max_examples=50)
@given(NAMES, st.integers(0, 10**9 - 1), ALIASES)
def test_what_has_the_form_is_read(name: str, number: int, alias: str) -> None:
    assert parse_reference(f"{name}/{number}") == Reference(name, number=number)
    assert parse_reference(f"{name}@{alias}") == Reference(name, alias=alias)
    assert parse_reference(name) == Reference(name, alias="champion")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a/",
        "/3",
        "a/b",
        "a/3/4",
        "./a",
        "a@",
        "@a",
        "a@3",
        "a@b@c",
        "a/-1",
        "a b",
        "ä",
        "a/3\n",
    ],
)
def test_what_has_not_is_refused(text: str) -> None:
    assert not is_reference(text)
    with pytest.raises(RegistryError, match="NAME/NUMBER, NAME@ALIAS and NAME"):
        parse_reference(text)


@settings(max_examples=80)
@given(st.lists(st.one_of(st.none(), st.integers(1, 4), st.just("back"))))
def test_rolling_back_is_undoing(actions: list[int | str | None]) -> None:
    """Against the plain idea: a stack of all that was promoted, in which going back is popping."""
    history: list[AliasMove] = []
    stack: list[int | None] = [None]
    for action in actions:
        now = stack[-1]
        if action == "back":
            below = [number for number in stack if number not in (None, now)]
            assert earlier(history)[:1] == below[-1:]
            if below:
                while stack[-1] != below[-1]:
                    stack.pop()
                history.append(_move(now, stack[-1], "rollback"))
        elif action != now:
            stack.append(action)
            history.append(_move(now, action, "set"))


def _move(start: int | None, to: int | None, kind: str) -> AliasMove:
    return AliasMove("m", "a", start, to, 0.0, "", "", 0, kind)


def test_a_process_is_known_by_its_mark_for_as_long_as_it_lives() -> None:
    mark = owners.own_mark()
    assert mark == owners.own_mark()
    assert not owners.is_gone(mark)
    code = "from registry.owners import own_mark; print(own_mark())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert owners.is_gone(done.stdout.strip())


def test_of_others_nothing_is_said_from_here() -> None:
    boot, namespace, number, started = owners.own_mark().split(" ")
    assert owners.is_gone(f"{boot} {namespace} {number} 1"), "the number was given to another"
    assert not owners.is_gone(f"another-boot {namespace} {number} 1")
    assert not owners.is_gone(f"{boot} 1 {number} 1")
    assert int(number) == os.getpid()
    assert int(started) > 0
