"""A pipeline's run dies at every point, and the next one ends it: nothing half, nothing twice.

The registry and the memory of runs are real, on SQLite; death is an exception that nothing catches.
Real processes die in tests/chaos/test_retrain.py.
"""

from pathlib import Path
from typing import Any

import pytest

from configs.errors import EnvironmentFailure, UserError
from registry.errors import LeaseLost
from tests.support.pipeline_world import MODEL, NAME, SmallSteps, World
from trainer.retrain import STEPS


class Died(BaseException):
    """The process is no more."""


class Recorder:
    """Counts points, and dies at one of them."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.labels: list[str] = []
        self.dies_at = dies_at

    def __call__(self, label: str) -> None:
        self.labels.append(label)
        if len(self.labels) - 1 == self.dies_at:
            raise Died(label)


def points() -> list[str]:
    """All points of an undisturbed run, in order."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder()
        world = World(Path(folder), recorder)
        world.run()
        world.database.close()
        return recorder.labels


POINTS = points()


def check_consistent(world: World) -> None:
    """What holds at every moment, whoever died."""
    champion, versions = world.champion(), world.versions()
    assert champion is None or champion in versions
    assert len(versions) <= 2
    for version in map(world.plain_registry.version, [MODEL] * len(versions), versions):
        assert world.plain_registry.verify(version) == []
    moved = [] if not versions else world.plain_registry.history(MODEL, "champion")
    promoted = [
        world.plain_store.result(run.run_id, "promote") for run in world.plain_store.runs(NAME)
    ]
    is_moved = any(move.to_number == 2 for move in moved)
    assert is_moved == any(p is not None and p["decision"] == "promoted" for p in promoted)


def test_there_are_points_before_and_after_each_step() -> None:
    assert POINTS.count("before store.record") == len(STEPS) - 1
    assert "inside promoting" in POINTS
    assert "before registry.register" in POINTS
    assert "after registry.set_alias" in POINTS


# Nothing lasting happens on the way to a "before": who dies there leaves what the last point left.
STATES = [n for n, label in enumerate(POINTS) if n == 0 or not label.startswith("before")]
DEATHS = [(number, True) for number in STATES]
DEATHS += [(number, False) for number in STATES if number >= POINTS.index("in decide")]


@pytest.mark.parametrize(
    ("number", "is_passed"),
    DEATHS,
    ids=[f"{n}-{POINTS[n]}-{'passes' if passes else 'refused'}" for n, passes in DEATHS],
)
def test_a_run_that_died_is_ended_by_the_next(tmp_path: Path, number: int, is_passed: bool) -> None:
    world = World(tmp_path, Recorder(number))
    world.is_passed = is_passed
    world.give_champion()
    try:
        world.run()
        is_dead = False
    except Died:
        is_dead = True
    if is_passed:
        assert is_dead
    check_consistent(world)
    after = World(tmp_path)
    after.is_passed = is_passed
    if not after.plain_store.runs(NAME, "done"):
        outcome = after.run("run-2")
        is_begun = number >= POINTS.index("after store.begin")
        assert outcome.is_resumed == is_begun
        assert outcome.run_id == ("run-1" if is_begun else "run-2")
        assert outcome.decision == ("promoted" if is_passed else "kept")
    (run,) = after.plain_store.runs(NAME)
    assert run.status == "done"
    assert after.champion() == (2 if is_passed else 1)
    assert after.versions() == [1, 2]
    assert after.times("trained") == 1
    assert after.times("notified") in (1, 2)
    check_consistent(after)


@pytest.mark.parametrize("number", STATES[::4])
def test_it_may_die_again_and_again(tmp_path: Path, number: int) -> None:
    for at in (number, 4, 2, 6, 3):
        try:
            World(tmp_path, Recorder(at)).run()
        except Died:
            continue
        break
    world = World(tmp_path)
    if not world.plain_store.runs(NAME, "done"):
        world.run()
    assert world.champion() == 1
    assert world.versions() == [1]
    assert world.times("trained") == 1


def test_a_rollback_between_promotion_and_rerun_stays(tmp_path: Path) -> None:
    """Who has promoted once does not do it again over what a person decided since."""
    world = World(tmp_path, Recorder(POINTS.index("after registry.set_alias")))
    world.give_champion()
    with pytest.raises(Died):
        world.run()
    assert world.champion() == 2
    world.move_champion(1)
    after = World(tmp_path)
    assert after.run().decision == "promoted"
    assert after.champion() == 1


def test_a_champion_that_was_moved_meanwhile_is_kept(tmp_path: Path) -> None:
    world = World(tmp_path, Recorder(POINTS.index("in decide")))
    world.give_champion()
    with pytest.raises(Died):
        world.run()
    world.plain_registry.register(MODEL, tmp_path / "first", key="another")
    world.move_champion(2)
    outcome = World(tmp_path).run()
    assert outcome.decision == "kept"
    assert "somebody moved it" in outcome.reasons[0]
    assert world.champion() == 2


def test_nothing_new_ends_at_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.is_new = False
    outcome = world.run()
    assert (outcome.decision, outcome.reasons) == ("nothing_new", ("nothing new",))
    assert set(outcome.done) == {"discover", "notify"}
    assert world.times("trained") == 0


@pytest.mark.parametrize("step", ["train", "register", "promote"])
def test_who_was_given_up_for_dead_changes_nothing(tmp_path: Path, step: str) -> None:
    """A process sleeps inside a step, another one takes over and ends the run, the first wakes."""

    class Sleeper(SmallSteps):
        def takeover(self) -> None:
            World(tmp_path).run("run-2")

        def train(self, done: Any) -> Any:
            result = super().train(done)
            if step == "train":
                self.takeover()
            return result

        def register(self, done: Any) -> Any:
            result = super().register(done)
            if step == "register":
                self.takeover()
            return result

        def promote(self, done: Any, commit: Any) -> Any:
            if step == "promote":
                self.takeover()
                world.move_champion(1)
            return super().promote(done, commit)

    world = World(tmp_path)
    world.give_champion()
    with world.course() as course, pytest.raises(LeaseLost, match="took it over"):
        course.run("run-1", lambda run_id: Sleeper(world, run_id), Silent())
    assert world.champion() == (1 if step == "promote" else 2)
    assert world.versions() == [1, 2]
    assert world.times("trained") == 1
    assert [run.status for run in world.plain_store.runs(NAME)] == ["done"]


class Silent:
    def run(self, *_: Any) -> None: ...

    def step(self, *_: Any) -> None: ...


def failing(world: World, step: str, error: Exception) -> Any:
    def steps(run_id: str) -> SmallSteps:
        made = SmallSteps(world, run_id)

        def fail(done: Any) -> Any:
            raise error

        setattr(made, step, fail)
        return made

    return steps


def test_after_a_mistake_of_the_user_the_next_run_begins_anew(tmp_path: Path) -> None:
    world = World(tmp_path)
    with world.course() as course, pytest.raises(UserError):
        course.run("run-1", failing(world, "prepare", UserError("no such column")), Silent())
    (run,) = world.plain_store.runs(NAME)
    assert (run.status, run.said) == ("failed", "no such column")
    assert world.run("run-2").run_id == "run-2"


def test_after_a_failure_of_the_environment_the_run_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path)
    with world.course() as course, pytest.raises(EnvironmentFailure):
        course.run("run-1", failing(world, "evaluate", EnvironmentFailure("disk")), Silent())
    outcome = world.run("run-2")
    assert (outcome.run_id, outcome.is_resumed) == ("run-1", True)
    assert world.times("trained") == 1


@pytest.mark.parametrize("step", STEPS)
def test_a_place_that_refuses_is_a_failure_of_the_environment(tmp_path: Path, step: str) -> None:
    world = World(tmp_path)

    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/runs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SmallSteps, step, refuse)
        with pytest.raises(EnvironmentFailure, match=f"the step {step} failed: .*'/runs'. Mend"):
            world.run("run-1")
    outcome = world.run("run-2")
    assert (outcome.run_id, outcome.decision) == ("run-1", "promoted")
    assert world.times("trained") == 1


def test_a_look_at_what_there_is_may_be_refused(tmp_path: Path) -> None:
    world = World(tmp_path, Recorder(POINTS.index("in decide")))
    with pytest.raises(Died):
        world.run("run-1")
    world.point = lambda _: None

    def refuse(*_: Any) -> str:
        raise PermissionError(13, "Permission denied", "/runs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SmallSteps, "stale", refuse)
        with pytest.raises(EnvironmentFailure, match="Permission denied"):
            world.run("run-2")
    assert world.run("run-3").run_id == "run-1"


@pytest.mark.parametrize("why", ["pipeline", "data", "fresh"])
def test_a_run_that_fits_no_more_is_given_up(tmp_path: Path, why: str) -> None:
    world = World(tmp_path, Recorder(POINTS.index("in prepare")))
    with pytest.raises(Died):
        world.run()
    after = World(tmp_path)
    after.stale = "files changed" if why == "data" else ""
    with after.course(digest="other" if why == "pipeline" else "d") as course:
        outcome = course.run("run-2", after.steps, Silent(), is_fresh=why == "fresh")
    assert outcome.run_id == "run-2"
    given_up = after.plain_store.runs(NAME)[1]
    assert (given_up.run_id, given_up.status) == ("run-1", "abandoned")
    assert given_up.said in (
        "the pipeline file has changed since",
        "files changed",
        "a fresh run was asked for",
    )
