"""Seeking: any step of any number of workers, what windows need, and plans of any size."""

import itertools
import time
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.plan import Plan, Share
from tests.support.orders import plans, row_order, rows_by_seeking


def rows_of_step(plan: Plan, order: Any, workers: int, step: int) -> list[int]:
    """File rows of a step, of all workers one after the other."""
    first, last = plan.step_edges(step, step + 1).tolist()
    found: list[int] = []
    for rank in range(workers):
        share = Share(plan, rank, workers)
        for shard in share.shards:
            start, stop = share.positions(shard, first), share.positions(shard, last)
            rows = np.arange(start, stop) * plan.virtual_shards + shard
            found += order[rows].tolist()
    return found


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 999), st.integers(1, 20), st.integers(1, 20))
def test_another_number_of_workers_goes_on_from_any_step(plan, place, before, after):
    """Each row once, whatever the numbers of workers before and after."""
    before, after = min(before, plan.virtual_shards), min(after, plan.virtual_shards)
    order = row_order(plan, 1)
    change = place % (plan.steps_per_epoch + 1)
    found: list[int] = []
    for step in range(plan.steps_per_epoch):
        rows = rows_of_step(plan, order, before if step < change else after, step)
        first, last = plan.step_edges(step, step + 1).tolist()
        assert sorted(rows) == sorted(order[first:last])
        found += rows
    assert sorted(found) == list(range(plan.rows))


@settings(max_examples=40, deadline=None)
@given(plans, st.integers(0, 999))
def test_seeking_gives_what_going_through_gives(plan, place):
    first = place % plan.rows
    last = min(first + 40, plan.rows)
    expected = row_order(plan, 2)[first:last]
    assert list(rows_by_seeking(plan, 2, first, last)) == list(expected)


@settings(max_examples=80, deadline=None)
@given(plans)
def test_edges_of_many_steps_are_those_of_each(plan):
    steps = range(plan.steps_per_epoch + 2)
    assert plan.step_edges(0, steps[-1]).tolist() == [plan.rows_before_step(s) for s in steps]
    later = plan.step_edges(1, steps[-1])
    assert later.tolist() == [plan.rows_before_step(s) for s in steps[1:]]


@settings(max_examples=80, deadline=None)
@given(plans, st.integers(0, 999))
def test_blocks_know_how_many_windows_need_them(plan, place):
    """From any row on; this is how long a decoded block is kept."""
    order = plan.for_epoch(0)
    for workers in {1, 2, plan.virtual_shards} & set(range(plan.virtual_shards + 1)):
        for rank, first_row in itertools.product(range(workers), (0, place % plan.rows)):
            share = Share(plan, rank, workers)
            needed = dict.fromkeys(range(len(plan.block_rows)), 0)
            for shard in share.shards:
                begin = share.positions(shard, first_row)
                if begin == plan.shard_rows(shard):
                    continue
                for window in range(begin // plan.rows_per_window, plan.windows(shard)):
                    for segment in order.window_segments(shard, window)[0]:
                        needed[segment.block] += 1
            found = {block: share.window_uses(order, block, first_row) for block in needed}
            assert found == needed


def test_blocks_are_where_the_stream_has_them():
    plan = Plan(np.asarray([5, 0, 3, 4]), 4, 2, 3, "window", 1)
    order = plan.for_epoch(0)
    spans = [order.block_span(int(block)) for block in order.block_order]
    assert spans[0][0] == 0
    assert spans[-1][1] == 12
    assert [stop - start for start, stop in spans] == plan.block_rows[order.block_order].tolist()
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_a_step_of_a_million_blocks_is_found_at_once():
    """10^10 rows for 1,000 workers; `make bench-data` has the times of this machine."""
    plan = Plan(np.full(1_000_000, 10_000, np.int64), 65_536, 1_024, 65_536, "window", 5)
    order = plan.for_epoch(1)
    assert order.stream_starts[-1] == 10**10  # what is done once an epoch
    begin = time.process_time()
    for place in range(200):
        step = place * 761 % plan.steps_per_epoch
        share = Share(plan, place * 5 % 1_000, 1_000)
        first, last = plan.step_edges(step, step + 1).tolist()
        assert share.step_offsets(step, step + 1)[1] >= 64
        for shard in share.shards:
            window = share.positions(shard, first) // plan.rows_per_window
            segments, _ = order.window_segments(shard, window)
            low, high = order.window_positions(shard, window)
            assert sum(segment.stop - segment.start for segment in segments) == high - low
        assert last - first <= 65_536
    assert (time.process_time() - begin) / 200 < 0.005  # five times what it may take
