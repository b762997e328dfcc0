"""What a job under chaos brings of its own: a metric that counts rows, and a slow callback.

Named in jobs by this file's path, as a user names code of theirs.
"""

import time

import keras

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
