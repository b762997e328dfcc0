"""What a job's data is, for a person to read: columns, a sample, and who gets what.

Plain values that print as JSON; nothing here decides anything. Reads all training rows once.
"""

import functools
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.blocks import OnNull, TableReader, without_nulls
from data_pipeline.encoding import Category, Text, Timestamp, is_text_type
from data_pipeline.features import InputLayout
from data_pipeline.features import null_rows as null_rows_of
from data_pipeline.plan import EpochOrder, Plan, Share
from data_pipeline.reader import memory_bound_bytes
from data_pipeline.scan import Moments
from data_pipeline.source import Source

_FREQUENT = 5


@dataclass(frozen=True)
class ColumnFacts:
    """What is known of a column over some rows.

    Attributes:
        rows: Rows seen.
        null_rows: Those that are null or NaN, or hold such an element.
        extremes: Least and greatest value, or None where there is none.
        moments: Of numbers, else None.
        counts: Of texts by their value.
    """

    rows: int = 0
    null_rows: int = 0
    extremes: tuple[Any, Any] | None = None
    moments: Moments | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def merge(self, other: "ColumnFacts") -> "ColumnFacts":
        """What is known over both sets of rows together."""
        extremes = [pair for pair in (self.extremes, other.extremes) if pair is not None]
        moments = [part for part in (self.moments, other.moments) if part is not None]
        return ColumnFacts(
            self.rows + other.rows,
            self.null_rows + other.null_rows,
            (min(e[0] for e in extremes), max(e[1] for e in extremes)) if extremes else None,
            functools.reduce(Moments.merge, moments) if moments else None,
            self.counts + other.counts,
        )

    def record(self) -> dict[str, Any]:
        """Plain values."""
        record: dict[str, Any] = {"rows": self.rows, "null_rows": self.null_rows}
        if self.counts:
            frequent = self.counts.most_common(_FREQUENT)
            return {**record, "distinct": len(self.counts), "most_frequent": dict(frequent)}
        least, greatest = self.extremes or (None, None)
        record |= {"least": _plain(least), "greatest": _plain(greatest)}
        if self.moments is not None:
            record["mean"] = float(self.moments.mean[0])
            record["standard_deviation"] = float(np.sqrt(self.moments.variance[0]))
        return record


def source_facts(source: Source) -> dict[str, Any]:
    """Files, blocks, rows and bytes of a role."""
    rows = source.block_rows
    return {
        "files": len(source.files),
        "blocks": len(rows),
        "rows": source.rows,
        "rows_a_block": [int(rows.min()), int(rows.max())],
        "bytes": sum(file.size_bytes for file in source.files),
    }


def describe_columns(
    source: Source, layout: InputLayout, threads: int | None = None
) -> list[dict[str, Any]]:
    """Every column that the job reads: its role, type, what it becomes, and its values.

    Raises:
        ReadError: A file cannot be read any more.
    """
    reader = TableReader(source, layout.columns)

    def visit(block: int) -> list[ColumnFacts]:
        table = reader.read(block)
        return [column_facts(table[name]) for name in layout.columns]

    totals = [ColumnFacts() for _ in layout.columns]
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for found in pool.map(visit, range(len(source.blocks))):
            totals = [total.merge(part) for total, part in zip(totals, found, strict=True)]
    types = {column.name: column for column in source.columns}
    return [
        {
            "name": name,
            "role": _role(name, layout),
            "type": types[name].dtype,
            "becomes": _becomes(name, layout),
            **facts.record(),
        }
        for name, facts in zip(layout.columns, totals, strict=True)
    ]


def column_facts(column: pa.ChunkedArray) -> ColumnFacts:
    """What is known of the values of a column."""
    rows, null_rows = len(column), int(null_rows_of(column).sum())
    values = _scalars(column).drop_null()
    if is_text_type(values.type):
        counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(values).to_pylist()}
        return ColumnFacts(rows, null_rows, counts=Counter(counts))
    if pa.types.is_floating(values.type):
        values = values.filter(pc.is_finite(values))
    if not len(values):
        return ColumnFacts(rows, null_rows)
    extremes = tuple(pc.min_max(values).as_py().values())
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return ColumnFacts(rows, null_rows, extremes)
    numbers = np.asarray(values, np.float64)
    mean = numbers.mean()
    squares = ((numbers - mean) ** 2).sum()
    moments = Moments(*(np.array([part]) for part in (float(len(numbers)), mean, squares)))
    return ColumnFacts(rows, null_rows, extremes, moments)


def describe_shares(
    plan: Plan, layout: InputLayout, workers: int, cache_bytes: int = 0
) -> list[dict[str, Any]]:
    """What each of the workers owns in the first epoch, and the memory it takes at most."""
    order = plan.for_epoch(0)
    shares = []
    for rank in range(workers):
        share = Share(plan, rank, workers)
        steps = np.diff(share.step_offsets(0, min(plan.steps_per_epoch, 1000)))
        shares.append(
            {
                "rank": rank,
                "virtual_shards": [share.shards.start, share.shards.stop - 1],
                "rows": sum(plan.shard_rows(shard) for shard in share.shards),
                "blocks": _blocks_of(order, share),
                "rows_a_step": [int(steps.min()), int(steps.max())],
                "memory_bound_bytes": memory_bound_bytes(share, layout, cache_bytes),
            }
        )
    return shares


def sample_rows(
    plan: Plan, source: Source, layout: InputLayout, on_null: OnNull, rows: int
) -> pa.Table:
    """The first rows of the first global batch as they stand in the files, in their order."""
    order = plan.for_epoch(0)
    reader = TableReader(source, layout.columns)
    tables: dict[int, pa.Table] = {}
    found = []
    for row in range(min(rows, plan.global_batch_size, plan.rows)):
        block, index = _place(order, row)
        if block not in tables:
            table = reader.read(block)
            tables[block] = without_nulls(table)[0] if on_null == "drop" else table
        found.append(tables[block].slice(index, 1))
    return pa.concat_tables(found)


def _place(order: EpochOrder, row: int) -> tuple[int, int]:
    """Block, and row in it, of a row of an epoch."""
    plan = order.plan
    position, shard = divmod(row, plan.virtual_shards)
    window = position // plan.rows_per_window
    segments, stride = order.window_segments(shard, window)
    permutation = order.window_permutation(shard, window)
    index = position - order.window_positions(shard, window)[0]
    place = index if permutation is None else int(permutation[index])
    for segment in segments:
        held = -(-(segment.stop - segment.start) // stride)
        if place < held:
            return segment.block, segment.start + place * stride
        place -= held
    raise IndexError(f"row {row} is in no segment of window {window} of shard {shard}")


def _blocks_of(order: EpochOrder, share: Share) -> int:
    """Blocks that hold rows of a share."""
    plan = order.plan
    if plan.shuffle == "none":
        return int(np.count_nonzero(plan.block_rows))
    first = plan.shard_start(share.shards.start)
    last = plan.shard_start(share.shards.stop - 1) + plan.shard_rows(share.shards.stop - 1)
    begin, end = np.searchsorted(order.stream_starts, [first, last - 1], side="right") - 1
    return int(np.count_nonzero(np.diff(order.stream_starts[begin : end + 2])))


def _scalars(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The single values of a column: list elements one by one, dictionaries as their values."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_nested(column.type):
        column = pc.list_flatten(column)
    return column


def _role(name: str, layout: InputLayout) -> str:
    if name == layout.label:
        return "label"
    return "weight" if name == layout.weight else "feature"


def _becomes(name: str, layout: InputLayout) -> str:
    """In words, what the model gets of a column."""
    if name == layout.label:
        if layout.label_classes is not None:
            return f"one of {len(layout.label_classes)} classes"
        return f"{layout.label_dtype}" + (f" x {layout.label_size}" * (layout.label_size > 1))
    feature = next((entry for entry in layout.features if entry.name == name), None)
    if feature is None:
        return "float32"
    encoding = feature.encoding
    if isinstance(encoding, Category):
        return f"{encoding.output} of {encoding.indices}"
    if isinstance(encoding, Text):
        return f"{encoding.output} of {encoding.indices} words, {encoding.sequence_length} a row"
    if isinstance(encoding, Timestamp):
        return ", ".join(_forms(encoding))
    scaled = ", normalised" if feature.is_normalized else ""
    return "float32" + (f" {list(feature.shape)}" if feature.shape else "") + scaled


def _forms(encoding: Timestamp) -> Sequence[str]:
    return [part if form == "number" else f"{form} of {part}" for part, form in encoding.channels]


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)
