"""Runs on Kubernetes: submitted, listed, followed, stopped.

A run is a RayJob named by its run id; all that is known of it is in the cluster, so any machine
with access to the namespace may ask. The twin of submission through Ray Jobs: the same methods.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from configs.errors import EnvironmentFailure, UserError, did_you_mean
from lockstep.kubernetes_client import (
    AlreadyThere,
    KubernetesClient,
    NotThere,
    Unreachable,
)
from lockstep.kustomize import Manifest
from lockstep.manifests import (
    DIGEST_ANNOTATION,
    ORIGIN_LABEL,
    RUN_LABEL,
    KubernetesRun,
    check_run_id,
    copy_of,
    head_budget,
    run_manifests,
)

Answer = TypeVar("Answer")

_POLL_S = 2.0
_OUTAGE_S = 600.0  # an API server is upgraded in less
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_STATES = {
    "": "pending",
    "New": "pending",
    "Initializing": "pending",
    "Waiting": "pending",
    "Scheduling": "pending",
    "Scheduled": "pending",
    "Running": "running",
    "Retrying": "running",
    "Suspending": "suspended",
    "Suspended": "suspended",
    "Complete": "succeeded",
    "Failed": "failed",
    "ValidationFailed": "failed",
}
_ENDED = ("succeeded", "failed", "stopped")


class RunFailed(EnvironmentFailure):
    """A run that was followed ended without success."""


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run.

    Attributes:
        run_id: Its name.
        state: `queued`, `pending` (its pods are coming), `running`, `suspended`, `stopped`,
            `succeeded` or `failed`.
        reason: Why, in the operator's words; may be empty.
        attempts: Clusters that were started for it so far.
        workers: Its training processes.
        submitted_at: When, as Kubernetes writes times.
        ended_at: When its last attempt ended; empty before.
    """

    run_id: str
    state: str
    reason: str = ""
    attempts: int = 0
    workers: int = 0
    submitted_at: str = ""
    ended_at: str = ""

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in _ENDED


class KubernetesJobs:
    """The runs of one namespace.

    Args:
        client: The namespace.
        template: The RayJob that runs are made from. None: the one in the cluster.
        sleep: Waits between two looks.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        client: KubernetesClient,
        template: Manifest | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._template = template
        self._sleep = sleep
        self._clock = clock

    def submit(self, packed: KubernetesRun) -> str:
        """Make a run, or find it made; returns its id.

        Idempotent: the same run of the same job again makes what is missing of it.

        Raises:
            UserError: A run of that name is another job's, or does not fit the cluster.
            Unreachable: The API server does not answer.
        """
        config_map, ray_job, budget = run_manifests(self._run_template("training"), packed)
        made = self._make(ray_job)
        for manifest in (config_map, budget):
            self._make_part(manifest, made)
        return packed.run_id

    def launch(self, template: str, *, is_exclusive: bool = False) -> str:
        """Make a run that is a plain copy of a template; returns its id.

        With `is_exclusive` a run of this template that is under way is taken for it.

        Raises:
            UserError: There is no such template.
            Unreachable: The API server does not answer.
        """
        found = self._run_template(template)
        if is_exclusive:
            for item in self._client.items("RayJob", f"{ORIGIN_LABEL}={template}"):
                if not _status_of(item).is_ended:
                    return str(item["metadata"]["name"])
        run_id = f"{template[:30]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        ray_job = copy_of(found, run_id)
        self._make_part(head_budget(ray_job), self._make(ray_job))
        return run_id

    def list(self) -> list[RunStatus]:
        """All runs, oldest first."""
        return [_status_of(item) for item in self._client.items("RayJob", RUN_LABEL)]

    def status(self, run_id: str) -> RunStatus:
        """What is known of a run.

        Raises:
            UserError: There is no such run.
        """
        check_run_id(run_id)
        try:
            return _status_of(self._client.get("RayJob", run_id))
        except NotThere:
            known = [status.run_id for status in self.list()]
            raise UserError(
                f"there is no run {run_id} in the namespace {self._client.namespace}. `lockstep "
                f"jobs list --kubernetes` shows those there are.{did_you_mean(run_id, known)}"
            ) from None

    def logs(self, run_id: str, follow: bool = False) -> Iterator[str]:
        """What the run has printed, line by line; with `follow` until it has ended.

        Outlives pods, attempts and outages of the API server of less than ten minutes.
        """
        pod, last = "", ""
        while True:
            status = self._patiently(lambda: self.status(run_id))
            pods = self._patiently(lambda: self._client.items("Pod", f"job-name={run_id}"))
            newest = _readable(pods)
            if newest != pod:
                pod, last = newest, ""
            for line in self._lines(pod, last, follow and not status.is_ended):
                last, _, text = line.partition(" ")
                yield text
            if not follow or status.is_ended:
                return
            self._sleep(_POLL_S)

    def follow(self, run_id: str, show: Callable[[str], None]) -> RunStatus:
        """Show what the run prints, and wait for its end.

        Raises:
            RunFailed: It failed, or was stopped.
        """
        for line in self.logs(run_id, follow=True):
            show(line)
        status = self._patiently(lambda: self.status(run_id))
        if status.state != "succeeded":
            raise RunFailed(
                f"run {run_id} {status.state} after {status.attempts} attempt(s): "
                f"{status.reason or 'no reason given'}. Submitted again under this id it goes on "
                "from its newest checkpoint, once it is deleted: lockstep jobs stop."
            )
        return status

    def stop(self, run_id: str) -> None:
        """End a run: it takes a last checkpoint, and its pods go. The run folder stays.

        Raises:
            UserError: There is no such run.
        """
        self.status(run_id)
        self._client.delete("RayJob", run_id)

    def result(self, run_id: str) -> dict[str, Any]:
        """The summary that a finished run has printed last.

        Raises:
            UserError: The run has not succeeded, or what it printed is gone.
        """
        status = self.status(run_id)
        if status.state != "succeeded":
            raise UserError(
                f"run {run_id} is {status.state}; a run that succeeded has a result. "
                f"`lockstep jobs logs {run_id} --kubernetes -f` follows it."
            )
        summary = _last_object("\n".join(self.logs(run_id)))
        if summary is None:
            raise UserError(
                f"the log of run {run_id} is gone, or ends without a summary. Read summary.json in "
                "its run folder on the volume."
            )
        return summary

    def _run_template(self, name: str) -> Manifest:
        if self._template is not None:
            return self._template
        try:
            return self._client.get("RayJob", name)
        except NotThere:
            raise UserError(
                f"the namespace {self._client.namespace} has no template {name}, a RayJob that "
                "runs are made from. Apply an overlay of deploy/ first, or name the namespace "
                "with --namespace."
            ) from None

    def _make(self, ray_job: Manifest) -> Manifest:
        try:
            return self._client.create(ray_job)
        except AlreadyThere:
            name = ray_job["metadata"]["name"]
            found = self._client.get("RayJob", name)
            if _digest(found) == _digest(ray_job):
                return found
            raise UserError(
                f"run {name} is there, and is another job's. Choose another --run-id, or end that "
                f"run: lockstep jobs stop {name} --kubernetes."
            ) from None

    def _make_part(self, manifest: Manifest, ray_job: Manifest) -> None:
        """Make an object that goes when the RayJob goes."""
        owner = {
            "apiVersion": ray_job["apiVersion"],
            "kind": ray_job["kind"],
            "name": ray_job["metadata"]["name"],
            "uid": ray_job["metadata"]["uid"],
        }
        metadata = {**manifest["metadata"], "ownerReferences": [owner]}
        try:
            self._client.create({**manifest, "metadata": metadata})
        except AlreadyThere:
            return  # made by an earlier call, which went no further

    def _lines(self, pod: str, last: str, follow: bool) -> Iterator[str]:
        """New lines of a pod, after the time of the last one that was seen."""
        if not pod:
            return
        try:
            for line in self._client.log(pod, follow=follow, since=last or None):
                if line and line.partition(" ")[0] > last:
                    yield line
        except (NotThere, Unreachable):
            return  # the pod has gone, or the server for a while: the caller looks again

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """Ask again through an outage of the API server, for ten minutes at most."""
        began = self._clock()
        while True:
            try:
                return ask()
            except Unreachable:
                if self._clock() - began > _OUTAGE_S:
                    raise
                self._sleep(_POLL_S)


def _status_of(item: Manifest) -> RunStatus:
    status = item.get("status") or {}
    deployment = str(status.get("jobDeploymentStatus", ""))
    state = _STATES.get(deployment, "running")
    if state == "succeeded" and status.get("jobStatus") == "STOPPED":
        state = "stopped"
    labels = item["metadata"].get("labels") or {}
    if _QUEUE_LABEL in labels and (state == "suspended" or item["spec"].get("suspend")):
        state = state if state in _ENDED else "queued"
    groups = item["spec"].get("rayClusterSpec", {}).get("workerGroupSpecs", ())
    reason = " ".join(filter(None, (status.get("reason"), status.get("message"))))
    return RunStatus(
        run_id=item["metadata"]["name"],
        state=state,
        reason=" ".join(reason.split()),
        attempts=int(status.get("failed", 0)) + int(deployment not in ("", "New", "Suspended")),
        workers=sum(group.get("replicas", 0) for group in groups),
        submitted_at=str(item["metadata"].get("creationTimestamp", "")),
        ended_at=str(status.get("endTime", "")),
    )


def _digest(ray_job: Manifest) -> Any:
    return (ray_job["metadata"].get("annotations") or {}).get(DIGEST_ANNOTATION)


def _readable(pods: list[Manifest]) -> str:
    """The newest pod that has printed or may print."""
    names = [
        str(pod["metadata"]["name"])
        for pod in pods
        if (pod.get("status") or {}).get("phase") in ("Running", "Succeeded", "Failed")
    ]
    return names[-1] if names else ""


def _last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object that begins at the start of a line."""
    decoder = json.JSONDecoder()
    start = len(text)
    while (start := text.rfind("{", 0, start)) >= 0:
        if start and text[start - 1] != "\n":
            continue
        try:
            value, _ = decoder.raw_decode(text, start)
        except ValueError:
            continue
        return value if isinstance(value, dict) else None
    return None
