"""Columns of tensors from the file to the model's input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.data import DataConfig
from data_pipeline.blocks import BlockReader
from data_pipeline.features import input_layout
from data_pipeline.ingest import ingested
from data_pipeline.scan import scan
from data_pipeline.source import open_source

VALUES = np.arange(5 * 2 * 3).reshape(5, 2, 3) % 7


def opened(tmp_path: Path, on_null: Any = "error", **features: Any) -> Any:
    data = DataConfig.model_validate(
        {
            "train": str(tmp_path / "rows"),
            "features": [{"name": "m", **features}],
            "label": "y",
            "on_null": on_null,
            "ingest_dir": str(tmp_path / "cache"),
        }
    )
    source = open_source("train", ingested("train", data.train, data), data.columns)
    layout = input_layout(data, source)
    found = scan(source, layout, data.on_null)
    return layout, found, BlockReader(source, layout, data.on_null).read(0)


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", ">f8", "i8", "bool"])
@pytest.mark.parametrize("shape", [None, [2, 3], [6]])
def test_the_shape_is_the_tensors_unless_the_job_gives_one(tmp_path, dtype, shape):
    (tmp_path / "rows").mkdir()
    values = VALUES.astype(dtype)
    np.savez(tmp_path / "rows" / "a.npz", m=values, y=np.arange(5))
    layout, _, block = opened(tmp_path, **({} if shape is None else {"shape": shape}))
    assert layout.input_shape == tuple(shape or (2, 3))
    np.testing.assert_array_equal(block.features[0], values.reshape(5, 6).astype("f4"))


def test_rows_without_a_tensor_can_be_dropped(tmp_path):
    (tmp_path / "rows").mkdir()
    lines = [f'{{"m": {VALUES[row].tolist()}, "y": {row}}}' for row in range(5)]
    lines[1], lines[3] = '{"m": null, "y": 1}', '{"m": [[1, 2, 3], [4, 5, 6]]}'
    (tmp_path / "rows" / "a.ndjson").write_text("\n".join(lines))
    layout, found, block = opened(tmp_path, "drop")
    assert layout.input_shape == (2, 3)
    assert found.dropped_rows == 2
    np.testing.assert_array_equal(block.features[0], VALUES.reshape(5, 6)[[0, 2, 4]])
    np.testing.assert_array_equal(block.label[:, 0], [0, 2, 4])
