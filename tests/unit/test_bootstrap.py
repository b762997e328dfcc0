"""The paired bootstrap: against closed forms, and what must hold for any rows."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trainer import bootstrap
from trainer.bootstrap import compare, plain_difference

NORMAL_95 = 1.6448536269514722


def test_the_bound_is_that_of_the_normal_law_for_many_rows() -> None:
    random = np.random.default_rng(1)
    champion = random.exponential(10, 1_000)
    candidate = champion + random.normal(0.1, 2.0, 1_000)
    found = compare(candidate, champion, confidence=0.95, resamples=2_000, seed=5)
    difference = candidate - champion
    error = difference.std() / math.sqrt(len(difference))
    assert found.worse == pytest.approx(difference.mean())
    assert found.at_most == pytest.approx(found.worse + NORMAL_95 * error, abs=0.15 * error)
    # Unpaired, the spread of the rows themselves would count: the bound would be far wider.
    assert found.at_most - found.worse < 0.5 * NORMAL_95 * champion.std() / math.sqrt(1_000)


def test_the_bound_covers_as_often_as_it_says() -> None:
    """Over many samples with a true difference of 0, the bound is below 0 about one time in ten."""
    random = np.random.default_rng(2)
    misses = 0
    for seed in range(250):
        difference = random.normal(0, 1, 80)
        found = compare(difference, np.zeros(80), confidence=0.9, resamples=300, seed=seed)
        misses += found.at_most < 0
    assert 0.05 < misses / 250 < 0.16


@given(
    values=arrays.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1e3)),
    seed=st.integers(0, 2**31),
    shape=st.sampled_from(["mean", "root"]),
    is_relative=st.booleans(),
    is_more_better=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_equal_models_differ_by_nothing(values, seed, shape, is_relative, is_more_better) -> None:
    found = compare(
        values,
        values,
        confidence=0.99,
        resamples=100,
        seed=seed,
        shape=shape,
        is_relative=is_relative,
        is_more_better=is_more_better,
    )
    assert (found.worse, found.at_most) == (0.0, 0.0)


@given(
    champion=arrays.arrays(np.float64, 40, elements=st.floats(1, 100)),
    shift=st.floats(0.01, 50),
    is_more_better=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_shift_of_every_row_is_certain(champion, shift, is_more_better) -> None:
    found = compare(
        champion + shift,
        champion,
        confidence=0.95,
        resamples=100,
        is_more_better=is_more_better,
    )
    expected = -shift if is_more_better else shift
    assert found.worse == pytest.approx(expected)
    assert found.at_most == pytest.approx(expected)


@given(
    rows=st.integers(2, 50),
    seed=st.integers(0, 1000),
    factor=st.floats(0.1, 10),
)
@settings(max_examples=30, deadline=None)
def test_relative_differences_do_not_know_units(rows, seed, factor) -> None:
    random = np.random.default_rng(seed)
    candidate, champion = random.uniform(1, 2, (2, rows))
    arguments = {"confidence": 0.9, "resamples": 100, "is_relative": True}
    first = compare(candidate, champion, **arguments)
    second = compare(candidate * factor, champion * factor, **arguments)
    assert second.worse == pytest.approx(first.worse, abs=1e-9)
    assert second.at_most == pytest.approx(first.at_most, abs=1e-9)


def test_rows_of_weight_zero_do_not_count() -> None:
    champion = np.array([1.0, 1.0, 1.0, 1.0])
    candidate = np.array([1.0, 1.0, 1.0, 99.0])
    weights = np.array([1.0, 1.0, 1.0, 0.0])
    found = compare(candidate, champion, weights, confidence=0.95, resamples=200)
    assert (found.candidate, found.at_most) == (1.0, 0.0)


def test_a_root_is_taken_of_the_mean() -> None:
    found = compare(
        np.array([4.0, 16.0]), np.array([1.0, 1.0]), confidence=0.9, shape="root", resamples=100
    )
    assert found.candidate == pytest.approx(math.sqrt(10))
    assert found.worse == pytest.approx(math.sqrt(10) - 1)


def test_the_same_seed_gives_the_same_bound() -> None:
    random = np.random.default_rng(3)
    candidate, champion = random.uniform(1, 2, (2, 500))
    first = compare(candidate, champion, confidence=0.95, seed=9)
    assert compare(candidate, champion, confidence=0.95, seed=9) == first
    assert compare(candidate, champion, confidence=0.95, seed=10) != first


def test_each_resample_draws_as_many_rows_as_there_are() -> None:
    table = np.stack([np.arange(50.0), np.ones(50), np.ones(50)], axis=1)
    sums = bootstrap._resampled_sums(table, 400, 1)
    assert (sums[:, 1] == 50).all()
    assert sums[:, 0].mean() == pytest.approx(np.arange(50).sum(), rel=0.02)
    # The sum of 50 draws from 0 to 49 has the standard deviation of one times the root of 50.
    assert sums[:, 0].std() == pytest.approx(np.arange(50).std() * math.sqrt(50), rel=0.1)


def test_memory_does_not_grow_with_the_resamples() -> None:
    rows = np.random.default_rng(4).uniform(1, 2, (2, 20_000))
    tracemalloc.start()
    compare(rows[0], rows[1], confidence=0.95, resamples=150)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20  # all draws at once would take 24 MB


def test_what_is_not_finite_is_never_within_a_bound() -> None:
    broken = np.array([1.0, math.nan, 2.0])
    assert compare(broken, np.ones(3), confidence=0.9, resamples=100).at_most == math.inf


def test_against_a_champion_without_error_any_error_is_infinitely_worse() -> None:
    found = compare(np.ones(5), np.zeros(5), confidence=0.9, resamples=100, is_relative=True)
    assert found.worse == math.inf
    assert found.at_most == math.inf


def test_the_plain_difference_has_the_same_signs() -> None:
    assert plain_difference(3.0, 2.0, is_relative=False, is_more_better=False) == 1.0
    assert plain_difference(3.0, 2.0, is_relative=True, is_more_better=True) == -0.5


@pytest.mark.parametrize(
    ("candidate", "champion", "weights"),
    [([], [], None), ([1.0], [1.0, 2.0], None), ([1.0], [1.0], [0.0]), ([1.0], [1.0], [-1.0])],
)
def test_rows_that_are_none_are_refused(candidate, champion, weights) -> None:
    with pytest.raises(ValueError, match="received"):
        compare(
            np.array(candidate),
            np.array(champion),
            None if weights is None else np.array(weights),
            confidence=0.9,
        )
