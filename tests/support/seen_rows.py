"""What a job under chaos brings of its own: a metric that counts rows, and code that misbehaves.

Named in jobs by this file's path, as a user names code of theirs. What misbehaves does so while a
file exists: a test removes it where a user would correct the code.
"""

import os
import signal
import time
from pathlib import Path

import keras
import tensorflow as tf

ROWS = 1003
"""As many as the training rows of `tests.support.jobs`."""


@keras.saving.register_keras_serializable("tests")
class Seen(keras.metrics.Metric):
    """How many of the rows were seen once, and how many otherwise; the label is a row's id."""

    def __init__(self, name="seen", **settings):
        super().__init__(name=name, **settings)
        self.times = self.add_variable((ROWS,), initializer="zeros", name="times")

    def update_state(self, y_true, y_pred, sample_weight=None):
        ids = keras.ops.cast(keras.ops.reshape(y_true, (-1,)), "int32")
        seen = keras.ops.one_hot(ids, ROWS)
        self.times.assign(self.times + keras.ops.sum(seen, axis=0))

    def result(self):
        is_once = keras.ops.cast(self.times == 1, "float32")
        is_otherwise = keras.ops.cast(self.times > 1, "float32")
        return {"once": keras.ops.sum(is_once), "more_than_once": keras.ops.sum(is_otherwise)}

    def reset_state(self):
        self.times.assign(keras.ops.zeros((ROWS,)))


class Slow(keras.callbacks.Callback):
    """Lets an epoch take longer."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def on_epoch_end(self, epoch, logs=None):
        time.sleep(self.seconds)


class SlowValidation(keras.callbacks.Callback):
    """Lets a validation take longer."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def on_test_begin(self, logs=None):
        time.sleep(self.seconds)


class Hungry(keras.callbacks.Callback):
    """Takes memory for a moment at each epoch's end."""

    def __init__(self, size_bytes):
        super().__init__()
        self.size_bytes = size_bytes

    def on_epoch_end(self, epoch, logs=None):
        taken = bytearray(self.size_bytes)
        taken[:: os.sysconf("SC_PAGE_SIZE")] = b"1" * len(taken[:: os.sysconf("SC_PAGE_SIZE")])


class Deadly(keras.callbacks.Callback):
    """Kills its process at the end of an epoch, always."""

    def __init__(self, file, epoch):
        super().__init__()
        self.file = file
        self.at_epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.at_epoch and Path(self.file).exists():
            os.kill(os.getpid(), signal.SIGKILL)


class Raising(keras.callbacks.Callback):
    """Raises at the end of an epoch: once, or as long as the file is there."""

    def __init__(self, file, epoch, is_once):
        super().__init__()
        self.file = file
        self.at_epoch = epoch
        self.is_once = is_once

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.at_epoch and Path(self.file).exists():
            if self.is_once:
                Path(self.file).unlink()
            raise ConnectionError("the dashboard does not answer")


class Endless(keras.callbacks.Callback):
    """Does not come back from the end of an epoch, once."""

    def __init__(self, file, epoch):
        super().__init__()
        self.file = file
        self.at_epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.at_epoch and Path(self.file).exists():
            Path(self.file).unlink()
            while True:
                pass


@keras.saving.register_keras_serializable("tests")
class Fuse(keras.metrics.Metric):
    """Raises in the compiled step, always after so many batches of an epoch."""

    def __init__(self, file, batches, name="fuse", **settings):
        super().__init__(name=name, **settings)
        self.is_live = Path(file).exists()
        self.batches = batches
        self.count = self.add_variable((), initializer="zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        if self.is_live:
            tf.debugging.assert_less(self.count.value, float(self.batches), "the fuse has blown")
        self.count.assign(self.count + 1)

    def result(self):
        return self.count * 1.0
