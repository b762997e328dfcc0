"""What is left of a run on Kubernetes that was stopped: a small ConfigMap beside its run folder.

Its RayJob is deleted, because that is how the operator ends a run cleanly; without a record the run
would be unknown from then on. A run that is submitted again needs none.
"""

import contextlib
import json
from dataclasses import asdict, replace

from cluster.submit import RunView
from lockstep.kubernetes_client import AlreadyThere, KubernetesClient, NotThere
from lockstep.kustomize import Manifest

_LABEL = "lockstep/stopped"
_MESSAGE = "stopped; submitting it again resumes it."


def keep_stopped(client: KubernetesClient, view: RunView) -> None:
    """Remember a run that is about to be stopped. Idempotent."""
    record = replace(view, status="stopped", message=_MESSAGE)
    labels = {"app.kubernetes.io/part-of": "lockstep", _LABEL: view.run_id}
    with contextlib.suppress(AlreadyThere):
        client.create(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": _name(view.run_id), "labels": labels},
                "data": {"run.json": json.dumps(asdict(record))},
            }
        )


def stopped_run(client: KubernetesClient, run_id: str) -> RunView | None:
    """A run that was stopped; None where none is remembered."""
    found = client.find("ConfigMap", _name(run_id))
    return _view(found) if found else None


def stopped_runs(client: KubernetesClient) -> list[RunView]:
    """All runs that were stopped, and not submitted again."""
    return [_view(item) for item in client.items("ConfigMap", _LABEL)]


def forget(client: KubernetesClient, run_id: str) -> None:
    """The run goes on. Idempotent."""
    with contextlib.suppress(NotThere):
        client.delete("ConfigMap", _name(run_id))


def _name(run_id: str) -> str:
    """No run has a dot in its id, so no run's own ConfigMap has this name."""
    return f"{run_id}.stopped"


def _view(item: Manifest) -> RunView:
    return RunView(**json.loads(item["data"]["run.json"]))
