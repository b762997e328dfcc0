"""Encodings: how a column that holds no plain numbers becomes numbers, learned once over all rows.

Owns what a category, a text and a timestamp are to a model, on Arrow columns: the reader and the
prediction service use the same functions. `trainer.preprocessing` builds the same arithmetic from
Keras layers, for the SavedModel; a test compares the two. An encoding gives *indices* and other
small numbers; one-hot vectors and embeddings are made of them inside the model
(`trainer.front`), so that they never travel.

Numbers of a category: 0 is unknown (a null too), 1 the most frequent value of the training rows.
Numbers of a word: 0 is no word, 1 unknown, 2 the most frequent one. A text is lowered and stripped
of punctuation (ASCII both) and split at white space, as Keras's TextVectorization does by default.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.data import FeatureConfig
from data_pipeline.errors import DataError

Floats = NDArray[np.float32]

RawKind = Literal["string", "int64", "timestamp[us]"]
"""What a column holds before it is encoded."""

DEFAULT_VOCABULARY_SIZE = 10_000
DEFAULT_SEQUENCE_LENGTH = 64
DEFAULT_EMBEDDING_SIZE = 8
DEFAULT_PARTS = ("month", "weekday", "hour")

PUNCTUATION = r"""[!"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~']"""
"""What is taken out of a text, as a regular expression of RE2."""

PERIODS: dict[str, tuple[int, int]] = {
    "month": (1, 12),
    "day": (1, 31),
    "weekday": (0, 7),
    "day_of_year": (1, 366),
    "hour": (0, 24),
    "minute": (0, 60),
    "second": (0, 60),
}
"""First value and period of the parts of a timestamp that repeat; Monday is weekday 0."""

DAY_US = 86_400_000_000

ENCODED_ENDPOINT = "serve_rows"
"""Signature of a SavedModel that takes rows of numbers, beside the one of raw columns."""

_UNKNOWN_TOKEN = "[UNK]"  # reserved by Keras's lookups; such a value counts as unknown


@dataclass(frozen=True)
class Category:
    """A value of a closed set, by its index: `(rows,) float32`.

    Attributes:
        is_text: Strings; else whole numbers and booleans.
        most: The most values that are told apart.
        output: What the model makes of the index.
        embedding_size: Numbers of an embedding.
        vocabulary: Known values, the most frequent first; None before they were learned.
    """

    is_text: bool
    most: int
    output: Literal["one_hot", "embedding", "index"]
    embedding_size: int = DEFAULT_EMBEDDING_SIZE
    vocabulary: tuple[Any, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row's numbers."""
        return ()

    @property
    def raw_dtype(self) -> RawKind:
        """Type of the column that serving takes."""
        return "string" if self.is_text else "int64"

    @property
    def indices(self) -> int:
        """How many different numbers there are."""
        return 1 + len(self.vocabulary or ())

    def values(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """The values to count."""
        return _cast(column, pa.string() if self.is_text else pa.int64())

    @property
    def unlearned(self) -> "Category":
        """The same settings without a vocabulary."""
        return replace(self, vocabulary=None)

    def learned(self, counts: Counter[Any]) -> "Category":
        """The encoding that knows the most frequent of the counted values."""
        counts.pop(_UNKNOWN_TOKEN, None)
        return replace(self, vocabulary=_most_frequent(counts, self.most))

    def encode(self, column: pa.ChunkedArray) -> Floats:
        """Indices of the values: `(rows,) float32`, 0 for unknown ones and nulls."""
        kind = pa.string() if self.is_text else pa.int64()
        if pa.types.is_dictionary(column.type):
            return np.concatenate(
                [np.empty(0, np.float32), *(self._from_dictionary(part) for part in column.chunks)]
            )
        return self._lookup(_cast(column, kind), kind)

    def _from_dictionary(self, array: pa.DictionaryArray) -> Floats:
        kind = pa.string() if self.is_text else pa.int64()
        numbers = self._lookup(_cast(pa.chunked_array([array.dictionary]), kind), kind)
        codes = array.indices.fill_null(len(numbers)).to_numpy(zero_copy_only=False)
        found: Floats = np.append(numbers, np.float32(0))[codes]
        return found

    def _lookup(self, column: pa.ChunkedArray, kind: pa.DataType) -> Floats:
        known = pa.array(self.vocabulary or (), kind)
        found = pc.index_in(column, value_set=known, skip_nulls=True).fill_null(-1)
        return np.asarray(found.to_numpy() + 1, np.float32)


@dataclass(frozen=True)
class Text:
    """Words by their indices: `(rows, sequence_length) float32`, 0 after the last word.

    Attributes:
        sequence_length: Words that are read, from the start.
        most: The most words that are told apart.
        output: What the model makes of the indices.
        embedding_size: Numbers of an embedding.
        vocabulary: Known words, the most frequent first; None before they were learned.
    """

    sequence_length: int
    most: int
    output: Literal["multi_hot", "count", "embedding", "index"]
    embedding_size: int = DEFAULT_EMBEDDING_SIZE
    vocabulary: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row's numbers."""
        return (self.sequence_length,)

    @property
    def raw_dtype(self) -> RawKind:
        """Type of the column that serving takes."""
        return "string"

    @property
    def indices(self) -> int:
        """How many different numbers there are."""
        return 2 + len(self.vocabulary or ())

    def values(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """The words to count."""
        return pa.chunked_array([_words(column)[0]])

    @property
    def unlearned(self) -> "Text":
        """The same settings without a vocabulary."""
        return replace(self, vocabulary=None)

    def learned(self, counts: Counter[Any]) -> "Text":
        """The encoding that knows the most frequent of the counted words."""
        return replace(self, vocabulary=_most_frequent(counts, self.most))

    def encode(self, column: pa.ChunkedArray) -> Floats:
        """Indices of the first words: `(rows, sequence_length) float32`."""
        words, rows = _words(column)
        places = np.arange(len(rows)) - np.searchsorted(rows, rows)
        is_read = places < self.sequence_length
        known = pa.array(self.vocabulary or (), pa.string())
        found = pc.index_in(words, value_set=known).fill_null(-1).to_numpy(zero_copy_only=False)
        out = np.zeros((len(column), self.sequence_length), np.float32)
        out[rows[is_read], places[is_read]] = found[is_read] + 2
        return out


@dataclass(frozen=True)
class Timestamp:
    """Parts of a moment: `(rows, size) float32`. A column with a time zone counts in UTC.

    Attributes:
        parts: What is told, in order.
        is_cyclic: Parts that repeat are told by sine and cosine, in this order.
    """

    parts: tuple[str, ...]
    is_cyclic: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row's numbers."""
        return (len(self.channels),)

    @property
    def raw_dtype(self) -> RawKind:
        """Type of the column that serving takes: microseconds since 1970, as an int64."""
        return "timestamp[us]"

    @property
    def unlearned(self) -> "Timestamp":
        """Itself: there is nothing to learn."""
        return self

    @property
    def channels(self) -> list[tuple[str, Literal["number", "sine", "cosine"]]]:
        """Part and form of each number."""
        channels: list[tuple[str, Literal["number", "sine", "cosine"]]] = []
        for part in self.parts:
            if self.is_cyclic and part in PERIODS:
                channels += [(part, "sine"), (part, "cosine")]
            else:
                channels.append((part, "number"))
        return channels

    def encode(self, column: pa.ChunkedArray) -> Floats:
        """The parts of each moment: `(rows, size) float32`; zeros where it is null."""
        moments = moments_us(column)
        numbers = moments.fill_null(0).to_numpy(zero_copy_only=False)
        out = np.empty((len(numbers), *self.shape), np.float32)
        for index, (part, form) in enumerate(self.channels):
            out[:, index] = _formed(_part(part, numbers), part, form)
        if moments.null_count:
            out[np.asarray(moments.is_null())] = 0
        return out


Encoding = Category | Text | Timestamp


def encoding_of(feature: FeatureConfig, kind: str, is_text: bool) -> Encoding | None:
    """The encoding that a feature's settings describe, not yet learned; None for numbers.

    Args:
        feature: Its settings.
        kind: numeric, categorical, text or timestamp.
        is_text: Whether the column holds strings.
    """
    size = feature.embedding_size or DEFAULT_EMBEDDING_SIZE
    most = feature.vocabulary_size or DEFAULT_VOCABULARY_SIZE
    output: Any = feature.encoding
    if kind == "categorical":
        return Category(is_text, most, output or "one_hot", size)
    if kind == "text":
        length = feature.sequence_length or DEFAULT_SEQUENCE_LENGTH
        return Text(length, most, output or "multi_hot", size)
    if kind == "timestamp":
        return Timestamp(tuple(feature.parts or DEFAULT_PARTS), feature.cyclic is not False)
    return None


def encoding_record(encoding: Encoding) -> dict[str, Any]:
    """The encoding as plain values, for `signature.json`."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(encoding).items()
    }
    return {"kind": type(encoding).__name__.lower(), **values}


def read_encoding(record: dict[str, Any]) -> Encoding:
    """The encoding of a record.

    Raises:
        KeyError, TypeError: It is none.
    """
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record.items()
        if name != "kind"
    }
    kinds = {"category": Category, "text": Text, "timestamp": Timestamp}
    encoding: Encoding = kinds[record["kind"]](**values)
    return encoding


def moments_us(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Microseconds since 1970 as int64: of timestamps, dates, whole numbers, or ISO 8601 texts.

    Raises:
        DataError: The column holds something else.
    """
    kind = column.type
    try:
        if pa.types.is_dictionary(kind):
            column = column.cast(kind.value_type)
            kind = column.type
        if pa.types.is_integer(kind):
            return column.cast(pa.int64())
        if is_text_type(kind):
            column = _parsed(column)
        return column.cast(pa.timestamp("us", getattr(column.type, "tz", None)), safe=False).cast(
            pa.int64()
        )
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"values that are no moments in time ({reason}); timestamps, dates, ISO 8601 texts and "
            "whole microseconds since 1970 are allowed."
        ) from None


def is_text_type(kind: pa.DataType) -> bool:
    """Whether a type is one of strings."""
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def count_values(encoding: Category | Text, column: pa.ChunkedArray) -> Counter[Any]:
    """How often each value (or word) of a column stands in it, nulls left out."""
    counts: Counter[Any] = Counter()
    for entry in pc.value_counts(encoding.values(column)).to_pylist():
        if entry["values"] is not None:
            counts[entry["values"]] += entry["counts"]
    return counts


def _parsed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts as moments; those with a zone in UTC."""
    try:
        return column.cast(pa.timestamp("us"))
    except pa.ArrowInvalid:
        return column.cast(pa.timestamp("us", "UTC"))


def _most_frequent(counts: Counter[Any], most: int) -> tuple[Any, ...]:
    """Values by falling count; equally frequent ones in their own order."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(value for value, _ in ranked[:most])


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column if column.type == kind else column.cast(kind)


def _words(column: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int64]]:
    """All words of a column of texts, one after the other, and the row of each."""
    texts = _cast(column, pa.string()).combine_chunks()
    if isinstance(texts, pa.ChunkedArray):
        texts = pa.concat_arrays(texts.chunks) if texts.num_chunks else pa.array([], pa.string())
    plain = pc.replace_substring_regex(pc.ascii_lower(texts.fill_null("")), PUNCTUATION, "")
    split = pc.ascii_split_whitespace(plain)
    words, rows = split.flatten(), pc.list_parent_indices(split).to_numpy()
    is_word = pc.not_equal(words, "")  # white space at an end gives an empty word
    return words.filter(is_word), rows[np.asarray(is_word)]


def _part(part: str, moments: NDArray[np.int64]) -> NDArray[Any]:
    """A part of the calendar or the clock of moments in microseconds since 1970."""
    seconds = np.floor_divide(moments, 1_000_000)
    if part == "second":
        return seconds % 60
    if part == "minute":
        return seconds // 60 % 60
    if part == "hour":
        return seconds // 3600 % 24
    days = np.floor_divide(moments, DAY_US)
    if part == "weekday":
        return (days + 3) % 7  # 1970-01-01 was a Thursday
    dates = days.astype("datetime64[D]")
    years = dates.astype("datetime64[Y]")
    months = dates.astype("datetime64[M]")
    parts: dict[str, NDArray[Any]] = {
        "year": years.astype(np.int64) + 1970,
        "day_of_year": (dates - years).astype(np.int64) + 1,
        "month": months.astype(np.int64) % 12 + 1,
        "day": (dates - months).astype(np.int64) + 1,
    }
    return parts[part]


def _formed(values: NDArray[Any], part: str, form: str) -> NDArray[Any]:
    if form == "number":
        return values
    first, period = PERIODS[part]
    angle: NDArray[np.float64] = (values - first) * (2 * math.pi / period)
    return np.sin(angle) if form == "sine" else np.cos(angle)


def learn_encodings(
    encodings: Sequence[Category | Text], counted: Iterable[Sequence[Counter[Any]]]
) -> list[Category | Text]:
    """Encodings that know the values of all parts of the data.

    Args:
        encodings: Those to learn.
        counted: For each part of the data what `count_values` gave for each encoding.
    """
    totals: list[Counter[Any]] = [Counter() for _ in encodings]
    for counts in counted:
        for total, found in zip(totals, counts, strict=True):
            total.update(found)
    return [encoding.learned(total) for encoding, total in zip(encodings, totals, strict=True)]
