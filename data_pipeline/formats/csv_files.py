"""CSV files: the typing of `data_pipeline.csv_text`, one type a column over all files."""

import functools
from collections.abc import Iterator

import pyarrow as pa

from data_pipeline.csv_text import CsvFile, CsvRules, open_csv, with_common_types
from data_pipeline.formats.pieces import Piece, Request, conformed, one_schema


def open_files(request: Request) -> list[Piece]:
    """Read all files once for the types of their columns; a piece a file.

    Raises:
        DataError: A file cannot be read, or has other columns than the first one.
    """
    data = request.data
    named = {
        kind: {feature.name for feature in data.features if feature.kind == kind}
        for kind in ("numeric", "categorical", "text")
    }
    rules = CsvRules(
        numbers=named["numeric"] | ({data.weight} if data.weight is not None else set()),
        categories=named["categorical"],
        texts=named["text"],
        has_times=True,
        skips_bad_lines=data.on_bad_rows == "skip",
    )
    opened = with_common_types(
        list(
            request.pool.map(
                lambda file: open_csv(file.path, rules, request.advance), request.files
            )
        )
    )
    schema = one_schema(request.name, [(file.path, file.schema) for file in opened])
    pieces = [
        Piece((file,), text.rows, functools.partial(_batches, text, schema), text.bad_lines)
        for file, text in zip(request.files, opened, strict=True)
    ]
    return pieces


def _batches(file: CsvFile, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for table in file.tables(schema.names):
        for batch in table.to_batches():
            yield conformed(batch, schema)
