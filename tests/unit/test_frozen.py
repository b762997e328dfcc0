"""Which rows judge and which train: no row does both, chosen rows stay chosen, copies are whole."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.frozen import (
    Frozen,
    RowRules,
    days_us,
    freeze_rows,
    has_moment,
    newest_moment,
)
from data_pipeline.inventory import Identity, inventory_record, new_files, read_inventory
from data_pipeline.inventory import take_inventory as take
from data_pipeline.row_hash import row_hashes

DAY = 86_400_000_000
DATA = DataConfig.model_validate({"train": "x", "features": ["a"], "label": "y"})


def write(path: Path, first: int, rows: int, **columns: Any) -> str:
    """Rows with ids from `first`; the time is a day a row."""
    ids = np.arange(first, first + rows)
    table = {
        "id": ids,
        "a": ids.astype("f4"),
        "y": -ids.astype("f4"),
        "t": pa.array(ids * DAY, pa.timestamp("us")),
        "place": [f"p{n % 3}" for n in ids],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**table, **columns}), path, row_group_size=37)
    return str(path)


def ids(paths: Any) -> list[int]:
    files = [paths] if isinstance(paths, str) else paths
    return [int(-y) for path in files for y in pq.read_table(path)["y"].to_pylist()]


def frozen(folder: Path, rules: RowRules, judging: Any, training: Any, **options: Any) -> Frozen:
    data = options.pop("data", DATA)
    return freeze_rows(data, rules, judging, training, folder / "rows", **options)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [write(tmp_path / f"in/{n}.parquet", 100 * n, 100) for n in range(3)]


def test_a_fraction_is_parted_and_stays_so_when_rows_come(tmp_path: Path, files: list[str]) -> None:
    rules = RowRules(fraction=0.25, key=("id",))
    first = frozen(tmp_path / "1", rules, files[:2], files[:2])
    later = frozen(tmp_path / "2", rules, files, files)
    for part, count in ((first, 200), (later, 300)):
        assert sorted(ids(part.evaluation) + ids(part.train)) == list(range(count))
        assert part.evaluation_rows + part.train_rows == count
        assert 0.15 * count < part.evaluation_rows < 0.35 * count
    assert set(ids(first.evaluation)) <= set(ids(later.evaluation))
    assert set(ids(first.train)) <= set(ids(later.train))


def test_rows_of_one_key_stay_together(tmp_path: Path, files: list[str]) -> None:
    found = frozen(tmp_path, RowRules(fraction=0.5, key=("place",)), files, files, extra=["place"])
    places = set(pq.read_table(found.evaluation)["place"].to_pylist())
    assert len(ids(found.evaluation)) == 100 * len(places)


def test_without_rules_files_are_taken_whole_and_training_files_as_they_are(
    tmp_path: Path, files: list[str]
) -> None:
    found = frozen(tmp_path, RowRules(), files[2:], files[:2])
    assert ids(found.evaluation) == list(range(200, 300))
    assert found.train == ()


def test_the_newest_days_judge_and_a_window_trains(tmp_path: Path, files: list[str]) -> None:
    newest = newest_moment(DATA, files, "t")
    assert newest == 299 * DAY
    after = newest - days_us(10)
    rules = RowRules(time_column="t", judges_after_us=after, trains_after_us=after - days_us(20))
    found = frozen(tmp_path, rules, files, files)
    assert ids(found.evaluation) == list(range(290, 300))
    assert ids(found.train) == list(range(270, 290))


def test_rows_of_the_last_moment_train_where_their_file_is_new(
    tmp_path: Path, files: list[str]
) -> None:
    late = write(tmp_path / "late.parquet", 240, 20)  # from the last moment that was seen, on
    rules = RowRules(time_column="t", trains_after_us=250 * DAY, unseen=frozenset({late}))
    found = frozen(tmp_path, rules, files, [*files, late])
    assert sorted(ids(found.train)) == sorted([*range(251, 300), *range(250, 260)])
    assert has_moment(DATA, [late], "t", 250 * DAY)
    assert not has_moment(DATA, [late], "t", 260 * DAY)


def test_copies_hold_the_columns_that_are_wanted_and_wished(
    tmp_path: Path, files: list[str]
) -> None:
    rules = RowRules(fraction=0.3, key=("id",))
    found = frozen(tmp_path, rules, files, files, extra=["place"], wished=["t", "nothing"])
    assert pq.read_schema(found.evaluation).names == ["a", "y", "id", "place", "t"]
    assert pq.read_schema(found.train[0]).names == ["a", "y"]


def test_columns_of_folders_are_copied(tmp_path: Path) -> None:
    files = [write(tmp_path / f"in/year={year}/0.parquet", 0, 10) for year in (2012, 2013)]
    data = DATA.model_copy(
        update={
            "features": [
                *DATA.features,
                *DataConfig.model_validate(
                    {"train": "x", "features": ["year"], "label": "y"}
                ).features,
            ]
        }
    )
    found = frozen(tmp_path, RowRules(), files, [], data=data)
    assert pq.read_table(found.evaluation)["year"].to_pylist() == [2012] * 10 + [2013] * 10


def test_more_rows_than_allowed_are_thinned_to_the_same_ones(
    tmp_path: Path, files: list[str]
) -> None:
    first = frozen(tmp_path / "1", RowRules(), files, [], max_rows=50)
    second = frozen(tmp_path / "2", RowRules(), files, [], max_rows=50)
    assert first.evaluation_rows == 50 == len(set(ids(first.evaluation)))
    assert ids(first.evaluation) == ids(second.evaluation)
    assert first.evaluation_sha256 == second.evaluation_sha256
    assert os.listdir(tmp_path / "1/rows") == os.listdir(tmp_path / "2/rows")


@pytest.mark.parametrize(("policy", "left"), [("drop", 8), ("zero", 10)])
def test_rows_with_nulls_judge_as_they_would_train(tmp_path: Path, policy: str, left: int) -> None:
    values = pa.array([1.0, None, float("nan")] + [2.0] * 7, pa.float32())
    path = write(tmp_path / "0.parquet", 0, 10, a=values)
    data = DATA.model_copy(update={"on_null": policy})
    found = frozen(tmp_path, RowRules(), [path], [], data=data)
    kept = pq.read_table(found.evaluation)["a"].to_pylist()
    assert len(kept) == left
    assert kept[:3] == ([1.0, 2.0, 2.0] if policy == "drop" else [1.0, 0.0, 0.0])


def test_csv_is_converted(tmp_path: Path) -> None:
    (tmp_path / "0.csv").write_text("a,y\n" + "".join(f"{n},{-n}\n" for n in range(100)))
    data = DATA.model_copy(update={"ingest_dir": str(tmp_path / "ingested")})
    rules = RowRules(fraction=0.5, key=("a",))
    found = frozen(tmp_path, rules, [str(tmp_path / "0.csv")], [str(tmp_path / "0.csv")], data=data)
    assert sorted(ids(found.evaluation) + ids(found.train)) == list(range(100))


def test_nothing_to_judge_or_to_train_is_told(tmp_path: Path, files: list[str]) -> None:
    with pytest.raises(DataError, match="leaves no row of 3 file"):
        frozen(tmp_path, RowRules(time_column="t", judges_after_us=400 * DAY), files, files)
    rules = RowRules(time_column="t", judges_after_us=0, trains_after_us=400 * DAY)
    with pytest.raises(DataError, match="is left to train on"):
        frozen(tmp_path, rules, files, files)
    assert not (tmp_path / "rows").exists()
    with pytest.raises(DataError, match="no column 'plce'.*'place'"):
        frozen(tmp_path, RowRules(), files, [], extra=["plce"])
    with pytest.raises(DataError, match="data.time_column: 'a' has"):
        newest_moment(DATA, files, "a")


@given(
    values=st.lists(st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1)), min_size=1, max_size=30)
)
@settings(max_examples=50, deadline=None)
def test_a_hash_knows_values_not_their_width_or_place(values: list[int | None]) -> None:
    narrow = pa.table({"k": pa.array(values, pa.int32())})
    wide = pa.table({"k": pa.array(values, pa.int64())})
    hashes = row_hashes(narrow, ["k"])
    assert (hashes == row_hashes(wide, ["k"])).all()
    assert (hashes[::-1] == row_hashes(wide.take(pa.array(range(len(values))[::-1])), ["k"])).all()
    assert len(set(hashes.tolist())) == len(set(values))


def test_hashes_of_all_kinds_are_even_and_fixed() -> None:
    rows = 2_000
    table = pa.table(
        {
            "f": np.arange(rows) / 7,
            "s": [f"row {n}" for n in range(rows)],
            "d": pa.array([f"row {n % 5}" for n in range(rows)]).dictionary_encode(),
            "l": pa.array([[n, n + 1] for n in range(rows)]),
            "t": pa.array(np.arange(rows) * DAY, pa.timestamp("us")),
            "b": np.arange(rows) % 2 == 0,
        }
    )
    for name in ("f", "s", "l", "t"):
        hashes = row_hashes(table, [name])
        assert len(set(hashes.tolist())) == rows
        assert 0.45 < (hashes < np.uint64(2**63)).mean() < 0.55
    assert len(set(row_hashes(table, ["d"]).tolist())) == 5
    assert (row_hashes(table, ["f", "s"]) != row_hashes(table, ["s", "f"])).all()
    # Choices that were made must not change with the program.
    assert row_hashes(table.slice(0, 1), ["s"])[0] == 17379740222799508349
    assert row_hashes(table.slice(0, 1), ["f", "b"])[0] == 16965494097514110161


def test_minus_zero_is_zero() -> None:
    pair = pa.table({"k": [0.0, -0.0]})
    first, second = row_hashes(pair, ["k"])
    assert first == second


# What is new


def test_an_inventory_finds_new_and_changed_files(tmp_path: Path, files: list[str]) -> None:
    folder = str(tmp_path / "in")
    before = take("data.files", folder, DATA, False, {})
    assert list(before) == files
    assert read_inventory(inventory_record(before)) == before
    write(tmp_path / "in/3.parquet", 300, 100)
    os.utime(files[1], ns=(1, 1))
    os.unlink(files[0])
    now = take("data.files", folder, DATA, False, before)
    assert new_files(now, before) == [files[1], str(tmp_path / "in/3.parquet")]


def test_a_hashed_inventory_knows_bytes_not_times(tmp_path: Path, files: list[str]) -> None:
    folder = str(tmp_path / "in")
    before = take("data.files", folder, DATA, True, {})
    os.utime(files[1], ns=(1, 1))
    state = os.stat(files[2])
    content = bytearray(Path(files[2]).read_bytes())
    content[40] ^= 255
    Path(files[2]).write_bytes(content)
    os.utime(files[2], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    now = take("data.files", folder, DATA, True, before)
    assert new_files(now, before) == [files[2]]


def test_what_is_not_known_of_an_earlier_file_is_not_held_against_it() -> None:
    now = {"a": Identity(5, 77), "b": Identity(6, 77)}
    assert new_files(now, {"a": Identity(5), "b": Identity(5)}) == ["b"]
