"""The dispatching of batch jobs as a thing to start: in a thread of the service, or by itself.

`python -m serving.batch_process CONFIG` runs the loop alone, for services whose front is elsewhere:
any number may be started on one database, one of them dispatches, and the others wait for its
place. CONFIG is JSON with the fields of `ProcessConfig`.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.pool import Pool, ProcessPool
from cluster.template import resolve
from registry.database import Database
from registry.store import Registry
from serving.accounts import Accounts
from serving.batch_files import ServiceSettings
from serving.batch_runner import BatchRunner
from serving.batch_seams import RunnerSettings
from serving.batch_store import BatchStore
from serving.batch_worker import LOADER
from serving.batches import BatchService, own_outputs

WORKER = "serving.batch_worker:BatchWorker"


@dataclass(frozen=True)
class ProcessConfig:
    """What the dispatching is started with; plain values.

    Attributes:
        database: URL; None: as everywhere.
        artifacts: Where the registry keeps artifacts; None: as everywhere.
        service: Fields of `ServiceSettings`.
        runner: Fields of `RunnerSettings`.
        models_bytes: Memory that the models of one predictor may take.
        threads: Threads of one predictor.
        loader: Gives a model for an artifact's folder.
        log_file: Receives what predictors print, where they are processes.
        pool: `processes` of this machine, or `actors` of the Ray that this process has joined.
        gpus: GPUs of each predictor that is an actor.
    """

    database: str | None = None
    artifacts: str | None = None
    service: dict[str, Any] = field(default_factory=dict)
    runner: dict[str, Any] = field(default_factory=dict)
    models_bytes: int = 2 * 2**30
    threads: int = 1
    loader: str = LOADER
    log_file: str | None = None
    pool: Literal["processes", "actors"] = "processes"
    gpus: float = 0.0


def make_pool(config: ProcessConfig) -> Pool:
    """The predictors, none of them started yet."""
    options, environment = worker_options(config), worker_environment(config)
    if config.pool == "actors":
        # By its name: whoever has processes need not have Ray in memory.
        made: Pool = resolve("cluster.actors:ActorPool")(
            WORKER, options, cpus=config.threads, gpus=config.gpus, environment=environment
        )
        return made
    return ProcessPool(WORKER, options, environment, config.log_file)


def worker_options(config: ProcessConfig) -> dict[str, Any]:
    """What a pool gives to `BatchWorker`."""
    return {"loader": config.loader, "models_bytes": config.models_bytes}


def worker_environment(config: ProcessConfig) -> dict[str, str]:
    """What predictors need in their environment: so many threads, and no words of TensorFlow's."""
    return {
        "TF_NUM_INTRAOP_THREADS": str(config.threads),
        "TF_NUM_INTEROP_THREADS": "1",
        "OMP_NUM_THREADS": str(config.threads),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def make_batches(
    config: ProcessConfig, give_pool: Callable[[], Pool] | None = None
) -> tuple[BatchService, BatchRunner]:
    """The service, for routes, and the loop, for a thread, of one configuration.

    Args:
        config: What it is started with.
        give_pool: Gives the predictors' pool; None: as the configuration says.
    """
    database = Database(config.database)
    registry = Registry(database, config.artifacts)
    accounts = Accounts(database)
    settings = {**config.service}
    if "outputs" in settings:
        settings["outputs"] = tuple(settings["outputs"])
    bounds = ServiceSettings(**settings)
    store = BatchStore(database, own_outputs(bounds.folder))
    service = BatchService(store, registry, accounts, bounds)

    runner = BatchRunner(
        store,
        registry,
        accounts,
        give_pool or (lambda: make_pool(config)),
        RunnerSettings(**config.runner),
        sweep=service.sweep,
    )
    return service, runner


def main() -> None:
    """Dispatch until SIGTERM or SIGINT."""
    logging.basicConfig(level=os.environ.get("LOCKSTEP_LOG", "INFO"), stream=sys.stderr)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    _, runner = make_batches(ProcessConfig(**json.loads(sys.argv[1])))
    print("ready", flush=True)
    runner.run(stop)


if __name__ == "__main__":
    main()
