"""A callback for jobs that are timed step by step: notes when each step is complete."""

import time
from pathlib import Path
from typing import Any

import keras


class StepTimes(keras.callbacks.Callback):
    """Appends the monotonic seconds of each step's end to a file.

    Args:
        path: The file; an earlier one is overwritten.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._file = Path(path).open("w", buffering=1)  # noqa: SIM115 - open as long as training

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """After each call of the compiled loop."""
        print(time.monotonic(), file=self._file)
