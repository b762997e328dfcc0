"""What a run writes for TensorBoard is what TensorBoard reads."""

from pathlib import Path

import pytest

from tests.support.curves import read_curves
from trainer.curves import CurveWriter


def test_a_run_and_its_resumption_are_one_curve(tmp_path: Path) -> None:
    for epochs in (range(2), range(2, 4)):  # each generation of workers has a writer of its own
        writer = CurveWriter(tmp_path)
        for epoch in epochs:
            logs = {"loss": 4.0 - epoch, "mae": 1.0, "val_loss": 5.0 - epoch}
            writer.write(epoch, logs, learning_rate=0.5)
    train = read_curves(tmp_path / "tensorboard" / "train")
    assert train.keys() == {"epoch_loss", "epoch_mae", "epoch_learning_rate"}
    assert train["epoch_loss"] == [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)]
    assert train["epoch_learning_rate"] == [(epoch, pytest.approx(0.5)) for epoch in range(4)]
    validation = read_curves(tmp_path / "tensorboard" / "validation")
    assert validation == {"epoch_loss": [(0, 5.0), (1, 4.0), (2, 3.0), (3, 2.0)]}
