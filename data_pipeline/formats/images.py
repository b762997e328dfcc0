"""Folders of images as rows: pixels, label and path, in the order of the paths.

An image's label is the name of its folder, or what a CSV file says of its path. Images are decoded
and resized by TensorFlow's operations, several at a time.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np
import pyarrow as pa
import tensorflow as tf
from numpy.typing import NDArray

from configs.data import ImagesConfig
from data_pipeline.csv_text import CsvRules, open_csv, with_common_types
from data_pipeline.errors import DataError
from data_pipeline.formats.eager import on_cpu, reason
from data_pipeline.formats.pieces import (
    BATCH_BYTES,
    Piece,
    Request,
    fixed_lists,
    list_type,
)
from data_pipeline.inputs import open_input
from data_pipeline.storage import FileState

_PIECE_IMAGES = 256
_LEAST_BATCH_IMAGES = 16

_Label = str | int | float | bool


def open_files(request: Request) -> list[Piece]:
    """Labels of all images; pieces of some hundred images, which are decoded when they are read.

    The columns are `image`, `(height, width, channels) uint8`, `label`, and `path`, relative to the
    folder that the job names.

    Raises:
        DataError: An image has no label.
    """
    config = cast(ImagesConfig, request.data.images)  # checked where the format was found
    paths = [_below(request.entries, file.path) for file in request.files]
    if config.labels is None:
        kind: pa.DataType = pa.string()
        labels: list[_Label] = [PurePosixPath(file.path).parent.name for file in request.files]
    else:
        kind, by_path = _labels_of(config.labels)
        labels = [_label(config.labels, by_path, path) for path in paths]
    image = list_type(pa.uint8(), (config.height, config.width, config.channels))
    schema = pa.schema([("image", image), ("label", kind), ("path", pa.string())])
    pieces = []
    for at in range(0, len(paths), _PIECE_IMAGES):
        some = slice(at, at + _PIECE_IMAGES)
        files = request.files[some]
        rows = list(zip(files, labels[some], paths[some], strict=True))
        batches = functools.partial(_batches, rows, config, schema, request.inner)
        pieces.append(Piece(files, len(rows), batches))
    return pieces


def _below(entries: Sequence[str], path: str) -> str:
    """The path below the entry that is its folder; of a file that is named, its own name."""
    for entry in entries:
        if PurePosixPath(entry) in PurePosixPath(path).parents:
            return str(PurePosixPath(path).relative_to(PurePosixPath(entry)))
    return PurePosixPath(path).name


def _labels_of(path: str) -> tuple[pa.DataType, dict[str, _Label]]:
    """Type of the labels of a CSV file, and the label of each path."""
    (file,) = with_common_types([open_csv(path, CsvRules())])
    for column in ("path", "label"):
        if column not in file.schema.names:
            raise DataError(
                f"data.images.labels: no column {column!r} in {path}; it has "
                f"{', '.join(file.schema.names)}. The columns path and label are needed."
            )
    found: dict[str, _Label] = {}
    for table in file.tables(("path", "label")):
        for name, label in zip(table["path"].to_pylist(), table["label"].to_pylist(), strict=True):
            if found.setdefault(str(name), label) != label:
                raise DataError(
                    f"data.images.labels: {path} gives {name!r} the labels {found[str(name)]!r} "
                    f"and {label!r}; one is allowed. Remove a line."
                )
    return file.schema.field("label").type, found


def _label(labels: str, by_path: Mapping[str, _Label], path: str) -> _Label:
    if path not in by_path:
        raise DataError(
            f"data.images.labels: {labels} has no line for {path!r}; each image needs one, named "
            "by its path below the folder. Add the line, or remove the image."
        )
    return by_path[path]


def _batches(
    rows: Sequence[tuple[FileState, _Label, str]],
    config: ImagesConfig,
    schema: pa.Schema,
    threads: Any,
) -> Iterator[pa.RecordBatch]:
    image_bytes = config.height * config.width * config.channels
    size = max(_LEAST_BATCH_IMAGES, BATCH_BYTES // image_bytes)
    for at in range(0, len(rows), size):
        files, labels, paths = zip(*rows[at : at + size], strict=True)
        pixels = list(threads.map(functools.partial(_decoded, config), files))
        columns = [
            fixed_lists(pa.array(np.concatenate(pixels)), schema.field("image").type),
            pa.array(labels, schema.field("label").type),
            pa.array(paths, pa.string()),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _decoded(config: ImagesConfig, file: FileState) -> NDArray[np.uint8]:
    """The pixels of an image, flat: `(height * width * channels,) uint8`."""
    with open_input(file.path) as opened:
        data = opened.read()
    with on_cpu():
        try:
            # Not all formats convert while they decode: GIF is coloured, BMP is as it is.
            image = tf.io.decode_image(data, expand_animations=False)
            image = _with_channels(image, config.channels)
            if tuple(image.shape[:2]) != (config.height, config.width):
                resized = tf.image.resize(image, (config.height, config.width), "bilinear")
                image = tf.cast(tf.round(resized), tf.uint8)
        except (tf.errors.OpError, ValueError) as error:
            raise DataError(
                f"{file.path} is not a readable image: {reason(error)}. PNG, JPEG, BMP and GIF are "
                "allowed; write it again, or remove it."
            ) from None
    flat: NDArray[np.uint8] = image.numpy().reshape(-1)
    return flat


def _with_channels(image: Any, channels: int) -> Any:
    """Grey or coloured pixels of an image of 1 to 4 channels; transparency is left out."""
    given = image.shape[-1]
    if given in (2, 4):
        image, given = image[..., : given - 1], given - 1
    if given == channels:
        return image
    return tf.image.grayscale_to_rgb(image) if channels == 3 else tf.image.rgb_to_grayscale(image)
