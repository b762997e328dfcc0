"""Hosts in network namespaces, and on one node the run that nothing disturbed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ray_session, rows  # noqa: F401
from tests.support.netns import Network, why_not


@pytest.fixture(scope="session")
def undisturbed(
    ray_session: None,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """What every disturbed run of the same job has to equal."""
    import lockstep
    from tests.support.chaos import chaos_job

    return lockstep.train(chaos_job(rows, tmp_path_factory.mktemp("undisturbed")))


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
