"""CSV files as typed tables: which type each column has, and on which line a mistake stands.

CSV has no types. A file is read twice: once to find, for each column, the narrowest type that holds
all of its values, and how many rows there are; then to be used. Both passes read text and convert
it by the same rules, in blocks, so memory does not grow with the file. Comma, UTF-8 and a line of
column names are what is understood; files may be compressed by gzip.
"""

import csv
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from data_pipeline.errors import DataError, ReadError
from data_pipeline.formats.pieces import BadLine
from data_pipeline.inputs import open_input, open_text

_BLOCK_BYTES = 4 * 2**20
_PROBED_ROWS = 16
_SHOWN_LETTERS = 1_000
_TEXT = pa.string()
_NARROW = (pa.int64(), pa.float64(), pa.bool_())

# ISO 8601, without and with a zone. What a microsecond cannot tell stays text.
_TIMES = (pa.timestamp("us"), pa.timestamp("us", "UTC"))

MISSING = ("", "NA", "N/A", "#N/A", "n/a", "NaN", "nan", "-NaN", "-nan", "null", "NULL", "None")
"""What stands for no value in a column of numbers; in a column of text it is text."""

_MISSING = pa.array(MISSING)

# Digits that are a name rather than an amount: 007, or more of them than a float64 can tell apart.
_CODE = r"^[+-]?(0[0-9]|[0-9]{16})"


@dataclass(frozen=True)
class CsvFile:
    """A CSV file of which all rows have been seen once.

    Attributes:
        path: The file.
        rows: Rows below the line of names.
        schema: Name and type of each column: int64, double, bool, timestamp or string, or null
            where it holds no value at all.
        bad_lines: Lines with too many or too few values, which are left out.
    """

    path: str
    rows: int
    schema: pa.Schema
    bad_lines: tuple[BadLine, ...] = ()

    def tables(self, columns: Collection[str]) -> Iterator[pa.Table]:
        """All rows in order, some megabytes of the file at a time.

        Raises:
            ReadError: The file is not what it was when it was opened.
        """
        kept = [field for field in self.schema if field.name in columns]
        try:
            for batch in _text_batches(self.path, self.schema.names, bool(self.bad_lines)):
                arrays = [_converted(batch[field.name], field.type) for field in kept]
                yield pa.table(arrays, schema=pa.schema(kept))
        except (OSError, pa.ArrowException) as error:
            raise ReadError(
                f"cannot read {self.path} a second time: {error}. Check the storage, and that "
                "nothing writes to the file; then start again."
            ) from error


@dataclass(frozen=True)
class CsvRules:
    """How the text of a file is understood.

    Attributes:
        numbers: Columns that must hold numbers or booleans.
        categories: Columns that are never times.
        texts: Columns that are text, even where they hold numbers only.
        has_times: Take columns of dates and times (ISO 8601) for timestamps; else they are text.
        skips_bad_lines: Leave lines with too many or too few values out.
    """

    numbers: Collection[str] = ()
    categories: Collection[str] = ()
    texts: Collection[str] = ()
    has_times: bool = False
    skips_bad_lines: bool = False

    def narrow_types(self, name: str) -> tuple[pa.DataType, ...]:
        """What is tried before text."""
        if name in self.texts:
            return ()
        is_timeless = name in self.numbers or name in self.categories
        return (*_NARROW, *_TIMES) if self.has_times and not is_timeless else _NARROW


def open_csv(
    path: str, rules: CsvRules, advance: Callable[[int], None] = lambda _: None
) -> CsvFile:
    """Read a file once and find the types of its columns.

    Of several files of the same rows, `with_common_types` makes what can be read one by one.

    Args:
        path: The file.
        rules: How it is understood.
        advance: Is told of bytes that were read, about.

    Raises:
        DataError: It cannot be read, a line has too many or too few values, or a column that must
            hold numbers holds text; with the line.
    """
    try:
        names = _column_names(path)
        rows, types, has_bad = _narrowest_types(path, names, rules, advance)
        bad_lines = tuple(_bad_lines(path)) if has_bad else ()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last one for names
        raise DataError(_explain(path, error)) from None
    for name in rules.numbers:
        if types.get(name) == _TEXT:
            raise DataError(_text_among_numbers(path, name))
    return CsvFile(path, rows, pa.schema([(name, types[name]) for name in names]), bad_lines)


def with_common_types(files: Sequence[CsvFile]) -> list[CsvFile]:
    """The files with one type for each column, which holds its values in all of them."""
    types: dict[str, pa.DataType] = {}
    for file in files:
        for field in file.schema:
            types[field.name] = _common_type(types.get(field.name, pa.null()), field.type)
    types = {name: pa.float64() if pa.types.is_null(kind) else kind for name, kind in types.items()}
    return [
        replace(file, schema=pa.schema([(name, types[name]) for name in file.schema.names]))
        for file in files
    ]


def _column_names(path: str) -> list[str]:
    # Bad lines are no matter here: the first block is parsed, the names are the first line.
    with open_input(path) as file, pacsv.open_csv(file, **_options([], _skip)) as reader:
        names: list[str] = reader.schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: {', '.join(map(repr, twice))} stands more than once in the line of names; "
            "each name once is allowed. Rename or remove a column."
        )
    return names


def _narrowest_types(
    path: str, names: list[str], rules: CsvRules, advance: Callable[[int], None]
) -> tuple[int, dict[str, pa.DataType], bool]:
    """Number of rows, for each column the narrowest type for all of them, and if lines are bad."""
    types = dict.fromkeys(names, pa.null())
    rows, has_bad = 0, False

    def skip(row: pacsv.InvalidRow) -> str:
        nonlocal has_bad
        has_bad = True
        return "skip"

    for batch in _text_batches(path, names, rules.skips_bad_lines, skip):
        rows += batch.num_rows
        for name in names:
            if types[name] != _TEXT:
                kinds = rules.narrow_types(name)
                found = _narrowest_type(batch[name], kinds, name in rules.numbers)
                types[name] = _common_type(types[name], found)
        advance(batch.nbytes)
    return rows, types, has_bad


def _narrowest_type(text: pa.Array, kinds: Sequence[pa.DataType], is_number: bool) -> pa.DataType:
    """The narrowest type of one block of a column; null where it holds no value at all.

    What need not be a number stays text where a number would lose digits.
    """
    values = _without_missing(text)
    if values.null_count == len(values):
        return pa.null()
    for kind in kinds:
        try:
            values.slice(0, _PROBED_ROWS).cast(kind)  # a cast fails as slowly as it succeeds
            converted = values.cast(kind)
        except pa.ArrowInvalid:
            continue
        if is_number or _keeps_digits(values, converted):
            return kind
    return _TEXT


def _keeps_digits(text: pa.Array, values: pa.Array) -> bool:
    if pa.types.is_integer(values.type):
        return bool(pc.all(pc.equal(values.cast(_TEXT), text)).as_py())
    if pa.types.is_floating(values.type):
        return not pc.any(pc.match_substring_regex(text, _CODE)).as_py()
    return True


def _common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    return pa.float64() if {first, second} == {pa.int64(), pa.float64()} else _TEXT


def _converted(text: pa.Array, kind: pa.DataType) -> pa.Array:
    """Values of a column of text in the type that was found for it."""
    return text if kind == _TEXT else _without_missing(text).cast(kind)


def _without_missing(text: pa.Array) -> pa.Array:
    trimmed = pc.utf8_trim_whitespace(text)
    return pc.if_else(pc.is_in(trimmed, _MISSING), pa.scalar(None, _TEXT), trimmed)


def _skip(_: object) -> str:
    return "skip"


def _text_batches(
    path: str,
    names: list[str],
    skips_bad_lines: bool,
    skip: Callable[[pacsv.InvalidRow], str] = _skip,
) -> Iterator[pa.RecordBatch]:
    options = _options(names, skip if skips_bad_lines else None)
    with open_input(path) as file, pacsv.open_csv(file, **options) as reader:
        yield from reader


def _options(names: list[str], skip: Callable[[pacsv.InvalidRow], str] | None) -> dict[str, object]:
    return {
        "read_options": pacsv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        "parse_options": pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        "convert_options": pacsv.ConvertOptions(column_types=dict.fromkeys(names, _TEXT)),
    }


def _bad_lines(path: str) -> Iterator[BadLine]:
    """Lines with too many or too few values, by their numbers.

    Arrow counts rows, not lines, and a value may hold line ends.
    """
    with open_text(path) as file:
        lines = csv.reader(file)
        width = len(next(lines, []))
        for values in lines:
            if values and len(values) != width:
                reason = f"{len(values)} values; the first line names {width} columns"
                yield BadLine(lines.line_num, reason, ",".join(values)[:_SHOWN_LETTERS])


def _explain(path: str, error: Exception) -> str:
    """Name the line of the first row of another length; else say what the reader said."""
    try:
        for bad in _bad_lines(path):
            return (
                f"{path}, line {bad.line}: {bad.reason}. Correct the line, or put values with "
                "commas into quotes."
            )
    except UnicodeDecodeError as wrong:
        return (
            f"{path} is not text in UTF-8, which is what CSV has to be ({wrong.reason}, near "
            f"{wrong.object[max(0, wrong.start - 20) : wrong.end + 20]!r}). Convert the file."
        )
    except (OSError, csv.Error):
        pass
    return (
        f"{path} is not a readable CSV file: {error}. Commas, a first line of column names and "
        "UTF-8 are allowed; convert the file, or take it out."
    )


def _text_among_numbers(path: str, name: str) -> str:
    """Name the line of the first text in a column that should hold numbers."""
    with open_text(path) as file:
        lines = csv.reader(file)
        column = next(lines).index(name)
        for values in lines:
            if len(values) <= column:
                continue
            if _narrowest_type(pa.array([values[column]], _TEXT), _NARROW, True) == _TEXT:
                return (
                    f"{path}, line {lines.line_num}: column {name!r} holds {values[column]!r}; "
                    "numbers, true and false are allowed, and nothing at all for a missing value. "
                    "Correct the value, or encode the column as numbers."
                )
    return (
        f"{path}: column {name!r} holds both numbers and true or false; one of them is allowed. "
        "Write 1 and 0."
    )
