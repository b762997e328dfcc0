"""Rows in memory: inputs, labels and weights, each row whole in one place.

Owns how rows are put there, permuted and dealt out at the speed of memory: blocks come by column,
models want rows. Where rows belong is told by `data_pipeline.plan`.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.blocks import Block
from data_pipeline.features import Array, InputLayout

TILE_BYTES = 2**18
"""What is written in one go: columns, and shards, take turns in what a core's cache holds."""

_TENSORFLOW_ALIGNMENT = 64


@dataclass(frozen=True)
class Rows:
    """Rows of a job.

    Attributes:
        inputs: `(rows, width)`, float32, or uint8 where all features are bytes.
        labels: `(rows, label_size)`.
        weights: `(rows,) float32`, or None where the job has no weight column.
    """

    inputs: Array
    labels: Array
    weights: Array | None

    @functools.cached_property
    def items(self) -> tuple[Array, ...]:
        """Each array as `(rows,)`: numpy copies an item of any size whole."""
        arrays = (self.inputs, self.labels)
        return tuple(map(_items, arrays if self.weights is None else (*arrays, self.weights)))

    def permuted(self, permutation: NDArray[np.int64]) -> "Rows":
        """A copy whose row k is row `permutation[k]`."""
        rows = len(permutation)
        copy = Rows(
            np.empty((rows, self.inputs.shape[1]), self.inputs.dtype),
            np.empty((rows, self.labels.shape[1]), self.labels.dtype),
            None if self.weights is None else np.empty(rows, np.float32),
        )
        for mine, theirs in zip(copy.items, self.items, strict=True):
            # Any mode but "raise" writes straight into `out`; a permutation is never out of range.
            np.take(theirs, permutation, out=mine, mode="clip")
        return copy

    def pairs(self, source: "Rows") -> list[tuple[Array, Array]]:
        """Arrays of these rows, each with the one of `source` that may be assigned to it in part.

        Assigning converts bytes to numbers where the two differ.
        """
        pairs = list(zip(self.items, source.items, strict=False))
        if self.inputs.dtype != source.inputs.dtype:
            pairs[0] = (self.inputs, source.inputs)
        return pairs


def empty_rows(layout: InputLayout, rows: int) -> Rows:
    """Room for rows that TensorFlow takes over without a copy; weights are one."""
    weights = _aligned((rows,), "float32")
    weights.fill(1.0)
    return Rows(
        _aligned((rows, layout.width), "float32"),
        _aligned((rows, layout.label_size), layout.label_dtype),
        weights,
    )


def gather(parts: Sequence[tuple[Block, slice]], layout: InputLayout) -> Rows:
    """Rows of several blocks, one part after the other."""
    sizes = [len(range(*part.indices(block.rows))) for block, part in parts]
    rows = sum(sizes)
    dtypes = {values.dtype for block, _ in parts for values in block.features}
    has_weights = any(block.weight is not None for block, _ in parts)
    gathered = Rows(
        np.empty((rows, layout.width), np.result_type(*dtypes) if dtypes else np.float32),
        np.empty((rows, layout.label_size), layout.label_dtype),
        np.empty(rows, np.float32) if has_weights else None,
    )
    fill(gathered, parts, layout)
    return gathered


def fill(out: Rows, parts: Sequence[tuple[Block, slice]], layout: InputLayout) -> None:
    """Copy rows of several blocks into `out`, one part after the other."""
    at = 0
    for block, part in parts:
        label = block.label[part]
        end = at + len(label)
        _fill_inputs(out.inputs[at:end], [values[part] for values in block.features], layout)
        out.labels[at:end] = label
        if block.weight is not None and out.weights is not None:
            out.weights[at:end] = block.weight[part]
        at = end


def _fill_inputs(out: Array, columns: Sequence[Array], layout: InputLayout) -> None:
    """Copy columns into rows, tile by tile: each line of memory is written while it is near."""
    tile = max(256, TILE_BYTES // out.strides[0])
    for start in range(0, len(out), tile):
        rows = out[start : start + tile]
        for feature, values in zip(layout.features, columns, strict=True):
            if values.ndim == 1:
                rows[:, feature.offset] = values[start : start + tile]
            else:
                end = feature.offset + feature.size
                rows[:, feature.offset : end] = values[start : start + tile]


def _items(array: Array) -> Array:
    if array.ndim == 1 or array.shape[1] == 1:
        return array.reshape(-1)
    return array.view(np.dtype((np.void, array.strides[0]))).reshape(-1)


def _aligned(shape: tuple[int, ...], dtype: str) -> Array:
    """An empty array at an address that TensorFlow accepts for a tensor of its own."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory: NDArray[Any] = np.empty(size + _TENSORFLOW_ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % _TENSORFLOW_ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
