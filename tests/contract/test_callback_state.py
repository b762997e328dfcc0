"""Whatever a callback remembers comes back from a checkpoint, or is named."""

import enum
import json
import logging
import threading
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

import keras
import numpy as np
import pytest

from trainer.callback_state import pack, unpack


class Colour(enum.Enum):
    RED = 1


class Callback(keras.callbacks.Callback):
    def __init__(self, value=None):
        super().__init__()
        self.value = value


def returned(callback, to):
    """Through a checkpoint: plain values as JSON, arrays beside."""
    packed = pack(callback, "callbacks/0")
    unpack(to, json.loads(json.dumps(packed.plain)), packed.arrays)
    return packed


VALUES = [
    *(None, True, 3, 2.5, "text", float("inf")),
    [1, [2, "three"], (4.0,)],
    (1, (2, [3])),
    {"best": 1.5, 7: [1, 2], (1, 2): {"deep": {"deeper": None}}},
    {3, 1, 2},
    frozenset({"a"}),
    deque([1, 2, 3], maxlen=3),
    OrderedDict([("b", 1), ("a", 2)]),
    [],
    {},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_of_any_depth_come_back(value):
    other = Callback()
    packed = returned(Callback(value), other)
    assert other.value == value
    assert type(other.value) is type(value)
    assert getattr(other.value, "maxlen", None) == getattr(value, "maxlen", None)
    assert packed.left_out == {}


def test_arrays_come_back_wherever_they_lie():
    def arrays():
        return [np.arange(3), {"moving": np.ones((2, 2), np.float16), "n": np.float32(0.5)}]

    mine, other = Callback(arrays()), Callback()
    packed = pack(mine, "callbacks/3")
    assert all(name.startswith("callbacks/3/") for name in packed.arrays)
    mine.value[0][:] = 9  # as a callback does between the snapshot and its writing
    unpack(other, json.loads(json.dumps(packed.plain)), packed.arrays)
    first, second = other.value
    np.testing.assert_array_equal(first, np.arange(3))
    assert second["moving"].dtype == np.float16
    np.testing.assert_array_equal(second["moving"], np.ones((2, 2)))
    assert second["n"] == 0.5
    first += 1  # what comes back is the callback's own


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        ([1, object()], "object"),
        (defaultdict(list, a=[1]), "defaultdict"),
        (np.array(["text"], object), "array of object"),
        (threading.Lock(), "lock"),
        (keras.metrics.Mean, None),
        (len, None),
        (logging.getLogger("mine"), None),
        (Path("somewhere"), None),
        (Colour.RED, None),
    ],
)
def test_what_cannot_be_kept_is_named_unless_it_never_changes(value, kind):
    packed = pack(Callback(value), "callbacks/0")
    assert "value" not in packed.plain
    assert packed.left_out == ({} if kind is None else {"value": kind})
    assert packed.arrays == {}


def test_a_callback_that_knows_better_is_asked():
    class Own(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.hidden = object()
            self.seen = 0

        def get_state(self):
            return {"seen": self.seen, "curve": [np.ones(2)]}

        def set_state(self, state):
            self.seen, self.curve = state["seen"], state["curve"]

    mine, other = Own(), Own()
    mine.seen = 5
    assert returned(mine, other).left_out == {}
    assert other.seen == 5
    np.testing.assert_array_equal(other.curve[0], np.ones(2))


def test_what_early_stopping_remembers_comes_back():
    mine = keras.callbacks.EarlyStopping(monitor="loss", patience=3, restore_best_weights=True)
    mine.best, mine.wait, mine.best_epoch = 0.25, 2, 7
    mine.best_weights = [np.ones((2, 2), np.float32), np.zeros(2, np.float32)]
    other = keras.callbacks.EarlyStopping(monitor="loss", patience=3, restore_best_weights=True)
    packed = returned(mine, other)
    assert (other.best, other.wait, other.best_epoch) == (0.25, 2, 7)
    np.testing.assert_array_equal(other.best_weights[0], np.ones((2, 2)))
    assert packed.left_out == {}
    assert packed.arrays["callbacks/0/best_weights/0000"] is mine.best_weights[0]


def test_the_model_and_the_places_of_files_are_no_state():
    mine = keras.callbacks.ModelCheckpoint("here.keras", monitor="loss")
    mine.set_params({"epochs": 3})
    packed = pack(mine, "callbacks/0")
    assert not {"filepath", "_model", "_params"} & set(packed.plain)
    assert json.loads(json.dumps(packed.plain))["monitor"] == "loss"
