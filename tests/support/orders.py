"""The order of an epoch, spelt out row by row: what `data_pipeline.plan` says in closed form."""

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.plan import Plan

plans = st.builds(
    Plan,
    st.lists(st.integers(0, 60), min_size=1, max_size=12)
    .filter(any)
    .map(lambda rows: np.asarray(rows, np.int64)),
    global_batch_size=st.integers(1, 90),
    virtual_shards=st.integers(1, 20),
    window_rows=st.integers(1, 30),
    shuffle=st.sampled_from(["none", "window", "full"]),
    seed=st.integers(0, 2**31 - 1),
)
"""Small plans of any kind."""


def row_order(plan: Plan, epoch: int) -> NDArray[np.int64]:
    """`(rows,)`: the file row of each row of an epoch.

    From the definition: permuted blocks make a stream, the stream is cut into V parts, rows are
    permuted inside windows of a part, and the parts are dealt out in turn.
    """
    if plan.shuffle == "none":
        return np.arange(plan.rows)
    order = plan.for_epoch(epoch)
    edges = np.concatenate([[0], np.cumsum(plan.block_rows)])
    stream = np.concatenate(
        [np.arange(edges[block], edges[block + 1]) for block in order.block_order]
    )
    dealt = np.full(plan.rows, -1)
    for shard, rows in enumerate(np.array_split(stream, plan.virtual_shards)):
        shuffled = np.full(len(rows), -1)
        for start in range(0, len(rows), plan.rows_per_window):
            window = rows[start : start + plan.rows_per_window]
            permutation = order.window_permutation(shard, start // plan.rows_per_window)
            shuffled[start : start + len(window)] = window[permutation]
        dealt[shard :: plan.virtual_shards] = shuffled
    return dealt


def rows_by_seeking(plan: Plan, epoch: int, first: int, last: int) -> NDArray[np.int64]:
    """`(last - first,)`: file rows of the epoch's rows `[first, last)`, found as the reader does.

    Only the windows that hold these rows are asked for, each block segment by segment.
    """
    order = plan.for_epoch(epoch)
    edges = np.concatenate([[0], np.cumsum(plan.block_rows)])
    found = np.full(last - first, -1)
    for row in range(first, last):
        position, shard = divmod(row, plan.virtual_shards)
        window = position // plan.rows_per_window
        segments, stride = order.window_segments(shard, window)
        rows = np.concatenate(
            [edges[s.block] + np.arange(s.start, s.stop, stride) for s in segments]
        )
        start, stop = order.window_positions(shard, window)
        permutation = order.window_permutation(shard, window)
        rows = rows if permutation is None else rows[permutation]
        if len(rows) != stop - start:
            raise AssertionError(f"window {window} of shard {shard}: {len(rows)} rows")
        found[row - first] = rows[position - start]
    return found
