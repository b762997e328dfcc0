"""The objects of a run on Kubernetes: what they say of it, how they are made and how they go.

Made and removed so that any number of callers, each of which may be cut off, make one run: names
are the run's, deletions are of one object and no later one of its name, and what Kubernetes has yet
to collect of a former attempt is not taken for the new one's.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from cluster.submit import RunView
from configs.errors import EnvironmentFailure, UserError
from lockstep.kubernetes_client import AlreadyThere, KubernetesClient, NotThere
from lockstep.kustomize import Manifest
from lockstep.manifests import DIGEST, JOB_NAME, ORIGIN_LABEL, RUN_FOLDER, RUN_LABEL, USER

_POLL_S = 2.0
_GONE_S = 300.0  # pods have two minutes to hand over
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_STATUS = {  # the operator's words, in those of commands
    "": "starting",
    "New": "starting",
    "Initializing": "starting",
    "Waiting": "starting",
    "Scheduling": "starting",
    "Scheduled": "starting",
    "Running": "running",
    "Retrying": "starting",
    "Suspending": "yielding",
    "Suspended": "waiting",
    "Complete": "done",
    "Failed": "failed",
    "ValidationFailed": "failed",
}


class RunObjects:
    """Makes and removes the objects of runs in one namespace.

    Args:
        client: The namespace.
        sleep: Waits between two looks.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        client: KubernetesClient,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._sleep, self._clock = client, sleep, clock

    def make(self, ray_job: Manifest, parts: Iterable[Manifest]) -> None:
        """Make a RayJob, unless it is under way or done, and the parts that go when it goes.

        One that failed, was stopped or is being deleted goes first, and so do its pods: two
        attempts never write at the same time.

        Raises:
            UserError: The name is another job's.
            EnvironmentFailure: What has to go has not gone within five minutes.
        """
        made, is_new = self._make(ray_job)
        for part in parts:
            self._make_part(part, made, is_new)

    def delete(self, found: Manifest, kind: str = "RayJob") -> None:
        """Delete this very object, not a later one of its name."""
        metadata = found["metadata"]
        with contextlib.suppress(NotThere, AlreadyThere):
            self._client.delete(kind, metadata["name"], metadata["uid"])

    def until_gone(self, run_id: str) -> None:
        """Wait until nothing is left of a RayJob that is deleted, its pods included.

        Raises:
            EnvironmentFailure: It has not gone within five minutes.
        """
        ends_at = self._clock() + _GONE_S
        while self._client.find("RayJob", run_id) or self._pods(run_id):
            self._wait(ends_at, run_id)

    def _make(self, ray_job: Manifest) -> tuple[Manifest, bool]:
        """The RayJob as it is there, and whether it was made now: else it is under way or done."""
        name = str(ray_job["metadata"]["name"])
        ends_at = self._clock() + _GONE_S
        while True:
            found = self._client.find("RayJob", name)
            if found is None and not self._pods(name):
                with contextlib.suppress(AlreadyThere):  # somebody else was faster: look again
                    return self._client.create(ray_job), True
            elif found is not None and not is_going(found):
                self._check_same(found, ray_job)
                if run_view(found).status not in ("failed", "stopped"):
                    return found, False
                self.delete(found)
                continue
            self._wait(ends_at, name)

    def _check_same(self, found: Manifest, ray_job: Manifest) -> None:
        if _digest(found) == _digest(ray_job):
            return
        name = ray_job["metadata"]["name"]
        remedy = "stop that run first: lockstep jobs stop"
        if run_view(found).is_final:
            remedy = f"forget that run first: kubectl -n {self._client.namespace} delete rayjob"
        raise UserError(
            f"run {name} is there, and is another job's. Choose another --run-id, or {remedy} "
            f"{name}."
        )

    def _make_part(self, manifest: Manifest, ray_job: Manifest, is_new: bool) -> None:
        """Make an object that goes when the RayJob goes, unless the RayJob has it.

        One of a former attempt, which Kubernetes has yet to collect, is replaced. One that nobody
        owns (made by `kubectl apply`) is that of a RayJob that was found.
        """
        kind, name = str(manifest["kind"]), str(manifest["metadata"]["name"])
        owner = {
            "apiVersion": ray_job["apiVersion"],
            "kind": ray_job["kind"],
            "name": ray_job["metadata"]["name"],
            "uid": ray_job["metadata"]["uid"],
        }
        metadata = {**manifest["metadata"], "ownerReferences": [owner]}
        ends_at = self._clock() + _GONE_S
        while True:
            with contextlib.suppress(AlreadyThere):
                self._client.create({**manifest, "metadata": metadata})
                return
            found = self._client.find(kind, name)
            if found is not None and not is_going(found):
                owners = [one["uid"] for one in found["metadata"].get("ownerReferences") or ()]
                if owner["uid"] in owners or not (owners or is_new):
                    return  # made by an earlier call, which went no further
                self.delete(found, kind)
                continue
            self._wait(ends_at, name)

    def _pods(self, run_id: str) -> list[Manifest]:
        """Pods of a run whose processes may still be there."""
        pods = self._client.items("Pod", f"{RUN_LABEL}={run_id}")
        return [pod for pod in pods if phase_of(pod) not in ("Succeeded", "Failed")]

    def _wait(self, ends_at: float, name: str) -> None:
        if self._clock() > ends_at:
            raise EnvironmentFailure(
                f"{name} was deleted and has not gone within {_GONE_S:g} s. See what holds it: "
                f"kubectl -n {self._client.namespace} get rayjobs,pods -l {RUN_LABEL}={name}"
            )
        self._sleep(_POLL_S)


def run_view(item: Manifest) -> RunView:
    """A RayJob in the words of commands."""
    metadata, status = item["metadata"], item.get("status") or {}
    annotations, labels = metadata.get("annotations") or {}, metadata.get("labels") or {}
    state = str(status.get("jobDeploymentStatus", ""))
    shown = _STATUS.get(state, "running")
    if shown == "done" and status.get("jobStatus") == "STOPPED":
        shown = "stopped"
    is_queued = _QUEUE_LABEL in labels
    if is_queued and shown == "starting" and item["spec"].get("suspend"):
        shown = "waiting"
    if metadata.get("deletionTimestamp") and shown not in ("done", "failed", "stopped"):
        shown = "stopping"
    message = " ".join(str(status.get(key, "")) for key in ("reason", "message"))
    return RunView(
        run_id=metadata["name"],
        name=annotations.get(JOB_NAME, labels.get(ORIGIN_LABEL, "")),
        user=annotations.get(USER, ""),
        status=shown,
        attempt=int(status.get("failed") or 0) + int(state not in ("", "New", "Suspended")),
        run_folder=annotations.get(RUN_FOLDER, ""),
        message=" ".join(message.split()),
        submitted_at=_seconds(metadata.get("creationTimestamp")),
        is_queued=is_queued,
    )


def is_going(item: Manifest) -> bool:
    """Whether it is deleted, and only waits for what has to be done before."""
    return bool(item["metadata"].get("deletionTimestamp"))


def phase_of(pod: Manifest) -> str:
    """What Kubernetes calls the state of a pod; "" before it has any."""
    return str((pod.get("status") or {}).get("phase", ""))


def _seconds(moment: str | None) -> float:
    """Unix time of a moment as Kubernetes writes it."""
    return datetime.fromisoformat(moment).timestamp() if moment else 0.0


def _digest(ray_job: Manifest) -> Any:
    return (ray_job["metadata"].get("annotations") or {}).get(DIGEST)
