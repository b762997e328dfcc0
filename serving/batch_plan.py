"""The plan of a batch job: its files, its columns, and its shards, decided once and recorded.

Everything that is wrong with a job as a whole is found here, before anything is computed: no such
file, a missing column, a type that the model cannot take, names that clash, nothing in it. Single
bad rows are left to the shards.
"""

import hashlib
import math
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import did_you_mean
from configs.stores import reason
from data_pipeline.source import describe_field, partitions_of
from data_pipeline.tables import Wanted
from serving import shards as cutting
from serving.batch_columns import csv_names, json_columns, kept_columns, text_types
from serving.batch_rows import RowSource, group_row_bytes
from serving.errors import BatchError
from serving.line_rows import CUSTOM_ID
from serving.locations import file_state, find_files, opened
from serving.openai_lines import check_lines
from serving.shards import Piece, Shard

FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
}
ROW_COLUMN = "__row__"
_FOOTER_BYTES = 64 * 2**10


@dataclass(frozen=True)
class PlanRequest:
    """What a job asks for; plain values.

    Attributes:
        inputs: Files, folders and globs; URIs or absolute paths.
        allowed: Where these may be; None for uploads, which are the service's own files.
        format: parquet, csv, ndjson or openai; None: as the files' names say.
        keep: "keys" for the columns that the model does not take, "all", or names.
        column: Name of the column of predictions.
        output_format: parquet, csv or ndjson; None: the input's.
        shard_rows: Rows of a shard, rounded to what fits the model; None: about two seconds' worth.
        predictors: How many predictors may work on it.
        model: Name of the model, and `url` the end point, that lines of OpenAI's files must name.
    """

    inputs: tuple[str, ...]
    allowed: tuple[str, ...] | None
    format: str | None = None
    keep: str | tuple[str, ...] = "keys"
    column: str = "prediction"
    output_format: str | None = "parquet"
    shard_rows: int | None = None
    predictors: int = 1
    model: str = ""
    url: str = ""


@dataclass(frozen=True)
class Plan:
    """What a job is going to do.

    Attributes:
        source: Where its rows come from.
        output_format: parquet, csv, ndjson or openai.
        shards: All of its shards.
        rows: Rows of all files.
        digests: Of each file: the SHA-256 of a text, or of the end of a Parquet file, which holds
            its footer.
    """

    source: RowSource
    output_format: str
    shards: tuple[Shard, ...]
    rows: int
    digests: tuple[str, ...]


def make_plan(request: PlanRequest, wanted: Wanted, sizes: Sequence[int], s_a_row: float) -> Plan:
    """Look at all files of a job and cut it.

    Args:
        request: The job.
        wanted: The model's input columns.
        sizes: Numbers of rows that the model is called with, ascending.
        s_a_row: Seconds of a predictor for a row.

    Raises:
        BatchError: The job cannot be done; the code tells why.
        LocationError: A file is not where the user's files may be.
        DataError: A store refuses.
        ReadError: A store does not answer.
    """
    files = _find(request)
    kind = request.format or _format_of(files)
    output = request.output_format or kind
    if kind == "openai":
        output = "openai"
    states = tuple(file_state(path) for path in files)
    source = RowSource(kind, states, request.allowed, wanted)
    planner = _Planner(request, source, output, tuple(sizes), s_a_row)
    try:
        plan = planner.parquet() if kind == "parquet" else planner.text()
    except (OSError, pa.ArrowException) as error:
        raise BatchError(
            f"the input cannot be read as {kind}: {reason(files[0], error)}. Check the file, and "
            "that its name ends as its format does.",
            "unreadable_file",
        ) from None
    if plan.rows == 0:
        raise BatchError(f"the input has no row at all ({len(files)} file(s)).", "empty_file")
    _check_clashes(request, plan)
    return plan


@dataclass(frozen=True)
class _Planner:
    request: PlanRequest
    source: RowSource
    output: str
    sizes: tuple[int, ...]
    s_a_row: float

    def parquet(self) -> Plan:
        request, source = self.request, self.source
        rows: list[int] = []
        sizes, widest, digests = 0, 0.0, []
        first: pa.Schema | None = None
        partitions = _partitions(request, source)
        for state in source.files:
            with opened(state.path, source.allowed, state) as file:
                footer = pq.ParquetFile(file)
                schema, metadata = footer.schema_arrow, footer.metadata
                rows.append(metadata.num_rows)
                digests.append(_tail_digest(file, state.size_bytes))
            _check_schema(state.path, schema, source.wanted, partitions)
            if first is None:
                first = schema
                kept = kept_columns(request.keep, [*schema.names, *partitions], source.wanted)
            _check_same(state.path, schema, first, [n for n in kept if n not in partitions])
            groups = range(metadata.num_row_groups)
            sizes += sum(metadata.row_group(n).total_byte_size for n in groups)
            columns = {*source.wanted, *kept}
            widest = max([widest, *(group_row_bytes(metadata, n, columns) for n in groups)])
        kinds, call_rows = dict.fromkeys(kept, ""), cutting.call_rows(self.sizes, widest)
        source = replace(source, kept=kinds, partitions=partitions, call_rows=call_rows)
        shard_rows = self._shard_rows(sizes / max(1, sum(rows)), sum(rows), call_rows)
        cut = tuple(cutting.cut_rows(rows, shard_rows))
        return Plan(source, self.output, cut, sum(rows), tuple(digests))

    def text(self) -> Plan:
        source = self.source
        begins: list[int] = []
        if source.format == "csv":
            source = replace(source, names=tuple(csv_names(source, begins)))
            for state, names in zip(source.files, source.names, strict=True):
                _check_names(state.path, names, source.wanted)
        unit_rows = self.sizes[-1]
        least_rows = cutting.mark_rows_for(unit_rows)
        found = _scanned(source, begins, unit_rows)
        if found.widest > cutting.MAX_CALL_BYTES:
            unit_rows = least_rows = cutting.call_rows(self.sizes, found.longest)
            found = _scanned(source, begins, unit_rows)  # for the places to cut
        size_bytes = sum(state.size_bytes for state in source.files)
        shard_rows = self._shard_rows(size_bytes / max(1, found.rows), found.rows, least_rows)
        cut = tuple(cutting.cut_text(found.stretches, unit_rows, shard_rows))
        source = replace(source, call_rows=unit_rows)
        source = replace(source, kept=self._text_columns(source, cut))
        return Plan(source, self.output, cut, found.rows, tuple(found.digests))

    def _shard_rows(self, row_bytes: float, rows: int, unit_rows: int) -> int:
        wanted = self.request.shard_rows
        if wanted is not None:
            return max(1, round(wanted / unit_rows)) * unit_rows
        return cutting.rows_of_a_shard(
            self.s_a_row, row_bytes, unit_rows, rows, self.request.predictors
        )

    def _text_columns(self, source: RowSource, cut: Sequence[Shard]) -> dict[str, str]:
        """Columns that are joined to the output, with the types of all their values."""
        if source.format == "openai":
            check_lines(source, cut, self.request.model, self.request.url)
            return {CUSTOM_ID: "string"}
        if source.format == "ndjson":
            found = json_columns(source, cut)
            if cut:
                _check_names(source.files[0].path, list(found), source.wanted)
            kept = kept_columns(self.request.keep, list(found), source.wanted)
            return {name: found[name] for name in kept}
        kept = kept_columns(self.request.keep, list(source.names[0]), source.wanted)
        for state, names in zip(source.files, source.names, strict=True):
            _check_names(state.path, names, dict.fromkeys(kept, ()))
        if self.output == "csv":
            return dict.fromkeys(kept, "string")
        return text_types(source, cut, kept)


@dataclass
class _Scanned:
    """What reading all texts of a job through has shown; see `TextScan`."""

    rows: int = 0
    longest: int = 0
    widest: int = 0
    stretches: list[Piece] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)


def _scanned(source: RowSource, begins: Sequence[int], unit_rows: int) -> _Scanned:
    """Rows of all files, and the places where they may be cut."""
    found, carried = _Scanned(), 0
    is_quoted, mark_rows = source.format == "csv", cutting.mark_rows_for(unit_rows)
    for index, state in enumerate(source.files):
        with opened(state.path, source.allowed, state) as file:
            begin = begins[index] if begins else cutting.text_begin(file)
            scan = cutting.TextScan(
                index, begin, found.rows, mark_rows, is_quoted, unit_rows, carried
            )
            digest = hashlib.sha256(_bytes_before(file, begin))
            for block in cutting.blocks_of(file, begin):
                scan.feed(block)
                digest.update(block)
            scan.close()
        found.rows += scan.rows
        found.longest = max(found.longest, scan.longest)
        found.widest = max(found.widest, scan.widest)
        found.stretches += scan.stretches()
        found.digests.append(f"sha256:{digest.hexdigest()}")
        carried = scan.left_bytes
    return found


def _find(request: PlanRequest) -> list[str]:
    if request.allowed is None:
        return list(request.inputs)
    return find_files(request.inputs, request.allowed, tuple(FORMATS))


def _format_of(files: Sequence[str]) -> str:
    suffixes = {posixpath.splitext(path)[1].lower() for path in files}
    formats = {FORMATS.get(suffix, suffix) for suffix in suffixes}
    if len(formats) > 1 or not formats <= set(FORMATS.values()):
        raise BatchError(
            f"the input's files end with {', '.join(sorted(suffixes)) or 'nothing'}; one format of "
            f"{', '.join(FORMATS)} is allowed. Convert them, or submit one job for each format. "
            "Compressed text cannot be cut: decompress it, or write Parquet.",
            "unknown_format",
        )
    return formats.pop()


def _partitions(request: PlanRequest, source: RowSource) -> dict[str, str]:
    """Columns that are names of folders and that the job reads: whole numbers where all are."""
    named = () if isinstance(request.keep, str) else request.keep
    found: dict[str, list[str | None]] = {}
    for state in source.files:
        for name, value in partitions_of(state.path).items():
            if name in source.wanted or name in named or request.keep == "all":
                found.setdefault(name, []).append(value)
    texts = {n: [v for v in values if v is not None] for n, values in found.items()}
    return {
        name: "int64" if all(v.lstrip("-").isdigit() and len(v) < 19 for v in values) else "text"
        for name, values in texts.items()
        if len(found[name]) == len(source.files)
    }


def _check_names(path: str, names: Sequence[str], wanted: Any) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise BatchError(
            f"{path} has more than one column {twice[0]!r}; each name once is allowed.",
            "duplicate_column",
            column=twice[0],
        )
    for name in wanted:
        if name not in names:
            raise BatchError(
                f"{path} has no column {name!r}; it has {', '.join(map(str, names))}."
                f"{did_you_mean(name, names)} Add the column, or rename one.",
                "missing_column",
                column=name,
            )


def _check_schema(path: str, schema: pa.Schema, wanted: Wanted, partitions: dict[str, str]) -> None:
    _check_names(path, [*schema.names, *(p for p in partitions if p not in schema.names)], wanted)
    for name, kind in wanted.items():
        if name in partitions and name not in schema.names:
            continue
        column = describe_field(schema.field(name))
        number = _number_kind(column.dtype)
        if isinstance(kind, str):
            is_whole, is_text = number in "iub", column.dtype == "text"
            is_time = column.dtype.startswith(("timestamp", "date"))
            fits = not column.is_list and {
                "string": is_text or is_whole,
                "int64": is_whole,
                "timestamp[us]": is_text or is_time or is_whole,
            }.get(kind, False)
            allowed = str(kind)
        else:
            size = math.prod(kind)
            fits = number in "iufb" and (column.size in (0, size) if column.is_list else size == 1)
            allowed = "a number" if size == 1 else f"a list of {size} numbers"
        if not fits:
            held = f"lists of {column.dtype}" if column.is_list else column.dtype
            raise BatchError(
                f"column {name!r} of {path} holds {held}; {allowed} is needed. Convert the column.",
                "wrong_type",
                column=name,
            )


def _number_kind(dtype: str) -> str:
    try:
        return np.dtype(dtype).kind
    except TypeError:
        return "O"


def _check_same(path: str, schema: pa.Schema, first: pa.Schema, kept: Sequence[str]) -> None:
    _check_names(path, schema.names, dict.fromkeys(kept, ()))
    for name in kept:
        if schema.field(name).type != first.field(name).type:
            raise BatchError(
                f"column {name!r} is {first.field(name).type} in the first file and "
                f"{schema.field(name).type} in {path}; one type is allowed for a column of the "
                "output. Convert the file, or leave the column out of `keep`.",
                "schema_mismatch",
                column=name,
            )


def _check_clashes(request: PlanRequest, plan: Plan) -> None:
    own = {request.column} if plan.output_format == "openai" else {request.column, ROW_COLUMN}
    clash = sorted(own & set(plan.source.kept))
    if clash:
        raise BatchError(
            f"the input has a column {clash[0]!r}, as the output has. Name another `column`, or "
            "leave it out of `keep`.",
            "column_clash",
            column=clash[0],
        )


def _tail_digest(file: Any, size_bytes: int) -> str:
    start = max(0, size_bytes - _FOOTER_BYTES)
    file.seek(start)
    return f"end-sha256:{hashlib.sha256(file.read()).hexdigest()}"


def _bytes_before(file: Any, offset: int) -> bytes:
    file.seek(0)
    return bytes(file.read(offset))
