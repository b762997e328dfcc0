"""How sure a difference between two models is: a paired bootstrap over the rows that judged both.

Pure arithmetic on arrays. Each resample draws rows with replacement and takes both models' values
of the same rows, so that what makes a row hard for both cancels. The bound is one-sided, of the
percentile method (B. Efron, R. Tibshirani: An Introduction to the Bootstrap, chapter 13).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.floating[Any]]
Shape = Literal["mean", "root"]
"""What a metric is of its values a row: their mean, or the square root of it."""


@dataclass(frozen=True)
class Comparison:
    """How much worse a candidate is than a champion.

    Attributes:
        candidate: Its metric.
        champion: The champion's metric.
        worse: How much worse the candidate is: in units of the metric, or in parts of the
            champion's value. Below 0: better.
        at_most: What `worse` is at most, with the confidence that was asked for.
    """

    candidate: float
    champion: float
    worse: float
    at_most: float


def compare(
    candidate: Values,
    champion: Values,
    weights: Values | None = None,
    *,
    confidence: float,
    resamples: int = 1_000,
    seed: int = 0,
    shape: Shape = "mean",
    is_relative: bool = False,
    is_more_better: bool = False,
) -> Comparison:
    """Compare two models by their values on the same rows.

    Takes memory for some six numbers a row beside the arguments, however many resamples there are.
    The same arguments give the same draws, on any machine.

    Args:
        candidate: `(rows,)`: its values of the metric, row by row.
        champion: `(rows,)`: those of the champion, in the same order.
        weights: `(rows,)`: weight of each row in the metric, not negative; None: all equal.
        confidence: Of the bound, between 0.5 and 1.
        resamples: How many are drawn.
        seed: Of the draws.
        shape: What the metric is of the values.
        is_relative: Differences are in parts of the champion's metric.
        is_more_better: More of the metric is better.

    Raises:
        ValueError: There is no row, the arrays are of different lengths, or no weight is above 0.
    """
    rows = len(candidate)
    if rows == 0 or len(champion) != rows or (weights is not None and len(weights) != rows):
        raise ValueError(
            f"received {rows} and {len(champion)} values; as many of both, and at least one, are "
            "needed."
        )
    if weights is not None and not (np.all(weights >= 0) and weights.sum() > 0):
        raise ValueError("received weights without a positive one, or with one below 0.")
    shares = np.ones(rows) if weights is None else np.asarray(weights, np.float64)
    # (rows, 3): what is summed over drawn rows
    table = np.stack([shares * candidate, shares * champion, shares], axis=1)
    whole = table.sum(axis=0)[None]  # (1, 3)
    drawn = _resampled_sums(table, resamples, seed)  # (resamples, 3)
    (worse,), (ours,), (theirs,) = _worse(whole, shape, is_relative, is_more_better)
    differences, _, _ = _worse(drawn[drawn[:, 2] > 0], shape, is_relative, is_more_better)
    at_most = math.inf
    if np.isfinite(differences).all():
        at_most = float(np.quantile(differences, confidence, method="higher"))
    return Comparison(float(ours), float(theirs), float(worse), at_most)


def plain_difference(
    candidate: float, champion: float, *, is_relative: bool, is_more_better: bool
) -> float:
    """How much worse a candidate's value is than a champion's, without any doubt about rows."""
    sums = np.array([[candidate, champion, 1.0]])
    return float(_worse(sums, "mean", is_relative, is_more_better)[0][0])


def _resampled_sums(table: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """`(resamples, 3)`: sums of the columns over as many drawn rows as there are."""
    rows = len(table)
    random = np.random.default_rng(seed)
    kind = np.int32 if rows < 2**31 else np.int64
    sums = np.empty((resamples, table.shape[1]))
    for resample in range(resamples):
        # How often each row was drawn: counting and one product read memory in order, which a
        # gather of drawn rows does not, and are ten times as fast.
        counts = np.bincount(random.integers(0, rows, rows, kind), minlength=rows)
        sums[resample] = counts @ table
    return sums


def _worse(
    sums: NDArray[np.float64], shape: Shape, is_relative: bool, is_more_better: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """How much worse, candidate's and champion's metric, each `(resamples,)`."""
    means = sums[:, :2] / sums[:, 2:]
    if shape == "root":
        means = np.sqrt(np.maximum(means, 0.0))
    candidate, champion = means[:, 0], means[:, 1]
    worse = champion - candidate if is_more_better else candidate - champion
    if is_relative:
        # Against a champion without any error, any error is infinitely worse, and none is equal.
        size = np.abs(champion)
        with np.errstate(divide="ignore", invalid="ignore"):
            worse = np.where(worse == 0, 0.0, worse / size)
    return worse, candidate, champion
