"""What a predictor does: plan a job, or compute one shard of it.

Runs in a process of its own (`cluster.station`), which may be lost with all that it holds: what a
shard gives stands under a hidden name until the dispatcher takes it. Models are loaded when a task
needs them, and the least recently used leave when they take more memory than they may.

Tasks and answers are plain values. An answer tells a failure by code and message, whether it may be
tried again, and the seconds of compute in any case.
"""

import gc
import time
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster.template import resolve
from configs.errors import EnvironmentFailure, UserError
from data_pipeline.tables import Wanted
from serving.batch_output import OutputSpec, PartWriter
from serving.batch_plan import PlanRequest, make_plan
from serving.batch_rows import read_chunks, read_source
from serving.errors import RequestError
from serving.openai_lines import LineProblems
from serving.row_predictor import RowModel, predict_chunk
from serving.shards import read_shard

LOADER = "serving.predictor:load_predictor"
_ROW_OVERHEAD_S = 1e-7  # reading and writing, beside the model


class BatchWorker:
    """A predictor of batch jobs. Used by one thread.

    Args:
        loader: `module:function` that gives a `RowModel` for an artifact's folder.
        models_bytes: Memory that loaded models may take; the one in use always stays.
    """

    def __init__(self, loader: str = LOADER, models_bytes: int = 2 * 2**30) -> None:
        self._loader = loader
        self._models_bytes = models_bytes
        self._models: OrderedDict[str, tuple[RowModel, int]] = OrderedDict()

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Work off a task of kind "plan" or "shard"; never raises for what is wrong with a job.

        Returns:
            `seconds` of compute, the `loaded` models, and either `error` (`code`, `message`,
            `line`, `column`, `is_retryable`, `problems`) or what the task gives.
        """
        started = time.perf_counter()
        try:
            model = self._model(task["model"], task["artifact"])
            answer = self._plan(task, model) if task["kind"] == "plan" else _shard(task, model)
        except (UserError, EnvironmentFailure, OSError, MemoryError) as error:
            answer = {"error": _described(error)}
        seconds = time.perf_counter() - started
        return {**answer, "seconds": seconds, "loaded": list(self._models)}

    def _plan(self, task: dict[str, Any], model: RowModel) -> dict[str, Any]:
        values = dict(task["request"])
        for name in ("inputs", "allowed", "keep"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        s_a_row = task["s_a_row"] or _measured(model)
        request, inputs = PlanRequest(**values), model.signature.inputs
        plan = make_plan(request, inputs, model.batch_rows, s_a_row)
        return {
            "s_a_row": s_a_row,
            "rows": plan.rows,
            "source": plan.source.as_record(),
            "output_format": plan.output_format,
            "digests": list(plan.digests),
            "shards": [shard.as_record() for shard in plan.shards],
            "output_shape": list(model.signature.output_shape),
        }

    def _model(self, name: str, artifact: str) -> RowModel:
        if name in self._models:
            self._models.move_to_end(name)
            return self._models[name][0]
        before = _resident_bytes()
        model: RowModel = resolve(self._loader)(artifact)
        model.predict(_example(model.signature.inputs, 1))  # what is compiled counts too
        self._models[name] = (model, max(0, _resident_bytes() - before))
        while len(self._models) > 1 and self._held_bytes() > self._models_bytes:
            self._models.popitem(last=False)
            gc.collect()
        return model

    def _held_bytes(self) -> int:
        return sum(size for _, size in self._models.values())


def _shard(task: dict[str, Any], model: RowModel) -> dict[str, Any]:
    """Predict a shard and write its files under the attempt's names."""
    spec = OutputSpec(**task["output"])
    shard = read_shard(task["shard"], task["record"])
    writer = PartWriter(spec, shard.number, task["epoch"])
    bad_rows, files = 0, None
    try:
        for chunk in read_chunks(read_source(task["source"]), shard):
            values, chunk = predict_chunk(model, chunk)
            bad_rows += len(chunk.errors)
            writer.write(chunk, values)
        files = writer.finish()
    finally:
        if files is None:
            writer.discard()
    return {"files": [asdict(file) for file in files], "rows": shard.rows, "bad_rows": bad_rows}


def _measured(model: RowModel) -> float:
    """Seconds a row of the model's largest call, and of what goes around it."""
    rows = model.batch_rows[-1]
    columns = _example(model.signature.inputs, rows)
    model.predict(columns)
    started = time.perf_counter()
    model.predict(columns)
    return (time.perf_counter() - started) / rows + _ROW_OVERHEAD_S


def _example(wanted: Wanted, rows: int) -> dict[str, Any]:
    """Columns that any model takes: zeros, and texts that are empty."""
    found: dict[str, Any] = {}
    for name, kind in wanted.items():
        if isinstance(kind, str):
            is_text = kind == "string"
            found[name] = np.full(rows, "", object) if is_text else np.zeros(rows, np.int64)
        else:
            found[name] = np.zeros((rows, *kind), np.float32)
    return found


def _described(error: BaseException) -> dict[str, Any]:
    is_retryable = not isinstance(error, UserError)
    code = "environment_failure" if is_retryable else "invalid_input"
    found: dict[str, Any] = {"code": code, "line": None, "column": None, "problems": []}
    if isinstance(error, RequestError):
        found["code"] = error.code
        found["line"] = getattr(error, "line", None)
        found["column"] = getattr(error, "column", None)
    if isinstance(error, LineProblems):
        found["problems"] = list(error.problems)
    return {**found, "message": str(error), "is_retryable": is_retryable}


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096
