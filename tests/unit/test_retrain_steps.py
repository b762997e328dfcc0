"""What a pipeline's steps decide without training: stale runs, same inputs, promotion."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from configs.load import load_job, load_pipeline
from configs.pipeline import WebhookConfig
from configs.schema import Job
from lockstep.pipeline_rows import lineage_of_files
from lockstep.retrain_steps import PipelineSteps, StepContext
from registry.database import Database
from registry.errors import LeaseLost
from registry.leases import Heartbeat, Leases
from registry.pipelines import PipelineStore
from registry.store import Registry
from tests.support.artifacts import write_artifact
from tests.unit.test_pipeline_rows import write
from tests.unit.test_pipeline_schema import JOB


class World:
    """A pipeline over a folder, with its lease, and a registry."""

    def __init__(
        self, folder: Path, data: Any = None, start_from: str = "scratch", **options: Any
    ) -> None:
        self.folder = folder
        data = data or {"evaluation": {"fraction": 0.2}}
        self.files = [write(folder / "in", f"{n}.parquet") for n in range(2)]
        values = {
            "name": "fresh",
            "job": JOB,
            "data": {"files": str(folder / "in"), **data},
            "start_from": start_from,
            "runs_dir": str(folder / "runs"),
        }
        database = Database(f"sqlite:///{folder / 'metadata.db'}")
        self.leases = Leases(database)
        self.store = PipelineStore(database, self.leases)
        self.registry = Registry(database, str(folder / "stored"))
        self.lease = self.leases.acquire("pipeline fresh", "me", 60.0)
        listener = SimpleNamespace(warned=lambda _: None)
        self.context = StepContext(
            load_pipeline(values),
            "digest",
            self.store,
            self.registry,
            Heartbeat(self.leases, self.lease),
            listener,  # type: ignore[arg-type]
            **options,
        )

    def steps(self, run_id: str = "r1") -> PipelineSteps:
        return PipelineSteps(self.context, run_id)

    def decided(self, run_id: str, is_passed: bool) -> dict[str, Any]:
        """A run up to its verdict, its artifact as small as can be."""
        signature = json.dumps({"inputs": [{"name": "a"}, {"name": "gone"}]}).encode()
        files = {"model.keras": run_id.encode(), "signature.json": signature}
        artifact = write_artifact(self.folder / f"artifact-{run_id}", files)
        reasons = [] if is_passed else ["mae is 30; at most 20 passes."]
        found = self.steps(run_id).discover({})
        rows = {"evaluation_sha256": "f" * 64}
        return {
            "discover": found,
            "prepare": {"rows": rows, "files": lineage_of_files(found)},
            "train": {"artifact": str(artifact)},
            "decide": {"is_passed": is_passed, "reasons": reasons, "checks": []},
        }

    def prepared(self, run_id: str = "r1") -> tuple[dict[str, Any], Job]:
        """What was prepared for a run, and its job."""
        steps = self.steps(run_id)
        result = steps.prepare({"discover": steps.discover({})})
        return result, load_job(result["job"])

    def end(self, run_id: str, is_passed: bool) -> dict[str, Any]:
        """A whole run, as far as the registry sees it."""
        done = self.decided(run_id, is_passed)
        steps = self.steps(run_id)
        self.store.begin(self.lease, "fresh", run_id, "digest", 1.0)
        self.store.record(self.lease, run_id, "discover", done["discover"], 1.0)
        done["register"] = steps.register(done)
        self.store.record(self.lease, run_id, "register", done["register"], 1.0)
        done["promote"] = steps.promote(done, lambda *_: None)
        decision, reasons = done["promote"]["decision"], done["promote"]["reasons"]
        self.store.end(self.lease, run_id, "done", decision, "\n".join(reasons), 2.0)
        return done


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_passed_candidate_becomes_champion_with_its_lineage(world: World) -> None:
    done = world.end("r1", True)
    assert done["promote"]["decision"] == "promoted"
    version = world.registry.resolve("small")
    assert version.aliases == ("candidate", "champion")
    assert version.tags == {"pipeline": "fresh", "gate": "passed"}
    seen = version.lineage["pipeline"]["files"]
    assert [file["path"] for file in seen] == world.files
    assert all(len(file["ends_sha256"]) == 64 for file in seen)
    assert version.key == "pipeline/fresh/r1"
    (move,) = world.registry.history("small", "champion")
    assert (move.who, move.why) == ("pipeline fresh", "run r1: passed 0 checks")
    again = world.steps().register(done)
    assert again["version"] == 1


def test_a_refused_candidate_is_a_version_and_no_champion(world: World) -> None:
    world.end("r1", True)
    third = write(world.folder / "in", "2.parquet")
    done = world.end("r2", False)
    assert done["discover"]["new"] == [third]
    assert done["promote"] == {"decision": "kept", "reasons": ["mae is 30; at most 20 passes."]}
    assert world.registry.resolve("small").number == 1
    refused = world.registry.version("small", 2)
    assert (refused.aliases, refused.parent) == (("candidate",), None)  # from scratch
    assert refused.lineage["gate"]["champion"] == 1
    assert [check["is_passed"] for check in refused.lineage["gate"]["checks"]] == [
        check["is_passed"] for check in done["decide"]["checks"]
    ]
    assert refused.description == "refused: mae is 30; at most 20 passes."


def test_what_was_refused_is_not_trained_again_unless_something_changed(world: World) -> None:
    world.end("r1", True)
    assert not world.steps().discover({})["is_new"]
    write(world.folder / "in", "2.parquet")
    world.end("r2", False)
    same = world.steps("r3").discover({})
    assert not same["is_new"]
    assert same["reason"] == (
        "nothing new: run r2 judged the same files and kept the champion (mae is 30; at most 20 "
        "passes.)"
    )
    write(world.folder / "in", "3.parquet")
    assert world.steps("r3").discover({})["is_new"]
    os.unlink(world.folder / "in" / "3.parquet")
    world.registry.set_alias("small", "champion", 2, who="ann", why="by hand")
    assert "no file is new" in world.steps("r3").discover({})["reason"]
    world.registry.rollback("small", who="ann", why="it was worse")
    assert not world.steps("r3").discover({})["is_new"]


TAKEN_BACK = (
    "nothing new: run {0} judged the same files; its candidate small/{1} was promoted and taken "
    "back since; --force trains anyway"
)


def test_a_rollback_is_not_undone_by_an_equal_candidate(world: World) -> None:
    world.end("r1", True)
    write(world.folder / "in", "2.parquet")
    world.end("r2", True)
    world.registry.rollback("small", who="ann", why="it was worse")
    found = world.steps("r3").discover({})
    assert (found["is_new"], found["new"]) == (False, [str(world.folder / "in/2.parquet")])
    assert found["reason"] == TAKEN_BACK.format("r2", 2)
    forced = replace(world.context, is_forced=True)
    assert PipelineSteps(forced, "r3").discover({})["is_new"]
    write(world.folder / "in", "3.parquet")
    world.end("r3", True)
    assert world.registry.resolve("small").number == 3
    world.registry.set_alias("small", "champion", 1, who="ann", why="back to the first")
    assert world.steps("r4").discover({})["reason"] == TAKEN_BACK.format("r3", 3)
    write(world.folder / "in", "4.parquet")
    assert world.steps("r4").discover({})["is_new"]


def test_a_candidate_from_another_champion_is_another_one(tmp_path: Path) -> None:
    world = World(tmp_path, start_from="champion")
    for run_id, name in (("r1", "2.parquet"), ("r2", "3.parquet"), ("r3", "4.parquet")):
        write(world.folder / "in", name)
        world.end(run_id, True)
    world.registry.set_alias("small", "champion", 1, who="ann", why="back to the first")
    assert world.steps("r4").discover({})["is_new"]
    world.registry.set_alias("small", "champion", 2, who="ann", why="back to the second")
    assert world.steps("r4").discover({})["reason"] == TAKEN_BACK.format("r3", 3)


@pytest.mark.parametrize("identity", ["time", "hash"])
def test_other_rows_that_judge_are_another_judgement(tmp_path: Path, identity: str) -> None:
    held = write(tmp_path / "held", "0.parquet")
    data = {"evaluation": {"files": str(tmp_path / "held")}, "identity": identity}
    world = World(tmp_path, data)
    world.end("r1", True)
    write(world.folder / "in", "2.parquet")
    world.end("r2", False)
    assert not world.steps("r3").discover({})["is_new"]
    write(tmp_path / "held", "0.parquet", 100)
    os.utime(held, ns=(1, 1))
    assert world.steps("r3").discover({})["is_new"]


def test_force_trains_although_nothing_is_new(tmp_path: Path) -> None:
    world = World(tmp_path, is_forced=True)
    world.end("r1", True)
    found = world.steps("r2").discover({})
    assert found["is_new"]
    assert found["reason"].startswith("forced, although nothing new")


def test_a_champion_that_was_moved_meanwhile_stays(world: World) -> None:
    world.end("r1", True)
    write(world.folder / "in", "2.parquet")
    done = world.decided("r2", True)
    world.registry.register("small", done["train"]["artifact"], key="another")
    world.registry.set_alias("small", "champion", 2, who="ann", why="by hand")
    steps = world.steps("r2")
    done["register"] = steps.register(done)
    promoted = steps.promote(done, lambda *_: None)
    assert promoted["decision"] == "kept"
    assert "somebody moved it" in promoted["reasons"][0]
    assert world.registry.resolve("small").number == 2


def test_who_lost_the_lease_moves_no_alias(world: World) -> None:
    done = world.end("r1", True)
    world.leases.acquire("pipeline fresh", "other", 60.0, lambda _: True)
    world.registry.set_alias("small", "candidate", None, who="ann", why="tidy")
    with pytest.raises(LeaseLost):
        world.steps().register(done)
    assert world.registry.version("small", 1).aliases == ("champion",)


def test_a_run_is_stale_where_what_it_goes_on_with_is_gone(world: World) -> None:
    steps = world.steps()
    assert steps.stale({}) == ""
    done: dict[str, Any] = {"discover": steps.discover({})}
    assert steps.stale(done) == ""
    write(world.folder / "in", "2.parquet")
    assert steps.stale(done) == ""  # more files do not matter to it
    os.utime(world.files[0], ns=(1, 1))
    assert steps.stale(done) == f"{world.files[0]} has changed since"
    copy = world.folder / "copy.parquet"
    copy.touch()
    rows = {"evaluation": str(copy), "train": [str(copy)]}
    assert steps.stale({**done, "prepare": {"rows": rows}}) == ""  # it reads copies
    used = {**done, "prepare": {"rows": {**rows, "train": []}}}
    assert steps.stale(used) == f"{world.files[0]} has changed since"
    lost = {**done, "prepare": {"rows": {**rows, "evaluation": "/no/file"}}}
    assert steps.stale(lost) == "/no/file is gone"
    trained = {**done, "prepare": {"rows": rows}, "train": {"artifact": "/no/artifact"}}
    assert steps.stale(trained) == "/no/artifact/manifest.json is gone"
    artifact = write_artifact(world.folder / "artifact")
    trained["train"] = {"artifact": str(artifact)}
    assert steps.stale(trained) == ""
    trained["prepare"] = {"rows": {**rows, "evaluation": "/no/file"}}
    assert steps.stale(trained) == "/no/file is gone"
    assert steps.stale({**trained, "evaluate": {}}).endswith("/trial/rows.npz is gone")
    assert steps.stale({**trained, "evaluate": {}, "decide": {}}) == ""
    assert steps.stale({**trained, "register": {}}) == ""


def rows(paths: str | list[str]) -> int:
    return sum(
        pq.read_metadata(path).num_rows for path in ([paths] * isinstance(paths, str) or paths)
    )


def test_rows_that_judge_are_parted_from_copied_rows_that_train(world: World) -> None:
    result, job = world.prepared()
    assert isinstance(job.data.test, str)
    assert rows(job.data.train) + rows(job.data.test) == 20
    assert (job.data.format, job.data.test) == ("parquet", result["rows"]["evaluation"])
    assert result["rows"]["train_rows"] == rows(job.data.train)
    again, _ = world.prepared()
    assert again["rows"] == result["rows"]  # a step that is repeated gives the same
    saved = load_job(world.folder / "runs/pipelines/fresh/r1/job.yaml")
    assert saved == job


def test_the_newest_file_judges_and_the_others_train_where_they_are(tmp_path: Path) -> None:
    world = World(tmp_path, {"evaluation": {"newest_files": 1}})
    _, job = world.prepared()
    assert job.data.train == [world.files[0]]
    assert job.data.test is not None
    assert rows(str(job.data.test)) == 10


def test_days_are_counted_back_from_the_newest_row(tmp_path: Path) -> None:
    data = {"time_column": "t", "window_days": 3, "evaluation": {"newest_days": 2}}
    world = World(tmp_path, data)
    _, job = world.prepared()
    days = pq.read_table(str(job.data.test))["t"].to_pylist()
    assert sorted({moment.day for moment in days}) == [9, 10]
    assert pq.read_table(job.data.train[0])["y"].to_pylist() == [5.0, 6.0, 7.0] * 2


def test_training_goes_on_from_a_copy_of_the_champion_on_new_rows(tmp_path: Path) -> None:
    world = World(tmp_path, {"train_on": "new", "evaluation": {"fraction": 0.2}}, "champion")
    _, first = world.prepared()
    assert first.model.file is None
    world.end("r1", True)
    write(world.folder / "in", "2.parquet", 50, 10)
    _, job = world.prepared("r2")
    assert job.model.file is not None
    assert Path(job.model.file).read_bytes() == b"r1"
    assert Path(job.model.file).with_name("signature.json").exists()
    values = [y for path in job.data.train for y in pq.read_table(path)["y"].to_pylist()]
    assert values
    assert min(values) >= 50


def test_a_report_is_written_where_the_folder_is_gone(world: World) -> None:
    done = world.end("r1", True)
    done["prepare"] |= {"training": []}
    done["train"] |= {"wall_s": 1.0, "run_folder": "/gone"}
    done["evaluate"] = {"candidate": {"metrics": {"mae": 2.0}, "slices": {}}, "champion": None}
    folder = world.folder / "runs/pipelines/fresh/r1"
    assert not folder.exists()
    assert Path(world.steps("r1").report(done)["path"]) == folder / "report.html"
    assert json.loads((folder / "decision.json").read_text())["decision"] == "promoted"


@pytest.mark.parametrize(("answer", "problem"), [("", ""), ("it answered 500", "it answered 500")])
def test_on_success_is_told_of_decisions_and_of_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, problem: str
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "lockstep.retrain_steps.post_webhook", lambda hook, body: told.append(body) or answer
    )
    world = World(tmp_path)
    assert world.steps("r0").notify({"discover": {}}) == {"problem": ""}
    assert told == []
    hook = WebhookConfig(url="http://host/hook")
    warned: list[str] = []
    context = replace(
        world.context,
        pipeline=world.context.pipeline.model_copy(update={"on_success": hook}),
        listener=SimpleNamespace(warned=warned.append),  # type: ignore[arg-type]
    )
    done = world.end("r1", True)
    done["evaluate"] = {"candidate": {"metrics": {"mae": 2.0}}}
    assert PipelineSteps(context, "r1").notify(done) == {"problem": problem}
    nothing = {"discover": PipelineSteps(context, "r2").discover({})}
    assert PipelineSteps(context, "r2").notify(nothing) == {"problem": problem}
    assert warned == [problem] * (2 if problem else 0)
    first, second = told
    assert {name: first[name] for name in ("event", "run_id", "decision", "version")} == {
        "event": "pipeline_done", "run_id": "r1", "decision": "promoted", "version": 1
    }  # fmt: skip
    assert (first["champion"], first["metrics"]) == (None, {"mae": 2.0})
    assert (second["decision"], second["version"], second["champion"]) == ("nothing_new", None, 1)
    assert "no file is new" in second["reasons"][0]
