"""Writers that die or are overtaken: a version is there whole or not at all, and no rest."""

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from registry import artifacts, claims
from registry.database import Database
from registry.errors import ArtifactFailure
from registry.store import Registry
from registry.tables import FOLDERS
from tests.support.artifacts import write_artifact
from tests.support.clock import Clock
from tests.support.processes import run_alone
from tests.support.registry_workers import MODEL, delete_until, register_until

STEPS_AT_MOST = 60


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact")


def folders(root: Path) -> list[str]:
    """Everything below the model's folder, unfinished things too."""
    model = root / MODEL
    return sorted(path.name for path in model.iterdir()) if model.exists() else []


def claimed(database: Database) -> int:
    with database.reading() as connection:
        return len(connection.execute(sa.select(FOLDERS)).all())


def test_a_register_that_is_killed_leaves_all_or_nothing(tmp_path: Path, artifact: Path) -> None:
    """Killed before each step that changes the disk or the database, and after the last."""
    url, root = f"sqlite:///{tmp_path / 'lockstep.db'}", tmp_path / "stored"
    database = Database(url)
    registry = Registry(database, str(root))
    unseen = 0
    for point in range(STEPS_AT_MOST):
        key = f"run/{point}"
        answer = run_alone(
            register_until, (url, str(root), str(artifact), point, key), timeout_s=60
        )
        before = registry.models()
        left = registry.keyed(MODEL, key) if before else None
        if left is not None:
            assert registry.verify(left) == []
        unseen += left is None
        again = registry.register(MODEL, artifact, key=key)
        assert left in (None, again)
        assert registry.verify(again) == []
        numbers = [version.number for version in registry.versions(MODEL)]
        assert numbers == list(range(1, len(numbers) + 1)), f"killed at {point}"
        registry.register(MODEL, artifact)  # cleans, where the one before had nothing to do
        versions = registry.versions(MODEL)
        assert folders(root) == sorted(Path(version.artifact).name for version in versions)
        assert claimed(database) == 0
        if answer is not None:
            break
    else:
        raise AssertionError("there are more steps than were tried")
    assert 15 < unseen < point
    database.close()


def test_a_deletion_that_is_killed_deletes_all_or_nothing(tmp_path: Path, artifact: Path) -> None:
    url, root = f"sqlite:///{tmp_path / 'lockstep.db'}", tmp_path / "stored"
    database = Database(url)
    registry = Registry(database, str(root))
    untouched = 0
    for point in range(STEPS_AT_MOST):
        number = registry.register(MODEL, artifact).number
        answer = run_alone(delete_until, (url, str(root), number, point), timeout_s=60)
        found = registry.version(MODEL, number)
        assert found.state == "deleted" or registry.verify(found) == []
        untouched += found.state == "ready"
        kept = registry.register(MODEL, artifact)  # removes what was left
        ready = [version for version in registry.versions(MODEL) if version.state == "ready"]
        assert kept in ready
        assert folders(root) == sorted(Path(version.artifact).name for version in ready)
        assert claimed(database) == 0
        if answer is not None:
            break
    else:
        raise AssertionError("there are more steps than were tried")
    assert 1 < untouched < point - 4
    database.close()


def test_a_writer_that_was_overtaken_is_refused(
    database: Database, tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slept through its lease; another cleaned up; then it wakes and wants to finish."""
    clock = Clock()
    registry = Registry(database, str(tmp_path / "stored"), clock)
    store = artifacts.store

    def sleepy(*arguments: Any) -> int:
        size_bytes = store(*arguments)
        monkeypatch.undo()
        clock.now += claims._LEASE_S + 1
        Registry(database, str(tmp_path / "stored"), clock).register(MODEL, artifact)
        return size_bytes

    monkeypatch.setattr(artifacts, "store", sleepy)
    with pytest.raises(ArtifactFailure, match=r"given up on: this process said nothing for 900 s"):
        registry.register(MODEL, artifact)
    (version,) = registry.versions(MODEL)
    assert registry.verify(version) == []
    assert folders(tmp_path / "stored") == [Path(version.artifact).name]
    assert claimed(database) == 0


def test_a_slow_writer_keeps_its_claim(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "_CHUNK_BYTES", 1)
    clock = Clock()
    registry = Registry(database, str(tmp_path / "stored"), clock)
    slow = write_artifact(tmp_path / "slow", {"model.keras": b"twenty slow letters."})
    chunks = artifacts._chunks

    def slowly(stream: Any) -> Any:
        for chunk in chunks(stream):
            clock.now += claims._LEASE_S / 2
            Registry(database, str(tmp_path / "stored"), clock)._claims.clean()
            yield chunk

    monkeypatch.setattr(artifacts, "_chunks", slowly)
    version = registry.register(MODEL, slow)
    monkeypatch.undo()
    assert registry.verify(version) == []


def test_one_that_loses_its_claim_halfway_stops(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifact: Path
) -> None:
    clock = Clock()
    registry = Registry(database, str(tmp_path / "stored"), clock)
    chunks = artifacts._chunks

    def stopped(stream: Any) -> Any:
        for chunk in chunks(stream):
            clock.now += claims._LEASE_S + 1
            Registry(database, str(tmp_path / "stored"), clock)._claims.clean()
            yield chunk

    monkeypatch.setattr(artifacts, "_chunks", stopped)
    with pytest.raises(ArtifactFailure, match="given up on"):
        registry.register(MODEL, artifact)
    assert registry.models() == []
    assert folders(tmp_path / "stored") == []
    assert claimed(database) == 0


def test_a_full_disk_registers_nothing(
    tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'lockstep.db'}")
    registry = Registry(database, str(tmp_path / "stored"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtifactFailure, match="storage failed: No space left on device"):
        registry.register(MODEL, artifact)
    monkeypatch.undo()
    assert folders(tmp_path / "stored") == []
    assert claimed(database) == 0
    database.close()


def test_files_that_cannot_be_removed_go_with_the_next_deletion(
    database: Database, tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(database, str(tmp_path / "stored"))
    first, second = registry.register(MODEL, artifact), registry.register(MODEL, artifact)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", refused)
    with pytest.raises(ArtifactFailure, match="m/1 is deleted, but its files .* could not be"):
        registry.delete(MODEL, 1)
    monkeypatch.undo()
    assert registry.version(MODEL, 1).state == "deleted"
    assert Path(first.artifact).exists()
    registry.delete(MODEL, 1)
    assert folders(tmp_path / "stored") == [Path(second.artifact).name]
    assert claimed(database) == 0


@pytest.mark.parametrize("has_committed", [True, False])
def test_who_is_cut_off_while_committing_asks_the_tables(
    database: Database,
    tmp_path: Path,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_committed: bool,
) -> None:
    """The commit may have been carried out though its answer never came."""
    registry = Registry(database, str(tmp_path / "stored"))
    store, dialect = artifacts.store, database._engine.dialect
    commit = dialect.do_commit

    def cut_off(connection: Any) -> None:
        monkeypatch.undo()
        if has_committed:
            commit(connection)
        raise KeyboardInterrupt

    def stored(*arguments: Any) -> int:
        size_bytes = store(*arguments)
        monkeypatch.setattr(dialect, "do_commit", cut_off)
        return size_bytes

    monkeypatch.setattr(artifacts, "store", stored)
    with pytest.raises(KeyboardInterrupt):
        registry.register(MODEL, artifact, key="once")
    found = registry.versions(MODEL) if registry.models() else []
    assert len(found) == has_committed
    assert folders(tmp_path / "stored") == [Path(version.artifact).name for version in found]
    assert all(registry.verify(version) == [] for version in found)
    assert claimed(database) == 0
    assert registry.register(MODEL, artifact, key="once").number == 1
