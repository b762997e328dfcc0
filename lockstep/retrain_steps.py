"""The steps of a pipeline's run as they are on real data, models and machines.

Each is safe to repeat (`trainer.retrain` says when): files appear whole or not at all in the run's
folder, training goes on from its checkpoints, a version is registered by the run's key.

    runs/pipelines/<pipeline>/<run_id>/
        rows/            the rows that judge, and copied training rows until the decision
        champion/        the model that training goes on from
        trial/           what was measured
        decision.json    verdict and reasons
        report.html
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import EnvironmentFailure
from configs.load import dump_job, load_job
from configs.pipeline import Pipeline
from configs.schema import Job, ModelConfig
from data_pipeline.errors import DataError
from data_pipeline.frozen import freeze_rows, frozen_record
from data_pipeline.ingest import ingested
from data_pipeline.inventory import file_sha256, read_inventory
from lockstep import api
from lockstep.follow import Listener
from lockstep.hold_trial import ROWS, evidence_of, has_own_code, hold_trial, input_columns
from lockstep.pipeline_past import inputs_of, judged_already, seen_by
from lockstep.pipeline_rows import (
    check_slices,
    files_now,
    lineage_of_files,
    look_for_news,
    roles_of_files,
    rules_for_rows,
)
from lockstep.registration import code_state
from lockstep.train_once import train_once
from lockstep.webhooks import post_webhook
from registry.errors import AliasConflict, RegistryError
from registry.leases import Heartbeat
from registry.pipelines import PipelineStore, Result
from registry.references import CHAMPION
from registry.store import Registry, Version
from trainer.files import write_json, write_text
from trainer.gate import judge
from trainer.retrain import Commit, Done
from trainer.retrain_report import write_retrain_report

CANDIDATE = "candidate"
_MODEL_FILES = ("model.keras", "signature.json")


@dataclass(frozen=True)
class StepContext:
    """What the steps of all runs of a pipeline share.

    Attributes:
        pipeline: The pipeline.
        digest: Of all in it that a decision depends on.
        store: The memory of runs.
        registry: Where models are.
        heartbeat: Of the lease.
        listener: Is told of the training.
        is_forced: Train even where nothing is new.
        address: A Ray cluster to join.
        is_verbose: Show what TensorFlow and Ray log.
    """

    pipeline: Pipeline
    digest: str
    store: PipelineStore
    registry: Registry
    heartbeat: Heartbeat
    listener: Listener
    is_forced: bool = False
    address: str | None = None
    is_verbose: bool = False


class PipelineSteps:
    """The steps of one run; see `trainer.retrain.Steps`."""

    def __init__(self, context: StepContext, run_id: str) -> None:
        self._context = context
        self._pipeline = context.pipeline
        self._run_id = run_id
        root = Path(context.pipeline.runs_dir).absolute()
        self._folder = root / "pipelines" / context.pipeline.name / run_id

    def stale(self, done: Done) -> str:
        """Files that a run began with may be others by now, or its folder may be gone."""
        if "register" in done or "discover" not in done:
            return ""
        gone = [path for path in self._needed(done) if not path.exists()]
        if gone:
            return f"{gone[0]} is gone"
        if "train" in done or ("prepare" in done and done["prepare"]["rows"]["train"]):
            return ""  # no file that it began with is read any more
        recorded = read_inventory(done["discover"]["files"])
        try:
            now = files_now(self._pipeline, recorded)
        except DataError as error:
            return str(error)
        others = [p for p, i in recorded.items() if p not in now or not i.is_same(now[p])]
        return f"{others[0]} has changed since" if others else ""

    def discover(self, done: Done) -> Result:
        """Files now, against those that the champion's run saw."""
        champion = self._champion()
        store, pipeline = self._context.store, self._pipeline
        found = look_for_news(pipeline, champion, seen_by(store, pipeline, champion))
        number = None if champion is None else champion.number
        found |= inputs_of(pipeline, self._context.digest, number, found)
        if found["is_new"] and (earlier := judged_already(store, pipeline, found)):
            found |= {"is_new": False, "reason": earlier}
        if not found["is_new"] and self._context.is_forced:
            found |= {"is_new": True, "reason": f"forced, although {found['reason']}"}
        digest = None if champion is None else champion.digest
        return {
            **found,
            "champion": number,
            "champion_digest": digest,
            "folder": str(self._folder),
        }

    def prepare(self, done: Done) -> Result:
        """Freeze the rows that judge, choose those that train, and settle the job."""
        data, job, found = self._pipeline.data, self._pipeline.job, done["discover"]
        self._folder.mkdir(parents=True, exist_ok=True)
        judging, training = roles_of_files(self._pipeline, found)
        champion = self._champion_of(found)
        rows = freeze_rows(
            job.data,
            rules_for_rows(self._pipeline, found),
            judging,
            training,
            self._folder / "rows",
            extra=[each.column for each in self._pipeline.gate.slices],
            wished=[] if champion is None else input_columns(self._artifact_of(champion)),
            max_rows=data.evaluation.max_rows,
        )
        check_slices(rows.evaluation, [each.column for each in self._pipeline.gate.slices])
        train = rows.train or ingested("train", training, job.data)
        settled = self._settled(job, train, rows.evaluation, champion)
        write_text(self._folder / "job.yaml", dump_job(settled))
        return {
            "rows": dict(frozen_record(rows)),
            "files": lineage_of_files(found),
            "judging": judging,
            "training": training,
            "job": settled.model_dump(mode="json"),
        }

    def train(self, done: Done) -> Result:
        """Train, go on with what an earlier process began, or take what it ended."""
        job = load_job(done["prepare"]["job"])
        context = self._context
        options = api.TrainOptions(
            run_id=self._run_id, address=context.address, is_verbose=context.is_verbose
        )
        run = train_once(job, options, context.listener, context.heartbeat)
        manifest = json.loads((run.artifact / "manifest.json").read_text())
        return {
            "run_folder": str(run.folder),
            "artifact": str(run.artifact),
            "digest": manifest["digest"],
            "metrics": run.metrics,
            "wall_s": run.summary["wall_s"],
        }

    def evaluate(self, done: Done) -> Result:
        """Measure candidate and champion in a process of their own."""
        rows = done["prepare"]["rows"]
        if file_sha256(rows["evaluation"]) != rows["evaluation_sha256"]:
            raise EnvironmentFailure(
                f"{rows['evaluation']} is not what was frozen. Begin anew with --fresh."
            )
        champion, gate = self._champion_of(done["discover"]), self._pipeline.gate
        request = {
            "candidate": done["train"]["artifact"],
            "champion": None if champion is None else str(self._artifact_of(champion)),
            "champion_name": str(champion),
            "evaluation": rows["evaluation"],
            "slice_rows": {each.column: each.min_rows for each in gate.slices},
            "smoke_rows": gate.smoke.rows,
            "tolerance": gate.smoke.tolerance,
            "has_own_code": has_own_code(self._pipeline.job),
            "trained": done["train"]["metrics"].get("test", {}),
        }
        return hold_trial(self._folder / "trial", request)

    def decide(self, done: Done) -> Result:
        """The verdict, from what was measured alone."""
        found = done["discover"]["champion"]
        name = f"{self._pipeline.model_name}/{found}"
        evidence = evidence_of(self._folder / "trial", done["evaluate"], name)
        verdict = judge(self._pipeline.gate, evidence)
        checks = [{**vars(check), "numbers": dict(check.numbers)} for check in verdict.checks]
        is_passed = verdict.is_passed
        return {"is_passed": is_passed, "reasons": list(verdict.reasons), "checks": checks}

    def register(self, done: Done) -> Result:
        """The candidate becomes a version, one a run, and is the alias `candidate`."""
        registry, name = self._context.registry, self._pipeline.model_name
        artifact = Path(done["train"]["artifact"])
        lineage = json.loads((artifact / "manifest.json").read_text())["lineage"]
        found, decided = done["discover"], done["decide"]
        parent = found["champion"] if self._pipeline.start_from == "champion" else None
        verdict = "passed" if decided["is_passed"] else "refused"
        version = registry.register(
            name,
            artifact,
            lineage={
                **lineage,
                "code": code_state(Path.cwd()),
                "pipeline": {
                    "name": self._pipeline.name,
                    "run_id": self._run_id,
                    "files": done["prepare"]["files"],
                    "newest_us": found["newest_us"],
                },
                "evaluation": done["prepare"]["rows"]["evaluation_sha256"],
                "gate": {**decided, "champion": found["champion"]},
            },
            description=_described(decided["reasons"]),
            tags={"pipeline": self._pipeline.name, "gate": verdict},
            parent=parent,
            key=f"pipeline/{self._pipeline.name}/{self._run_id}",
        )
        leases, lease = self._context.heartbeat.leases, self._context.heartbeat.lease
        registry.set_alias(
            name,
            CANDIDATE,
            version.number,
            who=f"pipeline {self._pipeline.name}",
            why=f"run {self._run_id}",
            guard=lambda connection: leases.check(connection, lease),
        )
        return {"version": version.number, "artifact": version.artifact}

    def promote(self, done: Done, commit: Commit) -> Result:
        """Move the champion, if it is still the one that the candidate was held against."""
        decided, found = done["decide"], done["discover"]
        if not decided["is_passed"]:
            return {"decision": "kept", "reasons": decided["reasons"]}
        registry = self._context.registry
        name, number = self._pipeline.model_name, done["register"]["version"]
        registry.require_intact(registry.version(name, number))
        if found["champion"] is None:
            reason = f"{name}/{number} is the first champion"
        else:
            reason = f"{name}/{number} took the place of {name}/{found['champion']}"
        checks = sum(check["is_passed"] is True for check in decided["checks"])
        result = {"decision": "promoted", "reasons": [f"{reason}: it passed {checks} checks."]}
        try:
            registry.set_alias(
                name,
                CHAMPION,
                number,
                who=f"pipeline {self._pipeline.name}",
                why=f"run {self._run_id}: passed {checks} checks",
                expected=found["champion"],
                guard=lambda connection: commit(connection, result),
            )
        except AliasConflict as error:
            return {"decision": "kept", "reasons": [f"not promoted: {error}"]}
        return result

    def report(self, done: Done) -> Result:
        """Write decision.json and report.html; copied training rows have done their work."""
        record = {
            "pipeline": self._pipeline.name,
            "run_id": self._run_id,
            "model": self._pipeline.model_name,
            "version": done["register"]["version"],
            "champion": done["discover"]["champion"],
            **done["promote"],
            "checks": done["decide"]["checks"],
            "trial": done["evaluate"],
            "rows": done["prepare"]["rows"],
            "training_files": len(done["prepare"]["training"]),
            "new_files": done["discover"]["new"],
            "wall_s": done["train"]["wall_s"],
            "run_folder": done["train"]["run_folder"],
        }
        self._folder.mkdir(parents=True, exist_ok=True)  # it may be gone: nothing else needs it
        write_json(self._folder / "decision.json", record)
        path = write_retrain_report(self._folder)
        shutil.rmtree(self._folder / "rows" / "train", ignore_errors=True)
        shutil.rmtree(self._folder / "champion", ignore_errors=True)
        return {"path": str(path)}

    def notify(self, done: Done) -> Result:
        """Call the webhook; the pipeline does not depend on it."""
        if self._pipeline.on_success is None:
            return {"problem": ""}
        found = done["discover"]
        ending = done.get("promote", {"decision": "nothing_new", "reasons": [found["reason"]]})
        body = {
            "event": "pipeline_done",
            "pipeline": self._pipeline.name,
            "model": self._pipeline.model_name,
            "run_id": self._run_id,
            **ending,
            "version": done.get("register", {}).get("version"),
            "champion": found["champion"],
            "metrics": done.get("evaluate", {}).get("candidate", {}).get("metrics", {}),
        }
        problem = post_webhook(self._pipeline.on_success, body)
        if problem:
            self._context.listener.warned(problem)
        return {"problem": problem}

    def _needed(self, done: Done) -> list[Path]:
        """What earlier steps wrote and later ones read."""
        if "decide" in done:
            return [Path(done["train"]["artifact"]) / "manifest.json"]
        if "evaluate" in done:
            manifest = Path(done["train"]["artifact"]) / "manifest.json"
            return [manifest, self._folder / "trial" / ROWS]
        if "prepare" not in done:
            return []
        rows = done["prepare"]["rows"]
        if "train" in done:
            return [Path(done["train"]["artifact"]) / "manifest.json", Path(rows["evaluation"])]
        return [Path(path) for path in (rows["evaluation"], *rows["train"])]

    def _champion(self) -> Version | None:
        with contextlib.suppress(RegistryError):
            return self._context.registry.resolve(f"{self._pipeline.model_name}@{CHAMPION}")
        return None

    def _champion_of(self, found: Result) -> Version | None:
        """The champion that the run began with."""
        number = found["champion"]
        if number is None:
            return None
        return self._context.registry.version(self._pipeline.model_name, number)

    def _artifact_of(self, version: Version) -> Path:
        return self._context.registry.fetch(version)

    def _settled(
        self, job: Job, train: str | Sequence[str], evaluation: str, champion: Version | None
    ) -> Job:
        """The job with its files, and with the champion's weights where they are asked for."""
        paths = train if isinstance(train, str) else list(train)
        files = {"train": paths, "test": evaluation, "format": "parquet"}
        update: dict[str, Any] = {
            "data": job.data.model_copy(update=files),
            "export": job.export.model_copy(update={"register": None}),  # a later step does
        }
        if self._pipeline.start_from == "champion" and champion is not None:
            update["model"] = ModelConfig(file=str(self._copy_of(champion)))
        return load_job(job.model_copy(update=update))

    def _copy_of(self, champion: Version) -> Path:
        """The champion's Keras file in the run's folder: a run that goes on finds the same one."""
        artifact = self._artifact_of(champion)
        if not (artifact / _MODEL_FILES[0]).exists():
            raise RegistryError(
                f"start_from: champion needs a {_MODEL_FILES[0]}, which {champion} does not have. "
                "Set start_from: scratch, or promote a version that `lockstep train` made."
            )
        copies = self._folder / "champion"
        copies.mkdir(exist_ok=True)
        for name in _MODEL_FILES:
            if (artifact / name).exists():
                shutil.copyfile(artifact / name, copies / name)
        return copies / _MODEL_FILES[0]


def _described(reasons: Sequence[str]) -> str:
    return "passed the gate" if not reasons else f"refused: {reasons[0]}"
