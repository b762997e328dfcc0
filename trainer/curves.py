"""Learning curves as TensorBoard event files: one point an epoch, by rank 0."""

import sys
from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf


class CurveWriter:
    """Writes `tensorboard/train` and `tensorboard/validation` below a run folder."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / "tensorboard"
        self._writers: dict[str, tf.summary.SummaryWriter] = {}

    def write(self, epoch: int, logs: Mapping[str, float], learning_rate: float) -> None:
        """Add an epoch's values; names are those of Keras's own TensorBoard callback.

        Curves are a picture: a disk that is full leaves a gap in them, and ends no training.
        """
        try:
            self._write(epoch, logs, learning_rate)
        except (OSError, tf.errors.OpError) as error:
            print(f"learning curves of epoch {epoch}: {error}", file=sys.stderr)
            self._writers.clear()

    def _write(self, epoch: int, logs: Mapping[str, float], learning_rate: float) -> None:
        for name, value in {**logs, "learning_rate": learning_rate}.items():
            role = "validation" if name.startswith("val_") else "train"
            if role not in self._writers:
                self._writers[role] = tf.summary.create_file_writer(str(self._folder / role))
            with self._writers[role].as_default():
                tf.summary.scalar(f"epoch_{name.removeprefix('val_')}", value, step=epoch)
        for writer in self._writers.values():
            writer.flush()
