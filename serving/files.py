"""Predictions for whole files: rows in, the same rows with a column more out, in their order.

Owns what an output folder is: Parquet parts and `_prediction.json`, which lists them (readers of
Parquet folders pass over names with an underscore). The folder appears whole or not at all: it is
written under a hidden name beside its place and renamed. An earlier output is replaced; anything
else that is in the way is left alone.
"""

import json
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.section import Paths
from data_pipeline.errors import DataError
from data_pipeline.storage import sync
from data_pipeline.tables import FileRows, Tables, null_error, open_tables
from serving.errors import OutputError, WriteError
from serving.predictor import Predictor
from serving.row_predictor import predict_good_rows

OnNull = Literal["error", "null"]
Progress = Callable[[int, int], None]

RECORD_FILE = "_prediction.json"

_FORMAT = "lockstep-prediction-1"
_PART_ROWS = 2**20


@dataclass(frozen=True)
class PredictionSummary:
    """What was predicted.

    Attributes:
        output: The folder.
        rows: Rows written, which are all rows read.
        null_rows: Rows among them without a prediction, as an input was null or NaN.
        files: Files read.
        parts: Files written.
        seconds: Time from start to end.
    """

    output: str
    rows: int
    null_rows: int
    files: int
    parts: int
    seconds: float


def predict_files(
    predictor: Predictor,
    inputs: Paths,
    output_dir: str | Path,
    *,
    on_null: OnNull = "error",
    column: str = "prediction",
    progress: Progress | None = None,
) -> PredictionSummary:
    """Predict for all rows of some files and write them, with their predictions, as Parquet.

    Parts follow the order of the files and of the rows in them. All columns of the inputs are kept
    (those of CSV as numbers, booleans or text, whichever fits all values); the prediction is a
    float32, or a list of fixed size where the model gives several numbers.

    Blocks until done. Where it raises, nothing has changed.

    Args:
        predictor: The model.
        inputs: A file, a folder, a glob, or a list of these; Parquet or CSV.
        output_dir: Must not exist, be empty, or hold an earlier output and nothing else.
        on_null: What a null or NaN in an input column does: "error", or "null", by which the
            prediction of that row is null.
        column: Name of the new column.
        progress: Is called with rows done and rows in all.

    Raises:
        DataError: The files cannot be read, or do not hold what is needed.
        OutputError: The output folder holds something else, or may not be written.
        WriteError: Storage failed.
    """
    started = time.monotonic()
    output = Path(output_dir).resolve()
    signature = predictor.signature
    tables = open_tables("input", inputs, signature.inputs, True, signature.table_rows)
    _check_output(output, tables.paths)
    _check_column(column, tables)
    nulls: Counter[tuple[str, str]] = Counter()
    done = null_rows = 0
    try:
        with _whole_folder(output) as folder, _PartWriter(folder) as writer:
            for rows in tables:
                masks = rows.null_masks(signature.inputs)
                nulls.update({(name, rows.path): int(mask.sum()) for name, mask in masks.items()})
                if on_null == "null" or not nulls:
                    values = _predicted(predictor, rows, list(masks.values()))
                    null_rows += values.null_count
                    writer.write(rows.table.append_column(column, values))
                done += rows.table.num_rows
                if progress is not None:
                    progress(done, tables.rows)
            if nulls and on_null == "error":
                raise null_error("input", nulls, "null")
            parts = writer.finished()
            _write_record(folder, predictor, tables.paths, parts, column)
            _check_output(output, tables.paths)  # much may have happened since the first time
    except OSError as error:
        raise WriteError(
            f"cannot write {output}: {error}. Nothing of it is left; check the storage, then start "
            "again."
        ) from error
    seconds = time.monotonic() - started
    return PredictionSummary(str(output), done, null_rows, len(tables.files), len(parts), seconds)


def _predicted(
    predictor: Predictor, rows: FileRows, null_masks: Sequence[NDArray[np.bool_]]
) -> pa.Array:
    """Predictions of some rows as a column; null where a mask is true."""
    signature = predictor.signature
    is_null = np.zeros(rows.table.num_rows, np.bool_)
    for mask in null_masks:
        is_null |= mask
    values = np.zeros((len(is_null), signature.output_size), np.float32)
    if not is_null.all():
        inputs = rows.table.select(list(signature.inputs))
        values = predict_good_rows(predictor, inputs, is_null, rows.path)
    if signature.output_size == 1:
        return pa.array(values[:, 0], mask=is_null)
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, signature.output_size, mask=pa.array(is_null))


class _PartWriter:
    """Writes tables one after the other into Parquet parts, each of them synced to storage.

    A part holds about a million rows, and columns of one type each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: pq.ParquetWriter | None = None
        self._parts: list[dict[str, Any]] = []

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def write(self, table: pa.Table) -> None:
        """Append a table, without the notes that its file held on itself."""
        table = table.replace_schema_metadata(None)
        if self._writer is not None:
            is_full = self._parts[-1]["rows"] >= _PART_ROWS
            if is_full or self._writer.schema != table.schema:
                self._close()
        if self._writer is None:
            name = f"part-{len(self._parts):05d}.parquet"
            self._writer = pq.ParquetWriter(self._folder / name, table.schema)
            self._parts.append({"name": name, "rows": 0})
        self._writer.write_table(table)
        self._parts[-1]["rows"] += table.num_rows

    def finished(self) -> list[dict[str, Any]]:
        """Close the last part; returns name and rows of each."""
        self._close()
        return self._parts

    def _close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            sync(self._folder / self._parts[-1]["name"])


def _write_record(
    folder: Path,
    predictor: Predictor,
    inputs: Sequence[str],
    parts: list[dict[str, Any]],
    column: str,
) -> None:
    record = {
        "format": _FORMAT,
        "model": str(predictor.path),
        "inputs": list(inputs),
        "column": column,
        "shape": list(predictor.signature.output_shape),
        "rows": sum(part["rows"] for part in parts),
        "parts": parts,
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
    sync(folder / RECORD_FILE)
    sync(folder)


def _check_column(column: str, tables: Tables) -> None:
    for file in tables.files:
        if column in file.schema.names:
            raise DataError(
                f"input: {file.path} has a column {column!r} already. Choose another name for the "
                "predictions with --column."
            )


def _check_output(output: Path, inputs: Sequence[str]) -> None:
    inside = [path for path in inputs if output in Path(path).resolve().parents]
    if inside:
        raise OutputError(
            f"the output folder {output} holds the input {inside[0]}; a folder of its own is "
            "needed. Choose another --output."
        )
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output} is a file; a folder is needed. Choose another --output.")
    held = sorted(entry.name for entry in output.iterdir())
    if held and held != _earlier_output(output):
        raise OutputError(
            f"{output} holds {', '.join(held[:5])}{' and more' if held[5:] else ''}; a new folder, "
            "an empty one, or an earlier output of a prediction and nothing else is allowed. "
            "Choose another --output, or empty it."
        )


def _earlier_output(folder: Path) -> list[str]:
    """Names of the files of an earlier output, sorted; empty where the folder is none."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
        if record["format"] != _FORMAT:
            return []
        return sorted([RECORD_FILE, *(str(part["name"]) for part in record["parts"])])
    except (OSError, ValueError, KeyError, TypeError):
        return []


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that takes its place at the end, or vanishes on an error.

    Between the two renames that replace an earlier output there is, for a moment, none.
    """
    mark = uuid.uuid4().hex[:8]
    partial = output.with_name(f".{output.name}.{mark}.partial")
    earlier = output.with_name(f".{output.name}.{mark}.earlier")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            f"cannot write beside {output}: {error}. Choose an --output that may be written."
        ) from error
    try:
        yield partial
        if output.exists():
            output.rename(earlier)
        try:
            partial.rename(output)
        finally:
            if earlier.exists() and not output.exists():
                earlier.rename(output)
        sync(output.parent)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
