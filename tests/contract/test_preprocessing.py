"""Keras layers give what the reader's arithmetic gives, for any raw value."""

import datetime as dt

import keras
import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.encoding import Category, Encoding, Text, Timestamp, count_values
from data_pipeline.features import InputColumn, InputLayout
from data_pipeline.scan import Statistics
from trainer.export import write_artifact
from trainer.front import columns_of, front_layers, has_front
from trainer.preprocessing import RawRows, raw_spec

WORDS = st.text(st.sampled_from("abAB ,.'-_[]\\\t\nüÜß!{}~^`1"), max_size=12)
MOMENTS = st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2200, 12, 31))
PARTS = ("year", "month", "day", "weekday", "day_of_year", "hour", "minute", "second")


def layout_of(*encodings: Encoding | None) -> InputLayout:
    features: list[InputColumn] = []
    for index, encoding in enumerate(encodings):
        offset = features[-1].offset + features[-1].size if features else 0
        shape = () if encoding is None else encoding.shape
        features.append(InputColumn(f"c{index}", shape, offset, encoding is None, encoding))
    return InputLayout(tuple(features), "y", "float32", 1, None)


def by_keras(encoding: Encoding, raw: tf.Tensor) -> np.ndarray:
    rows: np.ndarray = RawRows(layout_of(encoding))({"c0": raw}).numpy()
    return rows


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=8), st.lists(WORDS, min_size=1, max_size=8))
def test_texts_are_the_same_words_to_keras(training, serving):
    text = Text(4, 6, "index")
    text = text.learned(count_values(text, pa.chunked_array([pa.array(training)])))
    if not text.vocabulary:
        return  # Keras has no table without words; such a column is refused
    ours = text.encode(pa.chunked_array([pa.array(serving)]))
    np.testing.assert_array_equal(by_keras(text, tf.constant(serving)), ours)


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=8), st.lists(WORDS, min_size=1, max_size=8))
def test_categories_are_the_same_numbers_to_keras(training, serving):
    category = Category(True, 5, "index")
    category = category.learned(count_values(category, pa.chunked_array([pa.array(training)])))
    ours = category.encode(pa.chunked_array([pa.array(serving)]))
    np.testing.assert_array_equal(by_keras(category, tf.constant(serving))[:, 0], ours)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(-(2**40), 2**40) | st.integers(-3, 3), min_size=1, max_size=8),
    st.lists(st.integers(-3, 3), min_size=1, max_size=8),
)
def test_whole_numbers_are_the_same_categories_to_keras(training, serving):
    category = Category(False, 5, "index")
    category = category.learned(count_values(category, pa.chunked_array([pa.array(training)])))
    ours = category.encode(pa.chunked_array([pa.array(serving)]))
    raw = tf.constant(serving, tf.int64)
    np.testing.assert_array_equal(by_keras(category, raw)[:, 0], ours)


@settings(max_examples=60, deadline=None)
@given(st.lists(MOMENTS, min_size=1, max_size=8), st.booleans())
def test_moments_have_the_same_parts(moments, is_cyclic):
    stamp = Timestamp(PARTS, is_cyclic)
    column = pa.chunked_array([pa.array(moments, pa.timestamp("us"))])
    raw = tf.constant(column.cast(pa.int64()).to_pylist(), tf.int64)
    np.testing.assert_allclose(by_keras(stamp, raw), stamp.encode(column), atol=2e-6)


def mixed_layout() -> InputLayout:
    return layout_of(
        None,
        Category(True, 9, "one_hot", vocabulary=("x", "y")),
        None,
        Text(3, 9, "count", vocabulary=("a", "b")),
        Category(True, 9, "index", vocabulary=tuple(f"v{k}" for k in range(5000))),
        Text(3, 9, "multi_hot", vocabulary=("a", "b")),
        Timestamp(("year",), True),
    )


ROWS = np.array(
    [  # number, category, number, 3 words, index, 3 words, year
        [3.0, 1, 4, 2, 2, 3, 4999, 0, 0, 0, 2020],
        [5.0, 0, 6, 0, 0, 0, 4097, 1, 3, 3, 2021],
    ],
    np.float32,
)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_the_front_makes_vectors_of_indices(policy):
    mean = np.zeros(11, np.float32)
    mean[[0, 2]] = 1.0
    keras.config.set_dtype_policy(policy)
    try:
        (front,) = front_layers(mixed_layout(), Statistics(mean, np.ones(11, np.float32)))
    finally:
        keras.config.set_dtype_policy("float32")
    expected = [
        [2, 0, 1, 0, 3, 0, 2, 1, 4999, 0, 0, 0, 2020],
        [4, 1, 0, 0, 5, 0, 0, 0, 4097, 1, 0, 1, 2021],
    ]
    np.testing.assert_array_equal(front(ROWS), expected)
    np.testing.assert_array_equal(tf.function(front)(tf.constant(ROWS)), expected)


def test_embeddings_are_looked_up_and_those_of_words_averaged():
    layout = layout_of(
        Category(True, 9, "embedding", 2, ("x",)), Text(3, 9, "embedding", 2, ("a", "b"))
    )
    (front,) = front_layers(layout, None)
    tables = [variable.numpy() for variable in front.trainable_variables]
    assert [table.shape for table in tables] == [(2, 2), (4, 2)]
    rows = np.array([[1, 2, 3, 0], [0, 0, 0, 0]], np.float32)
    words = (tables[1][2] + tables[1][3]) / 2
    expected = [[*tables[0][1], *words], [*tables[0][0], 0, 0]]
    np.testing.assert_allclose(front(rows), expected, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_model_with_a_front_loads_in_plain_keras(tmp_path, suffix):
    layers = front_layers(mixed_layout(), None)
    model = keras.Sequential([keras.layers.Input((11,)), *layers, keras.layers.Dense(1)])
    path = tmp_path / f"model{suffix}"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert has_front(loaded)
    np.testing.assert_array_equal(loaded(ROWS), model(ROWS))


def test_a_saved_model_takes_raw_columns_and_encoded_rows(tmp_path):
    layout = layout_of(
        None,
        Category(True, 9, "one_hot", vocabulary=("x", "y")),
        Category(False, 9, "index", vocabulary=(5, -1)),
        Text(3, 9, "count", vocabulary=("a", "b")),
        Timestamp(("hour", "year"), True),
    )
    layers = [keras.layers.Input((layout.width,)), *front_layers(layout, None)]
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(loss="mse")
    write_artifact(tmp_path / "artifact", model, layout, {}, has_h5=True, has_saved_model=True)
    signatures = tf.saved_model.load(str(tmp_path / "artifact" / "saved_model")).signatures
    raw = {
        "c0": tf.constant([1.5, 2.5]),
        "c1": tf.constant(["y", "never seen"]),
        "c2": tf.constant([-1, 7], tf.int64),
        "c3": tf.constant(["B? a", ""]),
        "c4": tf.constant([6 * 3_600_000_000, -1], tf.int64),
    }
    rows = RawRows(layout)(raw)
    expected = [[1.5, 2, 2, 3, 2, 0, 1, 0, 1970], [2.5, 0, 0, 0, 0, 0, -0.2588, 0.9659, 1969]]
    np.testing.assert_allclose(rows, expected, atol=1e-4)
    predicted = signatures["serving_default"](**raw)["prediction"]
    np.testing.assert_allclose(predicted, model(rows), rtol=1e-6)
    np.testing.assert_allclose(signatures["serve_rows"](rows)["prediction"], predicted, rtol=1e-6)


def test_numbers_alone_need_no_front():
    assert front_layers(layout_of(None, Category(True, 3, "index", 8, ("a",))), None) == []


def test_raw_columns_keep_their_types():
    layout = mixed_layout()
    dtypes = [raw_spec(feature).dtype.name for feature in layout.features]
    assert dtypes == ["float32", "string", "float32", "string", "string", "string", "int64"]


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_model_with_columns_taken_out_loads_in_plain_keras(tmp_path, suffix):
    row = keras.layers.Input((5,), name="input")
    parts = [columns_of(row, 0, 2), columns_of(row, 2, 5)]
    model = keras.Model(row, keras.layers.Concatenate()(parts[::-1]))
    path = tmp_path / f"model{suffix}"
    model.save(path)
    rows = np.arange(10, dtype=np.float32).reshape(2, 5)
    np.testing.assert_array_equal(keras.saving.load_model(path)(rows), rows[:, [2, 3, 4, 0, 1]])
