"""Synthetic files that `benchmarks.data` reads: written once into build/, described by name.

Values are random, so that nothing compresses better than real measurements do, but for the files of
the memory trial, which should be large in memory and small on the disk.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BUILD = Path(__file__).parent.parent / "build" / "bench-data"

BATCH = 1024
"""Rows of a global batch."""

TFRECORD_ROWS = 300_000
"""Rows of the TFRecord file; writing more takes minutes."""

_SEED = 11
_STRINGS = {"carrier": 16, "origin": 300, "destination": 300, "tail": 4_000}
_IMAGE_BYTES = 64 * 64 * 3


@dataclass(frozen=True)
class Files:
    """Rows of one kind in Parquet files.

    Attributes:
        name: Of the kind and of the folder.
        rows: Of all files.
        files: How many.
        block_rows: Rows of a row group.
        columns: Numeric feature columns `x0`, `x1`, ...; the label `y` comes on top.
    """

    name: str
    rows: int
    files: int
    block_rows: int
    columns: int

    @property
    def folder(self) -> Path:
        """Where they are."""
        return BUILD / f"{self.name}-{self.rows}"

    @property
    def features(self) -> list[Any]:
        """As `data.features` of a job."""
        if self.name == "images":
            return [{"name": "image", "shape": [64, 64, 3]}]
        numbers: list[Any] = [f"x{index}" for index in range(self.columns)]
        if self.name == "strings":
            numbers += [{"name": name, "kind": "categorical"} for name in _STRINGS]
        return numbers

    @property
    def column_names(self) -> list[str]:
        """Features and label."""
        features = [each if isinstance(each, str) else each["name"] for each in self.features]
        return [*features, "y"]

    def write(self) -> None:
        """Write what is not there yet; a folder counts only once it is complete."""
        ready = self.folder / "_ready.json"
        if ready.exists() and json.loads(ready.read_text()) == asdict(self):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        generator = np.random.default_rng(_SEED)
        rows = self.rows // self.files
        for index in range(self.files):
            path = self.folder / f"{index:05d}.parquet"
            self._write_file(path, rows, generator)
        ready.write_text(json.dumps(asdict(self)))

    def _write_file(self, path: Path, rows: int, generator: np.random.Generator) -> None:
        writer = None
        for first in range(0, rows, self.block_rows):
            count = min(self.block_rows, rows - first)
            table = pa.table(_COLUMNS[self.name](self, count, generator))
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, compression="snappy")
            writer.write_table(table, row_group_size=count)
        if writer is not None:
            writer.close()


def _numbers(files: Files, rows: int, generator: np.random.Generator) -> dict[str, Any]:
    return {
        name: generator.standard_normal(rows, np.float32)
        for name in [*(f"x{index}" for index in range(files.columns)), "y"]
    }


def _few_numbers(files: Files, rows: int, generator: np.random.Generator) -> dict[str, Any]:
    names = [*(f"x{index}" for index in range(files.columns)), "y"]
    return {name: generator.integers(0, 16, rows).astype(np.float32) for name in names}


def _images(files: Files, rows: int, generator: np.random.Generator) -> dict[str, Any]:
    pixels = generator.integers(0, 256, rows * _IMAGE_BYTES, np.uint8)
    return {
        "image": pa.FixedSizeListArray.from_arrays(pixels, _IMAGE_BYTES),
        "y": generator.integers(0, 10, rows),
    }


def _strings(files: Files, rows: int, generator: np.random.Generator) -> dict[str, Any]:
    columns = _numbers(files, rows, generator)
    for name, size in _STRINGS.items():
        values = pa.array([f"{name}-{index:04d}" for index in range(size)])
        chosen = pa.array(generator.integers(0, size, rows).astype(np.int32))
        columns[name] = pa.DictionaryArray.from_arrays(chosen, values).cast(pa.string())
    return columns


_COLUMNS: dict[str, Callable[[Files, int, np.random.Generator], dict[str, Any]]] = {
    "numbers": _numbers,
    "small-files": _numbers,
    "wide": _numbers,
    "images": _images,
    "strings": _strings,
    "memory": _few_numbers,
}


def all_files(is_quick: bool) -> dict[str, Files]:
    """What the speed trials read, by name."""
    share = 20 if is_quick else 1
    kinds = (
        Files("numbers", 4_000_000 // share, 1, 100_000, 9),
        Files("images", 20_000 // share, 1, 1_000, 0),
        Files("wide", 100_000 // share, 1, 10_000, 500),
        Files("small-files", 2_000_000 // share, 2_000 // share, 1_000, 9),
        Files("strings", 2_000_000 // share, 1, 100_000, 5),
    )
    return {kind.name: kind for kind in kinds}


def memory_files(rows: int) -> Files:
    """Rows of the memory trial."""
    return Files("memory", rows, 1, 20_000, 9)


def write_tfrecords(files: Files) -> Path:
    """The first rows of a numeric kind as serialised `tf.train.Example`s, features and label."""
    import tensorflow as tf

    rows = min(TFRECORD_ROWS, files.rows)
    path = files.folder.parent / f"{files.name}-{rows}.tfrecord"
    if path.exists():
        return path
    source = pq.ParquetFile(next(files.folder.glob("*.parquet")))
    unfinished = path.with_suffix(".part")
    written = 0
    with tf.io.TFRecordWriter(str(unfinished)) as writer:
        for group in range(source.num_row_groups):
            table = source.read_row_group(group, columns=files.column_names)
            matrix = np.stack([column.to_numpy() for column in table.columns], axis=1)
            for row in matrix[: rows - written]:
                values = tf.train.FloatList(value=row)
                feature = {"row": tf.train.Feature(float_list=values)}
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())
            written += min(len(matrix), rows - written)
            if written == rows:
                break
    unfinished.rename(path)
    return path
