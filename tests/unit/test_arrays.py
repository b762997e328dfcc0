"""Arrays in memory as the data section of a job."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lockstep
from configs.data import DataConfig
from data_pipeline.arrays import from_arrays
from data_pipeline.converted import PartWriter
from data_pipeline.errors import ConvertError, DataError
from data_pipeline.features import input_layout
from data_pipeline.source import open_source

IMAGES = np.arange(5 * 4 * 4 * 3, dtype="u1").reshape(5, 4, 4, 3)


def read(folder: str) -> pa.Table:
    return pq.read_table(next(Path(folder).glob("*.parquet")))


def test_arrays_become_a_data_section(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path))
    labels = np.arange(5)
    section = lockstep.from_arrays((IMAGES, labels), test=(IMAGES[:2], labels[:2]))
    assert {key: section[key] for key in section if key not in ("train", "test")} == {
        "features": [{"name": "x", "shape": [4, 4, 3]}],
        "label": "y",
    }
    assert Path(section["train"]).parent == tmp_path / "arrays"
    data = DataConfig(**section)
    source = open_source("train", data.train, data.columns)
    layout = input_layout(data, source)
    assert (layout.input_shape, layout.label_dtype, source.rows) == ((4, 4, 3), "int64", 5)
    assert read(section["test"])["y"].to_pylist() == [0, 1]
    stored = read(section["train"])["x"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_array_equal(stored, IMAGES)


def test_a_mapping_is_a_column_a_name(tmp_path):
    x = {
        "a": np.arange(3.0),
        "b": [[1, 2], [3, 4], [5, 6]],
        "city": np.array(["Oslo", None, "Rome"], object),
        "code": np.array(["a", "b", "c"]),
    }
    section = from_arrays((x, np.zeros((3, 1), "f4"), [1, 2, 3]), folder=tmp_path)
    assert section["features"] == [
        {"name": "a"},
        {"name": "b", "shape": [2]},
        {"name": "city"},
        {"name": "code"},
    ]
    assert section["weight"] == "w"
    table = read(section["train"])
    assert table.to_pylist()[1] == {
        "a": 1.0,
        "b": [3, 4],
        "city": None,
        "code": "b",
        "y": 0.0,
        "w": 2,
    }


def test_the_same_content_is_written_once(tmp_path, monkeypatch):
    x, y = np.arange(8.0), np.arange(8)
    first = from_arrays((x, y), folder=tmp_path)
    monkeypatch.setattr(PartWriter, "write", lambda *_: pytest.fail("written again"))
    assert from_arrays((x.copy(), list(range(8))), folder=tmp_path) == first
    monkeypatch.undo()
    others = [
        (x + 1, y),
        (x, y + 1),
        (x.astype("f4"), y),
        (x.reshape(8, 1), y),
        ({"z": x}, y),
        (x[::-1], y),
        (x, y, np.ones(8)),
    ]
    folders = {from_arrays(other, folder=tmp_path)["train"] for other in others}
    assert len(folders | {first["train"]}) == len(others) + 1


def test_rows_without_weights_count_one_where_training_has_weights(tmp_path):
    section = from_arrays(
        (np.zeros(2), np.zeros(2), np.full(2, 0.5)), (np.zeros(3), np.zeros(3)), folder=tmp_path
    )
    assert read(section["validation"])["w"].to_pylist() == [1.0, 1.0, 1.0]


def test_what_fails_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PartWriter, "write", fail)
    with pytest.raises(ConvertError, match="No space left"):
        from_arrays((np.zeros(2), np.zeros(2)), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


ERRORS: dict[str, tuple[Any, str]] = {
    "not a pair": (np.zeros(3), "train received ndarray; "),
    "one array": ((np.zeros(3),), "received tuple of 1"),
    "rows differ": (
        (np.zeros((3, 2)), np.zeros(4)),
        r"train: received shapes x \(3, 2\), y \(4,\); the same first axis",
    ),
    "no row": ((np.zeros(0), np.zeros(0)), "no row"),
    "rows of several lengths": (([[1], [2, 3]], [0, 1]), "rows of one shape are allowed"),
    "a scalar": ((1.0, 2.0), "the same first axis"),
    "objects": (
        (np.array([1, "a"], object), [0, 1]),
        r"train: array 'x' has dtype object and holds int 1; .*numpy\.asarray\(x, 'float32'\)",
    ),
    "complex": ((np.zeros(2, complex), [0, 1]), "'x' holds complex128"),
    "label of several axes": ((np.zeros(2), np.zeros((2, 3, 3))), "the label has shape"),
    "weights in rows": ((np.zeros(2), np.zeros(2), np.zeros((2, 2))), "the weight has shape"),
    "name of the label": (({"y": np.zeros(2)}, np.zeros(2)), "x has a column 'y'; names other"),
    "no column": (({}, np.zeros(2)), "x has no column"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_arrays_that_are_no_rows_are_told(tmp_path, case):
    train, message = ERRORS[case]
    with pytest.raises(DataError, match=message):
        from_arrays(train, folder=tmp_path)


def test_roles_must_be_alike(tmp_path):
    train = (np.zeros((3, 2)), np.zeros(3))
    for other in ((np.zeros((3, 3)), np.zeros(3)), ({"a": np.zeros(3)}, np.zeros(3))):
        with pytest.raises(DataError, match="validation: a row has the columns and shapes"):
            from_arrays(train, other, folder=tmp_path)
