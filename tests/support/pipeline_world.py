"""A pipeline whose steps are small, with the real registry and the real memory of runs.

All that lasts lies in one folder, so that a run can die anywhere (by an exception in a test, or by
SIGKILL as a process of its own) and another go on:

    python -m tests.support.pipeline_world FOLDER POINT     ends itself at the point, or not at all
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from registry.database import Database
from registry.errors import AliasConflict, RegistryError
from registry.leases import Heartbeat, Leases, is_dead, this_process
from registry.pipelines import PipelineStore
from registry.store import Registry
from tests.support.artifacts import write_artifact
from trainer.retrain import Commit, Course, Done, Outcome

NAME = "fresh"
MODEL = "flights"

Point = Callable[[str], None]


class Traced:
    """An object that tells before and after each call of a method."""

    def __init__(self, thing: Any, name: str, point: Point) -> None:
        self._thing, self._name, self._point = thing, name, point

    def __getattr__(self, attribute: str) -> Any:
        method = getattr(self._thing, attribute)
        if not callable(method):
            return method

        def call(*arguments: Any, **named: Any) -> Any:
            self._point(f"before {self._name}.{attribute}")
            result = method(*arguments, **named)
            self._point(f"after {self._name}.{attribute}")
            return result

        return call


class World:
    """What outlives a process: the database, artifacts, and marks of what was done.

    Args:
        folder: Where all of it is.
        point: Is told where the run is; may not return.
    """

    def __init__(self, folder: Path, point: Point = lambda _: None) -> None:
        self.folder = folder
        self.point = point
        self.database = Database(f"sqlite:///{folder / 'lockstep.db'}")
        self.leases = Leases(self.database)
        self.plain_registry = Registry(self.database, str(folder / "stored"))
        self.plain_store = PipelineStore(self.database, self.leases)
        self.registry: Any = Traced(self.plain_registry, "registry", point)
        self.store: Any = Traced(self.plain_store, "store", point)
        self.is_new = True
        self.is_passed = True
        self.stale = ""

    def mark(self, what: str) -> None:
        """Remember that something was done once more."""
        with open(self.folder / "done.log", "a") as log:
            log.write(f"{what}\n")

    def times(self, what: str) -> int:
        """How often it was done."""
        log = self.folder / "done.log"
        return log.read_text().splitlines().count(what) if log.exists() else 0

    def champion(self) -> int | None:
        """Number of the champion; None before there is one."""
        with contextlib.suppress(RegistryError):
            return self.plain_registry.resolve(MODEL).number
        return None

    def versions(self) -> list[int]:
        """Numbers of all versions."""
        with contextlib.suppress(RegistryError):
            return [version.number for version in self.plain_registry.versions(MODEL)]
        return []

    def give_champion(self) -> None:
        """A first champion, from somewhere else."""
        made = write_artifact(self.folder / "first", {"model.keras": b"first"})
        self.plain_registry.register(MODEL, made)
        self.move_champion(1)

    def move_champion(self, number: int) -> None:
        """What a person does."""
        self.plain_registry.set_alias(MODEL, "champion", number, who="ann", why="by hand")

    def steps(self, run_id: str) -> "SmallSteps":
        """The steps of a run."""
        return SmallSteps(self, run_id)

    @contextlib.contextmanager
    def course(self, lasts_s: float = 60.0, digest: str = "d") -> Iterator[Course]:
        """The pipeline, by a process that holds its lease."""
        lease = self.leases.acquire(f"pipeline {NAME}", this_process(), lasts_s, lambda _: True)
        yield Course(NAME, digest, self.store, Heartbeat(self.leases, lease), lambda: 1.0)

    def run(self, new_run_id: str = "run-1", **options: Any) -> Outcome:
        """One call of `lockstep retrain`."""
        with self.course() as course:
            return course.run(new_run_id, self.steps, Silent(), **options)


class Silent:
    """Tells nothing."""

    def run(self, run_id: str, given_up: str, resumed_at: str) -> None:
        pass

    def step(self, name: str, result: dict[str, Any]) -> None:
        pass


class SmallSteps:
    """Each step marks that it was done; training can be gone on with, as the real one can."""

    def __init__(self, world: World, run_id: str) -> None:
        self.world, self.run_id = world, run_id
        self.artifact = world.folder / f"artifact-{run_id}"

    def stale(self, done: Done) -> str:
        return "" if "train" in done else self.world.stale

    def discover(self, done: Done) -> dict[str, Any]:
        self.world.point("in discover")
        champion = self.world.champion()
        reason = "new rows" if self.world.is_new else "nothing new"
        return {"is_new": self.world.is_new, "reason": reason, "champion": champion}

    def prepare(self, done: Done) -> dict[str, Any]:
        self.world.point("in prepare")
        return {}

    def train(self, done: Done) -> dict[str, Any]:
        self.world.point("before training")
        if not (self.artifact / "manifest.json").exists():
            self.world.mark("trained")
            write_artifact(self.artifact, {"model.keras": self.run_id.encode()})
        self.world.point("after training")
        return {"artifact": str(self.artifact)}

    def evaluate(self, done: Done) -> dict[str, Any]:
        self.world.point("in evaluate")
        return {}

    def decide(self, done: Done) -> dict[str, Any]:
        self.world.point("in decide")
        return {"is_passed": self.world.is_passed, "reasons": ["mae is 30; at most 20 passes."]}

    def register(self, done: Done) -> dict[str, Any]:
        version = self.world.registry.register(
            MODEL, done["train"]["artifact"], key=f"pipeline/{NAME}/{self.run_id}"
        )
        return {"version": version.number}

    def promote(self, done: Done, commit: Commit) -> dict[str, Any]:
        self.world.point("before promoting")
        if not done["decide"]["is_passed"]:
            return {"decision": "kept", "reasons": done["decide"]["reasons"]}
        result = {"decision": "promoted", "reasons": ["it passed"]}

        def guard(connection: Any) -> None:
            commit(connection, result)
            self.world.point("inside promoting")

        try:
            self.world.registry.set_alias(
                MODEL,
                "champion",
                done["register"]["version"],
                who="pipeline",
                why=self.run_id,
                expected=done["discover"]["champion"],
                guard=guard,
            )
        except AliasConflict as error:
            return {"decision": "kept", "reasons": [str(error)]}
        return result

    def report(self, done: Done) -> dict[str, Any]:
        self.world.point("in report")
        return {}

    def notify(self, done: Done) -> dict[str, Any]:
        self.world.mark("notified")
        self.world.point("after notifying")
        return {}


def main(folder: str, wanted: str) -> None:
    """Run the pipeline once, and end by SIGKILL at the wanted point, where it has one."""

    def point(label: str) -> None:
        if label == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    world = World(Path(folder), point)
    lease = world.leases.acquire(f"pipeline {NAME}", this_process(), 60.0, is_dead)
    with Heartbeat(world.leases, lease) as heartbeat:
        course = Course(NAME, "d", world.store, heartbeat, lambda: 1.0)
        run_id = f"run-{lease.fence}"
        print(course.run(run_id, world.steps, Silent()).decision)


if __name__ == "__main__":
    main(*sys.argv[1:])
