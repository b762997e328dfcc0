"""Windows: the rows of the plan, each block decoded once an epoch, and a bound on what is held."""

import itertools
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.blocks import Block
from data_pipeline.errors import ReadError
from data_pipeline.features import InputColumn, InputLayout
from data_pipeline.plan import Plan, Share
from data_pipeline.rows import ChunkMemory, RowMemory, joined, permuted, rows_of
from data_pipeline.windows import WindowReader, most_rows_held
from tests.support.orders import plans, row_order

NUMBER = (InputColumn("x", (1,), 0, False),)
LAYOUT = InputLayout(NUMBER, "y", "int64", 1, None)


class Blocks:
    """Blocks of numbered rows in place of a `BlockReader`; counts what is decoded and alive."""

    def __init__(self, block_rows: Any) -> None:
        self.edges = np.concatenate([[0], np.cumsum(block_rows)])
        self.decoded: list[int] = []
        self.most_rows = 0
        self._alive: list[weakref.ref[Any]] = []
        self._lock = threading.Lock()

    def read(self, number: int) -> Block:
        rows = np.arange(self.edges[number], self.edges[number + 1])
        inputs = rows.astype("f4")[:, None].copy()
        with self._lock:
            self.decoded.append(number)
            self._alive = [kept for kept in self._alive if kept() is not None]
            self._alive.append(weakref.ref(inputs))  # these stay where they are: see `rows_of`
            self.most_rows = max(self.most_rows, self.rows_alive())
        return Block((inputs,), -rows[:, None], None, {})

    def rows_alive(self) -> int:
        return sum(len(rows) for kept in self._alive if (rows := kept()) is not None)


def read_rows(windows: WindowReader, share: Share, epoch: int, first: int, last: int) -> list[int]:
    out = ChunkMemory(LAYOUT).empty(share.rows_before(last) - share.rows_before(first))
    windows.copy(epoch, first, last, out)
    np.testing.assert_array_equal(out.labels[:, 0], -out.inputs[:, 0])
    assert out.weights is not None
    assert set(out.weights) <= {1.0}
    rows: list[int] = out.inputs[:, 0].astype(int).tolist()
    return rows


@settings(max_examples=80, deadline=None)
@given(plans, st.integers(1, 3), st.lists(st.integers(0, 720), max_size=6), st.integers(0, 720))
def test_rows_are_those_of_the_plan_and_no_block_is_decoded_twice(plan, workers, cuts, begin):
    """For any cuts of two epochs, from any row of the first one on."""
    workers, begin = min(workers, plan.virtual_shards), begin % plan.rows
    edges = sorted({begin, plan.rows, *(cut for cut in cuts if begin < cut < plan.rows)})
    for rank in range(workers):
        share, blocks = Share(plan, rank, workers), Blocks(plan.block_rows)
        windows = WindowReader(share, blocks, LAYOUT, 2, 2)
        found = []
        for epoch, starts in ((0, edges), (1, [0, plan.rows])):
            for first, last in itertools.pairwise(starts):
                found += read_rows(windows, share, epoch, first, last)
        expected = []
        for epoch, first_row in ((0, begin), (1, 0)):
            order = row_order(plan, epoch)[first_row:]
            is_own = [
                (first_row + k) % plan.virtual_shards in share.shards for k in range(len(order))
            ]
            expected += order[is_own].tolist()
        assert found == expected
        needed = [
            block
            for epoch, first_row in ((0, begin), (1, 0))
            for block in range(len(plan.block_rows))
            if share.window_uses(plan.for_epoch(epoch), block, first_row)
        ]
        assert sorted(blocks.decoded) == sorted(needed)
        assert blocks.rows_alive() == 0
        assert blocks.most_rows <= most_rows_held(share, 2)


def test_blocks_are_dropped_long_before_the_epoch_ends():
    """The bound above is no more than a bound: here it is far from all rows, and held."""
    plan = Plan(np.full(400, 50, np.int64), 64, 4, 50, "window", 3)
    share, blocks = Share(plan, 0, 1), Blocks(plan.block_rows)
    windows = WindowReader(share, blocks, LAYOUT, 1, 2)
    for step in range(plan.steps_per_epoch):
        read_rows(windows, share, 0, *plan.step_edges(step, step + 1).tolist())
    assert len(blocks.decoded) == 400
    assert blocks.most_rows <= most_rows_held(share, 2) < plan.rows / 8


def test_reading_anew_starts_over_wherever_it_is():
    plan = Plan(np.full(9, 30, np.int64), 16, 3, 20, "window", 3)
    share, blocks = Share(plan, 0, 1), Blocks(plan.block_rows)
    windows = WindowReader(share, blocks, LAYOUT, 2, 2)
    order = [row_order(plan, epoch).tolist() for epoch in (0, 1)]
    for epoch, first, last in [(0, 0, 50), (0, 200, 270), (1, 0, 9), (1, 100, 110), (0, 40, 60)]:
        assert read_rows(windows, share, epoch, first, last) == order[epoch][first:last]


def test_what_was_held_for_another_place_is_let_go():
    plan = Plan(np.full(400, 30, np.int64), 16, 4, 20, "window", 3)
    share, blocks = Share(plan, 0, 1), Blocks(plan.block_rows)
    windows = WindowReader(share, blocks, LAYOUT, 1, 2)
    for place in range(0, plan.rows, 199):
        read_rows(windows, share, 0, place, place + 1)
    windows._pool.shutdown(wait=True)
    assert blocks.rows_alive() <= most_rows_held(share, 2) < plan.rows / 8


def test_the_next_windows_are_read_before_they_are_needed():
    plan = Plan(np.full(8, 10, np.int64), 8, 2, 10, "window", 3)
    share, blocks = Share(plan, 0, 1), Blocks(plan.block_rows)
    windows = WindowReader(share, blocks, LAYOUT, 2, 1)
    read_rows(windows, share, 0, 0, 2)
    windows._pool.shutdown(wait=True)
    assert {number // 1 for number in blocks.decoded} >= {
        segment.block
        for shard in (0, 1)
        for window in (0, 1)
        for segment in plan.for_epoch(0).window_segments(shard, window)[0]
    }


def test_a_block_that_cannot_be_read_is_told_to_the_caller():
    class Broken(Blocks):
        def read(self, number: int) -> Block:
            raise ReadError("gone")

    plan = Plan(np.full(3, 10, np.int64), 8, 2, 10, "window", 3)
    share = Share(plan, 0, 1)
    windows = WindowReader(share, Broken(plan.block_rows), LAYOUT, 1, 2)
    for _ in range(2):
        with pytest.raises(ReadError, match="gone"):
            read_rows(windows, share, 0, 0, 8)


def test_bytes_stay_bytes_until_they_are_dealt_out():
    """Images take a quarter of the memory, and become numbers in the chunk."""
    layout = InputLayout((InputColumn("x", (3,), 0, False),), "y", "float32", 2, "w")
    values = np.arange(12, dtype="u1").reshape(4, 3)
    label, weight = np.arange(8, dtype="f4").reshape(4, 2), np.arange(4, dtype="f4")
    block = Block((values,), label, weight, {})
    memory = RowMemory(layout, 4)
    whole = rows_of(block, layout, memory)
    rows = joined([whole.part(slice(1, 4)), whole.part(slice(0, 1))], memory)
    assert rows.inputs.dtype == np.uint8
    rows = permuted(rows, np.asarray([3, 0, 2, 1]), memory)
    out = ChunkMemory(layout).empty(4)
    for mine, theirs in out.pairs(rows):
        mine[:] = theirs
    assert out.inputs.dtype == np.float32
    expected = [0, 1, 3, 2]
    np.testing.assert_array_equal(out.inputs, values[expected])
    np.testing.assert_array_equal(out.labels, label[expected])
    np.testing.assert_array_equal(out.weights, weight[expected])


@pytest.mark.parametrize("columns", [1, 2, 9, 300])
def test_columns_become_rows(columns):
    """Also where there are more rows than a tile has, from a part of a block with a stride."""
    features = tuple(InputColumn(f"c{index}", (), index, False) for index in range(columns))
    layout = InputLayout(features, "y", "int64", 1, None)
    values = np.random.default_rng(0).normal(size=(3_000, columns)).astype("f4")
    label = np.arange(3_000)[:, None]
    block = Block(tuple(values.T), label, None, {})
    memory = RowMemory(layout, 3_000)
    whole = rows_of(block, layout, memory)
    rows = joined([whole.part(slice(7, 2_900, 2)), whole.part(slice(0, 5))], memory)
    chosen = [*range(7, 2_900, 2), *range(5)]
    np.testing.assert_array_equal(rows.inputs, values[chosen])
    np.testing.assert_array_equal(rows.labels, label[chosen])
    assert rows.weights is None


def test_rows_lie_where_tensorflow_takes_them_over():
    layout = InputLayout(NUMBER, "y", "float32", 3, "w")
    for count in (1, 17, 100_000):
        rows = ChunkMemory(layout).empty(count)
        for array in (rows.inputs, rows.labels, rows.weights):
            assert array is not None
            assert array.flags.c_contiguous
            assert array.ctypes.data % 64 == 0
            assert len(array) == count


def test_memory_of_a_chunk_is_used_again_only_when_nobody_has_it():
    layout = InputLayout(NUMBER, "y", "float32", 1, None)
    memory = ChunkMemory(layout)
    first = memory.empty(100)
    first.inputs.fill(5.0)
    address, part = first.inputs.ctypes.data, first.inputs[3:7]
    del first
    second = memory.empty(100)
    second.inputs.fill(7.0)
    assert part.tolist() == [[5.0]] * 4
    assert second.inputs.ctypes.data != address
    del part
    assert memory.empty(90).inputs.ctypes.data == address
    assert memory.empty(200).inputs.shape == (200, 1)
