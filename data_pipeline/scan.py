"""One pass over all rows of a source: nulls by file, rows that stay, exact statistics.

Blocks are read in parallel, each gives float64 sums of its own, and these are merged in the order
of the blocks, so that the result is the same on any machine with any number of threads. The merge
is the pairwise update of Chan, Golub and LeVeque (1979).
"""

import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.blocks import Block, BlockReader, OnNull, TableReader, without_nulls
from data_pipeline.encoding import Timestamp, count_values, learn_encodings
from data_pipeline.errors import DataError
from data_pipeline.features import InputLayout
from data_pipeline.source import Source

_LABEL_SAMPLE_ROWS = 4_000_000


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations, each `(channels,) float64`."""

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows together."""
        count = self.count + other.count
        safe = np.maximum(count, 1)
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * other.count / safe,
            self.squares + other.squares + delta**2 * self.count * other.count / safe,
        )

    @property
    def variance(self) -> NDArray[np.float64]:
        """Population variance, `(channels,)`."""
        return self.squares / np.maximum(self.count, 1)


@dataclass(frozen=True)
class Statistics:
    """Shift and scale of the model's input along its last axis, each `(channels,) float32`.

    Channels that are not normalised have mean 0 and variance 1.
    """

    mean: NDArray[np.float32]
    variance: NDArray[np.float32]


@dataclass(frozen=True)
class Scan:
    """What one pass found.

    Attributes:
        block_rows: `(blocks,) int64`, rows that stay in each block.
        dropped_rows: Rows that `data.on_null: drop` leaves out.
        zeroed_rows: Rows in which `data.on_null: zero` filled a value, by column.
        statistics: For the model's input, or None where nothing is normalised.
        constants: What the best constant predictions need.
        label_range: Smallest and largest label of all rows.
    """

    block_rows: NDArray[np.int64]
    dropped_rows: int
    zeroed_rows: dict[str, int]
    statistics: Statistics | None
    constants: "LabelSummary"
    label_range: tuple[float, float]


@dataclass(frozen=True)
class LabelSummary:
    """What the best constant predictions need to know of a label.

    Above four million rows it speaks of an even sample of the rows.

    Attributes:
        mean: `(label_size,)`.
        median: `(label_size,)`.
        frequencies: Share of each whole value of a single whole-number label that is never
            negative, in the order of the values; None for any other label.
    """

    mean: NDArray[np.float64]
    median: NDArray[np.float64]
    frequencies: NDArray[np.float64] | None


@dataclass(frozen=True)
class _Visit:
    """What one block contributes; an empty block has no extremes."""

    rows: int
    nulls: dict[str, int]
    moments: Moments | None
    label_sample: NDArray[np.generic]
    label_extremes: tuple[float, ...]


def scan(source: Source, layout: InputLayout, on_null: OnNull, threads: int | None = None) -> Scan:
    """Read every row once.

    Raises:
        DataError: A null or NaN where `on_null` does not allow one, a list of another length, or
            no row left.
    """
    reader = BlockReader(source, layout, on_null)
    stride = -(-source.rows // _LABEL_SAMPLE_ROWS)
    wanted = any(feature.is_normalized for feature in layout.features)

    def visit(block: int) -> _Visit:
        decoded = reader.read(block)
        moments = block_moments(decoded, layout) if wanted else None
        label = decoded.label
        extremes = (label.min().item(), label.max().item()) if label.size else ()
        return _Visit(decoded.rows, decoded.nulls, moments, label[::stride], extremes)

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        visits = list(pool.map(visit, range(len(source.blocks))))
    nulls = [seen.nulls for seen in visits]
    _refuse_nulls(source, layout, on_null, nulls)
    _refuse_empty_columns(source, nulls)
    block_rows = np.asarray([seen.rows for seen in visits], np.int64)
    kept = int(block_rows.sum())
    if kept == 0:
        raise DataError(
            f"data.{source.role}: data.on_null: drop leaves none of {source.rows} rows. "
            "Fill the values, or set data.on_null: zero."
        )
    total: Moments | None = None
    for moments in (seen.moments for seen in visits):
        if moments is not None:
            total = moments if total is None else total.merge(moments)
    extremes = [value for seen in visits for value in seen.label_extremes]
    return Scan(
        block_rows,
        source.rows - kept,
        _sum_counts(nulls) if on_null == "zero" else {},
        None if total is None else _statistics(total, layout),
        summarize_labels(np.concatenate([seen.label_sample for seen in visits])),
        (min(extremes), max(extremes)),
    )


def learn(
    source: Source, layout: InputLayout, on_null: OnNull, threads: int | None = None
) -> InputLayout:
    """The layout that knows the vocabularies and the classes of all rows of a source.

    Reads every row once, in parallel, of the columns that it is about; all columns where rows with
    nulls are dropped. A vocabulary that is known already is kept.

    Raises:
        DataError: Values that cannot be read as what they should be.
    """
    encodings = {
        name: encoding
        for name, encoding in layout.encodings.items()
        if not isinstance(encoding, Timestamp) and encoding.vocabulary is None
    }
    learns_classes = layout.label_classes == ()
    if not encodings and not learns_classes:
        return layout
    columns = list(encodings) + ([layout.label] if learns_classes else [])
    reader = TableReader(source, layout.columns if on_null == "drop" else columns)

    def visit(block: int) -> tuple[list[Counter[Any]], set[str]]:
        table = reader.read(block)
        if on_null == "drop":
            table = without_nulls(table)[0]
        counts = [count_values(encoding, table[name]) for name, encoding in encodings.items()]
        labels = set(pc.unique(table[layout.label]).to_pylist()) if learns_classes else set()
        return counts, labels

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        visits = list(pool.map(visit, range(len(source.blocks))))
    learned = learn_encodings(list(encodings.values()), [counts for counts, _ in visits])
    for name, encoding in zip(encodings, learned, strict=True):
        if not encoding.vocabulary:
            raise DataError(
                f"data.{source.role}: column {name!r} holds no value in any of {source.rows} rows. "
                "Take it out of data.features, or correct the files."
            )
    layout = layout.with_encodings(dict(zip(encodings, learned, strict=True)))
    if learns_classes:
        classes = set().union(*(labels for _, labels in visits)) - {None}
        layout = replace(layout, label_classes=tuple(sorted(classes)))
    return layout


def block_moments(block: Block, layout: InputLayout) -> Moments:
    """Moments of one block for each channel of the model's input.

    Several elements of a row that share a channel (pixels, time steps) count one by one.
    """
    parts: list[Moments] = []
    for feature, values in zip(layout.features, block.features, strict=True):
        channels = layout.channels if len(layout.features) == 1 and feature.shape else feature.size
        table = values.reshape(-1, channels).astype(np.float64)
        count = np.full(channels, len(table), np.float64)
        mean = table.mean(axis=0) if len(table) else np.zeros(channels)
        parts.append(Moments(count, mean, ((table - mean) ** 2).sum(axis=0)))
    return Moments(
        np.concatenate([part.count for part in parts]),
        np.concatenate([part.mean for part in parts]),
        np.concatenate([part.squares for part in parts]),
    )


def summarize_labels(labels: NDArray[np.generic]) -> LabelSummary:
    """Mean, median and, for class numbers, the share of each class.

    Args:
        labels: `(rows, label_size)`.
    """
    frequencies = None
    is_class = labels.dtype.kind in "iu" and labels.shape[1] == 1 and labels.min() >= 0
    if is_class and labels.max() < 100_000:
        frequencies = np.bincount(labels[:, 0].astype(np.int64)) / len(labels)
    values = labels.astype(np.float64)
    return LabelSummary(values.mean(axis=0), np.median(values, axis=0), frequencies)


def _statistics(total: Moments, layout: InputLayout) -> Statistics:
    mean, variance = total.mean.copy(), total.variance.copy()
    variance[variance == 0] = 1.0  # what never varied in training must not explode in serving
    for feature in layout.features:
        keep = np.arange(feature.offset, feature.offset + math.prod(feature.shape))
        if isinstance(feature.encoding, Timestamp) and feature.is_normalized:
            forms = [form for _, form in feature.encoding.channels]
            keep = keep[np.asarray(forms) != "number"]  # sines and cosines are of size 1 already
        elif feature.is_normalized:
            continue
        mean[keep], variance[keep] = 0.0, 1.0
    return Statistics(mean.astype(np.float32), variance.astype(np.float32))


def _refuse_nulls(
    source: Source, layout: InputLayout, on_null: OnNull, nulls: list[dict[str, int]]
) -> None:
    """Stop where the policy does not allow what was found."""
    targets = {layout.label, layout.weight}
    by_file: dict[tuple[str, str], int] = {}
    for (index, _), found in zip(source.blocks, nulls, strict=True):
        for column, rows in found.items():
            if on_null == "error" or (on_null == "zero" and column in targets):
                key = (column, source.files[index].path)
                by_file[key] = by_file.get(key, 0) + rows
    raise_for_nulls(source.role, by_file, targets)


def _refuse_empty_columns(source: Source, nulls: list[dict[str, int]]) -> None:
    """Stop where a column has no value in any row: dropping or zeros would hide it."""
    for column, rows in _sum_counts(nulls).items():
        if rows == source.rows:
            raise DataError(
                f"data.{source.role}: column {column!r} is null or NaN in all {rows} rows of "
                f"{len(source.files)} file(s); values are needed. Name another column, or check "
                f"what wrote {source.files[0].path}."
            )


def raise_for_nulls(
    role: str, by_file: dict[tuple[str, str], int], targets: set[str | None]
) -> None:
    """Raise DataError for null or NaN rows, counted by (column, file); none are fine."""
    if not by_file:
        return
    (column, path), rows = max(by_file.items(), key=lambda item: item[1])
    total = sum(by_file.values())
    more = f" ({total} in all, in {len(by_file)} places)" if len(by_file) > 1 else ""
    remedy = "drop" if column in targets else "drop or zero"
    raise DataError(
        f"data.{role}: column {column!r} is null or NaN in {rows} rows of {path}{more}; "
        f"data.on_null: error allows none. Clean the data, or set data.on_null: {remedy}."
    )


def _sum_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for found in counts:
        for column, rows in found.items():
            total[column] = total.get(column, 0) + rows
    return total
