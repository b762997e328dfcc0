"""`lockstep models` as it is typed: what it prints, for people and as JSON, and how it ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import LockstepError, UserError
from configs.load import load_job
from lockstep import cli, models
from lockstep.registration import Registration, code_state, origin_of, run_key
from registry.database import Database
from registry.errors import ArtifactFailure, RegistryError
from tests.support.artifacts import write_artifact

FIELDS = {"name", "version", "aliases", "digest", "artifact"}
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("LOCKSTEP_DATABASE", "LOCKSTEP_ARTIFACTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def lockstep(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; gives its JSON, its text with `as_text`, or its exit status with `status`."""

    def run(*arguments: str, as_text: bool = False, status: int = 0) -> Any:
        extra = [] if as_text else ["--json"]
        ended = cli.app([*arguments, *extra], standalone_mode=False) or 0
        assert ended == status
        printed = capsys.readouterr().out
        return printed if as_text else json.loads(printed)

    return run


@pytest.fixture
def two(lockstep: Run, tmp_path: Path) -> Path:
    """Two versions of flights."""
    for number, mae in ((1, 3.0), (2, 2.5)):
        lineage = {
            "run_id": f"run-{number}",
            "metrics": {"test": {"mae": mae}},
            "data": {"train": [{"path": "x", "rows": 10 * number}]},
        }
        files = {"model.keras": b"%d" % number}
        write_artifact(tmp_path / f"a{number}", files, lineage)
        lockstep("models", "register", f"a{number}", "--name", "flights", "--tag", f"n={number}")
    return tmp_path


def test_the_way_of_a_version(lockstep: Run, two: Path) -> None:
    first = lockstep("models", "promote", "flights/1", "--why", "first", "--who", "ann")
    assert first.keys() >= FIELDS
    assert (first["version"], first["aliases"]) == (1, ["champion"])
    assert (first["move"]["who"], first["move"]["why"]) == ("ann", "first")
    lockstep("models", "promote", "flights/2", "--alias", "candidate")
    second = lockstep("models", "promote", "flights@candidate", "--expected", "1")
    assert second["aliases"] == ["candidate", "champion"]
    assert second["move"]["who"] == models.who()
    with pytest.raises(RegistryError, match="expected to point to version 1"):
        lockstep("models", "promote", "flights/1", "--expected", "1")
    with pytest.raises(RegistryError, match="expected to not exist yet"):
        lockstep("models", "promote", "flights/1", "--expected", "none")

    (listed,) = lockstep("models", "list")["models"]
    assert listed.keys() >= FIELDS
    assert listed["aliases"] == {"candidate": 2, "champion": 2}
    shown = lockstep("models", "show", "flights")
    assert shown.keys() >= FIELDS
    assert shown["version"] == 2
    assert [version["version"] for version in shown["versions"]] == [1, 2]
    assert [move["sequence"] for move in shown["history"]] == [1, 2, 3]
    assert all(version.keys() >= FIELDS for version in shown["versions"])

    back = lockstep("models", "rollback", "flights")
    assert (back["version"], back["move"]["kind"]) == (1, "rollback")
    with pytest.raises(RegistryError, match="is held by candidate"):
        lockstep("models", "delete", "flights/2")
    gone = lockstep("models", "unalias", "flights@candidate")
    assert (gone["version"], gone["aliases"], gone["move"]["to_number"]) == (2, [], None)
    deleted = lockstep("models", "delete", "flights/2")
    assert (deleted["state"], Path(deleted["artifact"]).exists()) == ("deleted", False)
    assert lockstep("models", "show", "flights/2") == deleted
    assert "deleted" in lockstep("models", "show", "flights", as_text=True)
    assert lockstep("models", "compare", "flights/1", "flights/2")["versions"][1] == deleted
    history = lockstep("models", "history", "flights", "--alias", "candidate")["history"]
    assert [move["to_number"] for move in history] == [2, None]
    described = lockstep("models", "describe", "flights/1", "the old one", "--tag", "n=")
    assert (described["description"], described["tags"]) == ("the old one", {})


def test_verify_reads_the_files(lockstep: Run, two: Path) -> None:
    checked = lockstep("models", "verify")
    assert checked["damaged"] == 0
    assert [version["problems"] for version in checked["versions"]] == [[], []]
    (Path(checked["versions"][0]["artifact"]) / "model.keras").write_bytes(b"x")
    checked = lockstep("models", "verify", "flights/1", status=3)
    assert checked["versions"][0]["problems"] == ["model.keras was changed"]
    text = lockstep("models", "verify", as_text=True, status=3)
    assert "model.keras was changed" in text
    assert "intact" in text
    with pytest.raises(ArtifactFailure, match="Nothing was promoted"):
        lockstep("models", "promote", "flights/1")
    assert lockstep("models", "show", "flights/1")["aliases"] == []


def test_versions_are_compared(lockstep: Run, two: Path) -> None:
    compared = lockstep("models", "compare", "flights/1", "flights/2")
    assert compared["metrics"] == {"test": {"mae": [3.0, 2.5]}}
    assert compared["lineage"]["run_id"] == ["run-1", "run-2"]
    text = lockstep("models", "compare", "flights/1", "flights/2", as_text=True)
    assert "-0.5" in text
    assert "1 file of 10 rows" in text
    with pytest.raises(UserError, match="two or more are compared"):
        lockstep("models", "compare", "flights/1")


def test_people_get_tables(lockstep: Run, two: Path) -> None:
    lockstep("models", "promote", "flights/1", "--why", "[bold]why[/bold]")
    assert "flights" in lockstep("models", "list", as_text=True)
    shown = lockstep("models", "show", "flights", as_text=True)
    assert "[bold]why[/bold]" in shown
    assert "test mae 2.5" in shown
    assert "n=1" in lockstep("models", "show", "flights/1", as_text=True)
    moved = lockstep("models", "promote", "flights/2", as_text=True)
    assert moved == "flights@champion: from version 1 to version 2\n"


def test_an_empty_registry_says_how_to_fill_it(lockstep: Run) -> None:
    assert lockstep("models", "list") == {"models": []}
    assert "lockstep models register" in lockstep("models", "list", as_text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["promote", "flights"], "which is the champion itself"),
        (["promote", "flights/1", "--expected", "x"], "--expected received 'x'"),
        (["delete", "flights@champion"], "NAME/NUMBER is allowed"),
        (["unalias", "flights"], "NAME@ALIAS is allowed"),
        (["show", "flihgts"], "Did you mean 'flights'"),
        (["describe", "flights/1", "--tag", "x"], "KEY=VALUE is allowed"),
        (["register", "nowhere", "--name", "x"], "is no artifact"),
    ],
)
def test_mistakes_end_with_status_2(
    lockstep: Run, two: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(LockstepError, match=message) as caught:
        lockstep("models", *arguments)
    assert caught.value.exit_status == 2


def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Exit status and standard error of a command as the shell calls it."""
    monkeypatch.setattr("sys.argv", ["lockstep", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().err


def test_a_locked_database_ends_a_command_with_status_3(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "Database", lambda: Database(busy_s=0.05))
    other = Database()
    with other.writing("models"):
        status, said = typed(monkeypatch, capsys, "models", "promote", "flights/1")
    other.close()
    assert status == 3
    assert said.startswith("error: ")
    assert "metadata.db is locked: another process" in said
    assert len(said.splitlines()) == 1


def test_a_full_database_ends_a_command_with_status_3(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> Database:
        database = Database()
        with database.reading() as connection:  # the pool keeps this connection, and it its bound
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        return database

    monkeypatch.setattr(models, "Database", full)
    why = "x" * 100_000
    status, said = typed(monkeypatch, capsys, "models", "promote", "flights/1", "--why", why)
    assert status == 3
    assert "its storage is full" in said
    assert "Traceback" not in said
    monkeypatch.setattr(models, "Database", Database)
    with pytest.raises(RegistryError, match="no alias|no champion|has no"):
        models.open_registry().resolve("flights@champion")


def test_a_model_is_a_path_or_a_reference(lockstep: Run, two: Path) -> None:
    lockstep("models", "promote", "flights/1")
    stored = models.find_model("flights")
    assert stored == models.find_model("flights@champion") == models.find_model("flights/1")
    assert models.find_model("a1") == Path("a1")
    assert models.find_model("some/where/model.keras") == Path("some/where/model.keras")
    assert models.find_model("missing.keras") == Path("missing.keras")
    (two / "artifact").mkdir()
    with pytest.raises(RegistryError, match=r"no path artifct\. Did you mean 'artifact'\? As a"):
        models.find_model("artifct")
    (two / "flights" / "2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Write \./flights/2 for the path"):
        models.find_model("flights/2")
    assert models.find_model("./flights/2") == Path("flights/2")
    assert models.find_model("flights") == Path("flights")


JOB: dict[str, Any] = {
    "name": "flights",
    "model": {"file": "flights@champion"},
    "data": {"train": "rows.parquet", "features": ["a"], "label": "b"},
    "train": {"epochs": 1, "global_batch_size": 2},
}


def test_a_job_begins_with_a_version(lockstep: Run, two: Path) -> None:
    lockstep("models", "promote", "flights/2")
    origin = origin_of(load_job(JOB))
    assert str(origin.parent) == "flights/2"
    assert Path(str(origin.job.model.file)).read_bytes() == b"2"
    plain = load_job({**JOB, "model": {"file": "a1/model.keras"}})
    assert origin_of(plain).job is plain
    write_artifact(two / "tf", {"saved_model/saved_model.pb": b"1"})
    lockstep("models", "register", "tf", "--name", "other")
    with pytest.raises(UserError, match=r"other/1 holds no model\.keras"):
        origin_of(load_job({**JOB, "model": {"file": "other/1"}}))


def test_a_run_is_registered_once(lockstep: Run, two: Path) -> None:
    lockstep("models", "promote", "flights/2")
    job = load_job(JOB, ["export.register=flights"])
    summary = {"run_id": "r", "weights_sha256": ["ab" * 32], "artifact": str(two / "a1")}
    registration = Registration(origin_of(job))
    version = registration.register(summary)
    assert (version.number, version.parent, version.key) == (3, 2, run_key(summary))
    assert version.lineage["run_id"] == "run-1"
    assert version.lineage["parent"] == "flights/2"
    assert version.lineage["code"] is None
    # Exported once more, the files differ though the weights are the same.
    write_artifact(two / "a1", {"model.keras": b"other bytes"})
    assert Registration(origin_of(job)).register(summary) == version
    longer = {**summary, "weights_sha256": ["cd" * 32]}
    assert registration.register(longer).number == 4
    other = load_job({**JOB, "name": "new"}, ["export.register=new"])
    made = Registration(origin_of(other)).register(summary)
    assert (made.number, made.parent) == (1, None)


def test_a_run_that_is_not_registered_says_how(two: Path) -> None:
    job = load_job({**JOB, "model": {"file": "a1/model.keras"}}, ["export.register=flights"])
    registration = Registration(origin_of(job))
    (two / "a1" / "model.keras").unlink()
    summary = {"run_id": "r", "weights_sha256": ["ab" * 32], "artifact": "a1"}
    with pytest.raises(RegistryError, match=r"the run is done.* not whole.*Then: lockstep models "):
        registration.register(summary)


def test_code_is_known_by_its_commit(tmp_path: Path) -> None:
    assert code_state(tmp_path) is None
    assert code_state(tmp_path / "nowhere") is None
    here = code_state(Path(__file__).parent)
    assert here is None or (len(here["commit"]) == 40 and here["is_dirty"] in (True, False))
