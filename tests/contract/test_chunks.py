"""Chunks of all workers together hold each row once, with its place in the global batch."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.data import DataConfig
from data_pipeline.blocks import BlockReader
from data_pipeline.features import InputLayout, input_layout
from data_pipeline.plan import Plan, Share
from data_pipeline.reader import EvaluationChunks, EvaluationCut, TrainingChunks
from data_pipeline.source import open_source
from tests.support.orders import row_order

ROWS = 211


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlockReader, InputLayout, Any]:
    """Two files of rows whose only feature is the row's number."""
    folder = tmp_path_factory.mktemp("numbered")
    ids = np.arange(ROWS, dtype="f4")
    for name, part in (("a", ids[:97]), ("b", ids[97:])):
        pq.write_table(
            pa.table({"x": part, "y": -part}), folder / f"{name}.parquet", row_group_size=31
        )
    data = DataConfig(train=str(folder), features=["x"], label="y")  # type: ignore[list-item]
    source = open_source("train", str(folder), data.columns)
    layout = input_layout(data, source)
    block_rows = np.concatenate([file.block_rows for file in source.files]).astype(np.int64)
    return BlockReader(source, layout, "error", 2**20), layout, block_rows


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(1, 230),
    shards=st.integers(1, 20),
    workers=st.integers(1, 5),
    shuffle=st.sampled_from(["none", "window", "full"]),
    seed=st.integers(0, 99),
)
def test_places_put_the_parts_of_training_together(
    opened: Any, batch: int, shards: int, workers: int, shuffle: Any, seed: int
) -> None:
    reader, layout, block_rows = opened
    workers = min(workers, shards)
    plan = Plan(block_rows, batch, shards, 16, shuffle, seed)
    order = row_order(plan, 0)
    batches: dict[int, Any] = {}
    for rank in range(workers):
        chunks = TrainingChunks(Share(plan, rank, workers), reader, layout, 1, has_places=True)
        step = 0
        for number in range(chunks.chunks):
            inputs, labels, _, offsets, global_rows, places = chunks.assemble(number)
            for first, last, size in zip(offsets[:-1], offsets[1:], global_rows, strict=True):
                whole = batches.setdefault(step, np.full(int(size), -1.0))
                assert (whole[places[first:last]] == -1).all()
                whole[places[first:last]] = inputs[first:last, 0]
                np.testing.assert_array_equal(labels[first:last, 0], -inputs[first:last, 0])
                step += 1
    np.testing.assert_array_equal(np.concatenate([batches[k] for k in sorted(batches)]), order)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch=st.integers(1, 230), workers=st.integers(1, 6), is_shared=st.booleans())
def test_evaluation_shows_each_row_once_in_whole_batches(
    opened: Any, batch: int, workers: int, is_shared: bool
) -> None:
    reader, layout, block_rows = opened
    seen: list[float] = []
    batches: dict[int, Any] = {}
    for rank in range(workers):
        cut = EvaluationCut(rank, workers, batch, is_shared)
        chunks = EvaluationChunks(block_rows, reader, layout, cut)
        step = 0
        for number in range(chunks.chunks):
            inputs, _, _, offsets, global_rows, places = chunks.assemble(number)
            assert len(offsets) == len(global_rows) + 1
            seen += inputs[:, 0].tolist()
            for first, last, size in zip(offsets[:-1], offsets[1:], global_rows, strict=True):
                assert 0 < size <= batch
                if is_shared:
                    whole = batches.setdefault(step, np.full(int(size), -1.0))
                    whole[places[first:last]] = inputs[first:last, 0]
                else:  # a part lies inside one batch of all rows
                    numbers = inputs[first:last, 0].astype(int)
                    assert len(set(numbers // batch)) <= 1
                step += 1
    assert sorted(seen) == list(range(ROWS))
    if is_shared:
        whole = np.concatenate([batches[k] for k in sorted(batches)])
        np.testing.assert_array_equal(whole, np.arange(ROWS))


def test_places_cost_nothing_where_nobody_asks(opened: Any) -> None:
    reader, layout, block_rows = opened
    plan = Plan(block_rows, 16, 4, 16, "window", 1)
    chunk = TrainingChunks(Share(plan, 0, 2), reader, layout, 1).assemble(0)
    assert chunk[-1].shape == (0,)
