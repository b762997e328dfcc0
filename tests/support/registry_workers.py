"""Processes that work on one registry at once, and processes that die while they do.

Each function is the main of a process that `multiprocessing` starts; what it finds goes back
through a queue, as plain values.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from registry import places
from registry.database import Component, Database
from registry.errors import AliasConflict, RegistryError
from registry.store import Registry
from tests.support.artifacts import write_artifact

MODEL = "m"
ALIASES = ("champion", "champion", "champion", "candidate")


def mix(url: str, root: str, worker: int, operations: int, barrier: Any, answers: Any) -> None:
    """Register, move aliases and roll back at random; answers with what each call returned."""
    try:
        barrier.wait(60)
        answers.put((worker, _mixed(Registry(Database(url), root), Path(root), worker, operations)))
    except BaseException as error:
        answers.put((worker, repr(error)))
        raise


def _mixed(registry: Registry, root: Path, worker: int, operations: int) -> dict[str, Any]:
    choose = random.Random(worker)
    artifact = write_artifact(root / f"source-{worker}", {"model.keras": b"%d" % worker})
    found: dict[str, Any] = {"versions": [], "moves": [], "refused": 0, "champions": []}
    newest = 0
    for operation in range(operations):
        by = {"who": f"worker {worker}", "why": f"operation {operation}"}
        kind, alias = choose.random(), choose.choice(ALIASES)
        try:
            if kind < 0.1 or not newest:
                made = registry.register(MODEL, artifact, key=f"{worker}/{operation}")
                found["versions"].append(made)
                newest = made.number
            elif kind < 0.25:
                found["moves"].append((None, registry.rollback(MODEL, alias=alias, **by)))
            elif kind < 0.65:
                to = choose.randint(1, newest)
                found["moves"].append((to, registry.set_alias(MODEL, alias, to, **by)))
            else:
                before = _pointed_to(registry, alias)
                to = choose.randint(1, newest)
                move = registry.set_alias(MODEL, alias, to, expected=before, **by)
                if move.why == by["why"] and move.who == by["who"]:
                    assert move.from_number == before
                found["moves"].append((to, move))
        except AliasConflict:
            found["refused"] += 1
        except RegistryError as error:
            if "no earlier version" not in str(error) and "has no alias" not in str(error):
                raise
            found["refused"] += 1
        if operation % 8 == 0 and newest:
            held = [v.number for v in registry.versions(MODEL) if "champion" in v.aliases]
            is_moved = any(move.alias == "champion" for _, move in found["moves"])
            found["champions"].append((is_moved, len(held)))
    return found


def _pointed_to(registry: Registry, alias: str) -> int | None:
    try:
        return registry.resolve(f"{MODEL}@{alias}").number
    except RegistryError:
        return None


def prepare_at_once(url: str, component: Component, barrier: Any, answers: Any) -> None:
    """Open a database that nobody opened before, and prepare it; answers with None or the error."""
    try:
        barrier.wait(60)
        database = Database(url)
        database.prepare(component)
        with database.writing(component.name) as connection:
            (table,) = component.tables.sorted_tables
            connection.execute(table.insert().values(worker=os.getpid()))
        answers.put(None)
    except BaseException as error:
        answers.put(repr(error))
        raise


def register_until(url: str, root: str, artifact: str, point: int, key: str, answers: Any) -> None:
    """Register, and die before the `point`-th step that changes something, or right at the end.

    Answers where the point never came.
    """
    registry, step = _dying(url, root, point)
    version = registry.register(MODEL, artifact, key=key)
    step()
    answers.put(str(version))


def delete_until(url: str, root: str, number: int, point: int, answers: Any) -> None:
    """Delete, and die as `register_until` does."""
    registry, step = _dying(url, root, point)
    registry.delete(MODEL, number)
    step()
    answers.put(number)


def _dying(url: str, root: str, point: int) -> tuple[Registry, Callable[[], None]]:
    """A registry whose process dies at the `point`-th step, and what counts one more step."""
    left = [point]

    def step() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            step()
            return function(*arguments, **named)

        return call

    database = Database(url)
    registry = Registry(database, root)
    registry.prepare()
    for name in ("write", "commit", "remove"):
        setattr(places._Local, name, counted(getattr(places._Local, name)))
    os.fsync, os.unlink, os.rmdir = counted(os.fsync), counted(os.unlink), counted(os.rmdir)
    database._lock = counted(database._lock)  # type: ignore[method-assign]
    dialect = database._engine.dialect
    dialect.do_commit = counted(dialect.do_commit)  # type: ignore[method-assign]
    return registry, step
