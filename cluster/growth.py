"""A cluster that grows when it is asked to: how far, and the asking.

Ray does not tell how large its autoscaler may make a cluster; who deploys one says so in the
environment of its nodes, `LOCKSTEP_GROWS_TO`, a JSON list such as `[{"nodes": 8, "CPU": 2}]`.
Without it the cluster is what is there.
"""

import json
import os
from collections.abc import Mapping, Sequence

import ray.autoscaler.sdk

from cluster.room import Shape
from configs.errors import EnvironmentFailure

_VARIABLE = "LOCKSTEP_GROWS_TO"
_ALLOWED = '[{"nodes": 8, "CPU": 2}]'

Resources = Mapping[str, float]


def nodes_to_come() -> list[Resources]:
    """The resources of every node that may come, by Ray's names; empty where none may.

    Raises:
        EnvironmentFailure: What the environment says cannot be read.
    """
    text = os.environ.get(_VARIABLE, "")
    if not text:
        return []
    try:
        kinds = [dict(kind) for kind in json.loads(text)]
        counts = [int(kind.pop("nodes")) for kind in kinds]
        amounts = [{name: float(value) for name, value in kind.items()} for kind in kinds]
    except (ValueError, TypeError, KeyError) as error:
        raise EnvironmentFailure(
            f"{_VARIABLE} received {text!r}; a JSON list such as {_ALLOWED} is allowed. Correct it "
            "in the environment of the cluster's nodes, or take it away."
        ) from error
    return [kind for count, kind in zip(counts, amounts, strict=True) for _ in range(count)]


class Growth:
    """Asks the autoscaler for the nodes that gangs need; does nothing where there is none."""

    def __init__(self) -> None:
        self._asked: list[dict[str, float]] = []

    def ask(self, shapes: Sequence[Shape]) -> None:
        """Have nodes for all of these gangs together, those that run among them.

        What was asked for before is asked for no longer.

        Raises:
            EnvironmentFailure: As `nodes_to_come`.
        """
        if not nodes_to_come():
            return
        bundles = [
            {"CPU": shape.worker.cpus} | ({"GPU": shape.worker.gpus} if shape.worker.gpus else {})
            for shape in shapes
            for _ in range(shape.workers)
        ]
        if bundles != self._asked:
            ray.autoscaler.sdk.request_resources(bundles=bundles)
            self._asked = bundles
