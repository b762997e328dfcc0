"""What TensorFlow reads for us: TFRecord, images, and datasets of `tf.data`."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import lockstep
from data_pipeline.errors import DataError
from data_pipeline.source import describe_field
from tests.support.converted import table_of

# TFRecord


def feature(values: list[Any]) -> tf.train.Feature:
    if values and isinstance(values[0], bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
    if values and isinstance(values[0], float):
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def write_examples(path: Path, rows: list[dict[str, list[Any]]], options: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for row in rows:
            features = {name: feature(values) for name, values in row.items()}
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
    return path


def test_examples_become_columns_over_all_files(tmp_path):
    rows = [
        {"f": [i / 2], "i": [i], "v": [1.0 * i, 2.0], "r": [7] * (i % 3), "t": ["é".encode()]}
        for i in range(10)
    ]
    rows[0] |= {"pair": [1, 2], "grow": [1, 2]}
    rows[4] = {"i": [4]}
    more: list[dict[str, list[Any]]] = [
        {
            "f": [9.5],
            "i": [],
            "pair": [],
            "grow": [3],
            "raw": [b"\xff\x00"],
            "late": [b"a", b"b"],
            "r": [1],
        }
    ]
    write_examples(tmp_path / "rows" / "1.tfrecord", rows)
    write_examples(tmp_path / "rows" / "2.tfrecords.gz", more, "GZIP")
    table = table_of(tmp_path, tmp_path / "rows")
    assert {each.name: str(each.type) for each in table.schema} == {
        "f": "float",
        "grow": "list<element: int64>",
        "i": "int64",
        "late": "fixed_size_list<element: string>[2]",
        "pair": "fixed_size_list<element: int64>[2]",
        "r": "list<element: int64>",
        "raw": "binary",
        "t": "string",
        "v": "fixed_size_list<element: float>[2]",
    }
    assert table["f"].to_pylist() == [0, 0.5, 1, 1.5, None, 2.5, 3, 3.5, 4, 4.5, 9.5]
    assert table["i"].to_pylist() == [*range(10), None]
    assert table["v"].to_pylist()[3:6] == [[3, 2], None, [5, 2]]
    assert table["r"].to_pylist()[2:6] == [[7, 7], None, None, [7, 7]]
    assert table["t"].to_pylist()[3:5] == ["é", None]
    assert table["raw"].to_pylist()[-2:] == [None, b"\xff\x00"]
    assert table["late"].to_pylist()[-2:] == [None, ["a", "b"]]


def test_numbered_shards_are_found_by_a_glob(tmp_path):
    for shard in range(2):
        write_examples(tmp_path / f"rows.tfrecord-0000{shard}-of-00002", [{"x": [shard]}])
    assert table_of(tmp_path, tmp_path / "rows.tfrecord-*")["x"].to_pylist() == [0, 1]


def test_damaged_records_are_named(tmp_path):
    path = write_examples(tmp_path / "a.tfrecord", [{"x": [i % 100]} for i in range(200)])
    whole = path.read_bytes()
    size = len(whole) // 200
    flipped = bytearray(whole)
    flipped[150 * size + 15] ^= 1
    for content, record in ((whole[:-3], 200), (bytes(flipped), 151), (b"no records at all", 1)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.tfrecord, record {record}: .*truncated or dam"):
            table_of(tmp_path, path)
    packed = tmp_path / "b.tfrecord.gz"
    packed.write_bytes(gzip.compress(whole)[:-40])
    with pytest.raises(DataError, match=r"b\.tfrecord\.gz, record"):
        table_of(tmp_path, packed)


def test_records_that_are_no_rows_are_named(tmp_path):
    path = tmp_path / "a.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(tf.train.Example().SerializeToString())
        writer.write(b"not an example")
    with pytest.raises(DataError, match=r"a\.tfrecord, record 2 is no tf\.train\.Example"):
        table_of(tmp_path, path)
    write_examples(path, [{"x": [1]}, {"x": [1.5]}])
    with pytest.raises(DataError, match=r"'x' is a int64_list in .* but a float_list in .*rd 2"):
        table_of(tmp_path, path)
    write_examples(tmp_path / "rows" / "1.tfrecord", [{"x": [1]}])
    write_examples(tmp_path / "rows" / "2.tfrecord", [{"x": [b"a"]}])
    with pytest.raises(DataError, match=r"int64_list in .*1\.tfrecord but a bytes_list in .*2\.tf"):
        table_of(tmp_path, tmp_path / "rows")


# Images


def encoded(suffix: str, pixels: Any) -> bytes:
    if suffix == ".png":
        data: bytes = tf.io.encode_png(pixels).numpy()
        return data
    if suffix == ".jpg":
        data = tf.io.encode_jpeg(pixels, quality=100).numpy()
        return data
    height, width, _ = pixels.shape
    padding = -width * 3 % 4
    rows = b"".join(row[:, ::-1].tobytes() + bytes(padding) for row in pixels[::-1])
    sizes = [54 + len(rows), 0, 54, 40, width, height]
    header = b"BM" + b"".join(int(size).to_bytes(4, "little") for size in sizes)
    return header + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24) + rows


def write_image(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(path.suffix, np.asarray(pixels, np.uint8)))


def pixels_of(table: pa.Table) -> Any:
    return table["image"].combine_chunks().to_numpy_ndarray()


def test_an_images_label_is_its_folder(tmp_path):
    root = tmp_path / "rows"
    colours = {"cat/1.png": 10, "cat/2.bmp": 20, "dog/1.jpg": 30}
    for name, value in colours.items():
        write_image(root / name, np.full((4, 5, 3), value))
    write_image(root / "dog" / "2.png", np.full((4, 5, 1), 40))
    write_image(root / "dog" / "3.png", np.full((4, 5, 4), 50))
    table = table_of(tmp_path, root, images={"height": 4, "width": 5})
    assert table["path"].to_pylist() == [*colours, "dog/2.png", "dog/3.png"]
    assert table["label"].to_pylist() == ["cat", "cat", "dog", "dog", "dog"]
    assert describe_field(table.schema.field("image")).shape == (4, 5, 3)
    expected = np.array([10, 20, 30, 40, 50]).reshape(5, 1, 1, 1) * np.ones((1, 4, 5, 3))
    np.testing.assert_array_equal(pixels_of(table), expected)


def test_images_are_resized_and_made_grey(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3))
    write_image(tmp_path / "rows" / "a" / "1.png", pixels)
    for height, width in ((3, 5), (6, 8), (12, 9)):
        table = table_of(tmp_path, tmp_path / "rows", images={"height": height, "width": width})
        resized = tf.image.resize(pixels.astype("u1"), (height, width)).numpy()
        np.testing.assert_array_equal(pixels_of(table)[0], np.round(resized))
    grey = table_of(tmp_path, tmp_path / "rows", images={"height": 6, "width": 8, "channels": 1})
    weights = np.array([0.2989, 0.587, 0.114])
    np.testing.assert_allclose(pixels_of(grey)[0, ..., 0], pixels @ weights, atol=1)


def test_labels_come_from_a_file_and_its_change_counts(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        write_image(tmp_path / "rows" / name, np.zeros((2, 2, 3)))
    labels = tmp_path / "rows" / "labels.csv"
    labels.write_text("label,path\n1.5,b/2.png\n0.5,a/1.png\n7,other/3.png\n")
    images = {"height": 2, "width": 2, "labels": str(labels)}
    table = table_of(tmp_path, tmp_path / "rows", images=images)
    assert table["label"].to_pylist() == [0.5, 1.5]
    labels.write_text("label,path\nold,b/2.png\nnew,a/1.png\n")
    table = table_of(tmp_path, tmp_path / "rows", images=images)
    assert table["label"].to_pylist() == ["new", "old"]
    for text, message in (
        ("label,path\n1,a/1.png\n", r"labels\.csv has no line for 'b/2\.png'"),
        ("label,path\n1,a/1.png\n2,a/1.png\n", "the labels 1 and 2; one is allowed"),
        ("class,path\n1,a/1.png\n", "no column 'label' in"),
    ):
        labels.write_text(text)
        with pytest.raises(DataError, match=message):
            table_of(tmp_path, tmp_path / "rows", images=images)


def test_a_corrupt_image_is_named(tmp_path):
    write_image(tmp_path / "rows" / "a" / "1.png", np.zeros((9, 9, 3)))
    path = tmp_path / "rows" / "a" / "2.jpg"
    write_image(path, np.random.default_rng(0).integers(0, 256, (9, 9, 3)))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"2\.jpg is not a readable image"):
            table_of(tmp_path, tmp_path / "rows", images={"height": 2, "width": 2})


# Datasets


def rows_of(section: dict[str, Any], role: str = "train") -> pa.Table:
    return pq.read_table(next(Path(section[role]).glob("*.parquet")))


def pairs(rows: int = 10) -> Any:
    x = np.arange(rows * 2, dtype="f4").reshape(rows, 2)
    return tf.data.Dataset.from_tensor_slices((x, np.arange(rows)))


@pytest.mark.parametrize(
    "dataset",
    [
        pairs(),
        pairs().batch(4),
        pairs().batch(5, drop_remainder=True),
        pairs().batch(3).prefetch(1).map(lambda x, y: (x, y[:, None])),
    ],
    ids=["rows", "batches", "equal batches", "labels in columns"],
)
def test_a_dataset_is_stored_in_its_order(tmp_path, dataset):
    section = lockstep.from_dataset(dataset, folder=tmp_path)
    assert {key: section[key] for key in section if key != "train"} == {
        "features": [{"name": "x", "shape": [2]}],
        "label": "y",
        "shuffle": "none",
    }
    table = rows_of(section)
    assert table["y"].to_pylist() == list(range(10))
    assert table["x"].to_pylist()[9] == [18, 19]
    x = np.arange(20, dtype="f4").reshape(10, 2)
    same = lockstep.from_arrays((x, np.arange(10)), folder=tmp_path)
    assert same["train"] == section["train"], "the same rows are stored once"


def test_a_dataset_of_mappings_with_weights(tmp_path):
    x = {"a": np.arange(4.0), "city": ["Oslo", "Rome", "é", ""]}
    train = tf.data.Dataset.from_tensor_slices((x, np.ones((4, 3)), np.full(4, 0.5)))
    test = tf.data.Dataset.from_tensor_slices((x, np.zeros((4, 3))))
    section = lockstep.from_dataset(train, test=test.batch(3), folder=tmp_path)
    assert section["features"] == [{"name": "a"}, {"name": "city"}]
    assert rows_of(section)["city"].to_pylist() == ["Oslo", "Rome", "é", ""]
    assert rows_of(section, "test")["w"].to_pylist() == [1, 1, 1, 1]


DATASETS: dict[str, tuple[Any, str]] = {
    "without end": (pairs().repeat(), r"infinite; .*Remove \.repeat\(\)"),
    "no pairs": (tf.data.Dataset.range(3), r"elements are TensorSpec.*\(x, y\)"),
    "no dataset": ([1, 2], r"received list; a tf\.data\.Dataset is allowed"),
    "ragged": (
        tf.data.Dataset.from_tensor_slices((tf.ragged.constant([[1], [2, 3]]), [0, 1])),
        "dense tensors are allowed",
    ),
    "rows or batches": (
        tf.data.Dataset.from_tensors((np.zeros(3), np.zeros(3))),
        "may be batches or single rows. Say which with is_batched",
    ),
    "no element": (pairs().take(0), "no element"),
}


@pytest.mark.parametrize("case", DATASETS)
def test_datasets_that_cannot_be_stored_are_told(tmp_path, case):
    dataset, message = DATASETS[case]
    with pytest.raises(DataError, match=message):
        lockstep.from_dataset(dataset, folder=tmp_path)


def test_one_may_say_whether_elements_are_batches(tmp_path):
    unclear = tf.data.Dataset.from_tensors((np.zeros(3), np.zeros(3)))
    for is_batched, rows in ((True, 3), (False, 1)):
        section = lockstep.from_dataset(unclear, folder=tmp_path, is_batched=is_batched)
        assert rows_of(section).num_rows == rows
