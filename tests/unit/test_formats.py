"""Each format as rows: types over all files, and what is said of broken ones."""

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.errors import DataError
from data_pipeline.formats import ndjson
from data_pipeline.source import describe_field
from tests.support.converted import table_of


def types_of(table: pa.Table) -> dict[str, str]:
    return {field.name: str(field.type) for field in table.schema}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


# CSV


def test_csv_dates_and_times_become_timestamps(tmp_path):
    (tmp_path / "a.csv").write_text(
        "day,time,zone,fine,mixed,year,x\n"
        "2013-11-02,2013-11-02 05:06:07.25,2013-11-02T05:00:00Z,2013-11-02 05:06:07.1234567,"
        "2013-11-02,2013,1\n"
        ",NA,2013-11-02T05:00:00+02:00,,soon,2014,2\n"
    )
    table = table_of(tmp_path, tmp_path / "a.csv")
    assert types_of(table) == {
        "day": "timestamp[us]",
        "time": "timestamp[us]",
        "zone": "timestamp[us, tz=UTC]",
        "fine": "string",
        "mixed": "string",
        "year": "int64",
        "x": "int64",
    }
    assert table["day"].to_pylist() == [datetime.datetime(2013, 11, 2), None]
    assert table["time"].to_pylist() == [datetime.datetime(2013, 11, 2, 5, 6, 7, 250_000), None]
    hours = [value.astimezone(datetime.UTC).hour for value in table["zone"].to_pylist()]
    assert hours == [5, 3]


def test_csv_files_share_one_type_a_column_and_may_differ_in_their_order(tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "1.csv").write_text("x,y,t\n1,,2013-01-01\n")
    (rows / "2.csv").write_text("y,t,x\n7,later,1.5\n")
    assert table_of(tmp_path, rows).to_pylist() == [
        {"x": 1.0, "y": None, "t": "2013-01-01"},
        {"x": 1.5, "y": 7, "t": "later"},
    ]


def test_compressed_csv_is_read(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"x,y\n1,2\n3,4\n"))
    assert table_of(tmp_path, tmp_path / "a.csv.gz").to_pydict() == {"x": [1, 3], "y": [2, 4]}


def test_a_feature_that_must_be_numeric_may_be_written_in_any_way(tmp_path):
    (tmp_path / "a.csv").write_text("x,code\n08,08\n")
    numeric = [{"name": "x", "kind": "numeric"}]
    table = table_of(tmp_path, tmp_path / "a.csv", features=numeric)
    assert table.to_pylist() == [{"x": 8, "code": "08"}]
    (tmp_path / "a.csv").write_text("x,code\n8,1\neight,2\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3: column 'x' holds 'eight'"):
        table_of(tmp_path, tmp_path / "a.csv", features=numeric)


def test_texts_and_categories_of_a_job_stay_what_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("note,day,zip,other\n12,2013-01-01,7,2013-01-01\n")
    features = [{"name": "note", "kind": "text"}, {"name": "day", "kind": "categorical"}]
    features.append({"name": "zip", "kind": "categorical"})
    table = table_of(tmp_path, tmp_path / "a.csv", features=features)
    assert table.to_pylist() == [
        {"note": "12", "day": "2013-01-01", "zip": 7, "other": datetime.datetime(2013, 1, 1)}
    ]


CSV_ERRORS = {
    "too few values": (["a,b\n1,2\n3\n"], r"0\.csv, line 3: 1 values; the first line names 2"),
    "another column": (["x,y\n1,2\n", "x,z\n1,2\n"], r"'y' is in .*0\.csv but not in .*1\.csv"),
    "one more column": (["x\n1\n", "x,z\n1,2\n"], r"'z' is in .*1\.csv but not in .*0\.csv"),
}


@pytest.mark.parametrize("case", CSV_ERRORS)
def test_bad_csv_is_named(tmp_path, case):
    texts, message = CSV_ERRORS[case]
    (tmp_path / "rows").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "rows" / f"{number}.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        table_of(tmp_path, tmp_path / "rows")


def test_bad_csv_lines_are_counted_by_lines_not_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('x,note\n1,"a\nb"\n2\n\n3,c\n4,d,e\n')
    table = table_of(tmp_path, path, on_bad_rows="skip")
    assert table.to_pydict() == {"x": [1, 3], "note": ["a\nb", "c"]}
    (skipped,) = (tmp_path / "cache").glob("*/skipped.ndjson")
    assert [json.loads(line)["line"] for line in skipped.read_text().splitlines()] == [4, 7]


# NDJSON


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(ndjson, "BATCH_BYTES", 64)


@pytest.mark.usefixtures("small_blocks")
def test_ndjson_columns_have_one_type_over_all_lines_and_files(tmp_path):
    rows = tmp_path / "rows"
    write_lines(rows / "1.ndjson", [{"x": i, "s": "a", "m": True, "none": None} for i in range(30)])
    write_lines(rows / "2.jsonl", [{"x": 0.5, "late": [1, 2]}, "", {"s": "2013-01-01", "x": None}])
    table = table_of(tmp_path, rows)
    assert types_of(table) == {
        "x": "double",
        "s": "string",
        "m": "bool",
        "none": "double",
        "late": "fixed_size_list<element: int64>[2]",
    }
    assert table["x"].to_pylist() == [*map(float, range(30)), 0.5, None]
    assert table["s"].to_pylist() == ["a"] * 30 + [None, "2013-01-01"]
    assert table["late"].to_pylist() == [None] * 30 + [[1, 2], None]


@pytest.mark.usefixtures("small_blocks")
def test_ndjson_lists_keep_the_shape_that_all_rows_share(tmp_path):
    lines = [
        {"v": [i, i + 1], "m": [[i, 1.5], [2, 3], [4, 5]], "r": [0] * (i % 3), "t": ["a", "b"]}
        for i in range(20)
    ]
    lines[7]["m"] = None
    table = table_of(tmp_path, write_lines(tmp_path / "a.ndjson", lines))
    shapes = {each.name: describe_field(each) for each in table.schema}
    assert (shapes["v"].size, shapes["v"].shape) == (2, ())
    assert (shapes["m"].size, shapes["m"].shape) == (6, (3, 2))
    assert shapes["r"].size == 0
    assert table["v"].to_pylist() == [line["v"] for line in lines]
    assert table["r"].to_pylist() == [line["r"] for line in lines]
    storage = table["m"].combine_chunks().storage.to_pylist()
    assert storage[7] is None
    assert storage[8] == [8, 1.5, 2, 3, 4, 5]


@pytest.mark.usefixtures("small_blocks")
def test_ndjson_lines_that_cannot_be_read_are_left_out(tmp_path):
    lines: list[Any] = [{"x": i, "y": "é"} for i in range(40)]
    lines[3], lines[17], lines[18], lines[30] = '{"x": 3,', "[1]", "", '{x: 30, "y": ""}'
    lines[39] = '{"x": 1, "x": 2}'
    path = write_lines(tmp_path / "a.ndjson", lines)
    with path.open("ab") as file:
        file.write(b'{"x": 40, "y": "\xff"}\n{"x": 41, "y": "last"}')
    kept = [i for i in range(39) if i not in (3, 17, 18, 30)] + [41]
    table = table_of(tmp_path, path, on_bad_rows="skip")
    assert table["x"].to_pylist() == kept
    (skipped,) = (tmp_path / "cache").glob("*/skipped.ndjson")
    told = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert [line["line"] for line in told] == [4, 18, 31, 40, 41]
    assert [line["reason"].partition(":")[0] for line in told] == [
        "not JSON",
        "list instead of an object",
        "not JSON",
        "not JSON",
        "not text in UTF-8",
    ]


def test_ndjson_numbers_as_python_writes_them(tmp_path):
    path = write_lines(tmp_path / "a.ndjson", [{"x": 1}, {"x": float("nan")}, {"x": 2**53 + 1}])
    one, nothing, large = table_of(tmp_path, path)["x"].to_pylist()
    assert (one, large) == (1.0, 2.0**53)
    assert np.isnan(nothing)


NDJSON_ERRORS: dict[str, tuple[list[list[Any]], str]] = {
    "broken line": ([[{"x": 1}, '{"x": 2']], r"0\.ndjson, line 2: not JSON: .*on_bad_rows: skip"),
    "no object": ([[{"x": 1}, "17"]], r"0\.ndjson, line 2: int instead of an object"),
    "two types in a block": ([[{"x": 1}, {"x": "a"}]], r"0\.ndjson, lines 1 to .*x"),
    "two types in a file": (
        [[{"x": i, "y": "a" * 80} for i in range(9)] + [{"x": True, "y": "a" * 80}]],
        r"column 'x' holds int64 at first but bool in .*0\.ndjson",
    ),
    "two types in two files": (
        [[{"x": 1}], [{"x": "a"}]],
        r"column 'x' holds int64 at first but string in .*1\.ndjson",
    ),
    "nothing": ([[], [""]], "no row at all"),
}


@pytest.mark.parametrize("case", NDJSON_ERRORS)
@pytest.mark.usefixtures("small_blocks")
def test_bad_ndjson_is_named(tmp_path, case):
    files, message = NDJSON_ERRORS[case]
    for number, lines in enumerate(files):
        write_lines(tmp_path / "rows" / f"{number}.ndjson", lines)
    with pytest.raises(DataError, match=message):
        table_of(tmp_path, tmp_path / "rows")


@pytest.mark.usefixtures("small_blocks")
def test_a_line_without_end_and_a_cut_archive_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ndjson, "_LONGEST_LINE_BYTES", 1_000)
    path = write_lines(tmp_path / "a.ndjson", [{"x": 1}, {"x": "a" * 2_000}])
    with pytest.raises(DataError, match=r"a\.ndjson, line 2: no end within"):
        table_of(tmp_path, path)
    packed = gzip.compress(b'{"x": 1}\n' * 1_000)
    (tmp_path / "b.ndjson.gz").write_bytes(packed[:-20])
    with pytest.raises(DataError, match=r"b\.ndjson\.gz cannot be read"):
        table_of(tmp_path, tmp_path / "b.ndjson.gz")
    (tmp_path / "b.ndjson.gz").write_bytes(packed)
    assert table_of(tmp_path, tmp_path / "b.ndjson.gz").num_rows == 1_000


# Arrow IPC


def write_arrow(path: Path, table: pa.Table, is_stream: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def test_arrow_files_and_streams_keep_their_types(tmp_path):
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(
        np.arange(60, dtype="u1").reshape(10, 2, 3)
    )
    table = pa.table(
        {
            "i": pa.array(range(10), pa.int16()),
            "t": pa.array(range(10), pa.timestamp("ns")),
            "d": pa.array(["a", "b"] * 5).dictionary_encode(),
            "m": tensors,
            "none": pa.nulls(10),
        }
    )
    plain = table.set_column(2, "d", pa.array(["a", "b"] * 5))
    write_arrow(tmp_path / "rows" / "1.arrow", table)
    write_arrow(tmp_path / "rows" / "2.ipc", plain.select(plain.column_names[::-1]), True)
    found = table_of(tmp_path, tmp_path / "rows")
    assert types_of(found) == {
        "i": "int16",
        "t": "timestamp[ns]",
        "d": "string",
        "m": str(tensors.type),
        "none": "double",
    }
    assert found["i"].to_pylist() == [*range(10)] * 2
    assert found["d"].to_pylist() == ["a", "b"] * 10
    assert found["m"].combine_chunks().storage[13].as_py() == list(range(18, 24))


def test_arrow_schemas_that_differ_and_cut_files_are_named(tmp_path):
    first = write_arrow(tmp_path / "rows" / "1.arrow", pa.table({"x": [1] * 20}))
    second = write_arrow(tmp_path / "rows" / "2.arrow", pa.table({"x": [1.5]}))
    with pytest.raises(DataError, match=r"'x' is int64 in .*1\.arrow but double in .*2\.arrow"):
        table_of(tmp_path, tmp_path / "rows")
    second.unlink()
    whole = first.read_bytes()
    for kept in (len(whole) - 5, 40, 3, 0):
        first.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=r"1\.arrow is not a whole Arrow IPC file"):
            table_of(tmp_path, tmp_path / "rows")
    stream = write_arrow(tmp_path / "s.ipc", pa.table({"x": [1] * 20}), True)
    stream.write_bytes(stream.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"s\.ipc is not a whole Arrow IPC file"):
        table_of(tmp_path, stream)


# NumPy


def test_numpy_files_of_a_folder_are_columns_of_one_table(tmp_path):
    rows = tmp_path / "rows"
    for part in range(2):
        folder = rows / f"part-{part}"
        folder.mkdir(parents=True)
        ids = np.arange(5) + 5 * part
        np.save(folder / "x.npy", ids.astype("f4")[:, None] * [[1, 2]])
        np.save(folder / "image.npy", np.asfortranarray(np.arange(60).reshape(5, 2, 2, 3)))
        np.save(folder / "y.npy", ids.astype(">i4"))
        np.save(folder / "name.npy", np.array([f"é{i}" for i in ids]))
    table = table_of(tmp_path, rows)
    assert types_of(table) == {
        "image": "extension<arrow.fixed_shape_tensor[value_type=int64, shape=[2,2,3]]>",
        "name": "string",
        "x": "fixed_size_list<element: double>[2]",
        "y": "int32",
    }
    assert table["y"].to_pylist() == list(range(10))
    assert table["x"].to_pylist() == [[i, 2 * i] for i in range(10)]
    assert table["name"][9].as_py() == "é9"
    images = table["image"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_array_equal(images, np.arange(60).reshape(5, 2, 2, 3)[[*range(5)] * 2])


def test_numpy_archives_are_tables_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.formats.numpy_files.BATCH_BYTES", 100)
    rows = tmp_path / "rows"
    rows.mkdir()
    values = np.arange(100)
    for number, save in enumerate((np.savez, np.savez_compressed)):
        part = values[50 * number : 50 * number + 50]
        save(
            rows / f"{number}.npz",
            x=part.astype("f2"),
            flag=part % 2 == 0,
            when=part.astype("M8[h]"),
            code=np.char.mod("%d", part).astype("S"),
        )
    table = table_of(tmp_path, rows)
    assert types_of(table) == {
        "x": "halffloat",
        "flag": "bool",
        "when": "timestamp[ms]",  # Parquet knows no seconds
        "code": "string",
    }
    assert table["x"].to_pylist() == list(range(100))
    assert table["flag"].to_pylist() == [i % 2 == 0 for i in range(100)]
    assert table["when"][99].as_py() == datetime.datetime(1970, 1, 5, 3)
    assert table["code"][99].as_py() == "99"


NUMPY_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "rows differ": (
        {"x": np.zeros((3, 2)), "y": np.zeros(4)},
        r"'y' of .*y\.npy has shape \(4,\), 'x' has \(3, 2\)",
    ),
    "no axis": ({"x": np.zeros(())}, "the same first axis"),
    "objects": ({"x": np.array([{}, 1], object)}, r"x\.npy is not a whole NumPy file.*pickled"),
    "complex": ({"x": np.zeros(3, complex)}, "array 'x' holds complex128; numbers of up to 64"),
    "structure": ({"x": np.zeros(3, [("a", "i4")])}, "array 'x' holds"),
    "no element": ({"x": np.zeros((3, 0))}, "array 'x' has no element in a row"),
    "texts in a row": ({"x": np.array([["a", "b"]])}, "one text a row is allowed"),
}


@pytest.mark.parametrize("case", NUMPY_ERRORS)
def test_bad_arrays_are_named(tmp_path, case):
    arrays, message = NUMPY_ERRORS[case]
    (tmp_path / "rows").mkdir()
    for name, values in arrays.items():
        np.save(tmp_path / "rows" / f"{name}.npy", values)
    with pytest.raises(DataError, match=message):
        table_of(tmp_path, tmp_path / "rows")


def test_cut_numpy_files_are_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(1_000))
    np.savez(tmp_path / "x.npz", x=np.zeros(1_000))
    for name, kept in (("x.npy", -100), ("x.npy", 30), ("x.npy", 0), ("x.npz", -100), ("x.npz", 9)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(DataError, match=f"{name} is not a whole NumPy file"):
            table_of(tmp_path, path)


def test_archives_with_other_arrays_are_named(tmp_path):
    (tmp_path / "rows").mkdir()
    np.savez(tmp_path / "rows" / "1.npz", x=np.zeros((2, 3)))
    for arrays, message in (
        ({"x": np.zeros((2, 4))}, r"is fixed_size_list.*\[3\] in .*1\.npz but .*\[4\] in .*2\.npz"),
        ({"z": np.zeros((2, 3))}, r"'x' is in .*1\.npz but not in .*2\.npz"),
    ):
        np.savez(tmp_path / "rows" / "2.npz", **arrays)
        with pytest.raises(DataError, match=message):
            table_of(tmp_path, tmp_path / "rows")
