"""What the pages of a stranger's Parquet file become, told by their headers before any is read.

Owns the walk over a column chunk. The footer of a file only claims how many values a chunk has and
what they take; the reader believes each page's header instead, and a page of some fifty bytes may
say that it holds a thousand million values. So the headers are read here first, on the way that
Arrow's reader goes: from the first page of the chunk until as many values were seen as the footer
says. The format: https://github.com/apache/parquet-format, in Thrift's compact protocol.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BOOLEANS, _INTEGERS, _DOUBLE, _BINARY = (1, 2), (4, 5, 6), 7, 8
_LISTS, _MAP, _STRUCT = (9, 10), 11, 12
_DEEPEST = 16
_SIZE, _COMPRESSED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8  # fields of a page's header
_VALUES = 1  # field of each of the three kinds
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_V2: 4}


@dataclass(frozen=True)
class Page:
    """A page as its header has it.

    Attributes:
        values: Of the column, nulls and empty lists counted; 0 in a dictionary.
        size_bytes: Not compressed.
        encoding: Of the values, by the format's number.
    """

    values: int
    size_bytes: int
    encoding: int


def pages(body: memoryview, chunk: Any) -> Iterator[Page]:
    """The pages of a column chunk that a reader would read, by their headers.

    Args:
        body: The whole file.
        chunk: `pyarrow.parquet.ColumnChunkMetaData`.

    Raises:
        ValueError: A header cannot be read, or a page lies outside the file.
    """
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < at:
        at = chunk.dictionary_page_offset
    seen = 0
    while seen < chunk.num_values:
        reader = _Compact(body, at)
        header = reader.struct()
        at = reader.at + _whole(header, _COMPRESSED)
        if at > len(body):
            raise ValueError("a page lies outside the file")
        kind = next((kind for kind in _ENCODING if isinstance(header.get(kind), dict)), None)
        values = 0 if kind in (None, _DICTIONARY) else _whole(header[kind], _VALUES)
        encoding = 0 if kind is None else _whole(header[kind], _ENCODING[kind])
        seen += values
        yield Page(values, _whole(header, _SIZE), encoding)


def _whole(fields: dict[int, Any], number: int) -> int:
    value = fields.get(number)
    if not isinstance(value, int) or value < 0:
        raise ValueError("a page has no header that can be read")
    return value


class _Compact:
    """Structures of Thrift's compact protocol, from a place in a file on."""

    def __init__(self, body: memoryview, at: int) -> None:
        self._body = body
        self.at = at

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Values by the number of their field."""
        fields: dict[int, Any] = {}
        number = 0
        while (first := self._byte()) & 0x0F:
            number = number + (first >> 4) if first >> 4 else self._signed()
            fields[number] = self._value(first & 0x0F, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("a page's header is nested too deep")
        if kind in _BOOLEANS:
            return kind == 1
        if kind in _INTEGERS:
            return self._signed()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (3, _DOUBLE, _BINARY):  # 3: one byte
            self._skip({3: 1, _DOUBLE: 8}.get(kind) or self._unsigned())
            return None
        raise ValueError("a page's header holds what no page has")  # lists and maps

    def _skip(self, count: int) -> None:
        self.at += count

    def _byte(self) -> int:
        if not 0 <= self.at < len(self._body):
            raise ValueError("a page's header lies outside the file")
        self.at += 1
        return self._body[self.at - 1]

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number in a page's header has no end")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
