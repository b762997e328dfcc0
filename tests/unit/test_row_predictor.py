"""Bad rows among good ones: who is predicted, with whom, and what the others get."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.row_errors import Chunk, Marks, RowError, error_table
from serving.row_predictor import predict_chunk
from tests.support.batches import POISON, FakeModel


def chunk(values, bad=(), first_row=0):
    marks = Marks(len(values), first_row)
    for index in bad:
        marks.mark_row(index, "missing_value", "none", "a")
    table = pa.table({"a": pa.array(values, pa.float32()), "b": pa.array(values, pa.float32())})
    return marks.chunk(table, table.select([]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, POISON]), min_size=1, max_size=64),
    st.sets(st.integers(0, 63)),
)
def test_each_good_row_is_predicted_and_each_bad_one_told(values, bad):
    bad = {index for index in bad if index < len(values)}
    model = FakeModel({})
    predictions, marked = predict_chunk(model, chunk(values, bad, 100))
    refused = {n for n, value in enumerate(values) if value == POISON} - bad
    assert set(np.flatnonzero(marked.is_bad)) == bad | refused
    assert [error.row - 100 for error in marked.errors] == sorted(bad | refused)
    assert {e.row - 100 for e in marked.errors if e.code == "prediction_failed"} == refused
    for index, value in enumerate(values):
        wanted = 0.0 if marked.is_bad[index] else 3 * value
        assert predictions[index, 0] == pytest.approx(wanted)
    if not marked.is_bad.all():
        assert model.calls[-1] == len(values)  # the good ones in a call of the whole chunk


def test_a_failure_of_all_rows_together_is_no_matter_of_rows():
    class Picky(FakeModel):
        def predict(self, columns):
            if len(columns["a"]) > 2:
                raise ValueError("too many at once")
            return super().predict(columns)

    with pytest.raises(ValueError, match="too many"):
        predict_chunk(Picky({}), chunk([1.0, 2.0, 3.0]))


def test_what_is_not_about_values_is_not_looked_into():
    class Broken(FakeModel):
        def predict(self, columns):
            self.calls.append(1)
            raise OSError("the disk")

    model = Broken({})
    with pytest.raises(OSError, match="the disk"):
        predict_chunk(model, chunk([1.0, 2.0]))
    assert len(model.calls) == 1


def test_chunks_are_joined_with_their_rows_numbered_on():
    joined = Chunk.joined([chunk([1.0, 2.0], [1], 50), chunk([3.0], [0], 10)], 7)
    assert joined.rows == 3
    assert joined.is_bad.tolist() == [False, True, True]
    assert [error.row for error in joined.errors] == [8, 9]
    table = error_table([RowError(3, "c", "m")])
    assert table.to_pylist() == [{"row": 3, "code": "c", "message": "m", "column": None}]
