"""What a pipeline's `data` section makes of files: what is new, what judges, what trains."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.load import load_pipeline
from configs.pipeline import Pipeline
from data_pipeline.errors import DataError
from lockstep.pipeline_rows import (
    check_slices,
    files_now,
    look_for_news,
    roles_of_files,
    rules_for_rows,
)
from tests.unit.test_pipeline_schema import JOB

DAY = 86_400_000_000


def write(folder: Path, name: str, first: int = 0, rows: int = 10) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    days = np.arange(first, first + rows)
    table = {name: days.astype("f4") for name in ("a", "b", "y")}
    pq.write_table(
        pa.table({**table, "t": pa.array(days * DAY, pa.timestamp("us"))}), folder / name
    )
    return str(folder / name)


def pipeline(folder: Path, **data: Any) -> Pipeline:
    evaluation = data.pop("evaluation", {"fraction": 0.2})
    more = {"start_from": "champion"} if data.get("train_on") == "new" else {}
    section = {"files": str(folder), "evaluation": evaluation, **data}
    return load_pipeline({"name": "fresh", "job": JOB, "data": section, **more})


def champion(**lineage: Any) -> Any:
    """A version with this lineage."""

    class Version(SimpleNamespace):
        def __str__(self) -> str:
            return "flights/1"

    return Version(number=1, lineage=lineage)


def test_without_a_champion_all_files_are_new(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{n}.parquet") for n in range(2)]
    found = look_for_news(pipeline(tmp_path), None)
    assert (found["is_new"], found["new"]) == (True, files)
    assert found["reason"] == "2 of 2 files are new"


def test_files_that_came_or_changed_are_new(tmp_path: Path) -> None:
    first, second = (write(tmp_path, f"{n}.parquet") for n in range(2))
    before = look_for_news(pipeline(tmp_path), None)
    same = look_for_news(pipeline(tmp_path), champion(), before)
    assert not same["is_new"]
    assert (
        same["reason"] == "nothing new: no file is new since flights/1, the champion, was trained"
    )
    os.utime(second, ns=(1, 1))
    third = write(tmp_path, "2.parquet")
    assert look_for_news(pipeline(tmp_path), champion(), before)["new"] == [second, third]
    os.unlink(first)
    assert look_for_news(pipeline(tmp_path), champion(), before)["new"] == [second, third]


def test_after_a_rollback_what_the_older_champion_did_not_see_is_new(tmp_path: Path) -> None:
    write(tmp_path, "0.parquet")
    january = look_for_news(pipeline(tmp_path), None)
    second = write(tmp_path, "1.parquet")
    assert look_for_news(pipeline(tmp_path), champion(), january)["new"] == [second]


def test_a_champion_from_elsewhere_is_known_by_what_it_trained_on(tmp_path: Path) -> None:
    first, second = (write(tmp_path, f"{n}.parquet") for n in range(2))
    size = os.stat(first).st_size
    trained = champion(data={"train": [{"path": first, "size_bytes": size, "rows": 10}]})
    assert look_for_news(pipeline(tmp_path), trained)["new"] == [second]
    assert look_for_news(pipeline(tmp_path), champion())["new"] == [first, second]
    many = champion(data={"train": {"files": 5_000, "rows": 1, "sha256": "f"}})
    assert look_for_news(pipeline(tmp_path), many)["new"] == [first, second]


def test_by_time_later_rows_are_new_wherever_they_stand(tmp_path: Path) -> None:
    write(tmp_path, "0.parquet", 0, 10)
    by_time = pipeline(tmp_path, time_column="t")
    before = look_for_news(by_time, None)
    assert before["newest_us"] == 9 * DAY
    assert before["reason"] == "rows up to 1970-01-10T00:00:00+00:00"
    write(tmp_path, "1.parquet", 0, 5)  # a new file, old rows
    assert not look_for_news(by_time, champion(), before)["is_new"]
    write(tmp_path, "0.parquet", 0, 11)
    after = look_for_news(by_time, champion(), before)
    assert (after["is_new"], after["before_us"]) == (True, 9 * DAY)


def test_rows_of_the_newest_moment_that_come_in_a_later_file_are_new(tmp_path: Path) -> None:
    write(tmp_path, "0.parquet", 0, 10)
    by_time = pipeline(tmp_path, time_column="t")
    before = look_for_news(by_time, None)
    second = write(tmp_path, "1.parquet", 9, 1)
    after = look_for_news(by_time, champion(), before)
    assert (after["is_new"], after["newest_us"], after["unseen"]) == (True, 9 * DAY, [second])
    assert not look_for_news(by_time, champion(), after)["is_new"]


def test_files_that_are_held_out_neither_train_nor_are_new(tmp_path: Path) -> None:
    held = write(tmp_path, "0.parquet")
    other = write(tmp_path, "1.parquet")
    given = pipeline(tmp_path, evaluation={"files": held})
    assert list(files_now(given, {})) == [other]
    found = look_for_news(given, None)
    assert roles_of_files(given, found) == ([held], [other])


def test_the_newest_files_judge_and_a_window_of_the_others_trains(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{n}.parquet") for n in range(4)]
    given = pipeline(tmp_path, evaluation={"newest_files": 1}, window_files=2)
    found = {**look_for_news(given, None), "champion": None}
    assert roles_of_files(given, found) == (files[3:], files[1:3])
    all_judge = pipeline(tmp_path, evaluation={"newest_files": 4})
    with pytest.raises(DataError, match=r"4 file\(s\) are there, and all of them judge"):
        roles_of_files(all_judge, found)


def test_with_train_on_new_old_files_train_no_more(tmp_path: Path) -> None:
    first = write(tmp_path, "0.parquet")
    given = pipeline(tmp_path, train_on="new")
    before = look_for_news(given, None)
    second = write(tmp_path, "1.parquet")
    after = {**look_for_news(given, champion(), before), "champion": 1}
    judging, training = roles_of_files(given, after)
    assert (judging, training) == ([first, second], [second])
    assert roles_of_files(given, {**after, "champion": None})[1] == [first, second]


def test_with_train_on_new_and_nothing_new_the_reason_is_true(tmp_path: Path) -> None:
    write(tmp_path, "0.parquet")
    given = pipeline(tmp_path, train_on="new")
    before = look_for_news(given, None)
    same = {**look_for_news(given, champion(), before), "champion": 1}
    with pytest.raises(DataError, match="data.train_on: new, but no file is new; at least one has"):
        roles_of_files(given, same)


def test_rules_for_rows(tmp_path: Path) -> None:
    found = {"newest_us": 100 * DAY, "before_us": 60 * DAY, "champion": 1, "unseen": ["late"]}
    by_time = pipeline(tmp_path, time_column="t", window_days=30, evaluation={"newest_days": 10})
    rules = rules_for_rows(by_time, found)
    assert (rules.judges_after_us, rules.trains_after_us) == (90 * DAY, 60 * DAY)
    new = rules_for_rows(pipeline(tmp_path, time_column="t", train_on="new"), found)
    assert (new.judges_after_us, new.trains_after_us) == (None, 60 * DAY)
    assert (new.unseen, rules.unseen) == ({"late"}, set())
    assert new.key == ("a", "b", "y")
    plain = rules_for_rows(pipeline(tmp_path, evaluation={"newest_files": 1}), found)
    assert (plain.fraction, plain.time_column) == (None, None)
    keyed = pipeline(tmp_path, evaluation={"fraction": 0.2, "key": ["a"]})
    assert rules_for_rows(keyed, found).key == ("a",)


def test_a_column_of_many_values_makes_no_slices(tmp_path: Path) -> None:
    path = str(tmp_path / "evaluation.parquet")
    ids = [*range(1_001), 0, None]
    pq.write_table(pa.table({"id": ids, "few": [n % 7 if n else 0 for n in ids]}), path)
    check_slices(path, ["few"])
    with pytest.raises(DataError, match=r"gate.slices: column 'id' has 1,00\d values; 1,000 or"):
        check_slices(path, ["few", "id"])
