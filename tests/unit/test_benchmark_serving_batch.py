"""What the benchmark of batch jobs makes of what it measured."""

from benchmarks.harness import Row
from benchmarks.serving_batch import (
    FUNCTION,
    RAY,
    RAY_RUN,
    SERVICE,
    SERVICE_ALL,
    batch_peers,
    batch_results,
)


def rows(**values):
    names = {"service": SERVICE, "all": SERVICE_ALL, "ray": RAY, "run": RAY_RUN, "f": FUNCTION}
    return {names[key]: Row(names[key], "rows/s", tuple(v)) for key, v in values.items()}


def test_targets_are_held_against_medians():
    ratios, targets = batch_results(
        rows(
            service=[3.9, 4.0, 9.0],
            all=[3, 3, 3],
            ray=[0.2, 0.25, 0.4],
            run=[0.4, 0.5, 0.6],
            f=[8, 8, 8],
        )
    )
    assert [(target.value, target.target, target.is_met) for target in targets] == [
        (8.0, 8.0, True),
        (0.5, 0.5, True),
    ]
    assert ratios[1].values == (3.9 / 0.4, 8.0, 15.0)
    _, targets = batch_results(rows(service=[3.9], all=[3], ray=[0.1], run=[0.5], f=[8]))
    assert not any(target.is_met for target in targets)


def test_every_peer_is_told_apart():
    names = [peer.name for peer in batch_peers(is_quick=False)]
    assert sorted(names) == sorted({SERVICE, SERVICE_ALL, RAY, RAY_RUN, FUNCTION})
