"""Many writers of one registry: nothing is lost, and there is one champion at each moment."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from registry.aliases import earlier
from registry.database import Database
from registry.store import AliasMove, Registry
from tests.support.processes import run_at_once
from tests.support.registry_workers import MODEL, mix

WRITERS = 8


@pytest.mark.parametrize(
    ("database_url", "operations"),
    [
        ("sqlite", 100),
        ("postgresql", 50),
        pytest.param("sqlite", 200, marks=pytest.mark.long),
        pytest.param("postgresql", 200, marks=pytest.mark.long),
    ],
    indirect=["database_url"],
)
def test_eight_writers_lose_nothing(database_url: str, operations: int, tmp_path: Path) -> None:
    root = str(tmp_path / "stored")
    arguments = [(database_url, root, worker, operations) for worker in range(WRITERS)]
    answers = dict(run_at_once(mix, arguments, 250))
    assert all(isinstance(answer, dict) for answer in answers.values()), answers
    database = Database(database_url)
    registry = Registry(database, root)
    _check_versions(registry, answers)
    _check_history(registry.history(MODEL), answers)
    for alias in ("champion", "candidate"):
        _replay(registry, alias)
    database.close()
    for answer in answers.values():
        _check_champions(answer["champions"])
    assert sum(len(answer["moves"]) for answer in answers.values()) > WRITERS * operations / 2


def _check_champions(looks: list[tuple[bool, int]]) -> None:
    """None before the first move; once one was seen, or was made by who looks, exactly one."""
    is_there = False
    for is_moved, champions in looks:
        is_there = is_there or is_moved or champions > 0
        assert champions == int(is_there)
    assert is_there


def _check_versions(registry: Registry, answers: dict[int, Any]) -> None:
    """Each version that a writer was given is there, with its files; no other is."""
    versions = registry.versions(MODEL)
    assert [version.number for version in versions] == list(range(1, len(versions) + 1))
    given = {made.number: made for answer in answers.values() for made in answer["versions"]}
    assert len(given) == sum(len(answer["versions"]) for answer in answers.values())
    for version in versions:
        assert given[version.number].key == version.key
        assert given[version.number].artifact == version.artifact
        assert registry.verify(version) == []
    folders = [p for p in (Path(versions[0].artifact).parent).iterdir()]
    assert len(folders) == len(versions)


def _check_history(history: list[AliasMove], answers: dict[int, Any]) -> None:
    """The history is all that the writers were told, without a gap and without a stranger."""
    assert [move.sequence for move in history] == list(range(1, len(history) + 1))
    told: Counter[AliasMove] = Counter()
    for worker, answer in answers.items():
        for wanted, move in answer["moves"]:
            assert move in history
            assert wanted in (None, move.to_number)
            if move.who == f"worker {worker}":
                told[move] += 1
    own = {(move.who, move.why): move for move in history}
    assert len(own) == len(history)
    assert set(told) == set(history)
    times = [move.at for move in history]
    assert times == sorted(times)


def _replay(registry: Registry, alias: str) -> None:
    """Each move begins where the one before ended; each rollback goes where it must."""
    moves = registry.history(MODEL, alias)
    now = None
    for place, move in enumerate(moves):
        assert move.from_number == now
        assert move.to_number is not None
        if move.kind == "rollback":
            assert move.to_number == earlier(moves[:place])[0]
        now = move.to_number
    assert registry.resolve(f"{MODEL}@{alias}").number == now
    assert [v.number for v in registry.versions(MODEL) if alias in v.aliases] == [now]
