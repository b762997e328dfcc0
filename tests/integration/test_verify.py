"""`lockstep verify`: the certificate of a user's own job, and its exit status."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import lockstep
from tests.support.jobs import make_job

pytestmark = pytest.mark.usefixtures("ray_session")

NORMED: list[Any] = [
    {"Dense": {"units": 8}},
    "BatchNormalization",
    {"Activation": {"activation": "tanh"}},
    {"Dense": {"units": 1}},
]


def test_a_job_is_equal_on_two_and_three_workers(rows: Path, tmp_path: Path) -> None:
    certificate = lockstep.verify(make_job(rows, tmp_path), workers=(2, 3), steps=10)
    assert certificate["verdict"] == "equal"
    assert [each["workers"] for each in certificate["comparisons"]] == [2, 3]
    for each in certificate["comparisons"]:
        assert each["greatest"] <= certificate["tolerance"] == 4e-5
        assert each["layers"].keys() == {"small/dense", "small/dense_1", "optimizer"}
        assert each["training"].keys() == each["evaluation"].keys() == {"loss", "mae"}
    assert not any(tmp_path.iterdir())  # nothing is kept


@pytest.mark.long
def test_plain_normalization_differs_as_expected(rows: Path, tmp_path: Path) -> None:
    job = make_job(rows, tmp_path, model__layers=NORMED)
    certificate = lockstep.verify(job, steps=16)
    (comparison,) = certificate["comparisons"]
    assert certificate["verdict"] == comparison["verdict"] == "differs as expected"
    assert "train.sync_batch_norm: true" in comparison["causes"][0]


@pytest.mark.long
def test_synchronised_normalization_is_equal(rows: Path, tmp_path: Path) -> None:
    """With Adam the bias in front of it moves by rounding, in plain Keras too."""
    job = make_job(rows, tmp_path, model__layers=NORMED, train__sync_batch_norm=True)
    certificate = lockstep.verify(job, workers=(2, 3), steps=16)
    assert certificate["verdict"] == "equal"


UNEQUAL = """
import keras
import tensorflow as tf

def build():
    '''Another model under a strategy: what no verification can call equal.'''
    scale = 1.01 if tf.distribute.has_strategy() else 1.0
    return keras.Sequential([
        keras.layers.Dense(4, activation="tanh"),
        keras.layers.Dense(1),
        keras.layers.Rescaling(scale),
    ])
"""


@pytest.mark.long
def test_a_difference_that_nothing_explains_is_status_1(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lockstep import cli

    code = tmp_path / "unequal.py"
    code.write_text(UNEQUAL)
    path = tmp_path / "job.yaml"
    values = make_job(rows, tmp_path / "runs", model={"builder": f"{code}:build"})
    path.write_text(yaml.safe_dump(values))
    command = ["lockstep", "verify", str(path), "--workers", "2", "--steps", "3", "--json"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    certificate = json.loads(capsys.readouterr().out)
    assert certificate["verdict"] == "differs"
    assert certificate["rounding"] is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": (0, 2)}, r"--workers received \[0, 2\]"),
        ({"workers": (2, 2)}, r"--workers received \[2, 2\]"),
        ({"steps": 0}, "--steps received 0"),
    ],
)
def test_bad_numbers_are_told(rows: Path, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(lockstep.UserError, match=message):
        lockstep.verify(make_job(rows, tmp_path), **settings)
