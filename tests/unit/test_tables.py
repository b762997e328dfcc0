"""Files as tables: types of CSV columns, bounded sizes, and what is said of bad files."""

import datetime
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import csv_text, storage
from data_pipeline.errors import DataError
from data_pipeline.source import PARQUET_SUFFIXES
from data_pipeline.tables import Tables, open_tables


def write(path: Path, text: str) -> str:
    path.write_text(text, newline="")
    return str(path)


def merged(tables: Tables) -> pa.Table:
    return pa.concat_tables([rows.table for rows in tables], promote_options="permissive")


def columns_of(tmp_path: Path, text: str, *numbers: str) -> dict[str, list[Any]]:
    path = write(tmp_path / "x.csv", text)
    return merged(open_tables("input", path, dict.fromkeys(numbers, ()), True)).to_pydict()


def test_csv_columns_get_the_narrowest_type_that_keeps_their_values(tmp_path):
    text = (
        "n,code,price,flag,id,when,note\n"
        "1,007,1.50,true,1234567890123456,2013-11-02,\n"
        "-2,12,3,false,9007199254740993,2013-11-03,NA\n"
        ' NA ,13,,,,,"a, b\nc"\n'
    )
    assert columns_of(tmp_path, text, "n") == {
        "n": [1, -2, None],
        "code": ["007", "12", "13"],
        "price": [1.5, 3.0, None],
        "flag": [True, False, None],
        "id": [1234567890123456, 9007199254740993, None],
        "when": ["2013-11-02", "2013-11-03", ""],
        "note": ["", "NA", "a, b\nc"],
    }


def test_wanted_csv_columns_are_numbers_however_they_are_written(tmp_path):
    text = "hour,share,flag,none\n08,1e-3,TRUE,\n+9,inf,false,\n"
    assert columns_of(tmp_path, text, "hour", "share", "flag", "none") == {
        "hour": [8, 9],
        "share": [0.001, float("inf")],
        "flag": [True, False],
        "none": [None, None],
    }


def test_a_type_holds_for_the_whole_file_not_only_for_its_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_text, "_BLOCK_BYTES", 256)
    lines = [f"{row},{row},{row}" for row in range(200)]
    lines[150], lines[180] = "150,1.5,x", "180,180,180"
    columns = columns_of(tmp_path, "a,b,c\n" + "\n".join(lines) + "\n", "a")
    assert columns["a"] == list(range(200))
    assert columns["b"] == [float(row) if row != 150 else 1.5 for row in range(200)]
    assert columns["c"] == [str(row) if row != 150 else "x" for row in range(200)]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(-(2**63), 2**63 - 1),
            st.floats(width=64, allow_nan=False),
            st.booleans(),
            st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8),
        ),
        min_size=1,
    )
)
def test_numbers_survive_the_way_through_csv(tmp_path_factory, rows):
    names = ["i", "f", "b", "t"]
    table = pa.table([pa.array(list(values)) for values in zip(*rows, strict=True)], names)
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    pacsv.write_csv(table, path)
    back = merged(open_tables("input", str(path), dict.fromkeys("ifb", ()), True)).to_pydict()
    for name in "ifb":
        assert back[name] == table[name].to_pylist()


def test_a_type_holds_for_all_csv_files(tmp_path):
    write(tmp_path / "1.csv", "a,b,c,d\n1,,1,\n")
    write(tmp_path / "2.csv", "a,b,d,e\n1.5,x,,7\n")
    tables = open_tables("input", str(tmp_path), {"a": ()}, keeps_all=True)
    schemas = [
        dict(zip(f.schema.names, map(str, f.schema.types), strict=True)) for f in tables.files
    ]
    assert schemas == [
        {"a": "double", "b": "string", "c": "int64", "d": "double"},
        {"a": "double", "b": "string", "d": "double", "e": "int64"},
    ]
    assert [rows.table.to_pylist() for rows in tables] == [
        [{"a": 1.0, "b": "", "c": 1, "d": None}],
        [{"a": 1.5, "b": "x", "d": None, "e": 7}],
    ]


def test_tables_are_bounded_and_hold_all_rows_in_order(tmp_path):
    table = pa.table({"row_id": range(1_000), "x": [float(i) for i in range(1_000)]})
    pq.write_table(table.slice(0, 600), tmp_path / "1.parquet", row_group_size=170)
    pacsv.write_csv(table.slice(600, 399), tmp_path / "2.csv")
    pq.write_table(table.slice(999, 1), tmp_path / "3.pq")
    (tmp_path / "_notes.csv").write_text("not data")
    hidden = tmp_path / ".out.partial"
    hidden.mkdir()
    pq.write_table(table, hidden / "part.parquet")
    tables = open_tables("input", str(tmp_path), {"x": ()}, keeps_all=True, max_rows=64)
    assert tables.rows == 1_000
    assert len(tables.paths) == 3
    assert max(rows.table.num_rows for rows in tables) <= 64
    assert merged(tables)["row_id"].to_pylist() == list(range(1_000))
    assert open_tables("input", str(tmp_path), {"x": ()}).kept == ("x",)


def test_training_still_finds_parquet_only(tmp_path):
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match=r"no data file \(\*\.parquet, \*\.pq\)"):
        storage.find("data.train", str(tmp_path), PARQUET_SUFFIXES)


TEXT_ERRORS = {
    "too few values": ("a,b\n1,2\n3\n", r"x\.csv, line 3: 1 values; the first line names 2"),
    "too many values": ("a,b\n1,2\n\n3,4,5\n", r"x\.csv, line 4: 3 values"),
    "line after a quoted line end": ('a,b\n1,"2\n2"\n3\n', r"x\.csv, line 4: 1 values"),
    "text for a number": ("a,b\n1,2\nx,3\n", r"x\.csv, line 3: column 'a' holds 'x'"),
    "two kinds": ("a\n5\ntrue\n", "both numbers and true or false"),
    "no such column": ("aa,b\n1,2\n", "no column 'a' in .* Did you mean 'aa'"),
    "other separator": ("a;b\n1;2\n", "no column 'a' in .*it has a;b"),
    "name twice": ("a,a\n1,2\n", "'a' stands more than once"),
    "nothing": ("", "not a readable CSV file: Empty CSV file"),
    "no row": ("a,b\n", "no row at all; at least one row is needed"),
}


@pytest.mark.parametrize("case", TEXT_ERRORS)
def test_bad_csv_is_named_with_its_line(tmp_path, case):
    text, message = TEXT_ERRORS[case]
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(DataError, match=message):
        open_tables("input", path, {"a": ()})


def test_csv_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "x.csv").write_bytes("a,b\n1,é\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"not text in UTF-8.*b'a,b\\n1,\\xe9\\n'"):
        open_tables("input", str(tmp_path / "x.csv"), {"a": ()})
    (tmp_path / "x.csv").write_bytes("a,é\n1,2\n".encode("latin-1"))
    with pytest.raises(DataError, match="not text in UTF-8"):
        open_tables("input", str(tmp_path / "x.csv"), {"a": ()})


PARQUET_ERRORS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "text": (["1", "2"], (), "holds text; numbers or booleans are allowed"),
    "time": ([datetime.datetime(2013, 1, 1)], (), "holds timestamp"),
    "list for a number": (
        pa.array([[1.0, 2.0]], pa.list_(pa.float64(), 2)),
        (),
        "holds lists of 2 float64; numbers or booleans are allowed",
    ),
    "list of another length": (
        pa.array([[1.0, 2.0]], pa.list_(pa.float64(), 2)),
        (3,),
        "holds lists of 2 float64; lists of 3 numbers are allowed",
    ),
    "lists of text": ([["a"]], (1,), "holds lists of any number of text"),
    "number for a list": ([1.0], (2,), "holds float64; lists of 2 numbers are allowed"),
}


@pytest.mark.parametrize("case", PARQUET_ERRORS)
def test_parquet_of_a_wrong_type_is_named(tmp_path, case):
    values, shape, message = PARQUET_ERRORS[case]
    pq.write_table(pa.table({"a": values}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        open_tables("input", str(tmp_path), {"a": shape})


def test_lists_of_another_length_are_named(tmp_path):
    pq.write_table(pa.table({"a": [[1.0, 2.0], [3.0]]}), tmp_path / "x.parquet")
    (rows,) = open_tables("input", str(tmp_path), {"a": (2,)})
    with pytest.raises(DataError, match=r"x\.parquet: column 'a' has lists of other than 2"):
        rows.array("a", (2,), "float32")


def test_lists_cannot_come_from_csv(tmp_path):
    path = write(tmp_path / "x.csv", "a\n[1 2]\n")
    with pytest.raises(DataError, match="CSV has no lists: write the data as Parquet"):
        open_tables("input", path, {"a": (2,)})


def test_a_damaged_file_and_an_unknown_suffix_are_named(tmp_path):
    damaged = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1.0]}), damaged)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        open_tables("input", str(damaged), {"a": ()})
    path = write(tmp_path / "x.txt", "a\n1\n")
    with pytest.raises(DataError, match=re.escape(".parquet, .pq, .csv are allowed")):
        open_tables("input", path, {"a": ()})
