"""The pass over all rows: nulls and their policy, exact statistics, what is said of labels."""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import DataConfig
from data_pipeline import blocks as blocks_module
from data_pipeline.blocks import Block, BlockReader
from data_pipeline.errors import DataError, ReadError
from data_pipeline.features import InputColumn, InputLayout, input_layout
from data_pipeline.scan import Moments, Scan, block_moments, scan, summarize_labels
from data_pipeline.source import Source, open_source
from tests.support.parquet import Rows, write_parquet

NAN = float("nan")


def opened(path: Path, **changes: Any) -> tuple[Source, InputLayout]:
    """The files of a folder as a job with features a and b and label y sees them."""
    values = {"features": ["a", "b"], "label": "y", "normalize": True, **changes}
    data = DataConfig(train=str(path), **values)
    source = open_source("train", str(path), data.columns)
    return source, input_layout(data, source)


def scanned(path: Path, on_null: Any = "error", **changes: Any) -> Scan:
    return scan(*opened(path, **changes), on_null)


def rows_of(count: int, **columns: Any) -> Rows:
    numbers = [float(row) for row in range(count)]
    return {"a": numbers, "b": numbers, "y": list(range(count)), **columns}


def test_rows_without_nulls_all_stay(tmp_path):
    write_parquet(tmp_path / "1.parquet", rows_of(5), block_rows=2)
    write_parquet(tmp_path / "2.parquet", rows_of(3), block_rows=2)
    for on_null in ("error", "drop", "zero"):
        found = scanned(tmp_path, on_null)
        assert found.block_rows.tolist() == [2, 2, 1, 2, 1]
        assert (found.dropped_rows, found.zeroed_rows) == (0, {})
        assert found.label_range == (0, 4)


def write_nulls(folder: Path) -> list[str]:
    """Column a with 1 and 2 nulls and NaN, b with 1, in two files; 4 of 9 rows are touched."""
    return [
        write_parquet(folder / "1.parquet", rows_of(5, a=[0.0, None, 2.0, 3.0, 4.0]), block_rows=2),
        write_parquet(
            folder / "2.parquet",
            rows_of(4, a=[NAN, None, 5.0, 6.0], b=[1.0, None, None, 1.0]),
            block_rows=3,
        ),
    ]


def test_nulls_stop_with_the_worst_column_and_file(tmp_path):
    _, second = write_nulls(tmp_path)
    with pytest.raises(DataError) as error:
        scanned(tmp_path)
    assert str(error.value) == (
        f"data.train: column 'a' is null or NaN in 2 rows of {second} (5 in all, in 3 places); "
        "data.on_null: error allows none. Clean the data, or set data.on_null: drop or zero."
    )


def test_a_single_null_is_told_without_a_total(tmp_path):
    path = write_parquet(tmp_path / "1.parquet", rows_of(3, b=[1.0, NAN, 3.0]))
    with pytest.raises(DataError) as error:
        scanned(tmp_path)
    assert str(error.value) == (
        f"data.train: column 'b' is null or NaN in 1 rows of {path}; data.on_null: error allows "
        "none. Clean the data, or set data.on_null: drop or zero."
    )


def test_rows_with_nulls_are_dropped_and_counted(tmp_path):
    write_nulls(tmp_path)
    source, layout = opened(tmp_path)
    found = scan(source, layout, "drop")
    assert found.block_rows.tolist() == [1, 2, 1, 0, 1]
    assert found.dropped_rows == 4
    kept = BlockReader(source, layout, "drop")
    values = np.concatenate([kept.read(block).features[0] for block in range(5)])
    assert values.tolist() == [0, 2, 3, 4, 6]
    assert found.statistics is not None
    np.testing.assert_allclose(found.statistics.mean[0], 3.0)
    np.testing.assert_allclose(found.statistics.variance[0], 4.0)


def test_nulls_in_features_count_as_zero_and_are_counted(tmp_path):
    write_nulls(tmp_path)
    source, layout = opened(tmp_path)
    found = scan(source, layout, "zero")
    assert found.block_rows.tolist() == [2, 2, 1, 3, 1]
    assert (found.dropped_rows, found.zeroed_rows) == (0, {"a": 3, "b": 2})
    filled = BlockReader(source, layout, "zero")
    values = np.concatenate([filled.read(block).features[0] for block in range(5)])
    assert values.tolist() == [0, 0, 2, 3, 4, 0, 0, 5, 6]
    assert found.statistics is not None
    np.testing.assert_allclose(found.statistics.mean[0], 20 / 9, rtol=1e-6)


def test_infinity_is_no_null(tmp_path):
    write_parquet(tmp_path / "1.parquet", rows_of(3, a=[float("inf"), NAN, -float("inf")]))
    source, layout = opened(tmp_path, normalize=False)
    block = BlockReader(source, layout, "zero").read(0)
    assert block.features[0].tolist() == [float("inf"), 0, -float("inf")]
    assert block.nulls == {"a": 1}


@pytest.mark.parametrize("on_null", ["error", "zero"])
@pytest.mark.parametrize(("role", "column"), [("label", "y"), ("weight", "w")])
def test_labels_and_weights_are_never_filled(tmp_path, on_null, role, column):
    values = {"w": [1.0, 1.0, 1.0], column: [1.0, None, NAN]}
    path = write_parquet(tmp_path / "1.parquet", rows_of(3, **values))
    with pytest.raises(DataError) as error:
        scanned(tmp_path, on_null, weight="w")
    assert str(error.value) == (
        f"data.train: column '{column}' is null or NaN in 2 rows of {path}; data.on_null: error "
        "allows none. Clean the data, or set data.on_null: drop."
    )
    assert scanned(tmp_path, "drop", weight="w").dropped_rows == 2


def test_dropping_every_row_is_told(tmp_path):
    write_parquet(tmp_path / "1.parquet", rows_of(3, a=[None, NAN, 1.0], b=[1.0, 1.0, NAN]))
    with pytest.raises(DataError) as error:
        scanned(tmp_path, "drop")
    assert str(error.value) == (
        "data.train: data.on_null: drop leaves none of 3 rows. Fill the values, or set "
        "data.on_null: zero."
    )


def lists(values: list[Any], kind: Any = None, size: int = -1) -> pa.Array:
    return pa.array(values, pa.list_(kind or pa.float32(), size))


LIST_FEATURE = {"features": [{"name": "a", "shape": [2]}]}


@pytest.mark.parametrize("size", [-1, 2])
def test_a_list_with_a_null_inside_is_one_null_row(tmp_path, size):
    values = [[1.0, 2.0], [None, NAN], None, [3.0, NAN], [4.0, 5.0]]
    path = write_parquet(tmp_path / "1.parquet", rows_of(5, a=lists(values, size=size)))
    with pytest.raises(DataError, match=f"'a' is null or NaN in 3 rows of {path}; "):
        scanned(tmp_path, **LIST_FEATURE)
    source, layout = opened(tmp_path, **LIST_FEATURE)
    assert scan(source, layout, "drop").dropped_rows == 3
    reader = BlockReader(source, layout, "drop")
    found = [reader.read(block).features[0].tolist() for block in range(2)]
    assert found == [[[1, 2]], [[4, 5]]]


@pytest.mark.parametrize("kind", [pa.float32(), pa.int64(), pa.bool_()])
def test_nulls_inside_a_list_count_as_zero(tmp_path, kind):
    values = [[1, 1], [None, 1], [1, None]]
    if kind == pa.bool_():
        values = [[None if number is None else True for number in row] for row in values]
    write_parquet(tmp_path / "1.parquet", rows_of(3, a=lists(values, kind)))
    source, layout = opened(tmp_path, **LIST_FEATURE)
    block = BlockReader(source, layout, "zero").read(0)
    assert block.features[0].tolist() == [[1, 1], [0, 1], [1, 0]]
    assert scan(source, layout, "zero").zeroed_rows == {"a": 2}


def test_a_list_that_is_null_as_a_whole_has_no_zero(tmp_path):
    path = write_parquet(tmp_path / "1.parquet", rows_of(2, a=lists([None, [1.0, 2.0]])))
    with pytest.raises(DataError) as error:
        scanned(tmp_path, "zero", **LIST_FEATURE)
    assert str(error.value) == (
        f"{path}, block 0: column 'a' has lists that are null as a whole; data.on_null: zero can "
        "fill numbers in a list only. Set data.on_null: drop, or fill them."
    )


@pytest.mark.parametrize("values", [[[1.0, 2.0], [1.0]], [[1.0, 2.0], []], [[1.0] * 3, [1.0] * 3]])
def test_lists_of_another_length_are_told_with_file_and_block(tmp_path, values):
    path = write_parquet(tmp_path / "1.parquet", rows_of(2, a=lists(values)))
    with pytest.raises(DataError) as error:
        scanned(tmp_path, **LIST_FEATURE)
    assert str(error.value) == (
        f"{path}, block 0: column 'a' has lists of other than 2 elements. Correct the rows, or "
        "leave them out."
    )


def test_whole_numbers_and_booleans_become_float32_features(tmp_path):
    columns = rows_of(3, a=pa.array([1, None, 2**24], pa.int64()), b=pa.array([True, None, False]))
    write_parquet(tmp_path / "1.parquet", columns)
    source, layout = opened(tmp_path)
    block = BlockReader(source, layout, "zero").read(0)
    assert [values.dtype for values in block.features] == [np.float32, np.float32]
    assert [values.tolist() for values in block.features] == [[1, 0, 2**24], [1, 0, 0]]
    assert (block.label.dtype, block.label.shape) == (np.int64, (3, 1))


def test_a_file_that_changed_after_planning_is_not_read(tmp_path):
    path = write_parquet(tmp_path / "1.parquet", rows_of(3))
    source, layout = opened(tmp_path)
    write_parquet(Path(path), rows_of(4))
    with pytest.raises(ReadError) as error:
        BlockReader(source, layout, "error").read(0)
    assert str(error.value) == (
        f"{path} changed since the run was planned (size or time of change). Start a new run."
    )
    assert error.value.is_retryable


def test_a_file_that_is_damaged_inside_cannot_be_read(tmp_path):
    path = Path(write_parquet(tmp_path / "1.parquet", rows_of(400), block_rows=400))
    source, layout = opened(tmp_path)
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[4:200] = bytes(196)
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ReadError) as error:
        BlockReader(source, layout, "error").read(0)
    message = str(error.value)
    assert message.startswith(f"cannot read block 0 of {path}: ")
    assert message.endswith("check the storage, then resume.")


def test_blocks_are_kept_within_their_memory(tmp_path, monkeypatch):
    write_parquet(tmp_path / "1.parquet", rows_of(12), block_rows=4)
    source, layout = opened(tmp_path)
    decoded: list[int] = []
    decode = BlockReader._decode

    def counted(self: BlockReader, number: int) -> Block:
        decoded.append(number)
        return decode(self, number)

    monkeypatch.setattr(blocks_module.BlockReader, "_decode", counted)
    size = BlockReader(source, layout, "error").read(0).size_bytes
    assert size == 4 * (4 + 4 + 8)
    reads = [0, 1, 0, 2, 0, 1]
    for cache_bytes, expected in (
        (0, reads),
        (size - 1, reads),
        (2 * size, [0, 1, 2, 1]),
        (3 * size, [0, 1, 2]),
    ):
        decoded.clear()
        reader = BlockReader(source, layout, "error", cache_bytes)
        for block in reads:
            reader.read(block)
        assert decoded == expected


values64 = st.lists(
    st.floats(-1e6, 1e6, width=32).map(lambda number: number + 1e4), min_size=1, max_size=60
)


def moments_of(values: np.ndarray[Any, Any], edges: list[int]) -> Moments:
    """Moments merged over blocks of rows."""
    layout = InputLayout(
        tuple(InputColumn(f"c{i}", (), i, True) for i in range(values.shape[1])),
        *("y", "int64", 1, None),
    )
    label = np.zeros((0, 1), np.int64)
    parts = [
        block_moments(Block(tuple(values[start:stop].T), label, None, {}), layout)
        for start, stop in zip([0, *edges], [*edges, len(values)], strict=True)
    ]
    return functools.reduce(Moments.merge, parts)


@settings(max_examples=60, deadline=None)
@given(values64, st.lists(st.integers(0, 60), max_size=5))
def test_moments_are_those_of_numpy_however_rows_are_cut_into_blocks(column, cuts):
    values = np.asarray([column, column[::-1]], np.float32).T
    edges = sorted(min(cut, len(values)) for cut in cuts)
    exact = values.astype(np.float64)
    for moments in (moments_of(values, edges), moments_of(values, [])):
        assert moments.count.tolist() == [len(values)] * 2
        np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-12, atol=1e-9)
        scale = (exact**2).mean(axis=0)  # what cancels inside a variance
        np.testing.assert_allclose(moments.variance / scale, exact.var(axis=0) / scale, atol=1e-12)


def test_a_large_mean_costs_no_digits_of_the_variance():
    """Sums of squares would: 1e8 squared leaves nothing of a variance of 2."""
    values = 1e8 + np.asarray([[0.0], [2.0], [4.0], [2.0]] * 25)
    moments = moments_of(values, [7, 50])
    assert moments.mean[0] == 1e8 + 2
    np.testing.assert_allclose(moments.variance[0], 2.0, rtol=1e-8)  # means round to 1.5e-8


def write_random(folder: Path, rows: int = 997) -> np.ndarray[Any, Any]:
    """Two files of several blocks; returns their rows as `(rows, 2) float32`."""
    values = np.random.default_rng(5).normal(50, 7, (rows, 2)).astype(np.float32)
    for name, part, block_rows in (("1", slice(0, 400), 90), ("2", slice(400, rows), 137)):
        a, b = values[part].T
        columns = {"a": a, "b": b, "y": np.arange(len(a))}
        write_parquet(folder / f"{name}.parquet", columns, block_rows)
    return values


def test_statistics_are_those_of_numpy_rounded_to_float32(tmp_path):
    values = write_random(tmp_path).astype(np.float64)
    statistics = scanned(tmp_path).statistics
    assert statistics is not None
    assert statistics.mean.dtype == statistics.variance.dtype == np.float32
    np.testing.assert_array_equal(statistics.mean, values.mean(axis=0).astype(np.float32))
    np.testing.assert_array_equal(statistics.variance, values.var(axis=0).astype(np.float32))


def test_statistics_do_not_depend_on_threads(tmp_path, monkeypatch):
    """Bit for bit, in float64: also where the blocks are finished in another order."""
    write_random(tmp_path)
    source, layout = opened(tmp_path)
    merged: list[bytes] = []
    merge = Moments.merge

    def recorded(self: Moments, other: Moments) -> Moments:
        total = merge(self, other)
        merged.append(total.mean.tobytes() + total.squares.tobytes())
        return total

    monkeypatch.setattr(Moments, "merge", recorded)
    found = []
    for threads in (1, 2, 7):
        merged.clear()
        scan(source, layout, "error", threads=threads)
        found.append(list(merged))
    assert len(found[0]) == len(source.blocks) - 1
    assert found[1:] == [found[0]] * 2


def test_only_what_is_normalised_has_statistics(tmp_path):
    write_random(tmp_path)
    assert scanned(tmp_path, normalize=False).statistics is None
    features = ["a", {"name": "b", "normalize": False}]
    statistics = scanned(tmp_path, features=features).statistics
    assert statistics is not None
    assert (statistics.mean[1], statistics.variance[1]) == (0, 1)
    assert statistics.mean[0] != 0


def test_a_single_list_has_statistics_along_its_last_axis(tmp_path):
    values = np.random.default_rng(2).normal(3, 2, (50, 12)).astype(np.float32)
    columns = {"a": lists(values.tolist()), "y": list(range(50))}
    write_parquet(tmp_path / "1.parquet", columns, block_rows=8)
    statistics = scanned(tmp_path, features=[{"name": "a", "shape": [3, 2, 2]}]).statistics
    assert statistics is not None
    pixels = values.reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, pixels.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(statistics.variance, pixels.var(axis=0), rtol=1e-7)


def test_lists_beside_scalars_have_statistics_for_each_element(tmp_path):
    values = np.random.default_rng(2).normal(3, 2, (50, 5)).astype(np.float32)
    columns = {"a": values[:, 0], "v": lists(values[:, 1:].tolist()), "y": list(range(50))}
    write_parquet(tmp_path / "1.parquet", columns, block_rows=8)
    features = ["a", {"name": "v", "shape": [2, 2]}]
    statistics = scanned(tmp_path, features=features).statistics
    assert statistics is not None
    np.testing.assert_allclose(statistics.mean, values.mean(axis=0, dtype="f8"), rtol=1e-7)


def test_labels_are_summarised(tmp_path):
    write_parquet(tmp_path / "1.parquet", rows_of(5, y=[3, 0, 3, 1, 3]), block_rows=2)
    found = scanned(tmp_path)
    assert found.label_range == (0, 3)
    assert (found.constants.mean.tolist(), found.constants.median.tolist()) == ([2.0], [3.0])
    assert found.constants.frequencies is not None
    assert found.constants.frequencies.tolist() == [0.2, 0.2, 0, 0.6]


@pytest.mark.parametrize(
    "labels",
    [
        np.asarray([[0.0], [1.0]], np.float32),
        np.asarray([[-1], [1]]),
        np.asarray([[0, 1], [1, 0]]),
        np.asarray([[100_000], [1]]),
    ],
)
def test_labels_that_are_no_class_numbers_have_no_frequencies(labels):
    summary = summarize_labels(labels)
    assert summary.frequencies is None
    np.testing.assert_array_equal(summary.mean, labels.mean(axis=0))
    np.testing.assert_array_equal(summary.median, np.median(labels, axis=0))


def test_the_range_of_labels_is_that_of_all_rows_not_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.scan._LABEL_SAMPLE_ROWS", 10)
    labels = [5] * 41 + [-2] + [5] * 56 + [70, 5]
    write_parquet(tmp_path / "1.parquet", rows_of(100, y=labels), block_rows=50)
    found = scanned(tmp_path)
    assert found.label_range == (-2, 70)
    assert found.constants.mean.tolist() == [5.0]


def test_blocks_without_rows_are_no_mistake(tmp_path):
    write_parquet(tmp_path / "1.parquet", rows_of(3))
    none = {"a": pa.array([], pa.float64()), "b": pa.array([], pa.float64())}
    write_parquet(tmp_path / "0.parquet", {**none, "y": pa.array([], pa.int64())})
    found = scanned(tmp_path)
    assert found.block_rows.sum() == 3
    assert found.statistics is not None
    np.testing.assert_array_equal(found.statistics.mean, [1, 1])
