"""How an input is cut into shards: arithmetic over rows, and where the rows of a text begin.

A shard is a stretch of rows that is computed, committed and, where its predictor died, repeated as
one: some seconds of work. Shards begin at whole multiples of the rows that the model is called
with (for inputs with very large rows one of its smaller sizes, chosen by the data), so every row
has the same place in a batch of the same size however a job is cut and whoever computes it:
predictions do not depend on the plan. A plan is made once a job and recorded.

Parquet is cut by rows of a file, text (CSV, NDJSON) by bytes between records. Text is read through
once for that, in blocks; a record of CSV ends at a line end outside of quotes. Lines with nothing
on them are no rows.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import BatchError

TARGET_S = 2.0
LEAST_S = 0.25
MAX_SHARD_ROWS = 2**22
MAX_SHARD_BYTES = 64 * 2**20
MAX_ROW_BYTES = 16 * 2**20

MAX_CALL_BYTES = 64 * 2**20
"""Of the rows of one call of the model, as they are read; only a single row may have more."""
MARK_BYTES = 8 * 2**20

_BLOCK_BYTES = 4 * 2**20
_LEAST_MARK_ROWS = 4_096
_NEWLINE, _RETURN, _QUOTE = 10, 13, 34
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """A stretch of one file.

    Attributes:
        file: Index of the file in the job.
        start: First row of a Parquet file, or first byte of a text.
        stop: The row or byte after the last one.
        rows: How many rows.
    """

    file: int
    start: int
    stop: int
    rows: int


@dataclass(frozen=True)
class Shard:
    """What one predictor computes at a time.

    Attributes:
        number: Its place among the shards of the job, and the name of its part.
        first_row: Number in the job of its first row.
        rows: How many rows.
        pieces: Where they are, in order.
    """

    number: int
    first_row: int
    rows: int
    pieces: tuple[Piece, ...]

    def as_record(self) -> dict[str, Any]:
        """As JSON, for `read_shard`."""
        pieces = [[piece.file, piece.start, piece.stop, piece.rows] for piece in self.pieces]
        return {"first_row": self.first_row, "rows": self.rows, "pieces": pieces}


def read_shard(number: int, record: dict[str, Any]) -> Shard:
    """What `Shard.as_record` wrote."""
    pieces = tuple(Piece(*piece) for piece in record["pieces"])
    return Shard(number, record["first_row"], record["rows"], pieces)


def rows_of_a_shard(
    s_a_row: float, row_bytes: float, batch_rows: int, rows: int, predictors: int
) -> int:
    """Rows that a shard should have: about two seconds of work, and work for all predictors.

    Args:
        s_a_row: Seconds of a predictor for a row.
        row_bytes: Size of a row where it is read.
        batch_rows: Rows in a call of the model; shards are whole multiples of it.
        rows: Rows of the job, about.
        predictors: How many may work on the job.
    """
    wanted = TARGET_S / s_a_row
    spread = max(rows / (2 * predictors), LEAST_S / s_a_row)  # all have work, and end together
    batches = math.ceil(min(wanted, spread, MAX_SHARD_ROWS) / batch_rows)
    fitting = int(MAX_SHARD_BYTES / max(row_bytes, 1.0) / batch_rows)
    return max(1, min(batches, fitting)) * batch_rows


def cut_rows(file_rows: Sequence[int], shard_rows: int) -> list[Shard]:
    """Shards of files whose rows are known, such as Parquet's."""
    shards: list[Shard] = []
    pieces: list[Piece] = []
    first_row, held = 0, 0
    for file, rows in enumerate(file_rows):
        start = 0
        while start < rows:
            count = min(rows - start, shard_rows - held)
            pieces.append(Piece(file, start, start + count, count))
            start, held = start + count, held + count
            if held == shard_rows:
                shards.append(Shard(len(shards), first_row, held, tuple(pieces)))
                first_row, held, pieces = first_row + held, 0, []
    if held:
        shards.append(Shard(len(shards), first_row, held, tuple(pieces)))
    return shards


def mark_rows_for(batch_rows: int) -> int:
    """How many rows are between two places where a text may be cut: multiples of `batch_rows`."""
    return batch_rows * math.ceil(_LEAST_MARK_ROWS / batch_rows)


def call_rows(sizes: Sequence[int], row_bytes: float) -> int:
    """Rows of a call: the largest of a model's sizes whose rows fit `MAX_CALL_BYTES`."""
    fitting = [size for size in sizes if size * row_bytes <= MAX_CALL_BYTES]
    return max(fitting, default=min(sizes))


def cut_text(stretches: Iterable[Piece], unit_rows: int, shard_rows: int) -> list[Shard]:
    """Shards of stretches of text; see `TextScan.stretches`.

    They begin at whole multiples of `unit_rows`, and have at least `shard_rows` rows, or bytes as
    far as stretches allow.
    """
    shards: list[Shard] = []
    pieces: list[Piece] = []
    first_row, held, size_bytes = 0, 0, 0
    for stretch in stretches:
        if pieces and pieces[-1].file == stretch.file:
            last = pieces.pop()
            stretch = Piece(stretch.file, last.start, stretch.stop, last.rows + stretch.rows)
            held, size_bytes = held - last.rows, size_bytes - (last.stop - last.start)
        pieces.append(stretch)
        held, size_bytes = held + stretch.rows, size_bytes + stretch.stop - stretch.start
        is_full = held >= shard_rows or size_bytes >= MAX_SHARD_BYTES
        if held and is_full and (first_row + held) % unit_rows == 0:
            shards.append(Shard(len(shards), first_row, held, tuple(pieces)))
            first_row, held, size_bytes, pieces = first_row + held, 0, 0, []
    if held:
        shards.append(Shard(len(shards), first_row, held, tuple(p for p in pieces if p.rows)))
    return shards


@dataclass(frozen=True)
class Records:
    """Where the records of a block of text are.

    Attributes:
        starts: `(records,) int64`, offset of the first byte of each.
        ends: `(records,) int64`, offset after its last one, the line end included.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


def split_records(text: bytes | memoryview, is_quoted: bool) -> Records:
    """Records of a whole text, those without anything on their line left out.

    Args:
        text: From the start of a record to the end of one, or of the file.
        is_quoted: Whether a line end between two quotes ends no record, as in CSV.
    """
    scanner = _Scanner(is_quoted)
    found = [scanner.feed(text), scanner.close()]
    return Records(
        np.concatenate([records.starts for records in found]),
        np.concatenate([records.ends for records in found]),
    )


class TextScan:
    """Rows of one text file, counted block by block, and the places where it may be cut.

    Args:
        file: Index of the file.
        offset: Where the first record begins.
        first_row: Number in the job of the first row.
        mark_rows: A place to cut comes before each row whose number is a multiple of it,
        is_quoted: As in `split_records`.
        unit_rows: and, where rows are large, before multiples of this, some megabytes apart.
        carried_bytes: `left_bytes` of the file before.

    Attributes:
        rows: Rows so far.
        longest: Bytes of the longest row.
        widest: Bytes of so many rows as `unit_rows`, at most.
    """

    def __init__(
        self,
        file: int,
        offset: int,
        first_row: int,
        mark_rows: int,
        is_quoted: bool,
        unit_rows: int | None = None,
        carried_bytes: int = 0,
    ) -> None:
        self._scanner = _Scanner(is_quoted, offset)
        self._file, self._mark_rows, self._first_row = file, mark_rows, first_row
        self._unit_rows = unit_rows or mark_rows
        self._cuts: list[tuple[int, int]] = []  # (row, offset)
        self._begin = self._end = self._cut_at = offset
        self._window = offset - carried_bytes  # where the present `unit_rows` rows begin
        self.rows = self.longest = self.widest = 0

    def feed(self, block: bytes) -> None:
        """The next block of the file.

        Raises:
            BatchError: A row is longer than any row may be.
        """
        self._count(self._scanner.feed(block))
        self._end += len(block)
        if self._end - self._scanner.start > MAX_ROW_BYTES:
            self._refuse(self.rows + 1)

    def close(self) -> None:
        """There are no more blocks."""
        self._count(self._scanner.close())
        self.widest = max(self.widest, self.left_bytes)

    @property
    def left_bytes(self) -> int:
        """Bytes since the last row that is a multiple of `unit_rows`."""
        return self._end - self._window

    def stretches(self) -> Iterator[Piece]:
        """The file from place to place, in order."""
        cuts = [(0, self._begin), *self._cuts, (self.rows, self._end)]
        for (row, start), (next_row, stop) in zip(cuts, cuts[1:], strict=False):
            if next_row > row:
                yield Piece(self._file, start, stop, next_row - row)

    def _count(self, records: Records) -> None:
        count = len(records.starts)
        if not count:
            return
        lengths = records.ends - records.starts
        self.longest = max(self.longest, int(lengths.max()))
        if self.longest > MAX_ROW_BYTES:
            self._refuse(self.rows + int(lengths.argmax()) + 1)
        skipped = -(self._first_row + self.rows) % self._unit_rows
        places = records.starts[skipped :: self._unit_rows]
        if len(places):
            widths = np.diff(places, prepend=self._window)
            self.widest = max(self.widest, int(widths.max()))
            self._window = int(places[-1])
            self._cut(places, self.rows + skipped)
        self.rows += count

    def _cut(self, places: NDArray[np.int64], row: int) -> None:
        """Choose among places that are `unit_rows` apart, the first of them before `row`."""
        at = 0
        while True:
            by_rows = (-(self._first_row + row) // self._unit_rows - at) % (
                self._mark_rows // self._unit_rows
            )
            by_bytes = int(np.searchsorted(places, self._cut_at + MARK_BYTES))
            at = min(at + by_rows, max(at, by_bytes))
            if at >= len(places):
                return
            self._cut_at = int(places[at])
            if row + at * self._unit_rows:
                self._cuts.append((row + at * self._unit_rows, self._cut_at))
            at += 1

    def _refuse(self, row: int) -> None:
        raise BatchError(
            f"row {row} of input file {self._file} has more than {MAX_ROW_BYTES >> 20} MiB; fewer "
            "are allowed. Check that each row is on a line of its own, and that quotes are closed.",
            "row_too_large",
            line=row,
        )


class _Scanner:
    """Finds the ends of records in blocks that follow each other."""

    def __init__(self, is_quoted: bool, offset: int = 0) -> None:
        self._is_quoted = is_quoted
        self._offset = offset  # of the next block
        self.start = offset  # of the record that is not ended yet
        self._is_inside = False
        self._last = 0  # the last byte of the block before

    def feed(self, block: bytes | memoryview) -> Records:
        letters = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(letters == _NEWLINE)
        if self._is_quoted:
            quotes = np.flatnonzero(letters == _QUOTE)
            if len(quotes) or self._is_inside:
                before = np.searchsorted(quotes, ends) + self._is_inside
                ends = ends[before % 2 == 0]
                self._is_inside = bool((len(quotes) + self._is_inside) % 2)
        records = self._records(ends, letters)
        self._offset += len(letters)
        self._last = int(letters[-1]) if len(letters) else self._last
        return records

    def close(self) -> Records:
        """What follows the last line end."""
        empty = np.zeros(0, np.int64)
        left = self._offset - self.start
        if left == 0 or (left == 1 and self._last == _RETURN):
            return Records(empty, empty)
        return Records(np.array([self.start]), np.array([self._offset]))

    def _records(self, ends: NDArray[np.int64], letters: NDArray[np.uint8]) -> Records:
        stops = ends + 1 + self._offset
        starts = np.empty_like(stops)
        if len(stops):
            starts[0], starts[1:] = self.start, stops[:-1]
            self.start = int(stops[-1])
        lengths = stops - starts
        is_blank = lengths == 1
        short = np.flatnonzero(lengths == 2)
        if len(short):
            before = ends[short] - 1
            letter = np.where(before >= 0, letters[np.maximum(before, 0)], self._last)
            is_blank[short] = letter == _RETURN
        return Records(starts[~is_blank], stops[~is_blank])


def blocks_of(file: Any, offset: int) -> Iterator[bytes]:
    """The bytes of a file from an offset on, some megabytes at a time."""
    file.seek(offset)
    while block := file.read(_BLOCK_BYTES):
        yield block


def header_of(file: Any) -> tuple[bytes, int]:
    """The first record of a CSV file and where the second one begins; a byte order mark is left.

    Raises:
        BatchError: There is none.
    """
    file.seek(0)
    text = file.read(MAX_ROW_BYTES)
    begin = len(_BOM) if text.startswith(_BOM) else 0
    records = split_records(memoryview(text)[begin:], is_quoted=True)
    if not len(records.starts):
        raise BatchError("the input file is empty; a line of column names is needed.", "empty_file")
    start, end = int(records.starts[0]) + begin, int(records.ends[0]) + begin
    return text[start:end], end


def text_begin(file: Any) -> int:
    """Where the text of a file begins: after a byte order mark."""
    file.seek(0)
    return len(_BOM) if file.read(len(_BOM)) == _BOM else 0
