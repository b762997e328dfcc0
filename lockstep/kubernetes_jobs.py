"""Runs on Kubernetes: submitted, listed, followed, stopped.

A run is a RayJob named by its run id; all that is known of it is in the cluster, so any machine
with access to the namespace may ask. The twin of submission through Ray Jobs: the same methods.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import RunUnknown
from cluster.submit import Packed, RunView
from configs.errors import EnvironmentFailure, UserError, did_you_mean
from lockstep.kubernetes_client import AlreadyThere, KubernetesClient, NotThere, Unreachable
from lockstep.kubernetes_result import fetch
from lockstep.kustomize import Manifest
from lockstep.manifests import (
    DIGEST,
    JOB_NAME,
    ORIGIN_LABEL,
    RUN_FOLDER,
    RUN_LABEL,
    USER,
    RunOptions,
    check_run_id,
    copy_of,
    head_budget,
    run_manifests,
)

Answer = TypeVar("Answer")
Views = list[RunView]
Standings = list[dict[str, Any]]

_POLL_S = 2.0
_GONE_S = 300.0  # pods have two minutes to hand over
_OUTAGE_S = 600.0  # an API server is upgraded in less
_KEPT = 10
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


class RunFailed(EnvironmentFailure):
    """A run that was followed ended without success."""


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

    @property
    def template(self) -> Manifest:
        """What training runs are made from.

        Raises:
            UserError: There is none.
            Unreachable: The API server does not answer.
        """
        return self._run_template("training")

    def submit(self, packed: Packed, options: RunOptions | None = None) -> str:
        """Make a run, and return its id. One that is under way or done is left as it is.

        A run that had failed goes on from its newest checkpoint. What is missing of a run that an
        earlier call did not make to the end is made.

        Raises:
            UserError: A run of that name is another job's, or does not fit the cluster.
            Unreachable: The API server does not answer.
        """
        config_map, ray_job, budget = run_manifests(self.template, packed, options)
        made = self._make(ray_job)
        for manifest in (config_map, budget):
            self._make_part(manifest, made)
        return packed.run_id

    def launch(self, template: str, *, is_exclusive: bool = False) -> str:
        """Make a run that is a plain copy of a template; returns its id.

        With `is_exclusive` a run of this template that is under way is taken for it. Of runs that
        have ended the newest ten are kept: nobody else takes the objects of a clock's runs away.

        Raises:
            UserError: There is no such template.
            Unreachable: The API server does not answer.
        """
        found = self._run_template(template)
        if is_exclusive:
            for item in self._client.items("RayJob", f"{ORIGIN_LABEL}={template}"):
                if not _view(item).is_final:
                    return str(item["metadata"]["name"])
        self._forget(template)
        run_id = f"{template[:30]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        ray_job = copy_of(found, run_id)
        self._make_part(head_budget(ray_job), self._make(ray_job))
        return run_id

    def list(self) -> Views:
        """All runs, oldest first."""
        return [_view(item) for item in self._client.items("RayJob", RUN_LABEL)]

    def status(self, run_id: str) -> RunView:
        """One run.

        Raises:
            RunUnknown: There is no such run.
        """
        check_run_id(run_id)
        try:
            return _view(self._client.get("RayJob", run_id))
        except NotThere:
            known = [view.run_id for view in self.list()]
            raise RunUnknown(
                f"no run {run_id!r} in the namespace {self._client.namespace}; `lockstep jobs "
                f"list` shows all.{did_you_mean(run_id, known)}"
            ) from None

    def logs(self, run_id: str, follow: bool = False) -> Iterator[str]:
        """What a run prints, in pieces; with `follow` until its end.

        Outlives pods, attempts and outages of the API server of less than ten minutes.
        """
        pod, last = "", ""
        while True:
            view = self._patiently(lambda: self.status(run_id))
            pods = self._patiently(lambda: self._client.items("Pod", f"job-name={run_id}"))
            newest = _readable(pods)
            if newest != pod:
                pod, last = newest, ""
            for line in self._lines(pod, last, follow and not view.is_final):
                last, _, text = line.partition(" ")
                yield f"{text}\n"
            if not follow or view.is_final:
                return
            self._sleep(_POLL_S)

    def follow(self, run_id: str, show: Callable[[str], None]) -> RunView:
        """Show what the run prints, and wait for its end.

        Raises:
            RunFailed: It failed, or was stopped.
        """
        for piece in self.logs(run_id, follow=True):
            show(piece)
        view = self._patiently(lambda: self.status(run_id))
        if view.status != "done":
            raise RunFailed(
                f"run {run_id} {view.status} in attempt {view.attempt}: "
                f"{view.message or 'no reason given'}. Submitted again under this id it goes on "
                "from its newest checkpoint."
            )
        return view

    def stop(self, run_id: str) -> RunView:
        """Ask a run to write a checkpoint and end; its RayJob goes, its run folder stays.

        Raises:
            RunUnknown: There is no such run.
        """
        view = self.status(run_id)
        with contextlib.suppress(NotThere):  # ended by somebody else meanwhile
            self._client.delete("RayJob", run_id)
        message = "it takes a last checkpoint; submitting it again resumes it"
        return view if view.is_final else replace(view, status="stopping", message=message)

    def result(self, run_id: str, output: Path | None = None) -> dict[str, Any]:
        """A run's summary; with `output` its artifact and records are written there, whole.

        Raises:
            RunUnknown: There is no such run, or it has no summary yet.
        """
        view = self.status(run_id)
        return fetch(self._client, self.template, view.run_id, view.run_folder, output)

    def queue(self) -> Standings:
        """The queue is Kueue's: who waits, and what it says of it."""
        waiting = [view for view in self.list() if view.status == "waiting"]
        return [
            {
                "position": number,
                "run_id": view.run_id,
                "user": view.user,
                "priority": 0,
                "reason": view.message or "waits for Kueue to admit it",
            }
            for number, view in enumerate(waiting, 1)
        ]

    def _forget(self, template: str) -> None:
        items = self._client.items("RayJob", f"{ORIGIN_LABEL}={template}")
        ended = [str(item["metadata"]["name"]) for item in items if _view(item).is_final]
        for name in ended[: max(0, len(ended) - _KEPT)]:
            with contextlib.suppress(NotThere):
                self._client.delete("RayJob", name)

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
                return self._again(ray_job) if _view(found).status == "failed" else found
            raise UserError(
                f"run {name} is there, and is another job's. Choose another --run-id, or end that "
                f"run: lockstep jobs stop {name}."
            ) from None

    def _again(self, ray_job: Manifest) -> Manifest:
        """A failed run anew: the object of its last attempts goes first."""
        name = ray_job["metadata"]["name"]
        ends_at = self._clock() + _GONE_S
        with contextlib.suppress(NotThere):
            self._client.delete("RayJob", name)
        while True:
            try:
                return self._client.create(ray_job)
            except AlreadyThere:
                if self._clock() > ends_at:
                    raise
                self._sleep(_POLL_S)

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


def _view(item: Manifest) -> RunView:
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


def _seconds(moment: str | None) -> float:
    """Unix time of a moment as Kubernetes writes it."""
    return datetime.fromisoformat(moment).timestamp() if moment else 0.0


def _digest(ray_job: Manifest) -> Any:
    return (ray_job["metadata"].get("annotations") or {}).get(DIGEST)


def _readable(pods: list[Manifest]) -> str:
    """The newest pod that has printed or may print."""
    names = [
        str(pod["metadata"]["name"])
        for pod in pods
        if (pod.get("status") or {}).get("phase") in ("Running", "Succeeded", "Failed")
    ]
    return names[-1] if names else ""
