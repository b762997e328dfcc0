"""Windows of a worker's virtual shards: read ahead, shuffled, and dropped when they are used up.

Owns what is held in memory and for how long, so that memory is bounded by windows, not by the
data, and no block is decoded twice in an epoch: of each shard the present window and the next one,
and each decoded block until the last window of the epoch that needs rows of it was put together.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from data_pipeline.blocks import BlockReader
from data_pipeline.features import InputLayout
from data_pipeline.plan import EpochOrder, Share
from data_pipeline.rows import RowMemory, Rows, joined, permuted, rows_of

_DECODING_COPIES = 4
"""A block while it is decoded: encoded, in Arrow's memory, converted, without nulls."""

_TILE_BYTES = 2**20
"""Shards take turns in filling so much of a chunk, about what a core's cache holds."""

_LEAST_TILE_ROWS = 64

_WindowNumber = tuple[int, int]
"""(epoch, window): the windows of all owned shards with this number are read together."""


def most_rows_held(share: Share, threads: int) -> int:
    """Upper bound of the rows of windows and blocks in memory, those being decoded included."""
    plan = share.plan
    owned, largest = len(share.shards), int(plan.block_rows.max(initial=0))
    window = min(plan.rows_per_window, plan.shard_rows(share.shards.start))
    windows = owned * window * (1 if plan.shuffle == "full" else 2)
    if plan.shuffle == "none":  # all windows of a number go through the same blocks
        blocks = plan.virtual_shards * window + 2 * largest
    else:  # at each end of a shard, and where its next window ends; at the change of epochs of both
        blocks = (3 * owned + 2) * largest
    reading = threads * (window + _DECODING_COPIES * largest)
    return windows + min(blocks, 2 * plan.rows) + reading


class WindowReader:
    """A worker's rows in the order of the epochs.

    Args:
        share: Which rows.
        reader: Reads their blocks.
        layout: How they lie in memory.
        epochs: Nothing is read ahead of these.
        threads: Read ahead on so many threads.
    """

    def __init__(
        self, share: Share, reader: BlockReader, layout: InputLayout, epochs: int, threads: int
    ) -> None:
        self._share = share
        self._reader = reader
        self._layout = layout
        self._epochs = epochs
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="windows")
        most_rows = min(share.plan.rows_per_window, share.plan.shard_rows(share.shards.start))
        self._memory = RowMemory(layout, most_rows)
        self._block_memory = RowMemory(layout, int(share.plan.block_rows.max(initial=0)))
        self._next: tuple[int, int] | None = None
        self._blocks: dict[int, _EpochBlocks] = {}
        self._loading: dict[_WindowNumber, list[Future[Rows] | None]] = {}

    def copy(self, epoch: int, first_row: int, last_row: int, out: Rows) -> None:
        """Copy the share's rows among the rows `[first_row, last_row)` of an epoch.

        Calls are meant to follow each other without gaps; one that does not starts to read anew.
        Not for several threads at the same time.
        """
        if self._next != (epoch, first_row):
            self._restart(epoch, first_row)
        share, size = self._share, self._share.plan.rows_per_window
        starts = [share.positions(shard, first_row) for shard in share.shards]
        stops = [share.positions(shard, last_row) for shard in share.shards]
        position, last = min(starts), max(stops)
        before = share.rows_before(first_row)
        while position < last:
            window = position // size
            sources = self._load(epoch, window)
            end = min(last, (window + 1) * size)
            spans = [
                (max(position, start), min(end, stop))
                for start, stop in zip(starts, stops, strict=True)
            ]
            _deal(sources, window * size, spans, before, out)
            if end == (window + 1) * size and min(stops) >= end:
                self._drop(epoch, window, sources)
            position = end
        self._next = (epoch, last_row)
        if last_row == share.plan.rows:
            self._next = (epoch + 1, 0)
            self._forget(epoch)

    def _drop(self, epoch: int, window: int, windows: Sequence[Rows | None]) -> None:
        """Forget windows that are used up."""
        del self._loading[epoch, window]
        for rows in windows:
            if rows is not None:
                self._memory.give_back(rows)

    def _restart(self, epoch: int, first_row: int) -> None:
        for number in {number for number, _ in self._loading}:
            self._forget(number)
        self._blocks = {epoch: self._open_epoch(epoch, first_row)}

    def _open_epoch(self, epoch: int, first_row: int) -> "_EpochBlocks":
        order = self._share.plan.for_epoch(epoch)
        return _EpochBlocks(self._share, order, first_row, self._read_block, self._block_memory)

    def _read_block(self, number: int) -> Rows:
        # What Arrow has decoded is freed at once, so that its memory, too, is used again.
        return rows_of(self._reader.read(number), self._layout, self._block_memory)

    def _forget(self, epoch: int) -> None:
        self._blocks.pop(epoch, None)
        for number in [number for number in self._loading if number[0] == epoch]:
            for loading in self._loading.pop(number):
                if loading is not None:
                    loading.cancel()

    def _load(self, epoch: int, window: int) -> list[Rows | None]:
        """The windows of this number, one a shard, while the next ones are read."""
        loading = self._start(epoch, window)
        plan = self._share.plan
        if window + 1 < plan.windows(self._share.shards.start):
            self._start(epoch, window + 1)
        elif plan.shuffle != "full" and epoch + 1 < self._epochs:
            self._start(epoch + 1, 0)
        return [None if each is None else each.result() for each in loading]

    def _start(self, epoch: int, window: int) -> "list[Future[Rows] | None]":
        if (epoch, window) not in self._loading:
            if epoch not in self._blocks:
                self._blocks[epoch] = self._open_epoch(epoch, 0)
            blocks = self._blocks[epoch]
            self._loading[epoch, window] = [
                self._pool.submit(self._read, blocks, shard, window)
                if blocks.needs(shard, window)
                else None
                for shard in self._share.shards
            ]
        return self._loading[epoch, window]

    def _read(self, blocks: "_EpochBlocks", shard: int, window: int) -> Rows:
        segments, stride = blocks.order.window_segments(shard, window)
        numbers = [segment.block for segment in segments]
        parts = [
            block.part(slice(segment.start, segment.stop, stride))
            for block, segment in zip(blocks.take(numbers), segments, strict=True)
        ]
        permutation = blocks.order.window_permutation(shard, window)
        rows = joined(parts, self._memory) if permutation is None or len(parts) > 1 else parts[0]
        if permutation is not None:
            unordered, rows = rows, permuted(rows, permutation, self._memory)
            self._memory.give_back(unordered)
        blocks.give_back(numbers)
        return rows


def _deal(
    sources: Sequence[Rows | None],
    first: int,
    spans: Sequence[tuple[int, int]],
    before: int,
    out: Rows,
) -> None:
    """Copy positions of the owned shards' windows into their places: the shards take turns.

    Args:
        sources: One window a shard, whose first position is `first`.
        first: First position of the windows.
        spans: Positions `[start, stop)` that are wanted of each.
        before: Place that row 0 of `out` has among the worker's rows.
        out: Receives the rows.
    """
    owned = len(sources)
    pairs = [[] if source is None else out.pairs(source) for source in sources]
    row_bytes = sum(array.strides[0] for array in (out.inputs, out.labels))
    tile = max(_LEAST_TILE_ROWS, _TILE_BYTES // (row_bytes * owned))
    begin, end = min(start for start, _ in spans), max(stop for _, stop in spans)
    for low in range(begin, end, tile):
        for index, (start, stop) in enumerate(spans):
            start, stop = max(start, low), min(stop, low + tile)
            if start < stop:
                at = start * owned + index - before
                places = slice(at, at + (stop - start - 1) * owned + 1, owned)
                for mine, theirs in pairs[index]:
                    mine[places] = theirs[start - first : stop - first]


@dataclass
class _Held:
    """A block that windows still need; `lock` lets one thread decode it."""

    uses: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    rows: Rows | None = None


class _EpochBlocks:
    """The blocks of one epoch from its row `first_row` on, each decoded once; for many threads."""

    def __init__(
        self,
        share: Share,
        order: EpochOrder,
        first_row: int,
        read: Callable[[int], Rows],
        memory: RowMemory,
    ) -> None:
        self.order = order
        self._share = share
        self._first_row = first_row
        self._read = read
        self._memory = memory
        self._held: dict[int, _Held] = {}
        self._lock = threading.Lock()

    def needs(self, shard: int, window: int) -> bool:
        """Whether a window has rows from the first one on."""
        start, stop = self.order.window_positions(shard, window)
        return start < stop and stop > self._share.positions(shard, self._first_row)

    def take(self, numbers: Sequence[int]) -> list[Rows]:
        """The rows of the blocks that one window needs; to be called once a window."""
        found: dict[int, Rows] = {}
        # First what nobody works on, so that threads that need the same blocks share the work.
        for may_wait in (False, True):
            for number in numbers:
                if number not in found:
                    held = self._hold(number)
                    if held.lock.acquire(blocking=may_wait):
                        try:
                            if held.rows is None:
                                held.rows = self._read(number)
                            found[number] = held.rows
                        finally:
                            held.lock.release()
        return [found[number] for number in numbers]

    def give_back(self, numbers: Sequence[int]) -> None:
        """Tell that a window was put together; with its last window a block is forgotten."""
        for number in numbers:
            with self._lock:
                held = self._held[number]
                held.uses -= 1
                if held.uses > 0:
                    continue
                del self._held[number]
            if held.rows is not None:
                self._memory.give_back(held.rows)

    def _hold(self, number: int) -> _Held:
        with self._lock:
            if number not in self._held:
                uses = self._share.window_uses(self.order, number, self._first_row)
                self._held[number] = _Held(uses)
            return self._held[number]
