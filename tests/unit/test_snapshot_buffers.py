"""What a snapshot holds does not change while training goes on, and takes no new memory."""

import threading
from typing import Any

import keras
import numpy as np

from trainer.payloads import Snapshot
from trainer.snapshots import SnapshotSender
from trainer.state import hold


class SlowLink:
    """Takes a snapshot when it is let; keeps a copy of what it then saw."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.addresses: list[set[int]] = []

    def send(self, kind: str, body: Any = None) -> None:
        raise AssertionError(f"nothing but snapshots is expected, not {kind}")

    def send_large(self, kind: str, body: Snapshot) -> None:
        self.go_on.wait(10)
        copies = {name: np.array(array) for name, array in body.arrays.items()}
        self.sent.append((body.step, copies))
        self.addresses.append({array.ctypes.data for array in body.arrays.values()})

    def mark(self, phase: str, step: int = -1) -> None:
        pass

    def has_command(self, command: str) -> bool:
        return False


def test_steps_taken_while_a_snapshot_is_sent_do_not_show_in_it() -> None:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    link = SlowLink()
    sender = SnapshotSender(link)

    for step in range(3):
        link.go_on.clear()
        for variable in model.variables:
            variable.assign(np.full(variable.shape, step))
        sender.submit(Snapshot(step, hold(model), {"reason": "interval"}))
        for variable in model.variables:  # as optimizers do: in place where nobody holds it
            variable.value.assign_add(np.full(variable.shape, 0.5, np.float32))
        link.go_on.set()
        sender.flush()

    assert [step for step, _ in link.sent] == [0, 1, 2]
    for step, arrays in link.sent:
        weights = [array for name, array in arrays.items() if name.startswith("model/")]
        assert len(weights) == 2
        assert all((array == step).all() for array in weights)
    assert link.addresses[1] == link.addresses[2]
    assert not link.addresses[0] & link.addresses[1]
