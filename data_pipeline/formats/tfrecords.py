"""TFRecord files of `tf.train.Example`, a feature a column.

Examples have no schema. A file is read twice: once for the names, types and lengths of all
features, then, parsed in batches by TensorFlow, for the rows. TensorFlow's reader checks the
lengths and checksums of the records. A feature that is missing, or empty, in an example is null;
one number an example makes a column of numbers, as many in all examples fixed-size lists, else
lists. Bytes are text where all of them are UTF-8.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from data_pipeline.errors import DataError
from data_pipeline.formats.eager import on_cpu, reason
from data_pipeline.formats.pieces import (
    BATCH_BYTES,
    Piece,
    Request,
    fixed_lists,
    spread,
)
from data_pipeline.inputs import InputFile, local_copy

_FIRST_PASS_RECORDS = 64
_MAX_BATCH_RECORDS = 8_192

_ELEMENTS = {"float_list": pa.float32(), "int64_list": pa.int64(), "bytes_list": pa.binary()}
_PARSED = {"float_list": tf.float32, "int64_list": tf.int64, "bytes_list": tf.string}


@dataclass
class _Feature:
    """What all examples so far say of one feature.

    Attributes:
        kind: Which list of `tf.train.Feature` holds it.
        where: The first file with it.
        shortest: Least number of values of an example that has some; 0 where none has.
        longest: Greatest number.
        is_text: Whether all bytes are UTF-8.
    """

    kind: str
    where: str
    shortest: int = 0
    longest: int = 0
    is_text: bool = True

    @property
    def element(self) -> pa.DataType:
        return pa.string() if self.kind == "bytes_list" and self.is_text else _ELEMENTS[self.kind]

    @property
    def column_type(self) -> pa.DataType:
        if self.longest <= 1:
            return self.element
        size = self.longest if self.shortest == self.longest else -1
        return pa.list_(self.element, size)

    def add(self, values: Any) -> None:
        """Take in the values of one example."""
        length = len(values)
        if not length:
            return
        self.shortest = min(self.shortest or length, length)
        self.longest = max(self.longest, length)
        if self.kind == "bytes_list" and self.is_text:
            self.is_text = all(map(_is_utf8, values))

    def merge(self, other: "_Feature") -> None:
        """Take in what another file says."""
        if other.longest:
            self.shortest = min(self.shortest or other.shortest, other.shortest)
        self.longest = max(self.longest, other.longest)
        self.is_text = self.is_text and other.is_text


@dataclass(frozen=True)
class _Read:
    """One file after the first pass."""

    features: dict[str, _Feature]
    records: int
    bytes: int


def open_files(request: Request) -> list[Piece]:
    """Read all files once for their features; a piece a file. Columns are sorted by name.

    Raises:
        DataError: A file is truncated or damaged, a record is no example, or a feature has values
            of two types.
    """
    reads = list(request.pool.map(lambda file: _first_pass(file, request.advance), request.files))
    features: dict[str, _Feature] = {}
    for file, read in zip(request.files, reads, strict=True):
        for name, feature in read.features.items():
            known = features.setdefault(name, feature)
            if known.kind != feature.kind:
                raise _two_kinds(name, known, feature.kind, file.path)
            if known is not feature:
                known.merge(feature)
    features = dict(sorted(features.items()))
    schema = pa.schema([(name, feature.column_type) for name, feature in features.items()])
    pieces = []
    for file, read in zip(request.files, reads, strict=True):
        fitting = BATCH_BYTES * read.records // max(1, read.bytes)
        rows = min(_MAX_BATCH_RECORDS, max(1, fitting))
        batches = functools.partial(_second_pass, file, rows, features, schema)
        pieces.append(Piece((file,), read.records, batches))
    return pieces


def _first_pass(file: InputFile, advance: Callable[[int], None]) -> _Read:
    features: dict[str, _Feature] = {}
    records = total = 0
    for batch in _records(file.path, _FIRST_PASS_RECORDS):
        _check_examples(file.path, records, batch)
        size = sum(map(len, batch))
        for record in batch:
            records += 1
            for name, feature in tf.train.Example.FromString(record).features.feature.items():
                kind = feature.WhichOneof("kind")
                if kind is None:
                    continue
                known = features.setdefault(name, _Feature(kind, file.path))
                if known.kind != kind:
                    raise _two_kinds(name, known, kind, f"{file.path}, record {records}")
                known.add(getattr(feature, kind).value)
        total += size
        advance(size)
    return _Read(features, records, total)


def _second_pass(
    file: InputFile, rows: int, features: dict[str, _Feature], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    wanted = {
        name: tf.io.RaggedFeature(_PARSED[feature.kind], row_splits_dtype=tf.int64)
        for name, feature in features.items()
    }
    for batch in _records(file.path, rows):
        with on_cpu():
            parsed = tf.io.parse_example(batch, wanted)
        columns = [_column(parsed[name], feature) for name, feature in features.items()]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(ragged: Any, feature: _Feature) -> pa.Array:
    splits = ragged.row_splits.numpy()
    values = pa.array(ragged.values.numpy(), _ELEMENTS[feature.kind]).cast(feature.element)
    is_present = np.diff(splits) > 0
    kind = feature.column_type
    if kind == feature.element:
        return spread(values, is_present)
    if pa.types.is_fixed_size_list(kind):
        return spread(fixed_lists(values, kind), is_present)
    return pa.ListArray.from_arrays(
        pa.array(splits.astype(np.int32)), values, mask=pa.array(~is_present)
    )


def _records(path: str, rows: int) -> Iterator[Any]:
    """`(up to rows,)` records at a time, as bytes, checked against their checksums."""
    with local_copy(path) as local, on_cpu():
        dataset = _dataset(local)
        try:
            yield from dataset.batch(rows).as_numpy_iterator()
        except tf.errors.OpError as error:
            raise DataError(
                f"{path}, record {_whole_records(local) + 1}: {reason(error)}. The file is "
                "truncated or damaged, or no TFRecord file; write it again, or leave it out."
            ) from None


def _dataset(path: str) -> tf.data.Dataset:
    return tf.data.TFRecordDataset(path, "GZIP" if path.lower().endswith(".gz") else "")


def _whole_records(path: str) -> int:
    """Records before the first one that cannot be read."""
    count = 0
    try:
        for _ in _dataset(path).as_numpy_iterator():
            count += 1
    except tf.errors.OpError:
        pass  # what was looked for
    return count


def _check_examples(path: str, before: int, batch: Any) -> None:
    """Refuse records that are no examples; protobuf's own error is not ours to import."""
    with on_cpu():
        try:
            tf.io.parse_example(batch, {"": tf.io.VarLenFeature(tf.int64)})
            return
        except tf.errors.InvalidArgumentError:
            pass
        for number, record in enumerate(batch, before + 1):
            try:
                tf.io.parse_example([record], {"": tf.io.VarLenFeature(tf.int64)})
            except tf.errors.InvalidArgumentError:
                raise DataError(
                    f"{path}, record {number} is no tf.train.Example; records of these are "
                    "allowed. Write the rows as examples, or leave the file out."
                ) from None


def _two_kinds(name: str, known: _Feature, kind: str, where: str) -> DataError:
    return DataError(
        f"feature {name!r} is a {known.kind} in {known.where} but a {kind} in {where}; one type "
        "in all examples is allowed. Write the examples again, or leave the file out."
    )


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
