"""The dispatching of batch jobs inside a service: a thread, and its numbers among the service's.

Owns the life of the thread. Any number of processes may have one on the same database: one of them
dispatches, the others wait for its place.
"""

import contextlib
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.template import resolve
from configs.service import ServiceConfig
from serving.assembly import Settings, batch_config
from serving.batch_process import ProcessConfig, make_batches
from serving.metrics import Metrics

_LOG = logging.getLogger(__name__)
_NUMBERS_S = 1.0
_END_S = 60.0


def dispatching_config(settings: Settings) -> ProcessConfig:
    """What the loop is made of; where nobody says how many actors, as many as the cluster holds."""
    made, config = batch_config(settings), settings.config
    if made.pool == "processes" or config.predictors is not None:
        return made
    replicas = config.max_replicas or config.replicas
    # By its name: whoever has processes need not have Ray in memory.
    most = resolve("cluster.actors:capacity")(made.threads, made.gpus, replicas)
    return replace(made, runner={**made.runner, "max_predictors": most})


def actors_within(config: ServiceConfig) -> int:
    """Predictors that an embedded Ray needs room for, beside the replicas."""
    if config.predictor_pool == "processes" or config.predictors == 0:
        return 0
    return config.predictors or 1


class Dispatching:
    """Batch jobs of one configuration, from `start` to `stop`.

    Args:
        settings: Of the service.
    """

    def __init__(self, settings: Settings) -> None:
        _, self._runner = make_batches(dispatching_config(settings))
        self._metrics = Metrics(Path(settings.folder) / "metrics")
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._runner.run, args=(self._is_over,), name="dispatching"),
            threading.Thread(target=self._count, name="dispatching numbers"),
        ]

    @property
    def is_alive(self) -> bool:
        """Whether the loop runs."""
        return self._threads[0].is_alive()

    def start(self) -> None:
        """Go on with all jobs of the database."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the shards under way, or after a bound; what was not done is done later."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(_END_S)

    def _count(self) -> None:
        while not self._is_over.wait(_NUMBERS_S):
            with contextlib.suppress(RuntimeError):  # the loop changed what was being read
                self._show(self._runner.snapshot())
            try:
                self._metrics.save()
            except OSError as error:
                _LOG.warning("numbers of batch jobs wait to be written: %s", error)

    def _show(self, facts: dict[str, Any]) -> None:
        if not facts["is_owner"]:
            return
        self._metrics.batch_jobs.set(facts["jobs"])
        for state in ("running", "waiting"):
            self._metrics.batch_shards.set(facts[state], state)
        for user, seconds in facts["served_s"].items():
            self._metrics.batch_compute.values[user,] = seconds
        for version, rows in facts["rows"].items():
            self._metrics.rows.values[version] = rows
