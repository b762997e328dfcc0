"""The trial of a candidate: a process of its own that loads the artifact as a server would.

It predicts, is timed, is compared with what the training saw, and is judged beside the champion on
the same rows. The driver asks by a file and reads the answer from files, so that it needs no
TensorFlow, and a model that takes its process down takes no more.

    python -m lockstep.trial FOLDER      FOLDER holds request.json; receives trial.json, rows.npz
"""

import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf

from configs.errors import LockstepError
from lockstep.hold_trial import ANSWER, REQUEST, ROWS
from serving.errors import ModelFileError
from serving.evaluation import reason_of
from serving.predictor import Predictor, load_predictor
from serving.row_values import JudgedRows, first_difference, judge_rows
from trainer.files import write_json

FORMATS = ("model.keras", "saved_model", "trained_model.h5")

_CALLS = {1: 200, 1000: 30}
_WARM_UP = 10


def main(folder: Path) -> None:
    """Answer the request in a folder; a mistake that can be explained is an answer, too."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads((folder / REQUEST).read_text())
    try:
        answer, arrays = answer_to(request)
    except LockstepError as error:
        answer, arrays = {"error": str(error), "exit_status": error.exit_status}, {}
    with open(folder / f".{ROWS}", "wb") as file:
        np.savez(file, **arrays)
    os.replace(folder / f".{ROWS}", folder / ROWS)
    write_json(folder / ANSWER, answer)


def answer_to(request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was measured, as plain values, and the values of rows as arrays.

    Raises:
        LockstepError: The candidate cannot be judged. A champion that cannot be is told instead.
    """
    artifact = Path(request["candidate"])
    predictor = _loaded(artifact, request["has_own_code"])
    try:
        latency = _latency(predictor, request["evaluation"])
        ours = judge_rows(predictor, request["evaluation"], request["slice_rows"])
    except tf.errors.OpError as error:
        raise ModelFileError(
            f"the candidate cannot be evaluated on these rows: {reason_of(error)} Let rows judge "
            "that hold nothing that its layers and its loss cannot know, such as a class more."
        ) from error
    answer: dict[str, Any] = {
        "candidate": {"metrics": ours.metrics, "slices": ours.slices},
        "champion": None,
        "champion_problem": "",
        "latency_ms": latency,
        "size_bytes": sum(f.stat().st_size for f in artifact.rglob("*") if f.is_file()),
        "smoke": _smoke(request, artifact, predictor, ours),
        "rows": len(ours.predictions),
        "groups": {column: values for column, (values, _) in ours.groups.items()},
        "shapes": {name: row.shape for name, row in ours.rows.items()},
        "weighted": sorted(name for name, row in ours.rows.items() if row.is_weighted),
    }
    arrays: dict[str, Any] = {f"candidate/{name}": row.values for name, row in ours.rows.items()}
    arrays |= {f"codes/{column}": codes for column, (_, codes) in ours.groups.items()}
    if ours.weights is not None:
        arrays["weights"] = ours.weights
    if request["champion"] is not None:
        try:
            theirs = _champion(request, predictor)
            answer["champion"] = {"metrics": theirs.metrics, "slices": theirs.slices}
            arrays |= {f"champion/{name}": row.values for name, row in theirs.rows.items()}
        except (LockstepError, tf.errors.OpError) as error:
            reason = reason_of(error) if isinstance(error, tf.errors.OpError) else error
            answer["champion_problem"] = (
                f"{request['champion_name']} cannot be evaluated on these rows: {reason}"
            )
    return answer, arrays


def _champion(request: dict[str, Any], candidate: Predictor) -> JudgedRows:
    """The champion, judged by the candidate's loss and metrics."""
    champion = _loaded(Path(request["champion"]), request["has_own_code"])
    judged_alike = champion.judged_by(candidate.signature.compile)
    label = candidate.signature.layout.label
    return judge_rows(judged_alike, request["evaluation"], request["slice_rows"], label)


def _loaded(artifact: Path, has_own_code: bool) -> Predictor:
    """The model as a server loads it; with layers of the user's own it is the SavedModel that can.

    Raises:
        ModelFileError: It cannot be loaded.
    """
    saved_model = artifact / FORMATS[1]
    return load_predictor(saved_model if has_own_code and saved_model.exists() else artifact)


def _latency(predictor: Predictor, evaluation: str) -> dict[str, float]:
    """Median milliseconds of a call, before anything else has warmed the process up."""
    batch = next(pq.ParquetFile(evaluation).iter_batches(1_000))
    rows = {
        name: batch.column(name).to_pylist() if isinstance(wanted, str) else _numbers(batch, name)
        for name, wanted in predictor.signature.inputs.items()
    }
    medians = {}
    for count, calls in _CALLS.items():
        columns = {name: _repeated(values, count) for name, values in rows.items()}
        times = []
        for call in range(_WARM_UP + calls):
            start = time.perf_counter()
            predictor.predict(columns)
            if call >= _WARM_UP:
                times.append(1_000 * (time.perf_counter() - start))
        medians["one_row_ms" if count == 1 else "thousand_rows_ms"] = statistics.median(times)
    return medians


def _numbers(batch: Any, name: str) -> Any:
    return np.asarray(batch.column(name).to_pylist())


def _repeated(values: Any, count: int) -> Any:
    copies = -(-count // len(values))
    if isinstance(values, list):
        return (values * copies)[:count]
    return np.concatenate([values] * copies)[:count]


def _smoke(
    request: dict[str, Any], artifact: Path, predictor: Predictor, judged: JudgedRows
) -> list[str]:
    """What is wrong with the artifact: formats that differ, metrics that training did not see."""
    tolerance, count = request["tolerance"], request["smoke_rows"]
    ours = judged.predictions[:count]
    problems = [first_difference(FORMATS[0], judged.predictions, judged.predictions, tolerance)]
    batch = next(pq.ParquetFile(request["evaluation"]).iter_batches(count))
    inputs = predictor.signature.inputs
    columns = {
        name: batch.column(name).to_pylist() if isinstance(wanted, str) else _numbers(batch, name)
        for name, wanted in inputs.items()
    }
    for name in FORMATS[1:]:
        if not (artifact / name).exists():
            continue
        try:
            theirs = load_predictor(artifact / name).predict(columns)
        except (LockstepError, tf.errors.OpError) as error:
            if not request["has_own_code"]:
                problems.append(f"{name} cannot be served: {error}")
            continue
        problems.append(first_difference(name, ours[: len(theirs)], theirs, tolerance))
    penalty = float((predictor.signature.compile or {}).get("weight_penalty") or 0.0)
    trained = {name: value for name, value in request["trained"].items() if value is not None}
    # Penalties on activations are in the training's loss alone: other metrics tell more surely.
    names = [name for name in trained if name != "loss" and name in judged.metrics] or ["loss"]
    for name in names:
        if name in trained and name in judged.metrics:
            found = judged.metrics[name] + (penalty if name == "loss" else 0.0)
            allowed = tolerance * max(abs(trained[name]), 1e-3)
            if not abs(found - trained[name]) <= allowed:
                problems.append(
                    f"{name} of the exported artifact is {found:.6g}, the training's own "
                    f"evaluation of the same rows gave {trained[name]:.6g}"
                )
    return [problem for problem in problems if problem]


def _end_with_parent() -> None:
    """The driver holds the other end of standard input; the kernel closes it when it dies."""
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
