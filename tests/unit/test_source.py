"""From what a job calls its data to files, blocks and columns; and what is said of bad ones."""

import gc
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import DataConfig
from data_pipeline import storage
from data_pipeline.errors import DataError
from data_pipeline.features import InputLayout, input_layout
from data_pipeline.source import PARQUET_SUFFIXES, Column, Paths, Source, open_source
from tests.support.parquet import Rows, write_parquet


def write(path: Path, columns: Rows | None = None, block_rows: int = 4) -> str:
    return write_parquet(path, columns or {"a": [1.0, 2.0], "y": [0, 1]}, block_rows)


def layout_of(source: Source, **changes: object) -> InputLayout:
    features = changes.pop("features", ["a"])
    data = DataConfig(train="x", features=features, label="y", **changes)
    return input_layout(data, source)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in folders, beside what must not be found."""
    for name in ("b/2.parquet", "b/10.PARQUET", "b/deep/er/x.pq", "a.parquet"):
        write(tmp_path / name)
    for name in ("b/.hidden.parquet", "b/_SUCCESS.parquet", "b/_temporary/1.parquet"):
        write(tmp_path / name)
    write(tmp_path / "b" / ".spark" / "1.parquet")
    (tmp_path / "b" / "notes.txt").write_text("not data")
    (tmp_path / "b" / "folder.parquet").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        ("a.parquet", ["a.parquet"]),
        ("b", ["b/10.PARQUET", "b/2.parquet", "b/deep/er/x.pq"]),
        ("b/", ["b/10.PARQUET", "b/2.parquet", "b/deep/er/x.pq"]),
        ("*.parquet", ["a.parquet"]),
        ("b/?.parquet", ["b/2.parquet"]),
        ("**/*.p[qx]", ["b/deep/er/x.pq"]),
        (["b", "a.parquet"], ["b/10.PARQUET", "b/2.parquet", "b/deep/er/x.pq", "a.parquet"]),
        (["a.parquet", "*.parquet"], ["a.parquet"]),
        ("b/.hidden.parquet", ["b/.hidden.parquet"]),
    ],
)
def test_files_of_a_path_a_folder_a_glob_and_a_list(tree, paths, found):
    paths_found = storage.find("data.train", paths, PARQUET_SUFFIXES)
    assert paths_found == [str(Path(name)) for name in found]


def test_hidden_parents_of_a_named_folder_do_not_hide_its_files(tmp_path):
    path = write(tmp_path / ".cache" / "_data" / "1.parquet")
    folder = str(tmp_path / ".cache" / "_data")
    assert storage.find("data.train", folder, PARQUET_SUFFIXES) == [path]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "data.train is an empty list; name at least one file."),
        (
            "c/*.parquet",
            "data.train: 'c/*.parquet' matches no file. Check the pattern; it is relative to the "
            "working directory.",
        ),
        (
            "b/_temporary/*.pq",
            "data.train: 'b/_temporary/*.pq' matches no file. Check the pattern; it is relative "
            "to the working directory.",
        ),
        (
            "a.parquett",
            "data.train: no file or folder at 'a.parquett' (relative to the working directory). "
            "Did you mean 'a.parquet'? Check the path; `lockstep example flights` writes the data "
            "of the examples.",
        ),
        (
            "nowhere/at/all",
            "data.train: no file or folder at 'nowhere/at/all' (relative to the working "
            "directory). Check the path; `lockstep example flights` writes the data of the "
            "examples.",
        ),
        (
            "b/folder.parquet",
            "data.train: folder 'b/folder.parquet' holds no data file (*.parquet, *.pq). Name the "
            "folder that does.",
        ),
        (
            ["a.parquet", "gone"],
            "data.train: no file or folder at 'gone' (relative to the working directory). Check "
            "the path; `lockstep example flights` writes the data of the examples.",
        ),
    ],
)
def test_paths_without_files(tree, paths: Paths, message):
    with pytest.raises(DataError) as error:
        open_source("train", paths, ["a", "y"])
    assert str(error.value) == message
    assert error.value.exit_status == 2


def test_blocks_are_row_groups_in_the_order_of_files(tmp_path):
    write(tmp_path / "2.parquet", {"a": [1.0] * 5, "y": [0] * 5}, block_rows=2)
    write(tmp_path / "10.parquet", {"a": [1.0] * 3, "y": [0] * 3}, block_rows=9)
    source = open_source("train", str(tmp_path), ["a", "y"])
    assert [Path(file.path).name for file in source.files] == ["10.parquet", "2.parquet"]
    assert source.block_rows.tolist() == [3, 2, 2, 1]
    assert source.block_rows.dtype == np.int64
    assert source.blocks.tolist() == [[0, 0], [1, 0], [1, 1], [1, 2]]
    assert source.blocks is source.blocks
    assert source.rows == 8
    stat = (tmp_path / "2.parquet").stat()
    assert (source.files[1].size_bytes, source.files[1].modified_ns) == (
        stat.st_size,
        stat.st_mtime_ns,
    )


def test_an_empty_file_among_others_is_no_mistake(tmp_path):
    write(tmp_path / "0.parquet", {"a": pa.array([], pa.float64()), "y": pa.array([], pa.int64())})
    write(tmp_path / "1.parquet")
    source = open_source("train", str(tmp_path), ["a", "y"])
    assert source.rows == 2
    assert [rows for rows in source.block_rows if rows] == [2]


def test_columns_are_described_by_their_types(tmp_path):
    columns = {
        "f": pa.array([1.0], pa.float32()),
        "i": pa.array([1], pa.uint8()),
        "b": pa.array([True]),
        "fixed": pa.array([[1, 2, 3]], pa.list_(pa.int16(), 3)),
        "free": pa.array([[1.0]], pa.list_(pa.float64())),
        "text": pa.array(["x"]),
        "when": pa.array([0], pa.timestamp("ms")),
    }
    path = write(tmp_path / "x.parquet", columns)
    assert open_source("train", path, list(columns)).columns == (
        Column("f", "float32", 1, False),
        Column("i", "uint8", 1, False),
        Column("b", "bool", 1, False),
        Column("fixed", "int16", 3, True),
        Column("free", "float64", 0, True),
        Column("text", "text", 1, False),
        Column("when", "timestamp[ms]", 1, False),
    )


def test_nulls_are_counted_from_the_footers_for_the_jobs_columns_only(tmp_path):
    columns = {"a": [None, 1.0, None, 2.0, None], "y": [1, 2, 3, 4, 5], "other": [None] * 5}
    path = write(tmp_path / "x.parquet", columns, block_rows=2)
    assert open_source("train", path, ["a", "y"]).files[0].null_counts == {"a": 3}


def test_a_column_that_is_not_there(tmp_path):
    path = write(tmp_path / "x.parquet", {"distance": [1.0], "arr_delay": [2.0]})
    with pytest.raises(DataError) as error:
        open_source("train", path, ["distance", "arr_dely"])
    assert str(error.value) == (
        f"data.train: no column 'arr_dely' in {path}; it has distance, arr_delay. Did you mean "
        "'arr_delay'?"
    )


def test_a_column_that_only_the_second_file_lacks(tmp_path):
    write(tmp_path / "1.parquet")
    path = write(tmp_path / "2.parquet", {"a": [1.0], "Y": [2]})
    with pytest.raises(DataError) as error:
        open_source("validation", str(tmp_path), ["a", "y"])
    assert str(error.value) == (
        f"data.validation: no column 'y' in {path}; it has a, Y. Did you mean 'Y'?"
    )


@pytest.mark.parametrize(
    ("values", "description"),
    [
        (pa.array([1]), "int64"),
        (pa.array(["x"]), "text"),
        (pa.array([[1.0, 2.0]], pa.list_(pa.float64(), 2)), "lists of 2 float64"),
        (pa.array([[1.0]], pa.list_(pa.float64())), "lists of any number of float64"),
    ],
)
def test_a_column_of_another_type_in_another_file(tmp_path, values, description):
    first = write(tmp_path / "1.parquet", {"a": pa.array([1.0], pa.float64()), "y": [1]})
    second = write(tmp_path / "2.parquet", {"a": values, "y": [1]})
    with pytest.raises(DataError) as error:
        open_source("train", str(tmp_path), ["a", "y"])
    assert str(error.value) == (
        f"data.train: column 'a' is float64 in {first} but {description} in {second}; one type in "
        "all files is allowed. Convert the file, or leave it out."
    )


def test_files_without_rows(tmp_path):
    empty = {"a": pa.array([], pa.float64()), "y": pa.array([], pa.int64())}
    first = write(tmp_path / "1.parquet", empty)
    write(tmp_path / "2.parquet", empty)
    with pytest.raises(DataError) as error:
        open_source("test", str(tmp_path), ["a", "y"])
    assert str(error.value) == (
        "data.test: 2 file(s) with no row at all; at least one row is needed. Check what wrote "
        f"{first}."
    )


def not_parquet(path: Path) -> None:
    path.write_text("a,y\n1,2\n")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [not_parquet, truncated, empty])
def test_a_file_that_is_not_parquet(tmp_path, damage):
    write(tmp_path / "1.parquet")
    path = Path(write(tmp_path / "2.parquet"))
    damage(path)
    with pytest.raises(DataError) as error:
        open_source("train", str(tmp_path), ["a", "y"])
    message = str(error.value)
    assert message.startswith(f"{path} is not a readable Parquet file: ")
    assert message.endswith(". Parquet files are allowed; convert it, or take it out.")


def source_with(path: Path, **columns: object) -> Source:
    columns = {"a": [1.0], "y": [1], **columns}
    return open_source("train", write(path / "x.parquet", columns), list(columns))


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        (
            {"y": [["late"]]},
            {},
            "data.label: column 'y' holds text; numbers, booleans and lists of them are allowed. "
            "Encode it as numbers, or name another column.",
        ),
        (
            {"a": [["EWR"]]},
            {},
            "data.features: column 'a' holds text; numbers, booleans and lists of them are "
            "allowed. Encode it as numbers, or name another column.",
        ),
        (
            {"w": pa.array([0], pa.timestamp("ms"))},
            {"weight": "w"},
            "data.weight: column 'w' holds timestamp[ms]; numbers, booleans and lists of them are "
            "allowed. Encode it as numbers, or name another column.",
        ),
        (
            {"a": pa.array([[1.0, 2.0]], pa.list_(pa.float32()))},
            {},
            "data.features: column 'a' holds lists without a fixed size. Give its shape, such as "
            "{name: a, shape: [24, 8]}.",
        ),
        (
            {"a": pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3))},
            {"features": [{"name": "a", "shape": [2, 2]}]},
            "data.features: shape [2, 2] of column 'a' has 4 elements, its lists have 3. Give a "
            "shape of 3 elements.",
        ),
        (
            {},
            {"features": [{"name": "a", "shape": [4]}]},
            "data.features: column 'a' holds one number a row, shape [4] was given. Remove the "
            "shape.",
        ),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, changes, message):
    source = source_with(tmp_path, **columns)
    with pytest.raises(DataError) as error:
        layout_of(source, **changes)
    assert str(error.value) == message


def test_the_layout_puts_features_side_by_side(tmp_path):
    source = source_with(
        tmp_path,
        v=pa.array([[1, 2, 3]], pa.list_(pa.int32(), 3)),
        free=pa.array([[1.0] * 4], pa.list_(pa.float32())),
        w=[1.0],
    )
    features = ["a", {"name": "v", "normalize": False}, {"name": "free", "shape": [2, 2]}]
    layout = layout_of(source, features=features, normalize=True, weight="w")
    described = [(f.name, f.shape, f.offset, f.is_normalized) for f in layout.features]
    assert described == [("a", (), 0, True), ("v", (3,), 1, False), ("free", (2, 2), 4, True)]
    assert (layout.width, layout.input_shape, layout.channels) == (8, (8,), 8)
    assert (layout.label_dtype, layout.label_size, layout.weight) == ("int64", 1, "w")
    assert layout.row_bytes == 8 * 4 + 8 + 4


def test_a_single_list_keeps_its_shape(tmp_path):
    source = source_with(tmp_path, a=pa.array([[0.0] * 12], pa.list_(pa.float32(), 12)))
    layout = layout_of(source, features=[{"name": "a", "shape": [2, 3, 2]}])
    assert (layout.input_shape, layout.channels, layout.width) == ((2, 3, 2), 2, 12)
    assert layout_of(source).input_shape == (12,)


@pytest.mark.parametrize(
    ("label", "dtype", "size"),
    [
        (pa.array([1], pa.int8()), "int64", 1),
        (pa.array([True]), "int64", 1),
        (pa.array([1.0], pa.float64()), "float32", 1),
        (pa.array([[1.0, 0.0]], pa.list_(pa.float32(), 2)), "float32", 2),
        (pa.array([[1, 0, 0]], pa.list_(pa.int64(), 3)), "int64", 3),
    ],
)
def test_labels_keep_whole_numbers(tmp_path, label, dtype, size):
    layout = layout_of(source_with(tmp_path, y=label))
    assert (layout.label_dtype, layout.label_size) == (dtype, size)


@pytest.mark.parametrize(
    ("values", "features"),
    [
        (pa.nulls(5), ["a"]),
        (pa.array([None] * 5, pa.float64()), ["a"]),
        (pa.array([None] * 5, pa.list_(pa.null())), [{"name": "a", "shape": [2]}]),
    ],
)
def test_a_column_without_any_value(tmp_path, values, features):
    first = write(tmp_path / "1.parquet", {"a": values, "y": range(5)}, block_rows=2)
    write(tmp_path / "2.parquet", {"a": values, "y": range(5)}, block_rows=2)
    with pytest.raises(DataError) as error:
        open_source("train", str(tmp_path), ["a", "y"])
    assert str(error.value) == (
        "data.train: column 'a' is null in all 10 rows of 2 file(s); values are needed. Name "
        f"another column, or check what wrote {first}."
    )


def test_a_column_with_values_in_one_file_only(tmp_path):
    write(tmp_path / "1.parquet", {"a": pa.array([None] * 5, pa.float64()), "y": range(5)})
    write(tmp_path / "2.parquet", {"a": [1.0], "y": [1]})
    source = open_source("train", str(tmp_path), ["a", "y"])
    assert [file.null_counts for file in source.files] == [{"a": 5}, {}]


def test_nulls_are_counted_in_files_that_follow_an_empty_one(tmp_path):
    columns = {"a": pa.array([None, 1.0], pa.float64()), "y": [1, 2]}
    table = pa.table(columns)
    pq.ParquetWriter(tmp_path / "1.parquet", table.schema).close()
    write(tmp_path / "2.parquet", columns)
    source = open_source("train", str(tmp_path), ["a", "y"])
    assert [(file.block_rows, file.null_counts) for file in source.files] == [
        ((), {}),
        ((2,), {"a": 1}),
    ]


def test_footers_do_not_wait_for_the_garbage_collector(tmp_path):
    write(tmp_path / "1.parquet")
    gc.collect()
    gc.disable()
    try:
        open_source("train", str(tmp_path), ["a", "y"])
        assert not [held for held in gc.get_objects() if isinstance(held, pq.FileMetaData)]
    finally:
        gc.enable()


def test_a_column_that_becomes_text_in_file_700_is_told_from_the_footers(tmp_path):
    first = write(tmp_path / "000.parquet")
    for number in range(1, 705):
        os.link(first, tmp_path / f"{number:03d}.parquet")
    drifted = tmp_path / "700.parquet"
    drifted.unlink()
    write(drifted, {"a": ["one"], "y": [1]})
    with pytest.raises(DataError) as error:
        open_source("train", str(tmp_path), ["a", "y"])
    assert str(error.value) == (
        f"data.train: column 'a' is float64 in {first} but text in {drifted}; one type in all "
        "files is allowed. Convert the file, or leave it out."
    )


def test_nulls_are_told_of_the_named_column_only_when_names_hold_dots(tmp_path):
    columns = {
        "a": pa.array([{"b": None}, {"b": 1}]),
        "a.c": [1.0, None],
        "y": [1, 2],
    }
    path = write(tmp_path / "x.parquet", columns)
    assert open_source("train", path, ["a.c", "y"]).files[0].null_counts == {"a.c": 1}
