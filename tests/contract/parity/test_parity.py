"""Lockstep on any number of workers is plain Keras `fit` in one process, case by case."""

from typing import Any

import numpy as np
import pytest

from tests.contract.parity.cases import CASES, DEVICE_CASES, Case
from tests.contract.parity.report import Record

pytestmark = pytest.mark.timeout(3600)  # the first test of a group runs all of its cases


def _rows(cases: tuple[Case, ...], fast: Any) -> list[Any]:
    return [
        pytest.param(case, id=case.name, marks=() if fast(case) else pytest.mark.long)
        for case in cases
    ]


def _compare(suite: Any, case: Case, engine: str, ours: Any, is_alone: bool) -> Record:
    from tests.contract.parity.engines import greatest_difference

    assert isinstance(ours, dict), ours
    difference, place = greatest_difference(ours, suite.plain(case))
    differs = case.differs and not is_alone
    record = Record(case.name, engine, difference, place, case.tolerance, differs)
    suite.records.append(record)
    return record


def _check(record: Record, case: Case, ours: Any) -> None:
    for key, value in case.expected.items():
        assert np.allclose(ours[key], value, rtol=1e-6, atol=1e-6), (key, ours[key])
    if record.differs:
        assert record.difference > 2 * case.tolerance
    else:
        assert record.difference <= case.tolerance, record.place


_TABLE = [
    pytest.param(
        workers,
        case,
        id=f"{workers}-{case.name}",
        marks=() if workers == 3 and case.is_fast else pytest.mark.long,
    )
    for workers in (3, 1, 2, 4)
    for case in CASES
    if workers in (2, 3) or not case.is_variant
]


@pytest.mark.parametrize(("workers", "case"), _TABLE)
def test_workers_are_one_fit(suite: Any, case: Case, workers: int) -> None:
    ours = suite.lockstep(case, workers)
    engine = f"{workers} worker{'s' if workers > 1 else ''}"
    _check(_compare(suite, case, engine, ours, workers == 1), case, ours)


@pytest.mark.parametrize("case", _rows(DEVICE_CASES, lambda case: case.group == "norm"))
@pytest.mark.parametrize("devices", [2])
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_several_devices_a_worker_are_one_fit(
    suite: Any, case: Case, workers: int, devices: int
) -> None:
    ours = suite.lockstep(case, workers, devices)
    _check(_compare(suite, case, f"{workers} x {devices}", ours, False), case, ours)


CONTROLS = {
    "divisor left local": "sizes/5 virtual shards",
    "clipping before reducing": "optimizer/global_clipnorm",
    "penalties on every worker": "regularizers/on weights, biases and activities",
}


@pytest.mark.parametrize("sabotage", CONTROLS)
def test_a_step_that_is_not_exact_is_told(suite: Any, sabotage: str) -> None:
    """Negative controls: with its feature switched off a case must fail."""
    from tests.contract.parity.engines import greatest_difference

    case = next(case for case in CASES if case.name == CONTROLS[sabotage])
    ours = suite.sabotaged(case, 2, sabotage)
    assert isinstance(ours, dict), ours
    difference, _ = greatest_difference(ours, suite.plain(case))
    assert difference > 2 * case.tolerance


_ALONE = {
    "only rank 1 asks to stop": True,
    "only rank 0 asks to stop": True,
    "only rank 0 is out of time": True,  # its clock decides
    "only rank 1 is out of time": False,
}


@pytest.mark.parametrize(("who", "ends"), _ALONE.items())
def test_what_one_rank_alone_wants_is_decided_for_all(suite: Any, who: str, ends: bool) -> None:
    case = next(case for case in CASES if case.name == "sizes/5 virtual shards")
    outcome = suite.sabotaged(case, 3, who)
    assert isinstance(outcome, dict), outcome
    assert len(set(outcome["steps"])) == 1
    assert len(set(outcome["stopped"])) == 1
    assert (outcome["steps"][0] < outcome["of"]) is ends
    assert bool(outcome["stopped"][0]) is who.endswith("asks to stop")
