"""Reading from files: from any step on, for any number of workers, each block decoded once."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.data import DataConfig
from data_pipeline.blocks import Block, BlockReader
from data_pipeline.dataset import chunk_dataset
from data_pipeline.features import InputLayout, input_layout
from data_pipeline.plan import Plan, Share
from data_pipeline.reader import EvaluationChunks, EvaluationCut, TrainingChunks, memory_bound_bytes
from data_pipeline.rows import ChunkMemory
from data_pipeline.source import Source, open_source
from tests.support.orders import row_order

ROWS = 400


class CountingReader(BlockReader):
    """Tells which blocks were decoded."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.decoded: Counter[int] = Counter()

    def _decode(self, number: int) -> Block:
        self.decoded[number] += 1
        return super()._decode(number)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, InputLayout]:
    """Rows of a number, its negative and a pair, in three files."""
    folder = tmp_path_factory.mktemp("numbered")
    ids = np.arange(ROWS, dtype="f4")
    for name, part in (("a", ids[:97]), ("b", ids[97:100]), ("c", ids[100:])):
        pairs = pa.FixedSizeListArray.from_arrays(np.repeat(part, 2), 2)
        table = pa.table({"x": part, "z": pairs, "y": -part, "w": part / 2})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=31)
    features: Any = ["x", {"name": "z", "shape": [2]}]
    data = DataConfig(train=str(folder), features=features, label="y", weight="w")
    source = open_source("train", str(folder), data.columns)
    return source, input_layout(data, source)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(1, 150),
    shards=st.integers(1, 12),
    window=st.integers(1, 90),
    workers=st.integers(1, 5),
    shuffle=st.sampled_from(["none", "window", "full"]),
    place=st.integers(0, 9_999),
)
def test_the_rest_of_a_run_is_the_same_from_any_step_on(
    opened: Any, batch: int, shards: int, window: int, workers: int, shuffle: Any, place: int
) -> None:
    """As after a failure, with another number of workers: all rows from a step on, each once."""
    source, layout = opened
    workers = min(workers, shards)
    plan = Plan(source.block_rows, batch, shards, window, shuffle, 5)
    step = place % (2 * plan.steps_per_epoch)
    epoch, first_step = divmod(step, plan.steps_per_epoch)
    first_row = plan.rows_before_step(first_step)
    found: dict[int, list[float]] = {}
    for rank in range(workers):
        share = Share(plan, rank, workers)
        reader = CountingReader(source, layout, "error")
        chunks = TrainingChunks(share, reader, layout, 2)
        number, index = chunks.chunk_of(step)
        at = step
        for later in range(number, chunks.chunks):
            inputs, labels, weights, offsets, _, _ = chunks.assemble(later)
            np.testing.assert_array_equal(inputs, np.repeat(inputs[:, :1], 3, axis=1))
            np.testing.assert_array_equal(labels[:, 0], -inputs[:, 0])
            np.testing.assert_array_equal(weights, inputs[:, 0] / 2)
            for low, high in zip(offsets[index:-1], offsets[index + 1 :], strict=True):
                found.setdefault(at, []).extend(inputs[low:high, 0])
                at += 1
            index = 0
        assert at == 2 * plan.steps_per_epoch
        assert max(reader.decoded.values(), default=0) <= 2 - epoch
    rest = [row_order(plan, epoch)[first_row:]]
    rest += [row_order(plan, later) for later in range(epoch + 1, 2)]
    for k, expected in enumerate(_steps(rest, batch)):
        assert sorted(found[step + k]) == sorted(expected)


def _steps(epochs: list[Any], batch: int) -> list[list[float]]:
    return [
        rows[first : first + batch].tolist()
        for rows in epochs
        for first in range(0, len(rows), batch)
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_evaluation_decodes_no_block_twice(
    opened: Any, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.reader._CHUNK_BYTES", 512)
    source, layout = opened
    for rank in range(workers):
        reader = CountingReader(source, layout, "error")
        chunks = EvaluationChunks(
            source.block_rows, reader, layout, EvaluationCut(rank, workers, 8)
        )
        assert chunks.chunks > 5
        for number in range(chunks.chunks):
            chunks.assemble(number)
        assert set(reader.decoded.values()) == {1}


def test_tensorflow_takes_chunks_over_without_a_copy() -> None:
    """The installed one does so with memory at multiples of 64 bytes; others would cost a copy."""
    layout = InputLayout((), "y", "float32", 7, None)
    memory, kept = ChunkMemory(layout), []

    def assemble() -> Any:
        kept.append(memory.empty(1_000).labels)
        return kept[-1]

    numbers = tf.data.Dataset.range(3)
    dataset = numbers.map(lambda _: tf.numpy_function(assemble, [], tf.float32))
    tensors = list(dataset)
    assert [address(memoryview(tensor)) for tensor in tensors] == list(map(address, kept))


def address(array: Any) -> int:
    found: int = np.asarray(array).__array_interface__["data"][0]
    return found


def test_the_dataset_is_the_chunks(opened: Any) -> None:
    source, layout = opened
    plan = Plan(source.block_rows, 64, 4, 30, "window", 5)
    reader = CountingReader(source, layout, "error")
    expected = TrainingChunks(Share(plan, 0, 1), reader, layout, 3)
    chunks = TrainingChunks(Share(plan, 0, 1), reader, layout, 3)
    seen = 0
    for number, tensors in enumerate(chunk_dataset(chunks, layout, 1), 1):
        for tensor, array in zip(tensors, expected.assemble(number), strict=True):
            np.testing.assert_array_equal(tensor.numpy(), array)
        seen += 1
    assert seen == expected.chunks - 1


def test_the_bound_of_memory_is_told_by_windows_not_by_rows() -> None:
    layout = InputLayout((), "y", "float32", 10, None)

    def bound(blocks: int, workers: int = 1, **changes: Any) -> int:
        values = {"window_rows": 1_000, "shuffle": "window", **changes}
        plan = Plan(np.full(blocks, 1_000), 100, 16, seed=1, **values)
        return memory_bound_bytes(Share(plan, 0, workers), layout)

    assert bound(10_000) == bound(1_000)
    assert bound(1_000, window_rows=4_000) > bound(1_000)
    assert bound(1_000, workers=4) < 0.5 * bound(1_000)
    assert bound(10_000, shuffle="full") > 5 * bound(1_000, shuffle="full")
    plan = Plan(np.full(1_000, 1_000), 100, 16, 1_000, "window", 1)
    share = Share(plan, 0, 1)
    assert memory_bound_bytes(share, layout, 77) == memory_bound_bytes(share, layout) + 77
