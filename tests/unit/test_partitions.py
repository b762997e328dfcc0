"""Folders named key=value as columns: which, of what type, and what is said where they disagree."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from configs.data import DataConfig
from data_pipeline.blocks import BlockReader
from data_pipeline.errors import DataError
from data_pipeline.features import input_layout
from data_pipeline.scan import scan
from data_pipeline.source import Column, Source, open_source, partitions_of, with_partitions
from data_pipeline.tables import open_tables
from tests.support.parquet import write_parquet

ROWS = {"a": [1.0, 2.0, 3.0], "y": [0, 1, 0]}


def opened(root: Path, columns: list[str], *folders: str, **rows: Any) -> Source:
    for number, folder in enumerate(folders):
        write_parquet(root / folder / f"{number}.parquet", {**ROWS, **rows}, block_rows=2)
    return open_source("train", str(root), columns)


@pytest.mark.parametrize(
    ("path", "partitions"),
    [
        ("data/year=2013/month=1/part.parquet", {"year": "2013", "month": "1"}),
        ("s3://bucket/year=2013/part.parquet", {"year": "2013"}),
        ("/when=12%3A30%2F1/a b=x/part.parquet", {"when": "12:30/1", "a b": "x"}),
        ("carrier=__HIVE_DEFAULT_PARTITION__/x.parquet", {"carrier": None}),
        ("empty=/=x/plain/a=b=c/x.parquet", {"empty": "", "a": "b=c"}),
        ("name=x.parquet", {}),
    ],
)
def test_keys_and_values_are_in_the_names_of_folders(path, partitions):
    assert partitions_of(path) == partitions


def test_partitions_are_columns_of_whole_numbers_or_text(tmp_path):
    source = opened(
        tmp_path,
        ["a", "year", "carrier", "y"],
        "year=2013/carrier=EV",
        "year=-7/carrier=9",
        "year=007/carrier=__HIVE_DEFAULT_PARTITION__",
    )
    assert source.columns[1:3] == (
        Column("year", "int64", 1, False),
        Column("carrier", "text", 1, False),
    )
    by_year = {dict(file.partitions)["year"]: file for file in source.files}
    assert by_year["007"].null_counts == {"carrier": 3}
    tables = [
        with_partitions(pa.table({"a": [1.0, 2.0]}), by_year[year], source.columns)
        for year in ("2013", "-7", "007")
    ]
    assert [table["year"].to_pylist() for table in tables] == [[2013] * 2, [-7] * 2, [7] * 2]
    assert [table["carrier"].to_pylist() for table in tables] == [["EV"] * 2, ["9"] * 2, [None] * 2]
    only = with_partitions(pa.table({"a": [1.0]}), by_year["2013"], source.columns[:2])
    assert only.column_names == ["a", "year"]
    assert {table["carrier"].type for table in tables} == {pa.string()}


def test_numbers_that_int64_cannot_hold_stay_text(tmp_path):
    source = opened(tmp_path, ["id", "y"], "id=1", f"id={10**18}")
    assert source.columns[0].dtype == "text"


def test_partitions_that_the_job_does_not_name_are_not_kept(tmp_path):
    source = opened(tmp_path, ["a", "y"], "year=2013/month=1", "other")
    assert [file.partitions for file in source.files] == [(), ()]


def test_a_column_of_the_file_goes_before_its_folder(tmp_path):
    source = opened(tmp_path, ["year", "y"], "year=2013", year=[1, 2, 3])
    assert source.files[0].partitions == ()
    layout = input_layout(DataConfig(train="x", features=["year"], label="y"), source)
    assert BlockReader(source, layout, "error").read(0).features[0].tolist() == [1, 2]


def test_partitions_are_read_as_features_and_label(tmp_path):
    source = opened(tmp_path, ["month", "a", "year"], "year=2013/month=1", "year=2014/month=12")
    layout = input_layout(DataConfig(train="x", features=["month", "a"], label="year"), source)
    reader = BlockReader(source, layout, "error")
    blocks = [reader.read(block) for block in range(4)]
    assert np.concatenate([block.features[0] for block in blocks]).tolist() == [1] * 3 + [12] * 3
    assert (
        np.concatenate([block.label for block in blocks])[:, 0].tolist() == [2013] * 3 + [2014] * 3
    )
    assert blocks[0].label.dtype == np.int64


def test_a_job_of_partitions_only(tmp_path):
    source = opened(tmp_path, ["month", "year"], "year=2013/month=1", "year=2014/month=12")
    layout = input_layout(DataConfig(train="x", features=["month"], label="year"), source)
    found = scan(source, layout, "error")
    assert found.block_rows.tolist() == [2, 1, 2, 1]
    assert found.label_range == (2013, 2014)


def test_a_null_partition_is_a_null_in_all_rows_of_its_files(tmp_path):
    folders = ("month=1", "month=__HIVE_DEFAULT_PARTITION__")
    source = opened(tmp_path, ["month", "y"], *folders)
    layout = input_layout(DataConfig(train="x", features=["month"], label="y"), source)
    null_file = source.files[1].path
    with pytest.raises(DataError, match=f"'month' is null or NaN in 3 rows of {null_file}; "):
        scan(source, layout, "error")
    assert scan(source, layout, "drop").dropped_rows == 3
    assert scan(source, layout, "zero").zeroed_rows == {"month": 3}


def test_a_key_that_is_null_everywhere(tmp_path):
    with pytest.raises(DataError, match=r"'month' is null in all 3 rows of 1 file\(s\); values"):
        opened(tmp_path, ["month", "y"], "month=__HIVE_DEFAULT_PARTITION__")


@pytest.mark.parametrize("folders", [("year=1", "zero"), ("zero", "zz/year=1")])
def test_a_key_that_not_all_files_have(tmp_path, folders):
    with pytest.raises(DataError) as error:
        opened(tmp_path, ["year", "y"], *folders)
    outside = next(tmp_path.glob("zero/*.parquet"))
    assert str(error.value) == (
        f"data.train: column 'year' is told by folders (year=...), but {outside} is in none of "
        "them; all files have to be. Move the file, or leave it out."
    )


def test_a_folder_of_one_type_and_a_column_of_another(tmp_path):
    write_parquet(tmp_path / "b" / "x.parquet", {**ROWS, "year": ["x"] * 3})
    with pytest.raises(DataError) as error:
        opened(tmp_path, ["year", "y"], "a/year=1")
    assert "column 'year' is int64 in " in str(error.value)
    assert " but text in " in str(error.value)


def test_keys_are_offered_where_a_name_is_wrong(tmp_path):
    with pytest.raises(DataError) as error:
        opened(tmp_path, ["yaer", "y"], "year=1")
    assert str(error.value).endswith("it has a, y, year. Did you mean 'year'?")


def test_tables_for_prediction_have_the_folders_columns_too(tmp_path):
    opened(tmp_path, ["y"], "month=1/carrier=EV", "month=12/carrier=9")
    tables = open_tables("input", str(tmp_path), {"a": (), "month": ()})
    rows = [rows.table.to_pylist() for rows in tables]
    assert rows == [[{"a": a, "month": month} for a in ROWS["a"]] for month in (1, 12)]
    only = open_tables("input", str(tmp_path), {"month": ()}, keeps_all=False)
    assert sum(rows.table.num_rows for rows in only) == only.rows == 6
    with pytest.raises(DataError, match="'carrier' of .* holds text; numbers or booleans are"):
        open_tables("input", str(tmp_path), {"carrier": ()})


def test_a_file_without_any_value_among_others(tmp_path):
    first = write_parquet(tmp_path / "1.parquet", {**ROWS, "a": pa.nulls(3)})
    with pytest.raises(DataError) as error:
        opened(tmp_path, ["a", "y"], "other")
    assert f"column 'a' is null in all rows in {first} but float64 in " in str(error.value)
