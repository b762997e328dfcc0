"""A worker's rows in finished chunks of many steps.

Python works once a chunk, never once a step: a chunk holds the rows of several consecutive steps
and the offsets at which the compiled loop slices them. Chunks have numbers, and any of them can be
assembled first. They run on over the ends of epochs, so that the next epoch's first rows are ready
when it begins. `data_pipeline.dataset` hands them to TensorFlow.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.blocks import Block, BlockReader
from data_pipeline.features import InputLayout
from data_pipeline.plan import Plan, Segment, Share
from data_pipeline.rows import ChunkMemory, fill
from data_pipeline.windows import WindowReader, most_rows_held

_CHUNK_BYTES = 16 * 2**20
_MAX_CHUNK_STEPS = 1024
CHUNKS_AHEAD = 2
_CHUNKS_IN_MEMORY = CHUNKS_AHEAD + 3  # in use, finished but not yet fetched, being assembled
_READ_THREADS = 2


@dataclass(frozen=True)
class ChunkRows:
    """Rows of consecutive steps on one worker.

    Attributes:
        inputs: `(local_rows, *input_shape) float32`.
        labels: `(local_rows, label_size)`.
        weights: `(local_rows,) float32`, all ones where the job has no weight column.
        offsets: `(steps + 1,) int32`: step k holds the rows `offsets[k]` to `offsets[k + 1]`.
        global_rows: `(steps,) float32`: rows of each step over all workers.
        places: `(local_rows,) int32`: each row's place in its step's global batch; empty where
            the source was not asked for them.
    """

    inputs: Any
    labels: Any
    weights: Any
    offsets: Any
    global_rows: Any
    places: Any

    @property
    def tensors(self) -> "ChunkArrays":
        """All fields in their order."""
        return (
            self.inputs,
            self.labels,
            self.weights,
            self.offsets,
            self.global_rows,
            self.places,
        )


ChunkArrays = tuple[Any, Any, Any, Any, Any, Any]
"""The fields of a `ChunkRows`, in their order."""


class ChunkSource(Protocol):
    """Chunks by number; called from one thread of tf.data at a time."""

    chunks: int

    def assemble(self, chunk: int) -> ChunkArrays:
        """The arrays of a `ChunkRows`, in the order of its fields."""
        ...


def steps_per_chunk(plan: Plan, layout: InputLayout, workers: int) -> int:
    """Steps of a chunk: about 16 MiB on one worker, at most an epoch. The same on all workers."""
    step_bytes = layout.row_bytes * -(-plan.global_batch_size // workers)
    return max(1, min(_CHUNK_BYTES // step_bytes, _MAX_CHUNK_STEPS, plan.steps_per_epoch))


def memory_bound_bytes(share: Share, layout: InputLayout, cache_bytes: int = 0) -> int:
    """Memory that a worker's training rows take at most, whatever the size of the data.

    Args:
        share: The worker's part of the plan.
        layout: How rows lie in memory.
        cache_bytes: What blocks are kept in between epochs.
    """
    plan = share.plan
    steps = steps_per_chunk(plan, layout, share.workers)
    chunk_rows = min(plan.rows, steps * share.most_rows * share.devices)
    rows = most_rows_held(share, _READ_THREADS) + _CHUNKS_IN_MEMORY * chunk_rows
    return rows * layout.row_bytes + cache_bytes


class TrainingChunks:
    """Chunks of a worker's training rows, over all epochs.

    Chunk c of an epoch holds its steps `[c * S, (c + 1) * S)`; numbers run on over the epochs.
    Chunks are meant to be asked for in their order, from any one on.
    """

    def __init__(
        self,
        share: Share,
        reader: BlockReader,
        layout: InputLayout,
        epochs: int,
        has_places: bool = False,
        threads: int = _READ_THREADS,
    ) -> None:
        self._share = share
        self._layout = layout
        self._has_places = has_places
        self.steps_per_chunk = steps_per_chunk(share.plan, layout, share.workers)
        self.chunks_per_epoch = -(-share.plan.steps_per_epoch // self.steps_per_chunk)
        self.chunks = self.chunks_per_epoch * epochs
        self._memory = ChunkMemory(layout)
        self._windows = WindowReader(share, reader, layout, epochs, threads)

    def chunk_of(self, step: int) -> tuple[int, int]:
        """Chunk number that holds a step counted over all epochs, and the step's index in it."""
        epoch, step_of_epoch = divmod(step, self._share.plan.steps_per_epoch)
        chunk, index = divmod(step_of_epoch, self.steps_per_chunk)
        return epoch * self.chunks_per_epoch + chunk, index

    def assemble(self, chunk: int) -> ChunkArrays:
        """The rows of one chunk, in the order of the epoch."""
        plan, share = self._share.plan, self._share
        epoch, chunk_of_epoch = divmod(int(chunk), self.chunks_per_epoch)
        first_step = chunk_of_epoch * self.steps_per_chunk
        last_step = min(first_step + self.steps_per_chunk, plan.steps_per_epoch)
        edges = plan.step_edges(first_step, last_step)
        first_row, last_row = int(edges[0]), int(edges[-1])
        offsets = share.step_offsets(first_step, last_step)
        out = self._memory.empty(int(offsets[-1]))
        self._windows.copy(epoch, first_row, last_row, out)
        places = np.empty(0, np.int32)
        if self._has_places:
            rows = np.arange(first_row, last_row)
            shards = rows % plan.virtual_shards
            is_own = (shards >= share.shards.start) & (shards < share.shards.stop)
            places = (rows[is_own] % plan.global_batch_size).astype(np.int32)
        return (
            out.inputs.reshape(-1, *self._layout.input_shape),
            out.labels,
            out.weights,
            offsets.astype(np.int32),
            np.diff(edges).astype(np.float32),
            places,
        )


@dataclass(frozen=True)
class EvaluationCut:
    """How rows that are read once, in the order of the files, are cut for evaluation.

    Attributes:
        rank: This worker.
        workers: How many there are.
        batch_rows: Rows of a batch of all workers.
        is_batch_shared: Whether each worker holds a part of every batch. Otherwise each holds a
            contiguous part of all rows, and a batch lies on one worker or on two.
    """

    rank: int
    workers: int
    batch_rows: int
    is_batch_shared: bool = False

    def part(self, rows: int) -> tuple[int, int]:
        """This worker's part `[first, last)` of `rows` rows."""
        return self.rank * rows // self.workers, (self.rank + 1) * rows // self.workers


class EvaluationChunks:
    """Chunks of a worker's part of rows that are read once; each step is a part of a batch."""

    def __init__(
        self,
        block_rows: NDArray[np.int64],
        reader: BlockReader,
        layout: InputLayout,
        cut: EvaluationCut,
    ) -> None:
        self._reader = reader
        self._layout = layout
        self._cut = cut
        self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="evaluation")
        self._memory = ChunkMemory(layout)
        self._last_block: dict[int, Block] = {}
        self._starts = np.concatenate([[0], np.cumsum(block_rows)])
        self._rows = int(self._starts[-1])
        steps = max(1, min(_CHUNK_BYTES // (layout.row_bytes * cut.batch_rows), _MAX_CHUNK_STEPS))
        self._chunk_rows = steps * cut.batch_rows
        self._first, self._last = (0, self._rows) if cut.is_batch_shared else cut.part(self._rows)
        self._first_chunk = self._first // self._chunk_rows
        self.chunks = -(-self._last // self._chunk_rows) - self._first_chunk if self._rows else 0

    def assemble(self, chunk: int) -> ChunkArrays:
        """The rows of one chunk."""
        cut = self._cut
        chunk_start = (self._first_chunk + int(chunk)) * self._chunk_rows
        first = max(chunk_start, self._first)
        last = min(chunk_start + self._chunk_rows, self._last)
        batches = np.arange(first // cut.batch_rows, -(-last // cut.batch_rows) + 1)
        edges = np.minimum(batches * cut.batch_rows, self._rows)
        global_rows = np.diff(edges)
        if cut.is_batch_shared:
            parts = [cut.part(int(rows)) for rows in global_rows]
            starts = [(edge + a, edge + b) for edge, (a, b) in zip(edges, parts, strict=False)]
            ranges = [(int(start), int(stop)) for start, stop in starts]
            places = np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in parts])
        else:
            parts = [(a, b) for a, b in itertools.pairwise(np.clip(edges, first, last))]
            ranges = [(first, last)]
            places = np.empty(0, np.int32)
        offsets = np.concatenate([[0], np.cumsum([stop - start for start, stop in parts])])
        out = self._memory.empty(int(offsets[-1]))
        segments = [segment for start, stop in ranges for segment in self._segments(start, stop)]
        blocks = self._blocks(segments)
        pieces = [(blocks[piece.block], slice(piece.start, piece.stop)) for piece in segments]
        fill(out, pieces, self._layout)
        return (
            out.inputs.reshape(-1, *self._layout.input_shape),
            out.labels,
            out.weights,
            offsets.astype(np.int32),
            global_rows.astype(np.float32),
            places,
        )

    def _blocks(self, segments: list[Segment]) -> dict[int, Block]:
        """The blocks of a chunk; the last one is kept, as the next chunk may begin in it."""
        numbers = sorted({segment.block for segment in segments})
        unread = [number for number in numbers if number not in self._last_block]
        blocks = self._last_block | dict(
            zip(unread, self._pool.map(self._reader.read, unread), strict=True)
        )
        self._last_block = {number: blocks[number] for number in numbers[-1:]}
        return blocks

    def _segments(self, first: int, last: int) -> list[Segment]:
        """The block rows of rows `[first, last)`."""
        segments = []
        index = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < last:
            start, stop = (int(edge) for edge in self._starts[index : index + 2])
            until = min(last, stop)
            if until > first:
                segments.append(Segment(index, first - start, until - start))
                first = until
            index += 1
        return segments
