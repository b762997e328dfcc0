"""TFRecord files of `tf.train.Example`, a feature a column.

Examples have no schema. A file is read twice: once for the names, types and lengths of all
features, then, parsed in batches by TensorFlow, for the rows. TensorFlow's reader checks the
lengths and checksums of the records. A feature that is missing, or empty, in an example is null;
one number an example makes a column of numbers, as many in all examples fixed-size lists, else
lists. Bytes are text where all of them are UTF-8.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from data_pipeline.storage import FileState, local_copy

_READ_RECORDS = 64
_MAX_BATCH_RECORDS = 8_192

_ELEMENTS = {"float_list": pa.float32(), "int64_list": pa.int64(), "bytes_list": pa.binary()}
_NOTHING = {"": tf.io.VarLenFeature(tf.int64)}
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

    def add(self, ragged: Any) -> None:
        """Take in the values of some examples."""
        lengths = np.diff(ragged.row_splits.numpy())
        lengths = lengths[lengths > 0]
        if not len(lengths):
            return
        self.shortest = min(self.shortest or int(lengths.min()), int(lengths.min()))
        self.longest = max(self.longest, int(lengths.max()))
        if self.kind == "bytes_list" and self.is_text:
            self.is_text = _is_utf8(ragged.values.numpy())

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
    return [
        Piece((file,), read.records, functools.partial(_second_pass, file, features, schema))
        for file, read in zip(request.files, reads, strict=True)
    ]


def _first_pass(file: FileState, advance: Callable[[int], None]) -> _Read:
    features: dict[str, _Feature] = {}
    records = 0
    for batch in _records(file.path):
        parsed = _parsed(file.path, records, batch, features)
        known = len(features)
        for record in batch:
            found = tf.train.Example.FromString(record).features.feature
            if not features.keys() >= found.keys():
                _add_new(found, features, file.path)
        if len(features) > known:
            parsed = _parsed(file.path, records, batch, features)
        for name, feature in features.items():
            feature.add(parsed[name])
        records += len(batch)
        advance(sum(map(len, batch)))
    return _Read(features, records)


def _add_new(found: Any, features: dict[str, _Feature], path: str) -> None:
    for name in found:
        kind = found[name].WhichOneof("kind")
        if kind is not None:
            features.setdefault(name, _Feature(kind, path))


def _parsed(
    path: str, before: int, batch: Sequence[bytes], features: Mapping[str, _Feature]
) -> dict[str, Any]:
    """Values of the features by name, each a ragged tensor.

    Raises:
        DataError: A record is no example, or has values of another type; `before` records of the
            file precede the batch.
    """
    wanted: dict[str, Any] = {
        name: tf.io.RaggedFeature(_PARSED[feature.kind], row_splits_dtype=tf.int64)
        for name, feature in features.items()
    }
    with on_cpu():
        try:
            parsed: dict[str, Any] = tf.io.parse_example(batch, wanted or _NOTHING)
            return parsed
        except tf.errors.InvalidArgumentError as error:
            for number, record in enumerate(batch, before + 1):
                _check_record(path, number, record, features)
            raise DataError(f"{path}: {reason(error)}. Write the examples again.") from None


def _check_record(path: str, number: int, record: bytes, features: Mapping[str, _Feature]) -> None:
    try:  # protobuf's own error would have to be imported from there
        tf.io.parse_example([record], _NOTHING)
    except tf.errors.InvalidArgumentError:
        raise DataError(
            f"{path}, record {number} is no tf.train.Example; records of these are allowed. Write "
            "the rows as examples, or leave the file out."
        ) from None
    for name, feature in tf.train.Example.FromString(record).features.feature.items():
        kind = feature.WhichOneof("kind")
        if name in features and kind not in (None, features[name].kind):
            raise _two_kinds(name, features[name], kind, f"{path}, record {number}")


def _second_pass(
    file: FileState, features: dict[str, _Feature], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    records = 0
    for batch in _records(file.path):
        parsed = _parsed(file.path, records, batch, features)
        columns = [_column(parsed[name], feature) for name, feature in features.items()]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
        records += len(batch)


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


def _records(path: str) -> Iterator[list[bytes]]:
    """Records some megabytes at a time, checked against their checksums."""
    waiting: list[bytes] = []
    waiting_bytes = 0
    with local_copy(path) as local, on_cpu():
        try:
            for batch in _dataset(local).batch(_READ_RECORDS).as_numpy_iterator():
                waiting += batch.tolist()
                waiting_bytes += sum(map(len, batch))
                if waiting_bytes >= BATCH_BYTES or len(waiting) >= _MAX_BATCH_RECORDS:
                    yield waiting
                    waiting, waiting_bytes = [], 0
        except tf.errors.OpError as error:
            raise DataError(
                f"{path}, record {_whole_records(local) + 1}: {reason(error)}. The file is "
                "truncated or damaged, or no TFRecord file; write it again, or leave it out."
            ) from None
    if waiting:
        yield waiting


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


def _two_kinds(name: str, known: _Feature, kind: str, where: str) -> DataError:
    return DataError(
        f"feature {name!r} is a {known.kind} in {known.where} but a {kind} in {where}; one type "
        "in all examples is allowed. Write the examples again, or leave the file out."
    )


def _is_utf8(values: Any) -> bool:
    try:
        pa.array(values, pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        return False
    return True
