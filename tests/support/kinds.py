"""The same rows as files of every kind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import tensorflow as tf

ROWS = 1003
_CUT = 600


def numbered(rows: int = ROWS) -> pa.Table:
    """Columns `x` (the row's number), `a` and the label `y`."""
    ids = np.arange(rows)
    return pa.table({"x": ids.astype("f8"), "a": ids * 0.5 + 0.25, "y": -ids})


def _parts(folder: Path, suffix: str) -> list[tuple[Path, pa.Table]]:
    folder.mkdir(parents=True)
    table = numbered()
    return [
        (folder / f"0{suffix}", table.slice(0, _CUT)),
        (folder / f"1{suffix}", table.slice(_CUT)),
    ]


def _parquet(folder: Path) -> None:
    for path, table in _parts(folder, ".parquet"):
        pq.write_table(table, path, row_group_size=97)


def _csv(folder: Path) -> None:
    for path, table in _parts(folder, ".csv"):
        pacsv.write_csv(table, path)


def _ndjson(folder: Path) -> None:
    for path, table in _parts(folder, ".ndjson"):
        rows = [str(row).replace("'", '"') + "\n" for row in table.to_pylist()]
        path.write_text("".join(rows))


def _arrow(folder: Path) -> None:
    for path, table in _parts(folder, ".arrow"):
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)


def example(row: dict[str, int | float]) -> bytes:
    """A row as `tf.train.Example`."""
    features = {
        name: tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        if isinstance(value, int)
        else tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
        for name, value in row.items()
    }
    serialized: bytes = tf.train.Example(
        features=tf.train.Features(feature=features)
    ).SerializeToString()
    return serialized


def _tfrecord(folder: Path) -> None:
    for path, table in _parts(folder, ".tfrecord"):
        with tf.io.TFRecordWriter(str(path)) as writer:
            for row in table.to_pylist():
                writer.write(example(row))


def _numpy(folder: Path) -> None:
    for path, table in _parts(folder, ""):
        path.mkdir()
        for name in table.column_names:
            np.save(path / f"{name}.npy", table[name].to_numpy())


def _numpy_archives(folder: Path) -> None:
    for path, table in _parts(folder, ".npz"):
        np.savez(path, **{name: table[name].to_numpy() for name in table.column_names})


WRITERS: dict[str, Callable[[Path], None]] = {
    "parquet": _parquet,
    "csv": _csv,
    "ndjson": _ndjson,
    "arrow": _arrow,
    "tfrecord": _tfrecord,
    "npy": _numpy,
    "npz": _numpy_archives,
}


def write_images(folder: Path, rows: int) -> Path:
    """PNG files of 2 x 3 pixels whose first one is the row's number; returns the file of labels."""
    folder.mkdir(parents=True)
    lines = []
    for row in range(rows):
        pixels = np.full((2, 3, 3), 7, np.uint8)
        pixels[0, 0, 0] = row
        (folder / f"{row:04d}.png").write_bytes(tf.io.encode_png(pixels).numpy())
        lines.append(f"{row:04d}.png,{-row}\n")
    labels = folder.with_suffix(".csv")
    labels.write_text("path,label\n" + "".join(reversed(lines)))
    return labels
