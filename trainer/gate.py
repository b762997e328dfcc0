"""The gate: from what was measured of a candidate and its champion to a verdict with reasons.

Pure: all that it judges is measured before, and the same evidence gives the same verdict. Nothing
that was not measured passes: a metric that is missing or not finite fails its check.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import did_you_mean
from configs.pipeline import GateConfig, NoWorseConfig, SliceConfig, ThresholdConfig
from trainer.bootstrap import Shape, Values, compare, plain_difference
from trainer.metric_names import is_more_better

Kind = Literal["threshold", "no_worse", "champion", "latency", "size", "smoke"]


@dataclass(frozen=True)
class Judged:
    """One model on the frozen rows.

    Attributes:
        name: What reasons call it, such as `flights/3`.
        metrics: Over all rows, as Keras gives them.
        slices: The same by column and value, for values with enough rows.
        rows: `(rows,)` by metric, for those that are a mean over rows: each row's value.
    """

    name: str
    metrics: Mapping[str, float]
    slices: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    rows: Mapping[str, Values] = field(default_factory=dict)


@dataclass(frozen=True)
class SliceRows:
    """The rows of a column's values.

    Attributes:
        values: The values as texts, sorted.
        codes: `(rows,)`: index of each row's value.
    """

    values: tuple[str, ...]
    codes: NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Evidence:
    """All that is known of a candidate.

    Attributes:
        candidate: On the frozen rows.
        champion: On the same rows; None where there is none, or it could not be evaluated.
        champion_problem: Why it could not be.
        weights: `(rows,)`: weights of the rows, None where all count the same.
        weighted: Metrics in which they count.
        shapes: Metrics that are more than a mean over rows.
        slices: The rows of each column's values.
        latency_ms: Medians by the names of the bounds.
        size_bytes: Of the whole artifact.
        smoke: What is wrong with the exported artifact, as sentences.
    """

    candidate: Judged
    champion: Judged | None
    champion_problem: str = ""
    weights: Values | None = None
    weighted: frozenset[str] = frozenset()
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    slices: Mapping[str, SliceRows] = field(default_factory=dict)
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    size_bytes: int = 0
    smoke: Sequence[str] = ()


@dataclass(frozen=True)
class Check:
    """One thing that was asked of the candidate.

    Attributes:
        kind: What was asked.
        metric: Of which metric, or empty.
        where: The slice, such as `origin=EWR`; empty for all rows.
        is_passed: None where there were too few rows to judge.
        reason: A sentence with the numbers.
        numbers: What was compared, by name.
    """

    kind: Kind
    metric: str
    where: str
    is_passed: bool | None
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Whether the candidate may become champion.

    Attributes:
        checks: All of them, in the order of the pipeline file.
    """

    checks: tuple[Check, ...]

    @property
    def is_passed(self) -> bool:
        """Whether no check failed."""
        return not self.reasons

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why not: the sentences of all checks that failed."""
        return tuple(check.reason for check in self.checks if check.is_passed is False)


def judge(gate: GateConfig, evidence: Evidence) -> Verdict:
    """Hold the evidence against the gate.

    Comparisons with a champion are left out while there is none; with one that could not be
    evaluated, the candidate fails.
    """
    checks = [_smoke(evidence)]
    checks += [_threshold(check, evidence) for check in gate.thresholds]
    if evidence.champion_problem:
        checks.append(Check("champion", "", "", False, evidence.champion_problem))
    if evidence.champion is not None:
        everywhere = _Part("", None, evidence.candidate.metrics, evidence.champion.metrics)
        for each in gate.no_worse_than_champion:
            checks.append(_no_worse(each, evidence, everywhere, gate.resamples))
    for column in gate.slices:
        checks += _slices(column, evidence, gate.resamples)
    checks += _latency(gate, evidence)
    if gate.max_size_mb is not None:
        checks.append(_size(gate.max_size_mb, evidence.size_bytes))
    return Verdict(tuple(checks))


@dataclass(frozen=True)
class _Part:
    """Some of the rows: all, or a slice."""

    where: str
    chosen: NDArray[np.bool_] | None
    candidate: Mapping[str, float]
    champion: Mapping[str, float]

    @property
    def place(self) -> str:
        return f" where {self.where}" if self.where else ""


def _smoke(evidence: Evidence) -> Check:
    if evidence.smoke:
        return Check("smoke", "", "", False, f"smoke: {'; '.join(evidence.smoke)}.")
    return Check("smoke", "", "", True, "smoke: the exported artifact predicts what was trained.")


def _threshold(check: ThresholdConfig, evidence: Evidence, part: _Part | None = None) -> Check:
    part = part or _Part("", None, evidence.candidate.metrics, {})
    name, value = check.metric, part.candidate.get(check.metric)
    if value is None:
        return Check("threshold", name, part.where, False, _missing(name, part.candidate))
    numbers = {"candidate": value}
    bounds = []
    is_passed = math.isfinite(value)
    if check.min is not None:
        bounds.append(f"at least {check.min:g}")
        numbers["min"] = check.min
        is_passed = is_passed and value >= check.min
    if check.max is not None:
        bounds.append(f"at most {check.max:g}")
        numbers["max"] = check.max
        is_passed = is_passed and value <= check.max
    reason = f"{name}{part.place} is {value:.6g}; {' and '.join(bounds)} passes."
    return Check("threshold", name, part.where, is_passed, reason, numbers)


def _no_worse(check: NoWorseConfig, evidence: Evidence, part: _Part, resamples: int) -> Check:
    name = check.metric
    if name not in part.candidate or name not in part.champion:
        known = part.champion if name in part.candidate else part.candidate
        return Check("no_worse", name, part.where, False, _missing(name, known))
    if check.confidence is None:
        return _plainly(check, evidence, part)
    champion = evidence.champion
    if champion is None or name not in evidence.candidate.rows or name not in champion.rows:
        reason = (
            f"{name} is no mean over rows, so that no confidence can be given. Set confidence: "
            "null to compare the values as they are."
        )
        return Check("no_worse", name, part.where, False, reason)
    ours, theirs, weights = evidence.candidate.rows[name], champion.rows[name], None
    if name in evidence.weighted:
        weights = evidence.weights
    if part.chosen is not None:
        ours, theirs = ours[part.chosen], theirs[part.chosen]
        weights = None if weights is None else weights[part.chosen]
    try:
        found = compare(
            ours,
            theirs,
            weights,
            confidence=check.confidence,
            resamples=resamples,
            shape=evidence.shapes.get(name, "mean"),
            is_relative=check.scale == "relative",
            is_more_better=_is_more(check),
        )
    except ValueError as error:
        return Check("no_worse", name, part.where, False, f"{name}{part.place}: {error}")
    numbers = {
        "candidate": found.candidate,
        "champion": found.champion,
        "worse": found.worse,
        "at_most": found.at_most,
        "allowed": check.by,
        "confidence": check.confidence,
        "is_relative": float(check.scale == "relative"),
    }
    reason = (
        f"{name}{part.place} is {found.candidate:.6g}, the champion's {found.champion:.6g}: "
        f"{_difference(found.worse, check)}, and with {check.confidence:.3g} confidence at most "
        f"{_amount(found.at_most, check)} worse; {_amount(check.by, check)} is allowed."
    )
    return Check("no_worse", name, part.where, found.at_most <= check.by, reason, numbers)


def _plainly(check: NoWorseConfig, evidence: Evidence, part: _Part) -> Check:
    name = check.metric
    ours, theirs = part.candidate[name], part.champion[name]
    worse = plain_difference(
        ours,
        theirs,
        is_relative=check.scale == "relative",
        is_more_better=_is_more(check),
    )
    numbers = {"candidate": ours, "champion": theirs, "worse": worse, "allowed": check.by}
    reason = (
        f"{name}{part.place} is {ours:.6g}, the champion's {theirs:.6g}: "
        f"{_difference(worse, check)}; {_amount(check.by, check)} is allowed."
    )
    return Check("no_worse", name, part.where, worse <= check.by, reason, numbers)


def _slices(column: SliceConfig, evidence: Evidence, resamples: int) -> Iterator[Check]:
    rows = evidence.slices.get(column.column)
    if rows is None:
        reason = f"no column {column.column!r} among the rows that judge."
        yield Check("threshold", "", column.column, False, reason)
        return
    counts = np.bincount(rows.codes, minlength=len(rows.values))
    for code, value in enumerate(rows.values):
        where = f"{column.column}={value}"
        if counts[code] < column.min_rows:
            reason = (
                f"{where}: {counts[code]} rows, fewer than min_rows={column.min_rows}; not judged."
            )
            yield Check("threshold", "", where, None, reason, {"rows": float(counts[code])})
            continue
        champion = evidence.champion
        part = _Part(
            where,
            rows.codes == code,
            evidence.candidate.slices.get(column.column, {}).get(value, {}),
            {} if champion is None else champion.slices.get(column.column, {}).get(value, {}),
        )
        for threshold in column.thresholds:
            yield _threshold(threshold, evidence, part)
        if champion is not None:
            for each in column.no_worse_than_champion:
                yield _no_worse(each, evidence, part, resamples)


def _latency(gate: GateConfig, evidence: Evidence) -> Iterator[Check]:
    bounds = {} if gate.latency is None else gate.latency.model_dump(exclude_none=True)
    for name, bound in bounds.items():
        value = evidence.latency_ms.get(name, math.nan)
        reason = f"latency: {name} is {value:.4g}; at most {bound:g} passes."
        numbers = {"candidate": value, "max": bound}
        yield Check("latency", name, "", value <= bound, reason, numbers)


def _size(bound_mb: float, size_bytes: int) -> Check:
    size_mb = size_bytes / 1e6
    reason = f"the artifact has {size_mb:.4g} MB; at most {bound_mb:g} passes."
    numbers = {"candidate": size_mb, "max": bound_mb}
    return Check("size", "", "", size_mb <= bound_mb, reason, numbers)


def _missing(name: str, known: Mapping[str, float]) -> str:
    measured = ", ".join(known) or "none"
    return f"no metric {name!r}; {measured} were measured.{did_you_mean(name, known)}"


def _is_more(check: NoWorseConfig) -> bool:
    return is_more_better(check.metric) if check.mode == "auto" else check.mode == "max"


def _difference(worse: float, check: NoWorseConfig) -> str:
    if worse == 0:
        return "equal"
    return f"{_amount(abs(worse), check)} {'worse' if worse > 0 else 'better'}"


def _amount(value: float, check: NoWorseConfig) -> str:
    return f"{value:.3g}" if check.scale == "absolute" else f"{100 * value:.3g} %"
