"""The verdict of a verification follows from differences, their causes, and rounding."""

from typing import Any

import numpy as np
import pytest

from trainer.certificate import TOLERANCE, Verification, VerifySettings, compare, difference
from trainer.payloads import VerifyPayload


def outcome(shift: float = 0.0, loss: float = 1.0, causes: tuple[str, ...] = ()) -> dict[str, Any]:
    arrays = {
        "model/0000/m/dense/kernel": np.ones(3),
        "model/0001/m/dense/bias": np.zeros(2) + shift,
        "optimizer/0000/adam/iteration": np.ones(()),
    }
    return {
        "arrays": arrays,
        "logs": {"loss": loss},
        "evaluation": {"mae": 2.0},
        "causes": list(causes),
        "is_in_any_order": True,
    }


def test_equal_is_within_the_tolerance() -> None:
    found = compare(outcome(), outcome(TOLERANCE / 2), None)
    assert found["verdict"] == "equal"
    assert found["layers"] == {"m/dense": pytest.approx(TOLERANCE / 2), "optimizer": 0.0}
    assert found["greatest"] == pytest.approx(TOLERANCE / 2)
    assert found["causes"] == []


@pytest.mark.parametrize("other", [outcome(2 * TOLERANCE), outcome(loss=1.001), outcome(np.nan)])
def test_what_nothing_explains_differs(other: dict[str, Any]) -> None:
    assert compare(outcome(), other, None)["verdict"] == "differs"


def test_a_known_cause_makes_it_expected() -> None:
    found = compare(outcome(), outcome(0.1, causes=("a norm",)), None)
    assert found["verdict"] == "differs as expected"
    assert found["causes"] == ["a norm"]


def test_rounding_of_plain_keras_counts_as_equal_and_is_named() -> None:
    rounding = {
        "layers": {"m/dense": 0.03, "optimizer": 0.0},
        "training": {"loss": 0.0},
        "evaluation": {"mae": 0.0},
    }
    found = compare(outcome(), outcome(0.1), rounding)
    assert found["verdict"] == "equal"
    assert "order of floating-point sums (m/dense)" in found["causes"][0]
    assert compare(outcome(), outcome(0.2), rounding)["verdict"] == "differs"
    assert compare(outcome(), outcome(0.1, loss=1.01), rounding)["verdict"] == "differs"


def test_a_metric_that_only_one_has_differs() -> None:
    other = outcome()
    other["logs"] = {"loss": 1.0, "extra": 1.0}
    assert compare(outcome(), other, None)["verdict"] == "differs"


def test_difference_is_relative_to_large_and_absolute_to_small_numbers() -> None:
    assert difference([1e6 + 1], [1e6]) == pytest.approx(1e-6, rel=1e-3)
    assert difference([1e-3], [0.0]) == pytest.approx(1e-3)
    assert difference([np.nan, np.inf], [np.nan, np.inf]) == 0
    assert difference([np.inf], [1.0]) == np.inf
    assert difference([], []) == 0


class _Plan:
    steps_per_epoch = 10
    global_batch_size = 8


class _Data:
    plan = _Plan()


@pytest.mark.parametrize(
    ("steps", "spans"),
    [(1, [(9, 10)]), (4, [(0, 3), (9, 10)]), (10, [(0, 10)]), (99, [(0, 10)])],
)
def test_the_last_step_of_the_epoch_is_always_taken(steps: int, spans: Any) -> None:
    data: Any = _Data()
    job: Any = None
    assert VerifyPayload(job, data, steps).spans == spans


def run(outcomes: dict[str, Any]) -> tuple[list[str], Any]:
    """Stages that a verification goes through, and its certificate."""

    class Cluster:
        def model_copy(self, update: Any) -> Any:
            return self

    class Job:
        name = "mine"
        cluster = Cluster()

        def model_copy(self, update: Any) -> Any:
            return self

    job: Any = Job()
    data: Any = _Data()
    from cluster.channel import Message

    events: list[Any] = []
    verification = Verification(VerifySettings(job, data, (2, 3), 5), events.append)
    stages = []
    while (stage := verification.next_stage()) is not None:
        stages.append(stage.name)
        verification.payload(stage, len(stages), stage.workers)
        verification.on_message(Message(1, 0, "outcome", outcomes[stage.name]))
    return stages, verification.result(None)


def test_plain_keras_runs_once_more_only_where_something_differs() -> None:
    same = {"plain Keras": outcome(), "2 workers": outcome(), "3 workers": outcome()}
    stages, certificate = run(same)
    assert stages == ["plain Keras", "2 workers", "3 workers"]
    assert certificate["verdict"] == "equal"
    assert certificate["rounding"] is None
    again = "plain Keras, rows of each batch reordered"
    stages, certificate = run({**same, "3 workers": outcome(0.5), again: outcome(1e-9)})
    assert stages[-1] == again
    assert [each["verdict"] for each in certificate["comparisons"]] == ["equal", "differs"]
    assert certificate["verdict"] == "differs"


def test_rounding_is_not_asked_for_where_the_order_of_rows_has_a_meaning() -> None:
    """Dropout draws another mask for each place: rows that change places prove nothing."""
    plain = {**outcome(), "is_in_any_order": False}
    stages, certificate = run(
        {"plain Keras": plain, "2 workers": outcome(), "3 workers": outcome(0.05)}
    )
    assert stages == ["plain Keras", "2 workers", "3 workers"]
    assert certificate["verdict"] == "differs"
