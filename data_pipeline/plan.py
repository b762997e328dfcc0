"""The order of rows as pure arithmetic: a function of (blocks, seed, epoch), never of the workers.

Each epoch permutes the blocks; the rows of the permuted blocks form one *stream*, cut into V equal
*virtual shards*; rows are permuted inside windows of a shard. Row t of the epoch is position
`t // V` of shard `t % V`, and global batch k is rows `[k * B, (k + 1) * B)`. So each batch draws
from all shards in fixed proportion, any step is found without reading, and worker r of N, which
owns a contiguous range of shards, knows its rows of any batch in closed form.

This module hides the construction; the reader asks it where rows are. It reads nothing and knows
neither TensorFlow nor Ray.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Shuffle = Literal["none", "window", "full"]


class Segment(NamedTuple):
    """Rows `[start, stop)` of one block."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Everything that fixes the order of the training rows.

    Attributes:
        block_rows: `(blocks,) int64`, rows of each block in file order.
        global_batch_size: Rows of a step.
        virtual_shards: Equal parts V of the stream.
        window_rows: Rows of a shuffle window; ignored unless `shuffle` is "window".
        shuffle: How rows are ordered.
        seed: Seed of all permutations.
    """

    block_rows: NDArray[np.int64]
    global_batch_size: int
    virtual_shards: int
    window_rows: int
    shuffle: Shuffle
    seed: int

    @functools.cached_property
    def rows(self) -> int:
        """Rows of an epoch."""
        return int(self.block_rows.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the last may be smaller."""
        return -(-self.rows // self.global_batch_size)

    def rows_before_step(self, step: int) -> int:
        """Rows of the epoch that precede `step`, counted from the epoch's start."""
        return min(step * self.global_batch_size, self.rows)

    def step_edges(self, first_step: int, last_step: int) -> NDArray[np.int64]:
        """`(steps + 1,)`: `rows_before_step` of each step and of `last_step`."""
        steps = np.arange(first_step, last_step + 1, dtype=np.int64)
        return np.minimum(steps * self.global_batch_size, self.rows)

    def shard_rows(self, shard: int) -> int:
        """Rows of a virtual shard: equal for all, up to one."""
        return max(0, -(-(self.rows - shard) // self.virtual_shards))

    def shard_start(self, shard: int) -> int:
        """Position in the stream at which a virtual shard begins (not for shuffle "none")."""
        whole, extra = divmod(self.rows, self.virtual_shards)
        return shard * whole + min(shard, extra)

    def windows(self, shard: int) -> int:
        """Number of windows of a shard."""
        return -(-self.shard_rows(shard) // self.rows_per_window)

    @functools.cached_property
    def rows_per_window(self) -> int:
        """Positions of a shard that are read together and, unless "none", shuffled together."""
        if self.shuffle == "full":
            return max(1, self.shard_rows(0))
        return self.window_rows

    def for_epoch(self, epoch: int) -> "EpochOrder":
        """The order of one epoch."""
        return EpochOrder(self, epoch)


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch: where each position of each virtual shard is found."""

    plan: Plan
    epoch: int

    @functools.cached_property
    def block_order(self) -> NDArray[np.int64]:
        """`(blocks,)`: blocks in the order of the stream."""
        blocks = len(self.plan.block_rows)
        if self.plan.shuffle == "none":
            return np.arange(blocks)
        return self._generator(0).permutation(blocks)

    @functools.cached_property
    def stream_starts(self) -> NDArray[np.int64]:
        """`(blocks + 1,)`: stream position at which each block of `block_order` begins."""
        return np.concatenate([[0], np.cumsum(self.plan.block_rows[self.block_order])])

    @functools.cached_property
    def block_places(self) -> NDArray[np.int64]:
        """`(blocks,)`: index of each block in `block_order`."""
        places = np.empty(len(self.block_order), np.int64)
        places[self.block_order] = np.arange(len(places))
        return places

    def block_span(self, block: int) -> tuple[int, int]:
        """Stream positions `[first, last)` of a block's rows."""
        place = self.block_places[block]
        return int(self.stream_starts[place]), int(self.stream_starts[place + 1])

    def window_positions(self, shard: int, window: int) -> tuple[int, int]:
        """Positions `[first, last)` of a shard that a window holds."""
        size = self.plan.rows_per_window
        return window * size, min((window + 1) * size, self.plan.shard_rows(shard))

    def window_segments(self, shard: int, window: int) -> tuple[list[Segment], int]:
        """The block rows a window is made of, in stream order, and the stride through them.

        The stride is 1, or V for shuffle "none", where a shard holds each V-th row of the files so
        that row t of the epoch is row t of the files. With a stride, each segment starts at a row
        of the shard.
        """
        first, last = self.window_positions(shard, window)
        shards = self.plan.virtual_shards
        if self.plan.shuffle != "none":
            start = self.plan.shard_start(shard)
            return self._segments(start + first, start + last, 1), 1
        begin = first * shards + shard
        return self._segments(begin, begin + (last - first - 1) * shards + 1, shards), shards

    def window_permutation(self, shard: int, window: int) -> NDArray[np.int64] | None:
        """Order of a window's rows, or None for the order of the stream."""
        if self.plan.shuffle == "none":
            return None
        first, last = self.window_positions(shard, window)
        return self._generator(1 + shard, window).permutation(last - first)

    def _segments(self, begin: int, end: int, stride: int) -> list[Segment]:
        """Block rows of the stream positions `begin, begin + stride, ...` below `end`."""
        first = int(np.searchsorted(self.stream_starts, begin, side="right")) - 1
        last = int(np.searchsorted(self.stream_starts, end, side="left"))
        edges = self.stream_starts[first : last + 1]
        # A block's first row of the stride: the first position from its start on.
        starts = begin + -(-np.maximum(edges[:-1] - begin, 0) // stride) * stride
        stops = np.minimum(edges[1:], end)
        has_rows = starts < stops
        columns = (
            self.block_order[first:last][has_rows].tolist(),
            (starts - edges[:-1])[has_rows].tolist(),
            (stops - edges[:-1])[has_rows].tolist(),
        )
        return list(map(Segment, *columns))

    def _generator(self, *key: int) -> np.random.Generator:
        """A random stream of its own for each (seed, epoch, key), the same on every machine."""
        sequence = np.random.SeedSequence([self.plan.seed, self.epoch, *key])
        return np.random.Generator(np.random.Philox(sequence))


@dataclass(frozen=True)
class Share:
    """The rows of worker `rank` of `workers`: a contiguous range of virtual shards.

    `devices` tells over how many devices each worker splits its rows again.
    """

    plan: Plan
    rank: int
    workers: int
    devices: int = 1

    @functools.cached_property
    def shards(self) -> range:
        """The virtual shards that this worker owns."""
        shards = self.plan.virtual_shards
        return range(self.rank * shards // self.workers, (self.rank + 1) * shards // self.workers)

    @property
    def most_rows(self) -> int:
        """Upper bound of the rows of any device of any worker in a step."""
        shards, batch = self.plan.virtual_shards, self.plan.global_batch_size
        of_worker = min(batch, -(-shards // self.workers) * -(-batch // shards))
        return -(-of_worker // self.devices)

    def rows_before(self, row: int) -> int:
        """Rows of this worker among the first `row` rows of an epoch."""
        whole, rest = divmod(row, self.plan.virtual_shards)
        owned = len(self.shards)
        return whole * owned + min(max(rest - self.shards.start, 0), owned)

    def step_offsets(self, first_step: int, last_step: int) -> NDArray[np.int64]:
        """`(steps + 1,)`: this worker's rows before each step, counted from `first_step`."""
        edges = self.plan.step_edges(first_step, last_step)
        whole, rest = np.divmod(edges, self.plan.virtual_shards)
        owned = len(self.shards)
        before = whole * owned
        before += np.clip(rest - self.shards.start, 0, owned)
        offsets: NDArray[np.int64] = before - before[0]
        return offsets

    def may_be_empty(self, first_step: int, last_step: int) -> bool:
        """Whether some device (the same answer on all workers) may have no row in a step."""
        smallest = self.plan.rows_before_step(last_step) - self.plan.rows_before_step(last_step - 1)
        enough = self.plan.virtual_shards * self.devices
        return min(smallest, self.plan.global_batch_size) < enough

    def positions(self, shard: int, row: int) -> int:
        """Positions of `shard` among the first `row` rows of an epoch."""
        return max(0, -(-(row - shard) // self.plan.virtual_shards))

    def window_uses(self, order: EpochOrder, block: int, first_row: int = 0) -> int:
        """Windows of this worker that hold rows of a block.

        Only windows with a row from `first_row` of the epoch on count: a run that starts there
        reads no others.
        """
        plan = self.plan
        begin, end = order.block_span(block)
        shards = np.arange(self.shards.start, self.shards.stop)
        size = plan.rows_per_window
        # Positions of each shard before a row of the epoch; see `positions`.
        position, rows = (
            -((shards - row) // plan.virtual_shards) for row in (first_row, plan.rows)
        )
        if plan.shuffle == "none":
            first, last = (-((shards - row) // plan.virtual_shards) for row in (begin, end))
        else:
            whole, extra = divmod(plan.rows, plan.virtual_shards)
            starts = shards * whole + np.minimum(shards, extra)
            first, last = (np.clip(row - starts, 0, rows) for row in (begin, end))
        windows = -(-last // size) - np.maximum(first, position) // size
        return int(windows[(first < last) & (position < rows) & (windows > 0)].sum())


def auto_window_rows(row_bytes: int, virtual_shards: int) -> int:
    """Window size for rows of `row_bytes`: all windows together take at most about 256 MiB."""
    return int(min(65536, max(256, 2**28 // max(1, row_bytes * virtual_shards))))
