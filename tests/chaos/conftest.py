"""Hosts in network namespaces, shared by a module's tests and whole at the start of each."""

from collections.abc import Iterator

import pytest

from tests.support.netns import Network, why_not


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    """A head without CPUs, and three hosts with one each."""
    if reason := why_not():
        pytest.skip(reason)
    with Network() as network:
        network.start_head()
        for _ in range(3):
            network.add_node(cpus=1)
        yield network


@pytest.fixture
def network(hosts: Network) -> Network:
    """The hosts, all of them there."""
    for node in hosts.nodes:
        node.restore()
    return hosts
