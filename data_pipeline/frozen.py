"""Rows that judge, apart from rows that train: chosen by rule, and copied, so that nothing moves.

Owns the choice (by file, by time, by a hash of the row: `data_pipeline.row_hash`) and the copies. A
row that was chosen to judge by its hash never trains in a later run. Memory does not grow with the
files.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.data import DataConfig
from data_pipeline.blocks import TableReader
from data_pipeline.encoding import moments_us
from data_pipeline.errors import ConvertError, DataError
from data_pipeline.features import null_rows
from data_pipeline.ingest import ingested
from data_pipeline.inventory import file_sha256
from data_pipeline.row_hash import row_hashes
from data_pipeline.source import Source, open_source, read_footer

EVALUATION_FILE = "evaluation.parquet"
TRAIN_FOLDER = "train"

_GROUP_ROWS = 65_536
_FILE_ROWS = 4_194_304
_DAY_US = 86_400_000_000

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class RowRules:
    """Which rows of some files judge, and which train. None: the rule does not apply.

    Attributes:
        fraction: About this part judges.
        key: Columns whose values choose it.
        time_column: Column of moments.
        judges_after_us: Rows later than this judge.
        trains_after_us: Only rows later than this train.
        unseen: Files that came later: their rows of exactly that moment train, too.
    """

    fraction: float | None = None
    key: tuple[str, ...] = ()
    time_column: str | None = None
    judges_after_us: int | None = None
    trains_after_us: int | None = None
    unseen: frozenset[str] = frozenset()

    def masks(self, table: pa.Table) -> tuple[Mask, Mask]:
        """`(rows,)` each: which rows judge, which train; no row does both."""
        judges = np.zeros(table.num_rows, bool)
        trains = np.ones(table.num_rows, bool)
        if self.fraction is not None:
            judges |= row_hashes(table, self.key) < np.uint64(self.fraction * 2.0**64)
        if self.time_column is not None:
            moments = _moments(table, self.time_column)
            if self.judges_after_us is not None:
                judges |= moments > self.judges_after_us
            if self.trains_after_us is not None:
                trains = moments > self.trains_after_us
        return judges, trains & ~judges


@dataclass(frozen=True)
class Frozen:
    """What was copied.

    Attributes:
        evaluation: Path of the rows that judge.
        evaluation_sha256: Digest of that file.
        evaluation_rows: Rows in it.
        train: Copied training files; empty where files are used as they are.
        train_rows: Rows in them.
    """

    evaluation: str
    evaluation_sha256: str
    evaluation_rows: int
    train: tuple[str, ...]
    train_rows: int


def has_moment(data: DataConfig, files: Sequence[str], column: str, moment_us: int) -> bool:
    """Whether a row of some files is of exactly this moment. Raises as `newest_moment`."""
    source = _source("files", data, files, [column])
    return any(
        bool((_moments(table, column, is_null_allowed=True) == moment_us).any())
        for table in _tables(source, [column])
    )


def newest_moment(data: DataConfig, files: Sequence[str], column: str) -> int:
    """The latest moment of a column in all files, in microseconds since 1970.

    Raises:
        DataError: The column holds no moments, or none at all.
    """
    source = _source("files", data, files, [column])
    newest = [
        int(moments.max())
        for table in _tables(source, [column])
        if len(moments := _moments(table, column, is_null_allowed=True))
    ]
    if not newest:
        raise DataError(f"data.files: column {column!r} holds no moment. Name another time_column.")
    return max(newest)


def days_us(days: float) -> int:
    """Days in microseconds."""
    return int(days * _DAY_US)


def freeze_rows(
    data: DataConfig,
    rules: RowRules,
    judging: Sequence[str],
    training: Sequence[str],
    folder: Path,
    *,
    extra: Sequence[str] = (),
    wished: Sequence[str] = (),
    max_rows: int = 200_000,
) -> Frozen:
    """Copy the rows that judge and, where rows are chosen one by one, the rows that train.

    The folder appears whole or not at all; an earlier one of the name is replaced.

    Args:
        data: The job's section.
        rules: Which rows. Without a rule all rows of `judging` judge, and training files are used
            as they are.
        judging: Files of the rows that judge.
        training: Files of the rows that train.
        folder: Receives the copies.
        extra: Columns of the rows that judge beside those of the job.
        wished: More of them, where the files have them.
        max_rows: The most rows that judge; of more, so many are drawn, always the same ones.

    Raises:
        DataError: Columns are missing, or no row is left to judge or to train.
        ConvertError: The copies cannot be written.
    """
    is_by_row = rules.fraction is not None or rules.time_column is not None
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / TRAIN_FOLDER).mkdir(parents=True)
        needed = [*data.columns, *rules.key, *extra]
        if rules.time_column is not None and rules.judges_after_us is not None:
            needed.append(rules.time_column)
        rows = _copy_judges(data, rules, judging, partial, _unique(needed), wished, max_rows)
        trained = 0
        if is_by_row:
            trained = _copy_training(data, rules, training, partial / TRAIN_FOLDER)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, pa.ArrowException) as error:
        raise ConvertError(
            f"cannot copy rows to {folder}: {error}. A folder with room that may be written to is "
            "needed; set runs_dir."
        ) from error
    evaluation = str(folder / EVALUATION_FILE)
    copies = sorted(str(path) for path in (folder / TRAIN_FOLDER).glob("*.parquet"))
    return Frozen(evaluation, file_sha256(evaluation), rows, tuple(copies), trained)


def _copy_judges(
    data: DataConfig,
    rules: RowRules,
    files: Sequence[str],
    folder: Path,
    columns: Sequence[str],
    wished: Sequence[str],
    max_rows: int,
) -> int:
    is_by_row = rules.fraction is not None or rules.judges_after_us is not None
    paths = ingested("test", list(files), data)
    first = paths if isinstance(paths, str) else paths[0]
    there = read_footer(first, wished)
    held = {*there[1].names, *(name for name, _ in there[0].partitions)}
    columns = _unique([*columns, *(name for name in wished if name in held)])
    source = open_source("test", paths, columns)

    def tables() -> Iterator[pa.Table]:
        for table in _tables(source, columns):
            chosen = table.filter(pa.array(rules.masks(table)[0])) if is_by_row else table
            yield _without_nulls(chosen, data)

    whole = folder / f"whole-{EVALUATION_FILE}"
    with _Writer(whole, _FILE_ROWS * 1024) as writer:
        for table in tables():
            writer.add(table)
    rows = writer.rows
    if rows == 0:
        raise DataError(
            f"data.evaluation leaves no row of {len(files)} file(s) to judge by. Take more rows "
            "into it, or add files."
        )
    target = folder / EVALUATION_FILE
    if rows <= max_rows:
        os.replace(writer.paths[0], target)
        return rows
    chosen = np.zeros(rows, bool)
    chosen[np.random.default_rng(0).permutation(rows)[:max_rows]] = True
    start = 0
    with _Writer(target, rows) as thinned:
        for batch in pq.ParquetFile(writer.paths[0]).iter_batches(_GROUP_ROWS):
            part = chosen[start : start + batch.num_rows]
            thinned.add(pa.Table.from_batches([batch]).filter(pa.array(part)))
            start += batch.num_rows
    os.replace(thinned.paths[0], target)
    writer.paths[0].unlink()
    return max_rows


def _copy_training(data: DataConfig, rules: RowRules, files: Sequence[str], folder: Path) -> int:
    time = [] if rules.time_column is None else [rules.time_column]
    columns = _unique([*data.columns, *rules.key, *time])
    with _Writer(folder / "rows.parquet", _FILE_ROWS) as writer:
        for group, group_rules in _by_rules(files, rules):
            for table in _tables(_source("train", data, group, columns), columns):
                chosen = pa.array(group_rules.masks(table)[1])
                writer.add(table.filter(chosen).select(data.columns))
    if writer.rows == 0:
        raise DataError(
            f"data: no row of {len(files)} file(s) is left to train on. Let fewer rows judge, or "
            "widen the window."
        )
    return writer.rows


def _by_rules(files: Sequence[str], rules: RowRules) -> Iterator[tuple[list[str], RowRules]]:
    """The files that were seen before, and those that were not, with the rules of each."""
    seen = [path for path in files if path not in rules.unseen]
    unseen = [path for path in files if path in rules.unseen]
    if seen:
        yield seen, rules
    if unseen:
        after_us = rules.trains_after_us
        yield unseen, replace(rules, trains_after_us=None if after_us is None else after_us - 1)


class _Writer:
    """Writes tables as Parquet files of one schema, `name-00000.parquet` and so on."""

    def __init__(self, path: Path, file_rows: int) -> None:
        self.rows = 0
        self.paths: list[Path] = []
        self._path, self._file_rows = path, file_rows
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._written_rows = 0
        self._schema: pa.Schema | None = None
        self._file: pq.ParquetWriter | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        if self._file is not None:
            self._file.close()

    def add(self, table: pa.Table) -> None:
        """Write some rows; small tables are joined."""
        if table.num_rows == 0:
            return
        table = _plain(table)
        self._schema = self._schema or table.schema
        self._waiting.append(table.cast(self._schema))
        self._waiting_rows += table.num_rows
        self.rows += table.num_rows
        if self._waiting_rows >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._file is None or self._written_rows >= self._file_rows:
            if self._file is not None:
                self._file.close()
            name = f"{self._path.stem}-{len(self.paths):05d}.parquet"
            self.paths.append(self._path.with_name(name))
            self._file = pq.ParquetWriter(self.paths[-1], self._schema)
            self._written_rows = 0
        self._file.write_table(pa.concat_tables(self._waiting), row_group_size=_GROUP_ROWS)
        self._written_rows += self._waiting_rows
        self._waiting, self._waiting_rows = [], 0


def _source(role: str, data: DataConfig, files: Sequence[str], columns: Sequence[str]) -> Source:
    return open_source(role, ingested(role, list(files), data), columns)


def _tables(source: Source, columns: Sequence[str]) -> Iterator[pa.Table]:
    reader = TableReader(source, columns)
    for block in range(len(source.block_rows)):
        yield reader.read(block).select(list(columns))


def _without_nulls(table: pa.Table, data: DataConfig) -> pa.Table:
    """The rows as training would take them: nulls left out, or zero in features of numbers."""
    if data.on_null == "error" or table.num_rows == 0:
        return table
    if data.on_null == "drop":
        is_null = np.logical_or.reduce([null_rows(table[name]) for name in data.columns])
        return table.filter(pa.array(~is_null))
    for feature in data.features:
        column = table[feature.name]
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), 0.0, column).cast(column.type)
        if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
            index = table.schema.get_field_index(feature.name)
            table = table.set_column(index, feature.name, pc.fill_null(column, 0))
    return table


def _plain(table: pa.Table) -> pa.Table:
    """The table with dictionaries written out: files may differ in them."""
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            column = table[field.name].cast(field.type.value_type)
            table = table.set_column(index, field.name, column)
    return table.replace_schema_metadata(None)


def _moments(table: pa.Table, column: str, is_null_allowed: bool = False) -> NDArray[np.int64]:
    try:
        moments = moments_us(table[column])
    except DataError as error:
        raise DataError(f"data.time_column: {column!r} has {error}") from None
    if moments.null_count and not is_null_allowed:
        raise DataError(
            f"data.time_column: {column!r} is null in {moments.null_count} rows; every row needs "
            "its time. Fill them, or leave the rows out."
        )
    found: NDArray[np.int64] = moments.drop_null().to_numpy()
    return found


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def frozen_record(frozen: Frozen) -> Mapping[str, Any]:
    """What was copied, as plain values."""
    return {**vars(frozen), "train": list(frozen.train)}
