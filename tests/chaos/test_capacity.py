"""A node is gone and nothing replaces it: the run goes on with fewer, and grows again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lockstep
from tests.support.chaos import EPOCHS, OWN_CODE, assert_each_row_once, chaos_job, events_of
from tests.support.drivers import driving
from tests.support.jobs import final_weights

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(240),
]

TOLERANCE = 4e-5


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each, on this machine."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=small)
    yield made
    made.shutdown()


def capacity_job(rows: Path, runs: Path, pause_s: float) -> dict[str, Any]:
    """Without what depends on the number of workers by design, or magnifies rounding as Adam does.

    One worker all the way instead of two moves these weights by 4e-6 at most, another seed by 0.08
    at least.
    """
    return chaos_job(
        rows,
        runs,
        model__layers=[{"Dense": {"units": 8, "activation": "tanh"}}, {"Dense": {"units": 1}}],
        compile__optimizer={"SGD": {"learning_rate": 0.01, "momentum": 0.9}},
        compile__loss="mae",
        train__epochs=5 * EPOCHS,
        train__callbacks=[{f"{OWN_CODE}:Slow": {"seconds": pause_s}}],
        cluster__min_workers=1,
        cluster__replace_timeout_s=2.0,
    )


def test_a_lost_node_makes_the_gang_smaller_until_there_is_another(
    rows: Path, tmp_path: Path, cluster: Any
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    job = capacity_job(rows, tmp_path / "runs", 1.0)
    with driving(job, "--address", cluster.address) as driver:
        driver.until("checkpoint", lambda event: event["step"] >= 24)
        cluster.remove_node(node, allow_graceful=False)
        driver.until("forming", lambda event: event["workers"] == 1)
        driver.until("recovered")
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        driver.until("pausing", lambda event: "room for more" in event["reason"])
        assert driver.wait() == 0
    stages = [event for event in events_of(driver.folder, "forming") if event["stage"] == "train"]
    assert [stage["workers"] for stage in stages] == [2, 1, 2]
    run = lockstep.api.Run(driver.folder)
    assert_each_row_once(run)
    quiet = lockstep.train(capacity_job(rows, tmp_path / "quiet", 0.0))
    ours, theirs = final_weights(run), final_weights(quiet)
    for name, values in theirs.items():
        if name.startswith("model/"):
            np.testing.assert_allclose(ours[name], values, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_run_begins_with_the_hosts_there_are_and_grows(
    rows: Path, tmp_path: Path, cluster: Any
) -> None:
    """As one that is resumed after a node has gone, or whose coordinator has a successor."""
    job = capacity_job(rows, tmp_path / "runs", 1.0)
    with driving(job, "--address", cluster.address) as driver:
        driver.until("formed")
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        driver.until("pausing", lambda event: "room for more" in event["reason"])
        assert driver.wait() == 0, driver.said
    stages = [event for event in events_of(driver.folder, "forming") if event["stage"] == "train"]
    assert [stage["workers"] for stage in stages] == [1, 2]
    assert_each_row_once(lockstep.api.Run(driver.folder))
