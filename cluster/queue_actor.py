"""The queue as a process of the cluster: one small detached actor on the head.

Ray starts it anew when it dies; all that it knows is in its file. It is asked through `call`, from
any process that has joined the cluster.
"""

import io
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.dashboard.utils import ray_address_to_api_server_url
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.growth import Growth
from cluster.jobs_api import RUN, JobsApi, JobView
from cluster.nodes import alive_nodes
from cluster.queue_keeper import Keeper
from cluster.queue_store import QueueStore, Record
from cluster.room import Placed, Shape, Worker
from cluster.secret_keeping import drop_secrets
from cluster.shares import Policy, Terms
from cluster.submit import STOP_GRACE_S, run_metadata
from configs.errors import EnvironmentFailure

NAMESPACE = "lockstep"
_NAME = "lockstep-queue"
_STEP_S = 1.0
_CALL_S = 60.0
_HORIZON = "LOCKSTEP_QUEUE_HORIZON_S"


class QueueActor:
    """The keeper in a thread of its own, its methods under one lock."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._lock = threading.Lock()
        policy = Policy(horizon_s=float(os.environ.get(_HORIZON, "300")))
        self._keeper = Keeper(
            QueueStore(self._folder / "queue.db"),
            _RayJobs(self._folder),
            _RayNodes(),
            time.time,
            policy,
        )
        threading.Thread(target=self._go_on, name="queue", daemon=True).start()

    def submit(self, asked: dict[str, Any], package: bytes) -> dict[str, Any]:
        """See `Keeper.submit`; returns the run as `runs` does."""
        with self._lock:
            run_id = self._keeper.submit(asked, package)
        return next(one for one in self.runs() if one["run_id"] == run_id)

    def cancel(self, run_id: str) -> None:
        """See `Keeper.cancel`."""
        with self._lock:
            self._keeper.cancel(run_id)

    def set_terms(self, user: str, terms: dict[str, Any]) -> dict[str, Any]:
        """See `Keeper.set_terms`."""
        with self._lock:
            users = self._keeper.set_terms(user, Terms(**terms))
        return {name: asdict(one) for name, one in users.items()}

    def runs(self) -> list[dict[str, Any]]:
        """All runs, as `RunView` without `is_queued`."""
        with self._lock:
            reasons = {one.run_id: one.reason for one in self._keeper.standings() if one.position}
            return [_shown(one, reasons) for one in self._keeper.records()]

    def standings(self) -> list[dict[str, Any]]:
        """See `Keeper.standings`."""
        with self._lock:
            return [asdict(one) for one in self._keeper.standings()]

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def _go_on(self) -> None:
        while True:
            started = time.monotonic()
            try:
                with self._lock:
                    self._keeper.step()
            except EnvironmentFailure as error:
                logging.getLogger(__name__).warning("the queue tries again: %s", error)
            except Exception as error:  # a thread's main: the process ends, a new one begins
                logging.getLogger(__name__).exception("the queue ends: %s", error)
                sys.stderr.flush()
                os._exit(1)
            time.sleep(max(0.05, _STEP_S - (time.monotonic() - started)))


def start() -> None:
    """Start the queue where there is none. Call on the head; any number of times."""
    home = os.environ.get("LOCKSTEP_HOME") or str(Path.home() / ".lockstep")
    here = ray.get_runtime_context().get_node_id()
    actor = (
        ray.remote(QueueActor)
        .options(
            name=_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=4,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(str(Path(home).absolute() / "queue"))
    )
    _answer(actor.pid.remote())


def call(method: str, *arguments: Any) -> Any:
    """Call a method of the queue.

    Raises:
        EnvironmentFailure: There is no queue, or it does not answer.
        UserError: What the method raises.
    """
    try:
        actor = ray.get_actor(_NAME, namespace=NAMESPACE)
    except ValueError:
        raise EnvironmentFailure(
            "the cluster has no queue. The first `lockstep submit --queue` starts it."
        ) from None
    return _answer(getattr(actor, method).remote(*arguments))


def _answer(asked: Any) -> Any:
    try:
        return ray.get(asked, timeout=_CALL_S)
    except ray.exceptions.RayTaskError as error:
        if error.cause is not None:
            raise error.cause from None
        raise
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        reason = " ".join(str(error).split())[-400:]
        raise EnvironmentFailure(f"the queue does not answer: {reason}") from error


class _RayJobs:
    """Ray Jobs of this cluster, as the keeper needs them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "packages"  # each is there while it is handed over to Ray
        shutil.rmtree(self._folder, ignore_errors=True)
        gcs = ray.get_runtime_context().gcs_address
        os.environ.setdefault("RAY_ADDRESS", gcs)
        self._api = JobsApi(ray_address_to_api_server_url(gcs))

    def states(self) -> Mapping[str, JobView]:
        return {job.submission_id: job for job in self._api.jobs() if RUN in job.metadata}

    def start(self, name: str, record: Record, package: bytes) -> None:
        shown = run_metadata(
            record.run_id,
            record.name,
            record.user,
            record.run_folder,
            record.attempt,
            is_queued=True,
        )
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S), "LOCKSTEP_QUEUED": "1"}
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            with zipfile.ZipFile(io.BytesIO(package)) as archive:
                archive.extractall(folder)
            self._api.start(name, record.entrypoint, folder, shown, environment)

    def stop(self, name: str) -> None:
        self._api.stop(name)

    def ended(self, run_id: str) -> None:
        drop_secrets(run_id)


class _RayNodes:
    """Nodes and gangs of this cluster, as the keeper needs them."""

    def __init__(self) -> None:
        self._growth = Growth()

    def whole(self) -> Mapping[str, Worker]:
        return {node["NodeID"]: _worker(node["Resources"]) for node in ray.nodes() if node["Alive"]}

    def used(self) -> Mapping[str, Worker]:
        whole = self.whole()
        used = {}
        for node in alive_nodes():
            has, free = whole.get(node.node_id, Worker(0.0)), _worker(node.free)
            used[node.node_id] = Worker(
                max(0.0, has.cpus - free.cpus), max(0.0, has.gpus - free.gpus)
            )
            if node.is_draining:  # takes nothing new
                used[node.node_id] = has
        return used

    def placed(self) -> Mapping[str, Placed]:
        return gangs_placed(placement_group_table().values(), self.whole())

    def want(self, shapes: Sequence[Shape]) -> None:
        self._growth.ask(shapes)


def gangs_placed(
    groups: Iterable[Mapping[str, Any]], nodes: Container[str]
) -> dict[str, dict[str, int]]:
    """Where the gangs of runs hold room, by run id.

    Args:
        groups: As `placement_group_table` has them. One that lost a node holds what it has on the
            others while Ray looks for another place.
        nodes: Those that are there.
    """
    found: dict[str, dict[str, int]] = {}
    for group in groups:
        name = str(group["name"])
        if group["state"] not in ("CREATED", "RESCHEDULING") or not name.startswith("lockstep-"):
            continue
        run_id = name.removeprefix("lockstep-").rpartition("-")[0]
        places: dict[str, int] = {}
        for node in group["bundles_to_node_id"].values():
            if node in nodes:
                places[node] = places.get(node, 0) + 1
        found[run_id] = places
    return found


def _worker(resources: Mapping[str, float]) -> Worker:
    return Worker(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


def _shown(record: Record, reasons: Mapping[str, str]) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "name": record.name,
        "user": record.user,
        "status": record.status,
        "attempt": record.attempt,
        "run_folder": record.run_folder,
        "message": " ".join(filter(None, (reasons.get(record.run_id), record.message))),
        "submitted_at": record.submitted_at,
    }
