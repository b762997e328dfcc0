"""The order of rows: each once, the same for any number of workers, and found by arithmetic."""

import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from data_pipeline.plan import Plan, Share, auto_window_rows
from tests.support.orders import row_order, rows_by_seeking

SHUFFLES = ("none", "window", "full")


def plan_of(
    blocks: list[int], batch: int = 4, shards: int = 3, window: int = 5, **changes: Any
) -> Plan:
    values: dict[str, Any] = {"shuffle": "window", "seed": 7, **changes}
    return Plan(np.asarray(blocks, np.int64), batch, shards, window, **values)


plans = st.builds(
    plan_of,
    st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    batch=st.integers(1, 90),
    shards=st.integers(1, 20),
    window=st.integers(1, 30),
    shuffle=st.sampled_from(SHUFFLES),
    seed=st.integers(0, 2**31 - 1),
)


def odd_plans(test: Any) -> Any:
    """Always tries row counts that batches, shards and windows do not divide."""
    others = {"place": 3} if "place" in inspect.signature(test).parameters else {}
    for blocks, shuffle in itertools.product(
        ([1], [97], [0, 5, 0], [3, 1, 2], [31, 30, 30]), SHUFFLES
    ):
        for batch, shards in ((8, 16), (200, 3)):
            plan = plan_of(blocks, batch=batch, shards=shards, shuffle=shuffle)
            test = example(plan=plan, **others)(test)
    return test


def shares(plan: Plan, workers: int) -> list[Share]:
    return [Share(plan, rank, workers) for rank in range(workers)]


def worker_counts(plan: Plan) -> list[int]:
    counts = {1, 2, 3, plan.virtual_shards // 2, plan.virtual_shards}
    return sorted(workers for workers in counts if 1 <= workers <= plan.virtual_shards)


def owned_rows(share: Share, first: int, last: int) -> list[int]:
    """The epoch's rows in `[first, last)` that a worker owns, one by one."""
    return [row for row in range(first, last) if row % share.plan.virtual_shards in share.shards]


@settings(max_examples=80, deadline=None)
@given(plans)
@odd_plans
def test_each_row_is_seen_once_in_each_epoch(plan):
    for epoch in (0, 1):
        assert sorted(row_order(plan, epoch)) == list(range(plan.rows))


@settings(max_examples=40, deadline=None)
@given(plan=plans, place=st.integers(0, 999))
@odd_plans
def test_any_steps_alone_have_the_rows_of_the_whole_epoch(plan, place):
    first_step = place % plan.steps_per_epoch
    first = plan.rows_before_step(first_step)
    last = min(plan.rows_before_step(first_step + 2), first + 60)
    for epoch in (0, 3):
        expected = row_order(plan, epoch)[first:last]
        assert list(rows_by_seeking(plan, epoch, first, last)) == list(expected)


@settings(max_examples=80, deadline=None)
@given(plans)
@odd_plans
def test_steps_are_full_but_the_last(plan):
    edges = [plan.rows_before_step(step) for step in range(plan.steps_per_epoch + 1)]
    sizes = np.diff(edges)
    assert plan.steps_per_epoch == math.ceil(plan.rows / plan.global_batch_size)
    assert sizes.sum() == plan.rows
    assert set(sizes[:-1]) <= {plan.global_batch_size}
    assert 1 <= sizes[-1] <= plan.global_batch_size
    assert plan.rows_before_step(plan.steps_per_epoch + 5) == plan.rows


@settings(max_examples=80, deadline=None)
@given(plans)
@odd_plans
def test_workers_own_contiguous_shards_and_all_of_them(plan):
    for workers in range(1, plan.virtual_shards + 1):
        owned = [share.shards for share in shares(plan, workers)]
        assert list(itertools.chain(*owned)) == list(range(plan.virtual_shards))
        sizes = [len(shards) for shards in owned]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=80, deadline=None)
@given(plans)
@odd_plans
def test_local_batches_partition_each_global_batch(plan):
    """Whatever N is, step k is rows [kB, (k + 1)B) of one order, cut up without rest."""
    edges = [plan.rows_before_step(step) for step in range(plan.steps_per_epoch + 1)]
    for workers in worker_counts(plan):
        parts = shares(plan, workers)
        for step, (first, last) in enumerate(itertools.pairwise(edges)):
            rows = [owned_rows(share, first, last) for share in parts]
            assert sorted(itertools.chain(*rows)) == list(range(first, last))
            sizes = [int(share.step_offsets(step, step + 1)[1]) for share in parts]
            assert sizes == [len(own) for own in rows]


@settings(max_examples=40, deadline=None)
@given(plans)
@odd_plans
def test_rows_before_is_what_counting_gives(plan):
    for workers in worker_counts(plan):
        for share in shares(plan, workers):
            owns = [row % plan.virtual_shards in share.shards for row in range(plan.rows)]
            counted = np.concatenate([[0], np.cumsum(owns)])
            assert [share.rows_before(row) for row in range(plan.rows + 1)] == list(counted)
            steps = range(plan.steps_per_epoch + 1)
            expected = [counted[plan.rows_before_step(step)] for step in steps]
            assert list(share.step_offsets(0, plan.steps_per_epoch)) == expected
            later = share.step_offsets(plan.steps_per_epoch // 2, plan.steps_per_epoch)
            middle = expected[plan.steps_per_epoch // 2]
            assert list(later) == [rows - middle for rows in expected[plan.steps_per_epoch // 2 :]]


@settings(max_examples=80, deadline=None)
@given(plans)
@odd_plans
def test_a_workers_rows_go_through_its_shards_in_turn(plan):
    """On this the reader relies: it writes position p of its shard i to place p * shards + i."""
    for workers in worker_counts(plan):
        for share in shares(plan, workers):
            owned = len(share.shards)
            for place, row in enumerate(owned_rows(share, 0, plan.rows)):
                position, shard = divmod(row, plan.virtual_shards)
                assert share.positions(shard, row) == position
                assert share.rows_before(row) == place
                assert position * owned + share.shards.index(shard) == place


@settings(max_examples=80, deadline=None)
@given(plans)
@odd_plans
def test_shards_are_equal_up_to_a_row_and_positions_count_them(plan):
    sizes = [plan.shard_rows(shard) for shard in range(plan.virtual_shards)]
    assert sum(sizes) == plan.rows
    assert max(sizes) - min(sizes) <= 1
    starts = [plan.shard_start(shard) for shard in range(plan.virtual_shards)]
    assert starts == [sum(sizes[:shard]) for shard in range(plan.virtual_shards)]
    share = Share(plan, 0, 1)
    for shard, size in enumerate(sizes):
        counted = [row for row in range(plan.rows) if row % plan.virtual_shards == shard]
        assert share.positions(shard, plan.rows) == size == len(counted)
        half = plan.rows // 2
        assert share.positions(shard, half) == len([row for row in counted if row < half])
        windows = [plan.for_epoch(0).window_positions(shard, w) for w in range(plan.windows(shard))]
        assert list(itertools.chain(*(range(*window) for window in windows))) == list(range(size))


@settings(max_examples=80, deadline=None)
@given(plans)
@odd_plans
def test_a_worker_without_rows_is_always_foreseen_and_by_all_alike(plan):
    steps = plan.steps_per_epoch
    ranges = {(0, 1), (0, steps), (steps - 1, steps), (steps // 2, steps // 2 + 1)}
    for workers in worker_counts(plan):
        parts = shares(plan, workers)
        for first, last in ranges:
            answers = {share.may_be_empty(first, last) for share in parts}
            assert len(answers) == 1
            smallest = min(np.diff(share.step_offsets(first, last)).min() for share in parts)
            assert answers == {True} or smallest > 0


@odd_plans
@given(plans)
@settings(deadline=None)
def test_no_device_has_more_rows_than_foreseen_nor_none_unforeseen(plan):
    for workers, devices in itertools.product(worker_counts(plan), (1, 2, 3)):
        parts = [Share(plan, rank, workers, devices) for rank in range(workers)]
        assert len({share.most_rows for share in parts}) == 1
        for step in range(plan.steps_per_epoch):
            rows = [int(np.diff(share.step_offsets(step, step + 1))[0]) for share in parts]
            of_devices = [
                count * (device + 1) // devices - count * device // devices
                for count in rows
                for device in range(devices)
            ]
            assert max(of_devices) <= parts[0].most_rows
            if min(of_devices) == 0:
                assert parts[0].may_be_empty(step, step + 1)


def test_full_batches_of_at_least_a_row_a_shard_are_known_not_to_be_empty():
    """The quick path exists: foreseeing emptiness everywhere would pass the test above."""
    share = Share(plan_of([100], batch=16, shards=16), 0, 4)
    assert not share.may_be_empty(0, 6)
    assert share.may_be_empty(0, 7)  # the last step has four rows
    assert share.may_be_empty(6, 7)
    assert Share(plan_of([100], batch=15, shards=16), 0, 4).may_be_empty(0, 1)


@settings(max_examples=80, deadline=None)
@given(plans)
def test_batches_draw_from_all_parts_of_the_stream_in_fixed_proportion(plan):
    """Row t comes from shard t % V, which is one stretch of the stream of permuted blocks."""
    assume(plan.shuffle != "none")
    edges = np.concatenate([[0], np.cumsum(plan.block_rows)])
    blocks = plan.for_epoch(0).block_order
    stream = np.concatenate([np.arange(edges[block], edges[block + 1]) for block in blocks])
    order = row_order(plan, 0)
    for shard in range(plan.virtual_shards):
        start = plan.shard_start(shard)
        stretch = stream[start : start + plan.shard_rows(shard)]
        assert sorted(order[shard :: plan.virtual_shards]) == sorted(stretch)


@settings(max_examples=80, deadline=None)
@given(plans)
def test_rows_stay_inside_their_window(plan):
    """What bounds the memory of a worker: a window is all that is held of a shard."""
    order = plan.for_epoch(1)
    for shard in range(plan.virtual_shards):
        for window in range(plan.windows(shard)):
            permutation = order.window_permutation(shard, window)
            first, last = order.window_positions(shard, window)
            if plan.shuffle == "window":
                assert last - first <= plan.rows_per_window
            if permutation is not None:
                assert sorted(permutation) == list(range(last - first))


@pytest.mark.parametrize(
    ("rows", "batch", "sizes"),
    [
        (1, 4, [1]),
        (3, 4, [3]),
        (4, 4, [4]),
        (5, 4, [4, 1]),
        (13, 4, [4, 4, 4, 1]),
        (2, 1, [1, 1]),
    ],
)
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_the_last_batch_is_what_is_left(rows, batch, sizes, shuffle):
    plan = plan_of([rows], batch=batch, shards=16, shuffle=shuffle)
    edges = [plan.rows_before_step(step) for step in range(plan.steps_per_epoch + 1)]
    assert list(np.diff(edges)) == sizes
    assert sorted(row_order(plan, 0)) == list(range(rows))
    total = [sum(np.diff(s.step_offsets(0, len(sizes)))) for s in shares(plan, 5)]
    assert sum(total) == rows


def test_without_shuffling_the_order_is_that_of_the_files():
    plan = plan_of([5, 0, 7, 1], batch=4, shards=3, shuffle="none")
    for epoch in (0, 1):
        assert list(rows_by_seeking(plan, epoch, 0, 13)) == list(range(13))
    assert list(plan.for_epoch(1).block_order) == [0, 1, 2, 3]


@pytest.mark.parametrize("shuffle", ["window", "full"])
def test_epochs_and_seeds_differ_and_nothing_else_does(shuffle):
    blocks = [10] * 8
    orders = {
        (seed, epoch): tuple(row_order(plan_of(blocks, shuffle=shuffle, seed=seed), epoch))
        for seed in (0, 1, 2**31 - 1)
        for epoch in (0, 1, 2, 1_000_000)
    }
    assert len(set(orders.values())) == len(orders)
    assert tuple(range(80)) not in orders.values()
    for (seed, epoch), order in orders.items():
        again = plan_of(blocks, shuffle=shuffle, seed=seed, batch=9)
        assert tuple(row_order(again, epoch)) == order, "the batch size must not matter"


def test_blocks_and_windows_are_permuted_each_for_itself():
    plan = plan_of([10] * 8, shards=4, window=5)
    order = plan.for_epoch(0)
    permutations = {
        tuple(order.window_permutation(shard, window)) for shard in range(4) for window in range(4)
    }
    assert len(permutations) > 10  # of 16, among 120 possible ones
    assert list(order.block_order) != list(range(8))
    assert list(order.block_order) != list(plan.for_epoch(1).block_order)


def test_the_order_is_the_one_of_earlier_versions():
    """Pinned: a run is resumed, or repeated years later, in the order it had."""
    window = plan_of([5, 3, 0, 4], shards=2, window=3, seed=7)
    assert list(row_order(window, 1)) == [8, 7, 10, 0, 9, 1, 5, 2, 11, 3, 6, 4]
    full = plan_of([5, 3, 0, 4], shards=2, shuffle="full", seed=7)
    assert list(row_order(full, 1)) == [11, 4, 5, 0, 8, 1, 10, 7, 9, 3, 6, 2]


def test_a_step_far_into_a_large_plan_is_found_without_the_steps_before():
    """10^10 rows in 10^5 blocks: arithmetic only, and no number overflows."""
    plan = plan_of([100_000] * 100_000, batch=65_536, shards=1_024, window=256)
    assert plan.rows == 10**10
    assert plan.steps_per_epoch == 152_588
    step = plan.steps_per_epoch - 1
    first = plan.rows_before_step(step)
    assert first == step * 65_536
    parts = shares(plan, 1_000)
    assert sum(share.rows_before(first) for share in parts) == first
    assert sum(int(share.step_offsets(step, step + 1)[1]) for share in parts) == 10**10 - first
    rows = rows_by_seeking(plan, 2, first, first + 3)
    assert len({int(row) for row in rows}) == 3
    assert all(0 <= row < 10**10 for row in rows)


@pytest.mark.parametrize(
    ("row_bytes", "shards", "rows"),
    [(40, 16, 65_536), (4_096, 16, 4_096), (100_000, 16, 256), (1, 1, 65_536), (0, 1, 65_536)],
)
def test_the_window_is_chosen_by_memory_within_bounds(row_bytes, shards, rows):
    assert auto_window_rows(row_bytes, shards) == rows
