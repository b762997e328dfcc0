"""Which node gets the next host, and how long a lease lasts."""

import pytest

from cluster.lease import Lease
from cluster.nodes import Node, choose

NEED = {"CPU": 2.0, "GPU": 1.0}
ROOM = {"CPU": 4.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("nodes", "used", "expected"),
    [
        ([Node("a", "", free=ROOM), Node("b", "", free=ROOM)], ["a"], "b"),
        ([Node("a", "", free=ROOM), Node("b", "", free=ROOM)], ["a", "b", "b"], "a"),
        ([Node("a", "", free=ROOM), Node("b", "", free={"CPU": 4.0})], ["a"], "a"),
        ([Node("a", "", free={"CPU": 1.0, "GPU": 1.0})], [], None),
        ([Node("a", "", is_draining=True, free=ROOM), Node("b", "", free=ROOM)], ["b"], "b"),
        ([Node("shunned", "", free=ROOM), Node("b", "", free=ROOM)], ["b"], "b"),
        ([], [], None),
    ],
)
def test_a_host_goes_where_room_is_and_the_fewest_are(
    nodes: list[Node], used: list[str], expected: str | None
) -> None:
    found = choose(nodes, NEED, used, {"shunned"})
    assert (found and found.node_id) == expected


def test_what_one_host_takes_is_not_there_for_the_next() -> None:
    node = Node("a", "", free=ROOM)
    assert choose([node.without(NEED)], NEED, []) is None
    assert choose([node.without(NEED)], {"CPU": 2.0}, []) is not None


def test_a_lease_runs_out_unless_it_is_renewed() -> None:
    now = 0.0
    lease = Lease(20, lambda: now)
    now = 15.0
    assert lease.left_s() == 5
    lease.renew()
    now = 34.0
    assert lease.left_s() == 1
    now = 36.0
    assert lease.left_s() == 0
