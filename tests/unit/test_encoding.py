"""Encodings: categories, texts and moments as numbers, learned exactly, the same every time."""

import datetime as dt
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.data import DataConfig, FeatureConfig
from configs.errors import JobError
from configs.load import load_job
from data_pipeline.blocks import BlockReader
from data_pipeline.encoding import (
    Category,
    Text,
    Timestamp,
    count_values,
    encoding_record,
    learn_encodings,
    read_encoding,
)
from data_pipeline.errors import DataError
from data_pipeline.features import InputLayout, input_layout
from data_pipeline.scan import learn, scan
from data_pipeline.source import Source, open_source
from tests.support.parquet import write_parquet
from trainer.errors import ModelError
from trainer.preflight import open_sources

EPOCH = dt.datetime(1970, 1, 1)


def column(values: list[Any], kind: pa.DataType | None = None) -> pa.ChunkedArray:
    """Values in two chunks, as a table of several batches has them."""
    half = len(values) // 2
    return pa.chunked_array([pa.array(values[:half], kind), pa.array(values[half:], kind)])


def opened(path: Path, features: list[Any], **changes: Any) -> tuple[Source, InputLayout]:
    data = DataConfig(train=str(path), features=features, **{"label": "y", **changes})
    source = open_source("train", str(path), data.columns)
    return source, input_layout(data, source)


def test_a_category_is_its_rank_by_frequency_and_zero_is_unknown():
    category = Category(True, 2, "one_hot")
    values = column(["b", "c", "b", None, "a", "a", "b"])
    known = category.learned(count_values(category, values))
    assert known.vocabulary == ("b", "a")  # two are told apart, c is the rarest
    assert known.indices == 3
    assert known.encode(values).tolist() == [1, 0, 1, 0, 2, 2, 1]
    assert known.encode(column(["new", "a"])).tolist() == [0, 2]


def test_equally_frequent_values_stand_in_their_own_order():
    category = Category(True, 10, "index")
    assert category.learned(Counter({"z": 1, "a": 1, "m": 2})).vocabulary == ("m", "a", "z")


def test_a_value_that_keras_reserves_counts_as_unknown():
    category = Category(True, 10, "index")
    known = category.learned(count_values(category, column(["[UNK]", "[UNK]", "x"])))
    assert known.vocabulary == ("x",)
    assert known.encode(column(["[UNK]", "x"])).tolist() == [0, 1]


@given(st.lists(st.none() | st.sampled_from(["a", "b", "", "ü", "A"]), min_size=1, max_size=40))
def test_a_dictionary_encodes_as_its_values(values):
    category = Category(True, 3, "index")
    plain = column(values, pa.string())
    known = category.learned(count_values(category, plain))
    assert known.encode(plain.dictionary_encode()).tolist() == known.encode(plain).tolist()
    assert count_values(category, plain.dictionary_encode()) == count_values(category, plain)


@given(st.lists(st.none() | st.integers(-5, 5), min_size=1, max_size=40))
def test_whole_numbers_and_booleans_are_categories_too(values):
    category = Category(False, 100, "index")
    known = category.learned(count_values(category, column(values, pa.int16())))
    by_value = {value: 1 + index for index, value in enumerate(known.vocabulary or ())}
    expected = [by_value.get(value, 0) for value in values]
    assert known.encode(column(values, pa.int16())).tolist() == expected
    flags = [None if value is None else value > 0 for value in values]
    of_flags = category.learned(count_values(category, column(flags, pa.bool_())))
    assert set(of_flags.vocabulary or ()) <= {0, 1}


def test_a_text_is_lowered_stripped_split_cut_and_filled_up():
    text = Text(3, 10, "index", vocabulary=("flight", "late"))
    values = column(["The flight's LATE, late!", " late  ", "", None, "flight\tlate late flight"])
    assert text.encode(values).tolist() == [
        [1, 1, 3],  # "flights" is another word
        [3, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
        [2, 3, 3],
    ]


def test_words_are_counted_over_the_whole_text():
    text = Text(1, 2, "index")
    counts = count_values(text, column(["a b b", "c. B", None, ""]))
    assert counts == {"a": 1, "b": 3, "c": 1}
    assert text.learned(counts).vocabulary == ("b", "a")


MOMENTS = st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2200, 12, 31))


@given(st.lists(MOMENTS, min_size=1, max_size=20))
def test_parts_of_a_moment_are_those_of_the_calendar(moments):
    parts = ("year", "month", "day", "weekday", "day_of_year", "hour", "minute", "second")
    encoded = Timestamp(parts, is_cyclic=False).encode(column(moments, pa.timestamp("us")))
    expected = [
        [m.year, m.month, m.day, m.weekday(), m.timetuple().tm_yday, m.hour, m.minute, m.second]
        for m in moments
    ]
    assert encoded.tolist() == expected


def test_parts_that_repeat_lie_on_a_circle():
    midnight, six = dt.datetime(2024, 2, 29), dt.datetime(2024, 2, 29, 6)
    stamp = Timestamp(("hour", "year"), is_cyclic=True)
    assert stamp.shape == (3,)
    encoded = stamp.encode(column([midnight, six, None], pa.timestamp("ms")))
    assert encoded == pytest.approx(np.array([[0, 1, 2024], [1, 0, 2024], [0, 0, 0]]), abs=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1_700_000_000_000_000]),
        pa.array([1_700_000_000], pa.timestamp("s")),
        pa.array([1_700_000_000_000_000_000], pa.timestamp("ns", "Europe/Berlin")),
        pa.array(["2023-11-14 22:13:20"]),
        pa.array(["2023-11-14T23:13:20+01:00"]),
    ],
    ids=["int", "seconds", "zone", "text", "text with zone"],
)
def test_moments_come_in_many_forms(values):
    stamp = Timestamp(("month", "day", "hour", "minute", "second"), is_cyclic=False)
    assert stamp.encode(pa.chunked_array([values])).tolist() == [[11, 14, 22, 13, 20]]


def test_what_is_no_moment_is_told():
    with pytest.raises(DataError, match=r"no moments in time .* ISO 8601"):
        Timestamp(("hour",), True).encode(column(["noon", "one"]))


@pytest.mark.parametrize(
    "encoding",
    [
        Category(True, 7, "embedding", 3, ("x", "ü")),
        Category(False, 7, "one_hot", 8, (4, -1)),
        Text(5, 100, "count", 8, ("a",)),
        Timestamp(("year", "hour"), True),
    ],
)
def test_a_record_gives_the_same_encoding_back(encoding):
    assert read_encoding(encoding_record(encoding)) == encoding
    assert math.prod(encoding.shape) >= 1


@given(st.lists(st.lists(st.sampled_from("abcde"), max_size=8), min_size=1, max_size=8))
def test_what_is_learned_in_parts_is_what_is_learned_at_once(parts):
    category = Category(True, 3, "index")
    counted = [[count_values(category, column(part, pa.string()))] for part in parts]
    (learned,) = learn_encodings([category], counted)
    whole = Counter(value for part in parts for value in part)
    assert learned == category.learned(whole)


def write_columns(folder: Path) -> None:
    write_parquet(
        folder / "1.parquet",
        {"c": ["x", "y", "x", None, "x"], "t": ["A b", "b", "", "c", "b"], "y": [0, 1, 0, 1, 1]},
        block_rows=2,
    )
    write_parquet(
        folder / "2.parquet", {"c": ["z", "y"], "t": ["d", "b"], "y": [1, 0]}, block_rows=1
    )


def test_vocabularies_are_learned_over_all_files(tmp_path):
    write_columns(tmp_path)
    features = ["c", {"name": "t", "kind": "text", "sequence_length": 2}]
    source, layout = opened(tmp_path, features)
    assert not layout.is_learned
    learned = learn(source, layout, "zero", threads=3)
    assert learned.is_learned
    assert learned.encodings["c"].vocabulary == ("x", "y", "z")
    assert learned.encodings["t"].vocabulary == ("b", "a", "c", "d")
    assert learn(source, learned, "zero") is learned  # known ones are kept
    found = scan(source, learned, "zero")
    assert found.block_rows.tolist() == [2, 2, 1, 1, 1]
    assert found.statistics is None
    block = BlockReader(source, learned, "zero").read(1)
    assert [values.tolist() for values in block.features] == [[1, 0], [[0, 0], [4, 0]]]


def test_rows_that_are_dropped_teach_nothing(tmp_path):
    write_parquet(tmp_path / "1.parquet", {"c": ["x", "y"], "a": [None, 1.0], "y": [0, 1]})
    source, layout = opened(tmp_path, ["c", "a"])
    assert learn(source, layout, "drop").encodings["c"].vocabulary == ("y",)


def test_a_label_of_text_becomes_classes(tmp_path):
    write_parquet(tmp_path / "1.parquet", {"a": [1.0, 2.0, 3.0], "y": ["dog", "cat", "dog"]})
    source, layout = opened(tmp_path, ["a"])
    assert (layout.label_dtype, layout.label_classes) == ("int64", ())
    learned = learn(source, layout, "error")
    assert learned.label_classes == ("cat", "dog")
    assert BlockReader(source, learned, "error").read(0).label.tolist() == [[1], [0], [1]]
    path = write_parquet(tmp_path / "new" / "1.parquet", {"a": [1.0], "y": ["cow"]})
    other, _ = opened(tmp_path / "new", ["a"])
    with pytest.raises(DataError, match="label 'y' holds the class 'cow', which no training row"):
        scan(other, learned, "error")
    assert path in str(other.files[0].path)


def test_a_loss_of_distances_refuses_a_label_of_text(tmp_path):
    write_parquet(tmp_path / "1.parquet", {"a": [1.0, 2.0], "y": ["dog", "cat"]})
    job = {
        "name": "j",
        "model": {"layers": [{"Dense": {"units": 1}}]},
        "compile": {"loss": "mse"},
        "data": {"train": str(tmp_path), "features": ["a"], "label": "y"},
        "train": {"epochs": 1, "global_batch_size": 2},
    }
    with pytest.raises(ModelError, match="loss=mse measures distances, the label 'y' is text"):
        open_sources(load_job(job))
    _, layout = open_sources(load_job(job, ["compile.loss=binary_crossentropy"]))
    assert layout.label_classes == ("cat", "dog")


def test_kinds_follow_the_types_of_the_files(tmp_path):
    write_parquet(
        tmp_path / "1.parquet",
        {
            "text": ["x"],
            "coded": pa.array(["x"]).dictionary_encode(),
            "moment": pa.array([0], pa.timestamp("s")),
            "date": pa.array([dt.date(2020, 1, 1)]),
            "whole": [1],
            "y": [0.5],
        },
    )
    _, layout = opened(tmp_path, ["text", "coded", "moment", "date", "whole"], normalize=True)
    kinds = [type(feature.encoding).__name__ for feature in layout.features]
    assert kinds == ["Category", "Category", "Timestamp", "Timestamp", "NoneType"]
    assert [feature.is_normalized for feature in layout.features] == [
        *(False, False),
        *(True, True, True),
    ]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"name": "f", "kind": "categorical"}, "holds float64; strings, whole numbers"),
        ({"name": "f", "kind": "text"}, "holds float64; strings are allowed for kind: text"),
        ({"name": "c", "kind": "numeric"}, "holds text; numbers, booleans"),
        ({"name": "c", "sequence_length": 3}, "sequence_length has no effect on column 'c'"),
        ({"name": "f", "encoding": "one_hot"}, "encoding has no effect on column 'f'"),
    ],
)
def test_a_kind_that_a_column_cannot_be_is_told(tmp_path, feature, message):
    write_parquet(tmp_path / "1.parquet", {"c": ["x"], "f": [0.5], "y": [0]})
    with pytest.raises(DataError, match=message):
        opened(tmp_path, [feature])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "numeric", "vocabulary_size": 5}, "vocabulary_size has no effect"),
        ({"kind": "text", "encoding": "one_hot"}, "multi_hot, count, embedding, index are allowed"),
        ({"kind": "categorical", "embedding_size": 4}, "embedding_size=4 has no effect"),
        ({"kind": "timestamp", "parts": ["hour", "hour"]}, "each once is allowed"),
        ({"kind": "timestamp", "parts": ["hours"]}, "parts"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    job = {
        "name": "j",
        "model": {"layers": ["Flatten"]},
        "compile": {"loss": "mse"},
        "data": {"train": "x", "features": [{"name": "c", **settings}], "label": "y"},
        "train": {"epochs": 1, "global_batch_size": 2},
    }
    with pytest.raises(JobError, match=message):
        load_job(job)


def test_what_never_varied_is_not_scaled(tmp_path):
    write_parquet(tmp_path / "1.parquet", {"a": [5.0, 5.0], "b": [1.0, 3.0], "y": [0, 1]})
    source, layout = opened(tmp_path, ["a", "b"], normalize=True)
    statistics = scan(source, layout, "error").statistics
    assert statistics is not None
    assert statistics.mean.tolist() == [5, 2]
    assert statistics.variance.tolist() == [1, 1]


def test_only_numbers_of_a_moment_are_normalised(tmp_path):
    moments = [dt.datetime(2020, 1, 1), dt.datetime(2022, 1, 1, 12)]
    write_parquet(tmp_path / "1.parquet", {"t": pa.array(moments, pa.timestamp("us")), "y": [0, 1]})
    source, layout = opened(tmp_path, [{"name": "t", "parts": ["hour", "year"]}], normalize=True)
    statistics = scan(source, layout, "error").statistics
    assert statistics is not None
    assert statistics.mean.tolist() == [0, 0, 2021]
    assert statistics.variance.tolist() == [1, 1, 1]


def test_a_feature_config_keeps_defaults_out_of_sight():
    assert FeatureConfig(name="c").model_dump(exclude_none=True) == {"name": "c"}
