"""`data show`: columns, the first rows of the first batch, and the sharding, as they are."""

import datetime as dt
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from configs.data import DataConfig
from data_pipeline.describe import (
    column_facts,
    describe_columns,
    describe_shares,
    sample_rows,
    source_facts,
)
from data_pipeline.features import InputLayout, input_layout
from data_pipeline.plan import Plan, Shuffle
from data_pipeline.scan import learn
from data_pipeline.source import Source, open_source
from lockstep.data import describe_data
from lockstep.render_data import show_data
from tests.support.orders import row_order
from tests.support.parquet import write_parquet

ROWS = 53


def opened(folder: Path) -> tuple[Source, InputLayout]:
    write_parquet(
        folder / "1.parquet",
        {
            "a": [float(row) for row in range(ROWS)],
            "c": ["x" if row % 3 else "y" for row in range(ROWS)],
            "t": pa.array([dt.datetime(2020, 1, 1, row % 24) for row in range(ROWS)]),
            "y": list(range(ROWS)),
        },
        block_rows=7,
    )
    data = DataConfig(train=str(folder), features=["a", "c", "t"], label="y", normalize=True)
    source = open_source("train", str(folder), data.columns)
    return source, learn(source, input_layout(data, source), "error")


def plan_of(source: Source, shuffle: Shuffle) -> Plan:
    return Plan(source.block_rows, 10, 4, 5, shuffle, 3)


@pytest.mark.parametrize("shuffle", ["none", "window", "full"])
def test_the_sample_is_the_first_batch(tmp_path, shuffle):
    source, layout = opened(tmp_path)
    plan = plan_of(source, shuffle)
    sample = sample_rows(plan, source, layout, "error", 8)
    assert sample["y"].to_pylist() == row_order(plan, 0)[:8].tolist()


@pytest.mark.parametrize("shuffle", ["none", "window", "full"])
@pytest.mark.parametrize("workers", [1, 3, 4])
def test_shares_hold_each_row_once(tmp_path, shuffle, workers):
    source, layout = opened(tmp_path)
    plan = plan_of(source, shuffle)
    shares = describe_shares(plan, layout, workers)
    assert sum(share["rows"] for share in shares) == ROWS
    assert shares[0]["virtual_shards"][0] == 0
    assert shares[-1]["virtual_shards"][1] == 3
    order = row_order(plan, 0)
    for share in shares:
        first, last = share["virtual_shards"]
        owned = [row for place, row in enumerate(order) if first <= place % 4 <= last]
        touched = len({row // 7 for row in owned})
        assert share["blocks"] == (touched if shuffle != "none" else len(source.blocks))
        steps = [len(part) for part in np.split(order, range(10, ROWS, 10))]
        assert max(steps) >= share["rows_a_step"][1]


def test_columns_are_told_with_their_values(tmp_path):
    source, layout = opened(tmp_path)
    columns = {column["name"]: column for column in describe_columns(source, layout)}
    assert columns["a"]["mean"] == pytest.approx(26)
    assert columns["a"]["standard_deviation"] == pytest.approx(np.arange(ROWS).std())
    assert (columns["a"]["least"], columns["a"]["greatest"]) == (0.0, 52.0)
    assert columns["a"]["becomes"] == "float32, normalised"
    assert columns["c"]["most_frequent"] == {"x": 35, "y": 18}
    assert columns["c"]["becomes"] == "one_hot of 3"
    assert columns["t"]["least"] == "2020-01-01 00:00:00"
    assert columns["t"]["becomes"].startswith("sine of month, cosine of month")
    assert columns["y"]["role"] == "label"


def test_facts_of_parts_merge_to_those_of_the_whole():
    values = [1.0, None, float("nan"), float("inf"), -3.0, 8.0]
    whole = column_facts(pa.chunked_array([values]))
    parts = [
        column_facts(pa.chunked_array([pa.array(part, pa.float64())]))
        for part in (values[:2], values[2:3], values[3:])
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.record() == pytest.approx(whole.record())
    assert (whole.null_rows, whole.extremes) == (2, (-3.0, 8.0))
    texts = column_facts(pa.chunked_array([["a", None], ["a", "b"]]))
    assert (texts.counts, texts.null_rows) == (Counter(a=2, b=1), 1)
    nothing = column_facts(pa.chunked_array([pa.array([None], pa.float32())]))
    assert nothing.record() == {"rows": 1, "null_rows": 1, "least": None, "greatest": None}


def test_sources_are_counted(tmp_path):
    source, _ = opened(tmp_path)
    facts = source_facts(source)
    assert (facts["files"], facts["blocks"], facts["rows"]) == (1, 8, ROWS)
    assert facts["rows_a_block"] == [4, 7]


def test_all_of_it_is_printed_and_is_json(tmp_path):
    opened(tmp_path / "train")
    job = {
        "name": "shown",
        "model": {"layers": [{"Dense": {"units": 1}}]},
        "compile": {"loss": "mse"},
        "data": {"train": str(tmp_path / "train"), "features": ["a", "c", "t"], "label": "y"},
        "train": {"epochs": 1, "global_batch_size": 10},
        "cluster": {"workers": 3},
    }
    facts = describe_data(job, rows=4)
    assert json.loads(json.dumps(facts)) == facts
    assert [worker["rank"] for worker in facts["workers"]] == [0, 1, 2]
    assert all(worker["memory_bound_bytes"] > 0 for worker in facts["workers"])
    assert len(facts["sample"]) == 4
    text = io.StringIO()
    show_data(Console(file=text, width=140), facts)
    shown = text.getvalue()
    for expected in ("53", "one_hot of 3", "2 different: x 35, y 18", "virtual shards", "travel"):
        assert expected in shown
    assert len([line for line in shown.splitlines() if line.startswith(" t  ")]) == 2
