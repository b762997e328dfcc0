"""A node's farewell: it is taken away soon, and says so while it can still hand over.

Called on the node itself, by the hook that a platform runs before it stops a machine or a pod.
"""

import time
from collections.abc import Callable

import ray

from cluster.nodes import drain, live_actors
from cluster.runtime import joined

_LOOK_S = 0.5


def leave(within_s: float, address: str = "auto", node_ip: str | None = None) -> bool:
    """Drain the node this runs on, and wait until its actors have ended or the time is over.

    Gangs with workers here take a snapshot at a common step and go on elsewhere.

    Args:
        within_s: Until when the node is there.
        address: The cluster.
        node_ip: Which node, where this machine has several. None: the only one.

    Returns:
        Whether all actors had ended in time.

    Raises:
        NodeStays: Ray refuses to let the node go.
        EnvironmentFailure: The cluster does not answer.
    """
    ends_at = time.monotonic() + within_s
    with joined(address, node_ip):
        node_id = ray.get_runtime_context().get_node_id()
        drain(node_id, within_s)
        return wait_until(lambda: live_actors(node_id) == 0, ends_at)


def wait_until(
    is_so: Callable[[], bool],
    ends_at: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Look twice a second until something is so, or the clock shows `ends_at`."""
    while not is_so():
        if clock() >= ends_at:
            return False
        sleep(_LOOK_S)
    return True
