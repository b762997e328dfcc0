"""How well an order shuffles: arithmetic on the plan, against a full permutation of all rows.

The worst case is looked at, files that are sorted by the label: a row's label is its place in the
files. Nothing is read. Of large plans a sample of the steps is looked at.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.plan import EpochOrder, Plan, Share

_MOST_STEPS = 256
_MOST_PERMUTED_ROWS = 50_000_000


@dataclass(frozen=True)
class ShuffleQuality:
    """What an order makes of sorted files.

    Attributes:
        travel: Mean distance between a row's place in the files and in the epoch, as a share of
            what a full permutation gives, a third of all rows. 0 for the order of the files.
        autocorrelation: Correlation of the labels of neighbours in a batch, around the mean of the
            batch. Near 1 where they are still sorted, near 0 where they know nothing of each other.
        mean_spread: Standard deviation of the batches' mean labels, as a multiple of what batches
            drawn from all rows have. 1 is ideal; more: batches differ from each other.
        steps: Steps that were looked at.
    """

    travel: float
    autocorrelation: float
    mean_spread: float
    steps: int


def shuffle_quality(plan: Plan, epoch: int = 0) -> ShuffleQuality:
    """Quality of the order of one epoch, from at most 256 of its full steps."""
    rows, batch = plan.rows, min(plan.global_batch_size, plan.rows)
    order = _FileRows(plan.for_epoch(epoch))
    distance = products = squares = deviations = 0.0
    steps = sample_steps(plan)
    for step in steps:
        first = step * batch
        places = order.of(first, first + batch)
        distance += float(np.abs(places - np.arange(first, first + batch)).mean())
        labels = (places + 0.5) / rows
        centered = labels - labels.mean()
        products += float((centered[1:] * centered[:-1]).sum())
        squares += float((centered**2).sum())
        deviations += float((labels.mean() - 0.5) ** 2)
    # Variance of a label, and of the mean of a batch drawn without putting back.
    variance = (1 - 1 / rows**2) / 12
    ideal = variance / batch * (rows - batch) / max(1, rows - 1)
    return ShuffleQuality(
        travel=3 * distance / len(steps) / max(1.0, rows - 1 / rows),
        autocorrelation=products / squares if squares else 0.0,
        mean_spread=float(np.sqrt(deviations / len(steps) / ideal)) if ideal else 1.0,
        steps=len(steps),
    )


def sample_steps(plan: Plan) -> list[int]:
    """Full steps all over the epoch, few enough for the windows that they take to be permuted."""
    full_steps = max(1, plan.rows // plan.global_batch_size)
    rows_of_windows = plan.rows_per_window * plan.virtual_shards
    windows = -(-plan.rows // rows_of_windows)
    looked_at = max(1, min(windows, _MOST_PERMUTED_ROWS // rows_of_windows))
    if plan.shuffle == "none" or looked_at == windows:
        return _spread(0, full_steps, _MOST_STEPS)
    steps: list[int] = []
    for window in _spread(0, windows, looked_at):
        first = window * rows_of_windows // plan.global_batch_size
        last = min((window + 1) * rows_of_windows // plan.global_batch_size, full_steps)
        first = min(first, full_steps - 1)
        steps += _spread(first, max(first + 1, last), _MOST_STEPS // looked_at)
    return sorted(set(steps))


def _spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` (at least one) numbers of `[first, last)`, evenly spread."""
    found = np.linspace(first, last - 1, max(1, min(count, last - first)))
    return sorted({int(number) for number in np.round(found)})


class _FileRows:
    """Where the rows of an epoch stand in the files."""

    def __init__(self, order: EpochOrder) -> None:
        self._order = order
        self._share = Share(order.plan, 0, 1)
        self._starts = np.concatenate([[0], np.cumsum(order.plan.block_rows)])
        self._permuted: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def of(self, first: int, last: int) -> NDArray[np.int64]:
        """`(last - first,)`: file rows of the rows `[first, last)` of the epoch."""
        plan, order = self._order.plan, self._order
        if plan.shuffle == "none":
            return np.arange(first, last)
        positions = np.empty(last - first, np.int64)  # in the stream
        for shard in range(plan.virtual_shards):
            start, stop = (self._share.positions(shard, row) for row in (first, last))
            place = start * plan.virtual_shards + shard - first
            for window in range(start // plan.rows_per_window, plan.windows(shard)):
                low, high = order.window_positions(shard, window)
                if low >= stop:
                    break
                begin, end = max(start, low), min(stop, high)
                chosen = self._permutation(shard, window)[begin - low : end - low]
                until = place + (end - begin) * plan.virtual_shards
                positions[place : until : plan.virtual_shards] = (
                    plan.shard_start(shard) + low + chosen
                )
                place = until
        index = np.searchsorted(order.stream_starts, positions, side="right") - 1
        places: NDArray[np.int64] = (
            self._starts[order.block_order[index]] + positions - order.stream_starts[index]
        )
        return places

    def _permutation(self, shard: int, window: int) -> NDArray[np.int64]:
        """Of a window; the last one of each shard is kept, as steps come in their order."""
        if self._permuted.get(shard, (-1,))[0] != window:
            permutation = self._order.window_permutation(shard, window)
            if permutation is None:
                first, last = self._order.window_positions(shard, window)
                permutation = np.arange(last - first)
            self._permuted[shard] = (window, permutation)
        return self._permuted[shard][1]
