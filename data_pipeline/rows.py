"""Rows in memory: inputs, labels and weights, each row whole in one place.

Owns how rows are put there, permuted and dealt out at the speed of memory: blocks come by column,
models want rows. Where rows belong is told by `data_pipeline.plan`.
"""

import dataclasses
import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.blocks import Block
from data_pipeline.features import Array, InputLayout

_TENSORFLOW_ALIGNMENT = 64


@dataclass(frozen=True)
class Rows:
    """Rows of a job.

    Attributes:
        inputs: `(rows, width)`, float32, or uint8 where all features are bytes.
        labels: `(rows, label_size)`.
        weights: `(rows,) float32`, or None where the job has no weight column.
        memory: What they were taken from, to be given back; see `RowMemory`.
    """

    inputs: Array
    labels: Array
    weights: Array | None
    memory: "Rows | None" = None

    @functools.cached_property
    def items(self) -> tuple[Array, ...]:
        """Each array as `(rows,)`: numpy copies an item of any size whole."""
        arrays = (self.inputs, self.labels)
        return tuple(map(_items, arrays if self.weights is None else (*arrays, self.weights)))

    def part(self, rows: slice) -> "Rows":
        """Some of the rows, in the same memory."""
        weights = None if self.weights is None else self.weights[rows]
        return Rows(self.inputs[rows], self.labels[rows], weights)

    def pairs(self, source: "Rows") -> list[tuple[Array, Array]]:
        """Arrays of these rows, each with the one of `source` that may be assigned to it in part.

        Assigning converts bytes to numbers where the two differ.
        """
        pairs = list(zip(self.items, source.items, strict=False))
        if self.inputs.dtype != source.inputs.dtype:
            pairs[0] = (self.inputs, source.inputs)
        return pairs


class RowMemory:
    """Memory for rows that is used over and over; safe to share between threads.

    Memory that was touched before costs less than half of what new memory costs to write.

    Args:
        layout: How rows lie in memory.
        most_rows: No more are ever taken at a time.
    """

    def __init__(self, layout: InputLayout, most_rows: int) -> None:
        self._layout = layout
        self._most_rows = most_rows
        self._spare: list[Rows] = []
        self._lock = threading.Lock()

    def take(self, rows: int, dtype: Any) -> Rows:
        """Room for `rows` rows with inputs of this type."""
        layout, memory = self._layout, None
        with self._lock:
            while self._spare and memory is None:
                memory = self._spare.pop()
                if memory.inputs.dtype != dtype:
                    memory = None
        if memory is None:
            memory = Rows(
                np.empty((self._most_rows, layout.width), dtype),
                np.empty((self._most_rows, layout.label_size), layout.label_dtype),
                None if layout.weight is None else np.empty(self._most_rows, np.float32),
            )
        return dataclasses.replace(memory.part(slice(0, rows)), memory=memory)

    def give_back(self, rows: Rows) -> None:
        """Let others have the memory of rows that were taken; of others, do nothing."""
        if rows.memory is not None:
            with self._lock:
                self._spare.append(rows.memory)


class ChunkMemory:
    """Memory for rows that TensorFlow takes over without a copy.

    It is used again once neither numpy nor TensorFlow refers to any part of it. Not for several
    threads at the same time.
    """

    def __init__(self, layout: InputLayout) -> None:
        self._layout = layout
        self._spare: tuple[list[Array], ...] = ([], [], [])

    def empty(self, rows: int) -> Rows:
        """Room for `rows` rows; weights are one."""
        layout, (inputs, labels, weights) = self._layout, self._spare
        found = Rows(
            _lent(inputs, (rows, layout.width), "float32"),
            _lent(labels, (rows, layout.label_size), layout.label_dtype),
            _lent(weights, (rows,), "float32"),
        )
        if found.weights is not None:
            found.weights.fill(1.0)
        return found


class _Loan:
    """Memory that goes to `spare` when the last array over it is gone."""

    def __init__(self, memory: Array, spare: list[Array]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory
        self._spare = spare

    def __del__(self) -> None:
        self._spare.append(self._memory)


def _lent(spare: list[Array], shape: tuple[int, ...], dtype: str) -> Array:
    """An array without values, at an address that TensorFlow accepts for a tensor of its own."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = spare.pop() if spare else None
    if memory is None or len(memory) < size + _TENSORFLOW_ALIGNMENT:
        memory = np.empty(size + _TENSORFLOW_ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % _TENSORFLOW_ALIGNMENT
    lent: Array = np.asarray(_Loan(memory, spare))
    return lent[start : start + size].view(dtype).reshape(shape)


def rows_of(block: Block, layout: InputLayout, memory: RowMemory) -> Rows:
    """The rows of a block, copied; but a single feature of several numbers stays where it is."""
    if len(block.features) == 1 and block.features[0].ndim == 2:
        return Rows(np.ascontiguousarray(block.features[0]), block.label, block.weight)
    rows = memory.take(block.rows, np.result_type(*(values.dtype for values in block.features)))
    fill(rows, [(block, slice(None))], layout)
    return rows


def joined(parts: Sequence[Rows], memory: RowMemory) -> Rows:
    """Rows of several places, copied one after the other."""
    dtype = np.result_type(*(part.inputs.dtype for part in parts))
    whole = memory.take(sum(len(part.labels) for part in parts), dtype)
    at = 0
    for part in parts:
        end = at + len(part.labels)
        for mine, theirs in whole.pairs(part):
            mine[at:end] = theirs
        at = end
    return whole


def permuted(rows: Rows, permutation: NDArray[np.int64], memory: RowMemory) -> Rows:
    """A copy whose row k is row `permutation[k]`."""
    copy = memory.take(len(permutation), rows.inputs.dtype)
    for mine, theirs in zip(copy.items, rows.items, strict=True):
        # Any mode but "raise" writes straight into `out`; a permutation is never out of range.
        np.take(theirs, permutation, out=mine, mode="clip")
    return copy


def fill(out: Rows, parts: Sequence[tuple[Block, slice]], layout: InputLayout) -> None:
    """Copy rows of several blocks, by column, into `out`, one part after the other."""
    at = 0
    for block, part in parts:
        label = block.label[part]
        end = at + len(label)
        for feature, values in zip(layout.features, block.features, strict=True):
            if values.ndim == 1:
                out.inputs[at:end, feature.offset] = values[part]
            else:
                out.inputs[at:end, feature.offset : feature.offset + feature.size] = values[part]
        out.labels[at:end] = label
        if block.weight is not None and out.weights is not None:
            out.weights[at:end] = block.weight[part]
        at = end


def _items(array: Array) -> Array:
    if array.ndim == 1:
        return array
    if array.shape[1] > 1:
        array = array.view(np.dtype((np.void, array.shape[1] * array.itemsize)))
    return array[:, 0]
