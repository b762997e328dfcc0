"""A run that was cut inside an epoch goes on on another number of workers as if nothing was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lockstep
from lockstep.api import TrainOptions
from tests.support.jobs import ROWS, make_job
from tests.support.plain_keras import fit_plain

pytestmark = pytest.mark.usefixtures("ray_session")

OWN_METRIC = """
import keras

@keras.saving.register_keras_serializable("tests")
class Decaying(keras.metrics.Metric):
    def __init__(self, name="decaying", **settings):
        super().__init__(name=name, **settings)
        self.state = self.add_variable((), initializer="ones", name="state")

    def update_state(self, y_true, y_pred, sample_weight=None):
        error = keras.ops.max(keras.ops.abs(y_true - y_pred))
        self.state.assign(0.9 * self.state + error)

    def result(self):
        return self.state * 1.0

    def reset_state(self):
        self.state.assign(keras.ops.ones(()))
"""


@pytest.mark.long
@pytest.mark.parametrize("workers", [(2, 3), (3, 1)])
def test_state_of_every_kind_comes_along(
    rows: Path, tmp_path: Path, workers: tuple[int, int]
) -> None:
    """The user's metric, accumulators, averages, normalisation, and the rest of the epoch."""
    code = tmp_path / "own.py"
    code.write_text(OWN_METRIC)

    def job(count: int, **changes: Any) -> dict[str, Any]:
        adam = {"learning_rate": 0.01, "epsilon": 1e-3, "gradient_accumulation_steps": 3}
        return make_job(
            rows,
            tmp_path / "runs",
            model__layers=[
                {"Dense": {"units": 8, "use_bias": False}},
                "BatchNormalization",
                {"Activation": {"activation": "tanh"}},
                {"Dense": {"units": 1}},
            ],
            compile__optimizer={"Adam": {**adam, "use_ema": True, "ema_momentum": 0.9}},
            compile__metrics=["mae", f"{code}:Decaying"],
            train__sync_batch_norm=True,
            train__epochs=3,
            train__steps_per_execution=1,
            data__test=None,
            cluster__workers=count,
            export={"h5": False, "saved_model": False},
            **changes,
        )

    model, history = fit_plain(job(1), validation_batch_size=64)
    first, then = workers
    cut = lockstep.train(job(first, train__max_time_s=0.05))
    assert cut.summary["ended_by"] == "train.max_time_s"
    assert cut.summary["steps"] % 16 != 0  # inside an epoch
    run = lockstep.train(job(then), options=TrainOptions(is_resume=True))
    assert run.folder == cut.folder
    assert run.summary["rows_seen"] == 3 * ROWS["train"]
    for ours, theirs in zip(run.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=4e-5, atol=4e-5)
    for name, values in history.history.items():
        np.testing.assert_allclose(run.history[name], values, rtol=4e-5, atol=4e-5, err_msg=name)
