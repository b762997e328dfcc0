"""The registry on SQLite and on PostgreSQL: versions, aliases, history, deletion, damage."""

import json
import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from configs.errors import UserError
from registry.aliases import earlier
from registry.database import Database
from registry.errors import AliasConflict, ArtifactFailure, DatabaseFailure, RegistryError
from registry.store import AliasMove, ModelSummary, Registry
from tests.support.artifacts import FILES, write_artifact
from tests.support.clock import Clock

BY = {"who": "ann@desk", "why": "because"}


@pytest.fixture
def registry(database: Database, tmp_path: Path, clock: Clock) -> Registry:
    return Registry(database, str(tmp_path / "stored"), clock)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    lineage = {"run_id": "r1", "metrics": {"test": {"mae": 2.5, "odd": float("inf")}}}
    return write_artifact(tmp_path / "artifact", lineage=lineage)


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_version_is_what_was_registered(registry: Registry, artifact: Path, clock: Clock) -> None:
    made = registry.register(
        "flights", artifact, description="first", tags={"team": "ops"}, key="run/r1"
    )
    assert registry.version("flights", 1) == made
    assert str(made) == "flights/1"
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert made.digest == manifest["digest"]
    assert made.lineage["run_id"] == "r1"
    assert made.metrics == {"test": {"mae": 2.5, "odd": float("inf")}}
    assert (made.description, made.tags, made.key) == ("first", {"team": "ops"}, "run/r1")
    assert (made.state, made.created_at, made.aliases) == ("ready", clock.now, ())
    stored = Path(made.artifact)
    assert files_below(stored) == sorted([*FILES, "manifest.json"])
    assert made.size_bytes == sum(p.stat().st_size for p in stored.rglob("*") if p.is_file())
    assert registry.verify(made) == []
    assert registry.fetch(made) == stored
    assert (stored / "model.keras").read_bytes() == FILES["model.keras"]


def test_numbers_count_within_a_model_and_are_never_used_again(
    registry: Registry, artifact: Path
) -> None:
    assert [registry.register("a", artifact).number for _ in range(3)] == [1, 2, 3]
    assert registry.register("b", artifact).number == 1
    registry.delete("a", 3)
    assert registry.register("a", artifact, parent=2).parent == 2
    assert [v.number for v in registry.versions("a")] == [1, 2, 3, 4]
    registry.set_alias("a", "champion", 2, **BY)
    assert registry.models() == [
        ModelSummary("a", 3, 4, {"champion": 2}),
        ModelSummary("b", 1, 1, {}),
    ]
    registry.delete("b", 1)
    assert registry.models()[1] == ModelSummary("b", 0, 0, {})


def test_a_key_registers_once(registry: Registry, artifact: Path, tmp_path: Path) -> None:
    first = registry.register("a", artifact, key="run/1")
    assert registry.register("a", artifact, key="run/1") == first
    assert registry.keyed("a", "run/1") == first
    assert registry.keyed("a", "run/2") is None
    assert registry.register("b", artifact, key="run/1").number == 1
    other = write_artifact(tmp_path / "other", {"model.keras": b"different"})
    with pytest.raises(RegistryError, match="belongs to a/1, another artifact"):
        registry.register("a", other, key="run/1")
    registry.delete("a", 1)
    assert registry.register("a", artifact, key="run/1").state == "deleted"
    with pytest.raises(RegistryError, match="201 letters"):
        registry.register("a", artifact, key="k" * 201)


def test_references(registry: Registry, artifact: Path) -> None:
    for _ in range(3):
        registry.register("flights", artifact)
    registry.set_alias("flights", "champion", 2, **BY)
    registry.set_alias("flights", "candidate", 3, **BY)
    for reference, number in [
        ("flights", 2),
        ("flights@champion", 2),
        ("flights@candidate", 3),
        ("flights/1", 1),
    ]:
        assert registry.resolve(reference).number == number
    assert registry.resolve("flights").aliases == ("champion",)


def test_what_is_not_there_is_named_with_the_nearest(registry: Registry, artifact: Path) -> None:
    with pytest.raises(RegistryError, match="no model 'x' is registered; there is none yet"):
        registry.resolve("x")
    for _ in range(12):
        registry.register("flights", artifact)
    registry.delete("flights", 1)
    with pytest.raises(RegistryError, match="has no alias 'champion'; none is there"):
        registry.resolve("flights")
    registry.set_alias("flights", "champion", 3, **BY)
    for reference, message in [
        ("flihgts", "no model 'flihgts' is registered; flights are there. Did you mean 'flights'?"),
        ("flights@chmpion", "no alias 'chmpion'; champion is there. Did you mean 'champion'?"),
        ("flights/40", "no version 40; of its 11 the nearest are 8, 9, 10, 11, 12"),
        ("flights/1", "flights/1 was deleted"),
        ("flights/0x1", "received 'flights/0x1' as a model; NAME/NUMBER"),
        ("a b", "received 'a b' as a model"),
    ]:
        with pytest.raises(RegistryError, match=re.escape(message)):
            registry.resolve(reference)
    for name, why in [("", "received ''"), ("a/b", "as a model's name"), ("-a", "'-a'")]:
        with pytest.raises(RegistryError, match=why):
            registry.register(name, artifact)
    with pytest.raises(RegistryError, match="received '3' as an alias"):
        registry.set_alias("flights", "3", 3, **BY)
    with pytest.raises(RegistryError, match="has no version 99"):
        registry.register("flights", artifact, parent=99)
    with pytest.raises(RegistryError, match="was deleted"):
        registry.set_alias("flights", "champion", 1, **BY)
    with pytest.raises(RegistryError, match="has no version 99"):
        registry.set_alias("flights", "champion", 99, **BY)
    with pytest.raises(UserError, match="no alias 'other'"):
        registry.set_alias("flights", "other", None, **BY)
    with pytest.raises(RegistryError, match="no model 'flight'"):
        registry.history("flight")


def test_an_alias_moves_when_it_is_where_it_was_expected(
    registry: Registry, artifact: Path, clock: Clock
) -> None:
    for _ in range(3):
        registry.register("m", artifact)
    first = registry.set_alias("m", "champion", 1, expected=None, **BY)
    assert first == AliasMove("m", "champion", None, 1, clock.now, "ann@desk", "because", 1)
    with pytest.raises(AliasConflict, match="to not exist yet and does point to version 1"):
        registry.set_alias("m", "champion", 2, expected=None, **BY)
    with pytest.raises(AliasConflict, match="to point to version 3 and does point to version 1"):
        registry.set_alias("m", "champion", 2, expected=3, **BY)
    with pytest.raises(AliasConflict, match="to point to version 1 and does not exist"):
        registry.set_alias("m", "next", 2, expected=1, **BY)
    assert registry.history("m") == [first]
    assert registry.set_alias("m", "champion", 1, **BY) == first  # it is there already
    clock.now += 1
    second = registry.set_alias("m", "champion", 2, expected=1, who="bob", why="better")
    assert (second.from_number, second.to_number, second.sequence) == (1, 2, 2)
    registry.set_alias("m", "next", 3, **BY)
    gone = registry.set_alias("m", "next", None, expected=3, **BY)
    assert (gone.from_number, gone.to_number, gone.sequence) == (3, None, 4)
    assert [move.sequence for move in registry.history("m", "champion")] == [1, 2]
    assert registry.history("m")[1] == second
    assert registry.version("m", 3).aliases == ()


def test_rolling_back_goes_back_one_promotion_at_a_time(registry: Registry, artifact: Path) -> None:
    for _ in range(5):
        registry.register("m", artifact)
    with pytest.raises(RegistryError, match="no alias 'champion'"):
        registry.rollback("m", **BY)
    for number in (1, 2, 3, 4):
        registry.set_alias("m", "champion", number, **BY)
    registry.delete("m", 3)
    back = registry.rollback("m", **BY)
    assert (back.from_number, back.to_number, back.kind) == (4, 2, "rollback")
    registry.set_alias("m", "champion", 5, **BY)
    assert registry.rollback("m", **BY).to_number == 2
    assert registry.rollback("m", **BY).to_number == 1
    with pytest.raises(RegistryError, match="points to m/1, and no earlier version"):
        registry.rollback("m", **BY)
    registry.set_alias("m", "champion", None, **BY)
    assert registry.rollback("m", **BY).to_number == 1
    assert [move.sequence for move in registry.history("m")] == list(range(1, 11))


def test_deletion_refuses_what_an_alias_holds(registry: Registry, artifact: Path) -> None:
    for _ in range(2):
        registry.register("m", artifact)
    registry.set_alias("m", "champion", 1, **BY)
    with pytest.raises(RegistryError, match="m/1 is held by champion"):
        registry.delete("m", 1)
    assert registry.verify(registry.version("m", 1)) == []
    second = registry.version("m", 2)
    registry.delete("m", 2)
    registry.delete("m", 2)
    assert not Path(second.artifact).exists()
    assert registry.version("m", 2).state == "deleted"
    assert registry.verify(registry.version("m", 2)) == ["it was deleted"]
    with pytest.raises(RegistryError, match="was deleted"):
        registry.fetch(registry.version("m", 2))


def test_notes_change_and_nothing_else(registry: Registry, artifact: Path) -> None:
    made = registry.register("m", artifact, tags={"a": "1", "b": "2"}, description="old")
    changed = registry.annotate("m", 1, description="new", tags={"a": None, "c": "3"})
    assert (changed.description, changed.tags) == ("new", {"b": "2", "c": "3"})
    assert registry.annotate("m", 1).description == "new"
    assert changed.digest == made.digest


def test_damage_is_found_and_named(registry: Registry, artifact: Path) -> None:
    made = registry.register("m", artifact)
    stored = Path(made.artifact)
    (stored / "model.keras").write_bytes(b"a mOdel")
    (stored / "signature.json").unlink()
    (stored / "extra").write_text("x")
    assert registry.verify(made) == [
        "model.keras was changed",
        "signature.json is missing",
        "extra was added",
    ]
    with pytest.raises(ArtifactFailure, match="m/1 is not what was registered: model.keras"):
        registry.fetch(made)
    manifest = json.loads((stored / "manifest.json").read_text())
    for change, found in [
        ({"lineage": {"run_id": "forged"}}, "manifest.json was changed"),
        ({"digest": "0" * 64}, "manifest.json has a digest that does not fit"),
        ({"files": {"../../x": "0"}}, "manifest.json names the file '../../x'"),
    ]:
        (stored / "manifest.json").write_text(json.dumps({**manifest, **change}))
        assert registry.verify(made)[0].startswith(found)
    (stored / "manifest.json").write_text("[]")
    assert registry.verify(made) == ["manifest.json is not the manifest of an artifact"]
    (stored / "manifest.json").unlink()
    assert registry.verify(made) == ["manifest.json is missing"]


def test_only_whole_artifacts_are_registered(
    registry: Registry, artifact: Path, tmp_path: Path
) -> None:
    (artifact / "model.keras").write_bytes(b"changed")
    with pytest.raises(RegistryError, match="changed after it was written"):
        registry.register("m", artifact)
    (artifact / "model.keras").unlink()
    with pytest.raises(RegistryError, match="not whole: model.keras is missing"):
        registry.register("m", artifact)
    with pytest.raises(RegistryError, match=r"is no artifact.*Give the `artifact` of a run"):
        registry.register("m", tmp_path / "nowhere")
    write_artifact(tmp_path / "run" / "artifact")
    with pytest.raises(RegistryError, match=r"Give .*run/artifact\."):
        registry.register("m", tmp_path / "run")
    assert files_below(tmp_path / "stored") == []
    assert registry.models() == []


def test_a_database_that_is_locked_full_or_newer_changes_nothing(
    tmp_path: Path, artifact: Path
) -> None:
    url, stored = f"sqlite:///{tmp_path / 'lockstep.db'}", tmp_path / "stored"
    patient, database = Database(url), Database(url, busy_s=0.05)
    registry = Registry(database, str(stored))
    made = registry.register("m", artifact)
    with patient.writing("models"):
        assert registry.resolve("m/1") == made, "readers wait for nobody"
        for act in (
            lambda: registry.register("m", artifact),
            lambda: registry.set_alias("m", "champion", 1, **BY),
            lambda: registry.delete("m", 1),
        ):
            with pytest.raises(DatabaseFailure, match=r"lockstep\.db is locked: another process"):
                act()
    with database.reading() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(DatabaseFailure, match="its storage is full"):
        registry.register("m", artifact, description="x" * 100_000)
    database.close()
    assert registry.versions("m") == [made]
    registry.register("m", artifact)
    folders = [Path(version.artifact) for version in registry.versions("m")]
    assert sorted((stored / "m").iterdir()) == sorted(folders)
    with patient.writing("models") as connection:
        connection.execute(sa.text("UPDATE schema_versions SET version = 99"))
    with pytest.raises(RegistryError, match="of models are of version 99; .* Upgrade Lockstep"):
        Registry(database, str(stored)).models()
    database.close()
    patient.close()


def moves(*targets: int | None) -> list[AliasMove]:
    return [AliasMove("m", "a", None, to, 0.0, "", "", 0) for to in targets]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (moves(), []),
        (moves(1), []),
        (moves(1, 2, 3), [2, 1]),
        (moves(1, None), [1]),
        (moves(1, None, 2), [1]),
        (moves(1, 2, 1), [2]),
    ],
)
def test_what_can_be_rolled_back_to(history: list[AliasMove], expected: list[int]) -> None:
    assert earlier(history) == expected
