"""What Parquet's page headers say of a file, against files that pyarrow wrote and against lies."""

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.parquet_pages import pages

ROWS = 5_000
TABLE = pa.table(
    {
        "number": [float(row % 7) for row in range(ROWS)],
        "list": [[1.0, 2.0]] * ROWS,
        "text": [None if row % 5 == 0 else str(row % 1000) for row in range(ROWS)],
    }
)


def written(table: pa.Table, **options: Any) -> tuple[memoryview, list[Any]]:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    body = bytes(sink.getvalue())
    metadata = pq.ParquetFile(pa.BufferReader(body)).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return memoryview(body), [g.column(place) for g in groups for place in range(g.num_columns)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_page_version": "2.0"},
        {"use_dictionary": False},
        {"compression": "zstd", "data_page_size": 1_000},
        {"row_group_size": 700, "write_statistics": False},
        {"write_page_index": True, "write_page_checksum": True},
    ],
)
def test_headers_tell_all_values_and_all_bytes(options: dict[str, Any]) -> None:
    body, chunks = written(TABLE, **options)
    for chunk in chunks:
        found = list(pages(body, chunk))
        assert sum(page.values for page in found) == chunk.num_values
        size = sum(page.size_bytes for page in found)  # the chunk's holds the headers too
        assert size <= chunk.total_uncompressed_size <= size + 200 * len(found)


def test_the_encoding_of_texts_that_repeat_each_other_is_told() -> None:
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    body, chunks = written(TABLE.select(["text"]), use_dictionary=False, column_encoding=encoding)
    assert {page.encoding for page in pages(body, chunks[0])} == {7}


def test_a_footer_that_lies_about_its_values_changes_nothing() -> None:
    body, chunks = written(TABLE.select(["list"]), use_dictionary=False)
    true = chunks[0]
    for claimed in (1, true.num_values):
        lie = SimpleNamespace(
            data_page_offset=true.data_page_offset, has_dictionary_page=False, num_values=claimed
        )
        first = next(iter(pages(body, lie)))
        assert first.values == next(iter(pages(body, true))).values > 1


@given(st.binary(max_size=60), st.integers(-5, 70))
def test_what_is_no_header_is_an_error_and_nothing_else(data: bytes, at: int) -> None:
    chunk = SimpleNamespace(data_page_offset=at, has_dictionary_page=False, num_values=5)
    try:
        for number, _ in enumerate(pages(memoryview(data), chunk)):
            assert number < 60
    except ValueError:
        pass
