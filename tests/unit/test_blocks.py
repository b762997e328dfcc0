"""Blocks: what is told of nulls by cheap looks, bytes that stay bytes, and how often is decoded."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import DataConfig
from data_pipeline.blocks import BlockReader
from data_pipeline.features import input_layout, null_rows
from data_pipeline.source import open_source
from tests.support.parquet import write_parquet

floats = st.floats(width=32) | st.sampled_from([float("inf"), -float("inf"), float("nan"), 3e38])


@settings(max_examples=200, deadline=None)
@given(st.lists(floats | st.none(), max_size=30), st.sampled_from([pa.float32(), pa.float64()]))
def test_null_and_nan_are_found_row_by_row(values, kind):
    """Infinities and sums that overflow are neither."""
    expected = [value is None or value != value for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert null_rows(pa.chunked_array([pa.array(values, kind)])).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(floats | st.none(), min_size=2, max_size=2) | st.none(), max_size=12))
def test_lists_with_null_or_nan_are_found_row_by_row(rows):
    expected = [row is None or any(v is None or v != v for v in row) for row in rows]
    for kind in (pa.list_(pa.float32(), 2), pa.list_(pa.float32())):
        assert null_rows(pa.chunked_array([pa.array(rows, kind)])).tolist() == expected


@pytest.mark.parametrize("kind", [pa.int64(), pa.bool_(), pa.uint8(), pa.string()])
def test_what_cannot_be_nan_is_asked_for_nulls_only(kind):
    values = {pa.string(): ["a", None, "b"], pa.bool_(): [True, None, False]}.get(
        kind, [1, None, 2]
    )
    assert null_rows(pa.chunked_array([pa.array(values, kind)])).tolist() == [False, True, False]
    assert not null_rows(pa.chunked_array([pa.array(values[::2], kind)])).any()
    assert len(null_rows(pa.chunked_array([pa.array([], kind)]))) == 0


def reader_of(folder: Path, features: list[Any], on_null: Any) -> BlockReader:
    data = DataConfig(train=str(folder), features=features, label="y")
    source = open_source("train", str(folder), data.columns)
    return BlockReader(source, input_layout(data, source), on_null)


@pytest.mark.parametrize("size", [-1, 2])
def test_lists_of_bytes_stay_bytes_unless_one_is_null(tmp_path, size):
    kind = pa.list_(pa.uint8(), size)
    rows = [[1, 2], [3, 255], [None, 7], [0, 9]]
    write_parquet(tmp_path / "1.parquet", {"a": pa.array(rows, kind), "y": [0, 1, 2, 3]}, 2)
    reader = reader_of(tmp_path, [{"name": "a", "shape": [2]}], "zero")
    first, second = reader.read(0).features[0], reader.read(1).features[0]
    assert (first.dtype, second.dtype) == (np.uint8, np.float32)
    assert first.tolist() == [[1, 2], [3, 255]]
    assert second.tolist() == [[0, 7], [0, 9]]
    dropped = reader_of(tmp_path, [{"name": "a", "shape": [2]}], "drop").read(1)
    assert (dropped.features[0].dtype, dropped.features[0].tolist()) == (np.uint8, [[0, 9]])


def test_other_small_numbers_become_float32(tmp_path):
    columns = {
        "a": pa.array([1, 255], pa.uint8()),
        "b": pa.array([[1], [2]], pa.list_(pa.int8(), 1)),
    }
    write_parquet(tmp_path / "1.parquet", {**columns, "y": [0, 1]})
    block = reader_of(tmp_path, ["a", {"name": "b", "shape": [1]}], "error").read(0)
    assert [values.dtype for values in block.features] == [np.float32, np.float32]


def test_decoded_blocks_are_counted(tmp_path):
    write_parquet(tmp_path / "1.parquet", {"a": [1.0] * 9, "y": [0] * 9}, 4)
    reader = reader_of(tmp_path, ["a"], "error")
    for block in (0, 2, 0):
        reader.read(block)
    assert reader.decoded_blocks == 3
