"""The nodes of the cluster, as far as placing hosts asks: alive, leaving, with how much room.

All that is read of Ray's own state is read here; the choice between nodes is pure.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import ray
from ray._private import state as ray_state
from ray._private import worker
from ray.core.generated import autoscaler_pb2

from cluster.errors import NodeStays


@dataclass(frozen=True)
class Node:
    """A node that Ray believes alive.

    Attributes:
        node_id: Ray's name for it.
        address: Its network address.
        is_draining: It is about to leave and takes nothing new.
        free: Resources that nobody holds, by name.
    """

    node_id: str
    address: str
    is_draining: bool = False
    free: Mapping[str, float] = field(default_factory=dict)

    def without(self, need: Mapping[str, float]) -> "Node":
        """The same node once somebody holds `need`."""
        free = {name: amount - need.get(name, 0.0) for name, amount in self.free.items()}
        return replace(self, free=free)


def alive_nodes() -> list[Node]:
    """What Ray knows now. A node that died a moment ago may still be among them."""
    free = ray_state.available_resources_per_node()
    draining = draining_nodes()
    return [
        Node(
            node["NodeID"],
            str(node["NodeManagerAddress"]),
            node["NodeID"] in draining,
            free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def draining_nodes() -> set[str]:
    """Ids of nodes that are being drained: by `ray drain-node`, an autoscaler or a SIGTERM.

    Ray has no public call for it; this one is that of its own libraries, as of 2.60.
    """
    return set(ray_state.state.get_draining_nodes())


def drain(node_id: str, within_s: float) -> None:
    """Announce that a node goes within so many seconds: nothing new is placed there.

    Ray has no public call for it; this one is that of `ray drain-node`, as of 2.60.

    Raises:
        NodeStays: Ray refuses.
    """
    deadline_ms = int((time.time() + within_s) * 1000)
    is_accepted, reason = worker.global_worker.gcs_client.drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "the node is about to go",
        deadline_ms,
    )
    if not is_accepted:
        raise NodeStays(f"Ray does not let node {node_id} go: {reason}.")


def live_actors(node_id: str) -> int:
    """Actors on a node that have not ended."""
    return sum(
        actor["State"] == "ALIVE" and actor["Address"]["NodeID"] == node_id
        for actor in ray_state.actors().values()
    )


def choose(
    nodes: Sequence[Node],
    need: Mapping[str, float],
    used: Sequence[str],
    shunned: Collection[str] = (),
) -> Node | None:
    """The node for one more host: with room, on which the fewest of `used` node ids are.

    Returns None where no node has room. Nodes in `shunned` and draining ones are left out.
    """
    fitting = [
        node
        for node in nodes
        if not node.is_draining
        and node.node_id not in shunned
        and all(node.free.get(name, 0.0) >= amount for name, amount in need.items())
    ]
    return min(fitting, key=lambda node: (used.count(node.node_id), node.node_id), default=None)
