"""Kueue's queue, as its Workloads tell it: one for each run that waits.

Kueue takes the greatest priority first, and of equal ones the oldest. Where runs of other
namespaces wait in the same ClusterQueue, they are not seen here.
"""

from collections.abc import Mapping
from typing import Any

from cluster.submit import RunView
from lockstep.kubernetes_client import KubernetesClient, NotThere
from lockstep.kustomize import Manifest

_REASONS = ("QuotaReserved", "Admitted", "Evicted")


def kueue_standings(
    client: KubernetesClient, waiting: Mapping[str, RunView]
) -> list[dict[str, Any]]:
    """Standings of runs that wait, by the uid of their RayJob; in Kueue's order.

    A run for which Kueue has no Workload has no position: it is not in the queue, or not yet.
    """
    known: dict[str, Manifest] = {}
    try:
        for workload in client.items("Workload"):
            for owner in workload["metadata"].get("ownerReferences") or ():
                known[str(owner["uid"])] = workload
    except NotThere:
        known = {}  # no Kueue
    placed = [uid for uid in sorted(waiting, key=lambda uid: _order(known, uid)) if uid in known]
    rows = [_row(waiting[uid], known[uid], at) for at, uid in enumerate(placed, 1)]
    return [*rows, *(_row(view, {}, None) for uid, view in waiting.items() if uid not in known)]


def _order(known: Mapping[str, Manifest], uid: str) -> tuple[int, str]:
    workload = known.get(uid, {})
    made = str((workload.get("metadata") or {}).get("creationTimestamp", ""))
    return -_priority(workload), made


def _priority(workload: Manifest) -> int:
    return int((workload.get("spec") or {}).get("priority") or 0)


def _row(view: RunView, workload: Manifest, position: int | None) -> dict[str, Any]:
    return {
        "position": position,
        "run_id": view.run_id,
        "user": view.user,
        "priority": _priority(workload),
        "reason": _reason(workload)
        or view.message
        or ("waits for Kueue to admit it" if workload else "Kueue has not taken it up"),
    }


def _reason(workload: Manifest) -> str:
    """What Kueue says of a run that it has not admitted."""
    conditions = (workload.get("status") or {}).get("conditions") or ()
    told = {str(one["type"]): str(one.get("message", "")) for one in conditions}
    return " ".join(next((told[name] for name in _REASONS if told.get(name)), "").split())
