"""The driver's side of `lockstep.trial`: starts the process, and reads its answer as evidence."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from configs.catalog import is_own_code, split_spec
from configs.errors import EnvironmentFailure, UserError
from configs.schema import Job
from trainer.files import write_json
from trainer.gate import Evidence, Judged, SliceRows

REQUEST, ANSWER, ROWS = "request.json", "trial.json", "rows.npz"
_TIMEOUT_S = 3600.0
_USERS_MISTAKE = 2


def hold_trial(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Have the request answered in a process of its own; returns what it has measured.

    Values of rows stay in the folder, for `evidence_of`.

    Raises:
        UserError: A mistake in the pipeline that only the rows tell.
        EnvironmentFailure: The process died, or did not end in an hour.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / REQUEST, request)
    log = folder / "log.txt"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lockstep.trial", str(folder)],
            stdin=subprocess.PIPE,  # held open: its end is the driver's
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is the driver's
        )
        try:
            status = process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise EnvironmentFailure(
                f"the trial of {request['candidate']} did not end within {_TIMEOUT_S:g} s; see "
                f"{log}. Let fewer rows judge, or run again."
            ) from None
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
    if not (folder / ANSWER).exists():
        tail = log.read_text(errors="replace")[-2000:]
        raise EnvironmentFailure(
            f"the trial of {request['candidate']} ended with status {status} and no answer:\n{tail}"
        )
    answer: dict[str, Any] = json.loads((folder / ANSWER).read_text())
    if "error" in answer:
        kind = UserError if answer["exit_status"] == _USERS_MISTAKE else EnvironmentFailure
        raise kind(answer["error"])
    return answer


def evidence_of(folder: Path, answer: dict[str, Any], champion_name: str) -> Evidence:
    """What a trial has measured, for the gate.

    Raises:
        EnvironmentFailure: The values of the rows are gone.
    """
    try:
        with np.load(folder / ROWS) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError) as error:
        raise EnvironmentFailure(
            f"{folder / ROWS} cannot be read: {error}. Begin anew with --fresh."
        ) from error
    judged = {
        role: Judged(
            name,
            answer[role]["metrics"],
            answer[role]["slices"],
            {
                key.removeprefix(f"{role}/"): values
                for key, values in arrays.items()
                if key.startswith(f"{role}/")
            },
        )
        for role, name in (("candidate", "the candidate"), ("champion", champion_name))
        if answer[role] is not None
    }
    return Evidence(
        judged["candidate"],
        judged.get("champion"),
        answer["champion_problem"],
        arrays.get("weights"),
        frozenset(answer["weighted"]),
        answer["shapes"],
        {
            column: SliceRows(tuple(values), arrays[f"codes/{column}"])
            for column, values in answer["groups"].items()
        },
        answer["latency_ms"],
        answer["size_bytes"],
        answer["smoke"],
    )


def has_own_code(job: Job) -> bool:
    """Whether the model may have layers that Keras does not know."""
    layers = [split_spec(spec)[0] for spec in job.model.layers or []]
    return job.model.layers is None or any(is_own_code(name) for name in layers)


def input_columns(artifact: Path) -> list[str]:
    """Columns that a model of the registry needs to be judged."""
    signature = artifact / "signature.json"
    if not signature.exists():
        return []
    record = json.loads(signature.read_text())
    return [entry["name"] for entry in record["inputs"]]
