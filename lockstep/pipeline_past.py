"""What earlier runs of a pipeline know: what the champion's run saw, and what was judged already.

A run that would come to a decision that was made before is not worth training for, and must not
undo what somebody did about that decision.
"""

import hashlib
import json
from typing import Any

from configs.pipeline import Pipeline
from registry.pipelines import PipelineRun, PipelineStore, Result
from registry.store import Version


def seen_by(store: PipelineStore, pipeline: Pipeline, champion: Version | None) -> Result | None:
    """What the champion's run found, if it was one of this pipeline."""
    origin = {} if champion is None else champion.lineage.get("pipeline") or {}
    if origin.get("name") != pipeline.name:
        return None
    return store.result(origin["run_id"], "discover")


def inputs_of(pipeline: Pipeline, digest: str, champion: int | None, found: Result) -> Result:
    """Digests of all that a decision depends on: `inputs`, and of its candidate: `learned`.

    Args:
        pipeline: The pipeline.
        digest: Of its file.
        champion: Number of the version that a candidate is held against.
        found: What `look_for_news` found.
    """
    rows = [digest, found["files"], found["held_out"]]
    inputs = digest_of([*rows, champion])
    # Neither the champion's weights nor its watermark reach a candidate from scratch on all rows.
    is_alike = pipeline.start_from == "scratch" and pipeline.data.train_on == "all"
    return {"inputs": inputs, "learned": digest_of(rows) if is_alike else inputs}


def judged_already(store: PipelineStore, pipeline: Pipeline, found: Result) -> str:
    """Why training would lead nowhere, or nothing.

    The newest candidate was refused for the very same inputs; or one equal to the newest that was
    promoted would be trained, and somebody has moved the champion from it since.
    """
    judged = [run for run in store.runs(pipeline.name, "done") if run.decision != "nothing_new"]
    for run in judged[:1]:
        if run.decision == "kept" and _found(store, run).get("inputs") == found["inputs"]:
            said = run.said.partition("\n")[0]
            return (
                f"nothing new: run {run.run_id} judged the same files and kept the champion "
                f"({said})"
            )
    for run in [run for run in judged if run.decision == "promoted"][:1]:
        if _found(store, run).get("learned") == found["learned"]:
            return _taken_back(store, pipeline, run)
    return ""


def _found(store: PipelineStore, run: PipelineRun) -> Result:
    return store.result(run.run_id, "discover") or {}


def _taken_back(store: PipelineStore, pipeline: Pipeline, run: PipelineRun) -> str:
    registered = store.result(run.run_id, "register") or {}
    candidate = f"{pipeline.model_name}/{registered.get('version', '?')}"
    return (
        f"nothing new: run {run.run_id} judged the same files; its candidate {candidate} was "
        "promoted and taken back since; --force trains anyway"
    )


def digest_of(value: Any) -> str:
    """SHA-256 of plain values, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
