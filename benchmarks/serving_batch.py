"""Batch prediction, Parquet to Parquet, beside Ray Data and beside the compiled function alone.

`benchmarks.serving` puts these rows into its report. Each peer runs in a process of its own,
`python -m benchmarks.serving_batch PEER JSON`.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import (
    LookOut,
    Peer,
    Reading,
    Row,
    Target,
    measure,
    ratio,
    ratio_of_medians,
    run_fresh,
)

ROWS = 4_000_000
GROUP_ROWS = 100_000
FEATURES = tuple(f"x{n}" for n in range(9))

SERVICE = "batch, Lockstep"
SERVICE_ALL = "batch, Lockstep, all columns kept"
RAY = "batch, Ray Data map_batches + model.predict"
RAY_RUN = "batch, Ray Data, without its start"
FUNCTION = "batch, compiled function on arrays in memory"

ABOUT = (
    "Batch: the 9-32-128-1 network over 4 million rows of 9 float32 columns and an int64 key, "
    "Parquet (row groups of 100,000, snappy) to Parquet, on the whole machine. Lockstep: a job of "
    "a running service with a SQLite database, from its submission to `completed`, planning, "
    "commits, hashes and manifest included; one predictor a CPU, the model loaded, as in a "
    "service that is up. Ray Data: `read_parquet`, `map_batches` with an actor a CPU that calls "
    "`model.predict(batch_size=1024)`, `write_parquet`; its actors are started for the job, which "
    "is its way, so its row has that in it; the row below leaves it out, and the target is held "
    "against that one: both are up then. The function alone: one "
    "process, all cores, calls of 65,536 rows of one array, nothing read or written.",
)
_BARS = (
    ("batch: Lockstep to Ray Data with its start", SERVICE, RAY, None),
    ("batch: Lockstep to Ray Data", SERVICE, RAY_RUN, 8.0),
    ("batch: Lockstep to the function alone", SERVICE, FUNCTION, 0.5),
)
_TIMEOUT_S = 900.0
_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
_FOLDER = Path("build/bench-serving-batch")


def batch_peers(is_quick: bool) -> list[Peer]:
    """Everything that is timed."""
    options = {"rows": 400_000 if is_quick else ROWS}
    return [
        _peer(SERVICE, "service", options),
        _peer(SERVICE_ALL, "service", {**options, "keep": "all"}),
        _peer(RAY, "ray", options),
        _peer(RAY_RUN, "ray", {**options, "is_warm": True}),
        _peer(FUNCTION, "function", options),
    ]


def batch_results(rows: dict[str, Row]) -> tuple[list[Row], list[Target]]:
    """Ratios by repeat, and targets held against medians."""
    ratios, targets = [], []
    for name, above, below, target in _BARS:
        ratios.append(ratio(name, rows, above, below))
        if target is not None:
            targets.append(Target(name, ratio_of_medians(rows, above, below), target))
    return ratios, targets


def batch_rows(
    is_quick: bool, repeats: int, look_out: LookOut
) -> tuple[dict[str, Row], list[Row], list[Target]]:
    """Measure all peers: rows by name, ratios, targets."""
    prepare(is_quick)
    rows = measure(batch_peers(is_quick), repeats, look_out, retries=0 if is_quick else 2)
    return (rows, *batch_results(rows))


def prepare(is_quick: bool = False) -> None:
    """Write rows and artifact, where they are not there."""
    options = {"rows": 400_000 if is_quick else ROWS}
    run_fresh([("benchmarks.serving_batch", "files", json.dumps(options))], [_ENVIRONMENT], 600.0)


def _peer(name: str, program: str, options: dict[str, Any]) -> Peer:
    def read() -> Reading:
        command = ("benchmarks.serving_batch", program, json.dumps(options))
        said = run_fresh([command], [_ENVIRONMENT], _TIMEOUT_S)
        return Reading(said["rows"] / said["seconds"], said["begin_s"], said["end_s"])

    return Peer(name, "rows/s", read)


# -- the programs ----------------------------------------------------------------------------------


def _input(rows: int) -> Path:
    return (_FOLDER / f"rows-{rows}.parquet").absolute()


def run_files(options: dict[str, Any]) -> dict[str, Any]:
    """The input, and the artifact of the network."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _FOLDER.mkdir(parents=True, exist_ok=True)
    path = _input(options["rows"])
    if not path.exists():
        generator = np.random.default_rng(3)
        count = options["rows"]
        columns = {name: generator.standard_normal(count, np.float32) for name in FEATURES}
        table = pa.table({"id": np.arange(count), **columns})
        pq.write_table(table, path.with_suffix(".partial"), row_group_size=GROUP_ROWS)
        path.with_suffix(".partial").rename(path)
    if not (_FOLDER / "artifact" / "manifest.json").exists():
        from tests.support.batch_models import write_mlp

        shutil.rmtree(_FOLDER / "artifact", ignore_errors=True)
        write_mlp(_FOLDER / "artifact")
    return {}


def run_service(options: dict[str, Any]) -> dict[str, Any]:
    """One job of a service that is up; a small job before has the model loaded everywhere."""
    from registry.database import Database
    from registry.store import Registry
    from serving.accounts import Accounts
    from serving.batch_process import ProcessConfig, make_batches

    path = _input(options["rows"])
    with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
        home = Path(folder).absolute()
        cpus = os.cpu_count() or 1
        config = ProcessConfig(
            database=f"sqlite:///{home}/lockstep.db",
            artifacts=f"{home}/artifacts",
            service={"folder": f"{home}/service"},
            runner={"min_predictors": cpus, "max_predictors": cpus, "refresh_s": 0.05},
        )
        database = Database(config.database)
        registry = Registry(database, config.artifacts)
        version = registry.register("mlp", _FOLDER / "artifact")
        registry.set_alias("mlp", "champion", version.number, who="bench", why="bench")
        accounts = Accounts(database)
        accounts.add("bench", who="bench")
        accounts.allow_input("bench", str(path.parent), who="bench")
        account = accounts.account("bench")
        service, runner = make_batches(config)
        request = {"model": "mlp", "input": str(path), "keep": options.get("keep", "keys")}

        def done(values: dict[str, Any]) -> Any:
            job, _ = service.submit(account, values)
            while job.is_active:
                runner.step(0.05)
                job = service.job(account, job.id)
            assert job.status == "completed", job.problems
            assert (job.row_done, job.row_bad) == (options["rows"], 0)
            return job

        runner.begin()
        done({**request, "shard_rows": 65_536})  # every predictor has the model
        begin_s, begin = time.time(), time.perf_counter()
        done(request)
        seconds, end_s = time.perf_counter() - begin, time.time()
        runner.end(5.0)
    return {"rows": options["rows"], "seconds": seconds, "begin_s": begin_s, "end_s": end_s}


def run_ray(options: dict[str, Any]) -> dict[str, Any]:
    """Ray Data with `model.predict`, one actor a CPU; `is_warm`: less what a tiny job takes."""
    import ray

    cpus = os.cpu_count() or 1
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False

    artifact = str((_FOLDER / "artifact" / "model.keras").absolute())

    class Predict:
        def __init__(self) -> None:
            import keras

            self.model = keras.saving.load_model(artifact, compile=False)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            values = np.stack([batch[name] for name in FEATURES], 1)
            predicted = self.model.predict(values, batch_size=1024, verbose=0)
            return {"id": batch["id"], "prediction": predicted[:, 0]}

    def job(path: Path) -> float:
        with tempfile.TemporaryDirectory(dir=_FOLDER) as output:
            begin = time.perf_counter()
            read = ray.data.read_parquet(str(path))
            predicted = read.map_batches(
                Predict, batch_size=65_536, num_cpus=0.5, compute=_actors(cpus)
            )
            predicted.write_parquet(output)
            return time.perf_counter() - begin

    begin_s = time.time()
    seconds = job(_input(options["rows"]))
    end_s = time.time()
    rows = options["rows"]
    if options.get("is_warm"):
        import pyarrow.parquet as pq

        small = _FOLDER.absolute() / "small.parquet"
        few = 2 * 65_536
        pq.write_table(pq.read_table(_input(rows)).slice(0, few), small, row_group_size=few // 2)
        seconds, rows = seconds - job(small), rows - few
    ray.shutdown()
    return {"rows": rows, "seconds": seconds, "begin_s": begin_s, "end_s": end_s}


def _actors(count: int) -> Any:
    import ray

    return ray.data.ActorPoolStrategy(size=count)


def run_function(options: dict[str, Any]) -> dict[str, Any]:
    """The compiled function over one array, in calls of 65,536 rows."""
    import tensorflow as tf

    from serving.predictor import load_predictor

    predictor = load_predictor(_FOLDER / "artifact")
    values = np.random.default_rng(3).standard_normal((options["rows"], 9), np.float32)
    call = tf.function(predictor._model.call).get_concrete_function(
        tf.TensorSpec((None, 9), tf.float32)
    )
    out = np.empty(len(values), np.float32)

    def once() -> None:
        for start in range(0, len(values), 65_536):
            part = values[start : start + 65_536]
            out[start : start + len(part)] = call(tf.constant(part)).numpy()[:, 0]

    once()
    begin_s, begin = time.time(), time.perf_counter()
    once()
    seconds, end_s = time.perf_counter() - begin, time.time()
    return {"rows": len(values), "seconds": seconds, "begin_s": begin_s, "end_s": end_s}


_PROGRAMS = {
    "files": run_files,
    "service": run_service,
    "ray": run_ray,
    "function": run_function,
}


if __name__ == "__main__":
    print(json.dumps(_PROGRAMS[sys.argv[1]](json.loads(sys.argv[2]))))
