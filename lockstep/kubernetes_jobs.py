"""Runs on Kubernetes: submitted, listed, followed, stopped.

A run is a RayJob named by its run id; all that is known of it is in the cluster, so any machine
with access to the namespace may ask. The twin of submission through Ray Jobs: the same methods.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import RunUnknown
from cluster.submit import Packed, RunView
from configs.errors import EnvironmentFailure, UserError, did_you_mean
from lockstep.kubernetes_client import KubernetesClient, NotThere, Unreachable
from lockstep.kubernetes_objects import RunObjects, is_going, phase_of, run_view
from lockstep.kubernetes_queue import kueue_standings
from lockstep.kubernetes_records import forget, keep_stopped, stopped_run, stopped_runs
from lockstep.kubernetes_result import fetch
from lockstep.kustomize import Manifest
from lockstep.manifests import (
    ORIGIN_LABEL,
    RUN_LABEL,
    RunOptions,
    check_run_id,
    copy_of,
    head_budget,
    run_manifests,
)

Answer = TypeVar("Answer")
Views = list[RunView]
Standings = list[dict[str, Any]]
Manifests = list[Manifest]

_POLL_S = 2.0
_OUTAGE_S = 600.0  # an API server is upgraded in less
_KEPT = 10


class RunFailed(EnvironmentFailure):
    """A run that was followed ended without success."""


class RunStopped(RunFailed):
    """A run that was followed was stopped."""

    exit_status = 130


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
        self._objects = RunObjects(client, sleep, clock)

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

        A run that had failed or was stopped goes on from its newest checkpoint, once all of its
        former attempts has gone. What is missing of a run that an earlier call did not make to the
        end is made. Any number of callers at the same time make one run.

        Raises:
            UserError: A run of that name is another job's, or does not fit the cluster.
            Unreachable: The API server does not answer.
            EnvironmentFailure: Former attempts do not go.
        """
        config_map, ray_job, budget = run_manifests(self.template, packed, options)
        self._objects.make(ray_job, (config_map, budget))
        forget(self._client, packed.run_id)
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
                name = str(item["metadata"]["name"])
                if is_going(item):
                    self._objects.until_gone(name)
                elif not run_view(item).is_final:
                    return name
        self._forget(template)
        run_id = f"{template[:30]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        ray_job = copy_of(found, run_id)
        self._objects.make(ray_job, [head_budget(ray_job)])
        return run_id

    def list(self) -> Views:
        """All runs, oldest first."""
        views = {view.run_id: view for view in stopped_runs(self._client)}
        views |= {view.run_id: view for view in map(run_view, self._runs())}
        return sorted(views.values(), key=lambda view: (view.submitted_at, view.run_id))

    def status(self, run_id: str) -> RunView:
        """One run.

        Raises:
            RunUnknown: There is no such run.
        """
        check_run_id(run_id)
        found = self._client.find("RayJob", run_id)
        view = run_view(found) if found else stopped_run(self._client, run_id)
        if view is None:
            known = [view.run_id for view in self.list()]
            raise RunUnknown(
                f"no run {run_id!r} in the namespace {self._client.namespace}; `lockstep jobs "
                f"list` shows all.{did_you_mean(run_id, known)}"
            )
        return view

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
            RunStopped: It was stopped.
            RunFailed: It failed.
        """
        for piece in self.logs(run_id, follow=True):
            show(piece)
        view = self._patiently(lambda: self.status(run_id))
        if view.status != "done":
            raise (RunStopped if view.status == "stopped" else RunFailed)(
                f"run {run_id} {view.status} in attempt {view.attempt}: "
                f"{view.message or 'no reason given'}. Submitted again under this id it goes on "
                "from its newest checkpoint."
            )
        return view

    def stop(self, run_id: str) -> RunView:
        """Ask a run to write a checkpoint and end, and wait until no pod of it is left.

        Its RayJob goes; a record that it was stopped, and its run folder, stay. Idempotent; a run
        that has ended is left as it is.

        Raises:
            RunUnknown: There is no such run.
            EnvironmentFailure: Its pods have not gone within five minutes.
        """
        view = self.status(run_id)
        if view.is_final:
            return view
        keep_stopped(self._client, view)
        found = self._client.find("RayJob", run_id)
        if found is not None:
            self._objects.delete(found)
        self._objects.until_gone(run_id)
        return self.status(run_id)

    def result(self, run_id: str, output: Path | None = None) -> dict[str, Any]:
        """A run's summary; with `output` its artifact and records are written there, whole.

        Raises:
            RunUnknown: There is no such run, or it has no summary yet.
        """
        view = self.status(run_id)
        return fetch(self._client, self.template, view.run_id, view.run_folder, output)

    def queue(self) -> Standings:
        """The queue is Kueue's: who waits, in its order, and what it says of it."""
        waiting = [item for item in self._runs() if run_view(item).status == "waiting"]
        views = {str(item["metadata"]["uid"]): run_view(item) for item in waiting}
        return kueue_standings(self._client, views) if views else []

    def _runs(self) -> Manifests:
        return self._client.items("RayJob", RUN_LABEL)

    def _forget(self, template: str) -> None:
        items = self._client.items("RayJob", f"{ORIGIN_LABEL}={template}")
        ended = [str(item["metadata"]["name"]) for item in items if run_view(item).is_final]
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
                "runs are made from. Apply an overlay of deploy/ first, or name its namespace "
                "as in --address kubernetes://NAMESPACE."
            ) from None

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


def _readable(pods: list[Manifest]) -> str:
    """The newest pod that has printed or may print."""
    names = [
        str(pod["metadata"]["name"])
        for pod in pods
        if phase_of(pod) in ("Running", "Succeeded", "Failed")
    ]
    return names[-1] if names else ""
