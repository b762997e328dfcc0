"""Rows that cannot be predicted, and the chunk of rows that they stand in."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

ERROR_SCHEMA = pa.schema(
    [("row", pa.int64()), ("code", pa.string()), ("message", pa.string()), ("column", pa.string())]
)
"""What an error file holds: number of the row in the job's input, from 0, and why."""


@dataclass(frozen=True)
class RowError:
    """Why a row has no prediction.

    Attributes:
        row: Its number in the job's input, from 0.
        code: The reason in one word, for programs.
        message: The reason.
        column: The column that it is about; None where it is about the whole row.
    """

    row: int
    code: str
    message: str
    column: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Rows that follow each other.

    Attributes:
        first_row: Number in the job of the first one.
        inputs: The model's columns; what stands there in a bad row means nothing.
        kept: Columns that are joined to the output.
        is_bad: `(rows,) bool`.
        errors: One for each bad row, in order.
    """

    first_row: int
    inputs: pa.Table
    kept: pa.Table
    is_bad: NDArray[np.bool_]
    errors: list[RowError]

    @property
    def rows(self) -> int:
        """How many rows, bad ones included."""
        return len(self.is_bad)

    @staticmethod
    def joined(chunks: Sequence["Chunk"], first_row: int) -> "Chunk":
        """Chunks that follow each other as one, numbered from `first_row` on."""
        errors, row = [], first_row
        for chunk in chunks:
            shift = row - chunk.first_row
            errors += [RowError(e.row + shift, e.code, e.message, e.column) for e in chunk.errors]
            row += chunk.rows
        return Chunk(
            first_row,
            pa.concat_tables([chunk.inputs for chunk in chunks]),
            pa.concat_tables([chunk.kept for chunk in chunks]),
            np.concatenate([chunk.is_bad for chunk in chunks]),
            errors,
        )


@dataclass
class Marks:
    """Collects what is wrong with the rows of a chunk; of a row the first thing counts."""

    rows: int
    first_row: int
    is_bad: NDArray[np.bool_] = field(init=False)
    found: dict[int, RowError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """No row is bad yet."""
        self.is_bad = np.zeros(self.rows, bool)

    def mark(
        self, is_bad: NDArray[np.bool_], code: str, message: str, column: str | None = None
    ) -> None:
        """Mark the rows for which `is_bad`, `(rows,) bool`, is true."""
        if is_bad.any():
            for index in np.flatnonzero(is_bad):
                self.mark_row(int(index), code, message, column)

    def mark_row(self, index: int, code: str, message: str, column: str | None = None) -> None:
        """Mark one row, counted from the start of the chunk."""
        self.is_bad[index] = True
        if index not in self.found:
            self.found[index] = RowError(self.first_row + index, code, message, column)

    def chunk(self, inputs: pa.Table, kept: pa.Table) -> Chunk:
        """The rows with what was found."""
        errors = [self.found[index] for index in sorted(self.found)]
        return Chunk(self.first_row, inputs, kept, self.is_bad, errors)


def error_table(errors: Sequence[RowError]) -> pa.Table:
    """Errors as rows of an error file."""
    columns = [[getattr(error, name) for error in errors] for name in ERROR_SCHEMA.names]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, ERROR_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=ERROR_SCHEMA)
