"""A worker's rows as a `tf.data.Dataset` of finished chunks of many steps.

Python works once a chunk, never once a step: a chunk holds the rows of several consecutive steps
and the offsets at which the compiled loop slices them. The dataset is a range of chunk numbers,
mapped; starting anywhere is starting the range there. Chunks run on over the ends of epochs, so
that the next epoch's first rows are ready when it begins.
"""

import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from data_pipeline.blocks import BlockReader
from data_pipeline.features import Array, InputLayout
from data_pipeline.plan import EpochOrder, Plan, Segment, Share

_CHUNK_BYTES = 16 * 2**20
_MAX_CHUNK_STEPS = 1024


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


def chunk_dataset(source: ChunkSource, layout: InputLayout, first: int) -> tf.data.Dataset:
    """Chunks `first`, `first + 1`, ... of a source, assembled ahead of use."""
    signature = chunk_signature(layout)

    def assemble(number: tf.Tensor) -> tuple[tf.Tensor, ...]:
        arrays = tf.numpy_function(source.assemble, [number], [spec.dtype for spec in signature])
        return tuple(
            tf.ensure_shape(array, spec.shape)
            for array, spec in zip(arrays, signature, strict=True)
        )

    options = tf.data.Options()
    options.threading.private_threadpool_size = 2
    options.autotune.enabled = False
    return (
        tf.data.Dataset.range(first, source.chunks)
        .map(assemble, num_parallel_calls=1)
        .prefetch(2)
        .with_options(options)
    )


def chunk_signature(layout: InputLayout) -> tuple[tf.TensorSpec, ...]:
    """Types and shapes of a chunk's tensors, in the order of the fields of `ChunkRows`."""
    return (
        tf.TensorSpec((None, *layout.input_shape), tf.float32),
        tf.TensorSpec((None, layout.label_size), layout.label_dtype),
        tf.TensorSpec((None,), tf.float32),
        tf.TensorSpec((None,), tf.int32),
        tf.TensorSpec((None,), tf.float32),
        tf.TensorSpec((None,), tf.int32),
    )


def steps_per_chunk(plan: Plan, layout: InputLayout, workers: int) -> int:
    """Steps of a chunk: about 16 MiB on one worker, at most an epoch. The same on all workers."""
    step_bytes = layout.row_bytes * -(-plan.global_batch_size // workers)
    return max(1, min(_CHUNK_BYTES // step_bytes, _MAX_CHUNK_STEPS, plan.steps_per_epoch))


class TrainingChunks:
    """Chunks of a worker's training rows, over all epochs.

    Chunk c of an epoch holds its steps `[c * S, (c + 1) * S)`; numbers run on over the epochs.
    """

    def __init__(
        self,
        share: Share,
        reader: BlockReader,
        layout: InputLayout,
        epochs: int,
        has_places: bool = False,
        threads: int = 2,
    ) -> None:
        self._share = share
        self._layout = layout
        self._has_places = has_places
        self.steps_per_chunk = steps_per_chunk(share.plan, layout, share.workers)
        self.chunks_per_epoch = -(-share.plan.steps_per_epoch // self.steps_per_chunk)
        self.chunks = self.chunks_per_epoch * epochs
        self._windows = _WindowLoader(reader, threads)
        self._order = functools.lru_cache(maxsize=2)(share.plan.for_epoch)

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
        first_row, last_row = plan.rows_before_step(first_step), plan.rows_before_step(last_step)
        before = share.rows_before(first_row)
        local_rows = share.rows_before(last_row) - before
        out = _empty_rows(self._layout, local_rows)
        places = np.empty(local_rows if self._has_places else 0, np.int32)
        order = self._order(epoch)
        owned = len(share.shards)
        for index, shard in enumerate(share.shards):
            start, stop = share.positions(shard, first_row), share.positions(shard, last_row)
            at = start * owned + index - before
            if self._has_places:
                rows_of_epoch = np.arange(start, stop) * plan.virtual_shards + shard
                places[at::owned] = rows_of_epoch % plan.global_batch_size
            for rows in self._windows.rows(order, shard, start, stop):
                count = len(rows.labels)
                rows.write(out, slice(at, at + (count - 1) * owned + 1, owned), self._layout)
                at += count * owned
        edges = [plan.rows_before_step(step) for step in range(first_step, last_step + 1)]
        return (
            out.inputs.reshape(local_rows, *self._layout.input_shape),
            out.labels,
            out.weights,
            share.step_offsets(first_step, last_step).astype(np.int32),
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
        out = _empty_rows(self._layout, int(offsets[-1]))
        segments = [segment for start, stop in ranges for segment in self._segments(start, stop)]
        if segments:
            _gather(self._reader, segments, 1).write(out, slice(None), self._layout)
        return (
            out.inputs.reshape(-1, *self._layout.input_shape),
            out.labels,
            out.weights,
            offsets.astype(np.int32),
            global_rows.astype(np.float32),
            places,
        )

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


@dataclass(frozen=True)
class _Rows:
    """Rows by column: features in the layout's order, label, weight."""

    features: tuple[Array, ...]
    labels: Array
    weights: Array | None

    def select(self, chosen: slice | NDArray[np.int64]) -> "_Rows":
        weights = None if self.weights is None else self.weights[chosen]
        return _Rows(
            tuple(values[chosen] for values in self.features), self.labels[chosen], weights
        )

    def write(self, out: "_FlatRows", where: slice, layout: InputLayout) -> None:
        """Copy into the rows `where` of a chunk, feature by feature."""
        for feature, values in zip(layout.features, self.features, strict=True):
            if values.ndim == 1:
                out.inputs[where, feature.offset] = values
            else:
                out.inputs[where, feature.offset : feature.offset + feature.size] = values
        out.labels[where] = self.labels
        if self.weights is not None:
            out.weights[where] = self.weights


@dataclass(frozen=True)
class _FlatRows:
    inputs: NDArray[np.float32]
    labels: Array
    weights: NDArray[np.float32]


def _empty_rows(layout: InputLayout, rows: int) -> _FlatRows:
    return _FlatRows(
        np.empty((rows, layout.width), np.float32),
        np.empty((rows, layout.label_size), layout.label_dtype),
        np.ones(rows, np.float32),
    )


def _gather(reader: BlockReader, segments: Sequence[Segment], stride: int) -> _Rows:
    """Rows of several block segments, one after the other."""
    parts = []
    for segment in segments:
        block = reader.read(segment.block)
        rows = _Rows(block.features, block.label, block.weight)
        parts.append(rows.select(slice(segment.start, segment.stop, stride)))
    if len(parts) == 1:
        return parts[0]
    weights = [part.weights for part in parts if part.weights is not None]
    return _Rows(
        tuple(
            np.concatenate(columns) for columns in zip(*(p.features for p in parts), strict=True)
        ),
        np.concatenate([part.labels for part in parts]),
        np.concatenate(weights) if weights else None,
    )


class _WindowLoader:
    """Windows of virtual shards, permuted; each is read once and dropped when it is used up.

    While a window is consumed the next one of its shard is read in the background.
    """

    def __init__(self, reader: BlockReader, threads: int) -> None:
        self._reader = reader
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="windows")
        self._loading: OrderedDict[tuple[int, int, int], Future[_Rows]] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, order: EpochOrder, shard: int, start: int, stop: int) -> Sequence[_Rows]:
        """Rows at positions `[start, stop)` of a shard, in one piece a window."""
        size = order.plan.rows_per_window
        pieces = []
        while start < stop:
            window = start // size
            first, last = order.window_positions(shard, window)
            until = min(stop, last)
            rows = self._load(order, shard, window).result()
            pieces.append(rows.select(slice(start - first, until - first)))
            if until == last:
                self._drop(order, shard, window)
            if window + 1 < order.plan.windows(shard):
                self._load(order, shard, window + 1)
            start = until
        return pieces

    def _load(self, order: EpochOrder, shard: int, window: int) -> "Future[_Rows]":
        key = (order.epoch, shard, window)
        with self._lock:
            if key not in self._loading:
                self._loading[key] = self._pool.submit(self._read, order, shard, window)
            return self._loading[key]

    def _drop(self, order: EpochOrder, shard: int, window: int) -> None:
        with self._lock:
            self._loading.pop((order.epoch, shard, window), None)

    def _read(self, order: EpochOrder, shard: int, window: int) -> _Rows:
        segments, stride = order.window_segments(shard, window)
        rows = _gather(self._reader, segments, stride)
        permutation = order.window_permutation(shard, window)
        return rows if permutation is None else rows.select(permutation)
