"""Engine B inside a training process: many cases, one after the other, in one group.

Each goes through `trainer`'s own learner and loop, callbacks and checkpoints included; a second
fit goes on from the first one's snapshot, as `--resume` does.
"""

import contextlib
import functools
import gc
import itertools
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from cluster.channel import Channel
from cluster.template import Launch
from configs.schema import Job
from data_pipeline.blocks import BlockReader
from tests.contract.parity.engines import Outcome, Prepared
from trainer import batch, keras_adapter, step
from trainer.learner import Learner
from trainer.payloads import TrainingPayload
from trainer.strategy import Group
from trainer.worker import make_loop, weights_sha256


def main(channel: Channel, launch: Launch) -> None:
    """`launch.payload` is (devices, [(key, Prepared, sabotage)])."""
    devices, cases = launch.payload
    group = Group(launch.rank, launch.addresses, 1, devices)
    channel.send("ready")
    for key, prepared, sabotage in cases:
        channel.send("begin", key)
        keras.utils.clear_session()
        if sabotage is not None and sabotage.startswith("only rank"):
            outcome = run_alone(prepared, group, sabotage)
        else:
            with sabotaged(sabotage, group):
                outcome = run_case(prepared, group)
        if launch.rank == 0:
            channel.send("outcome", (key, outcome))
        gc.collect()
    channel.send("finished")
    channel.wait_for("leave", 120.0)


def run_case(prepared: Prepared, group: Group) -> Outcome:
    """Train, evaluate and predict as the case says; the same outcome as engine A's."""
    case = prepared.case
    cluster = {"workers": group.size, "cpu_devices_per_worker": group.devices}
    job = prepared.job.model_copy(
        update={"cluster": prepared.job.cluster.model_copy(update=cluster)}
    )
    every = 1 if case.validates else 10**6
    outcome: Outcome = {}
    snapshot: Any = None
    learner = Learner(_with_epochs(job, case.fits * case.epochs, every), prepared.data, group)
    for fit in range(1, case.fits + 1):
        job = _with_epochs(job, fit * case.epochs, every)
        link = Ears(lambda: False)
        loop = make_loop(TrainingPayload(job, prepared.data, job.runs_dir), learner, link)
        if snapshot is not None:
            _forget(learner)
            loop.restore(snapshot)
        loop.run()
        if group.rank == 0:
            outcome |= _history(link.heard)
        snapshots = [body for kind, body in link.heard if kind == "snapshot"]
        snapshot = group.broadcast(snapshots[-1] if snapshots else None)
        results = learner.evaluate("validation")
        outcome |= {f"evaluate/{fit}/{name}": value for name, value in results.items()}
        outcome |= _weights_and_predictions(learner, prepared, fit)
        digests = group.gather(
            np.frombuffer(bytes.fromhex(weights_sha256(learner.model)), np.int32)
        )
        if len(np.unique(digests, axis=0)) != 1:
            raise RuntimeError("ranks hold different weights")
    return outcome


class Ears:
    """A link that keeps what it is told; arrays are copied, as on their way to a coordinator."""

    def __init__(self, is_asked_to_stop: Callable[[], bool]) -> None:
        self.heard: list[tuple[str, Any]] = []
        self._is_asked_to_stop = is_asked_to_stop

    def send(self, kind: str, body: Any = None) -> None:
        self.heard.append((kind, body))

    def send_large(self, kind: str, body: Any) -> None:
        self.send(kind, pickle.loads(pickle.dumps(body)))

    def mark(self, phase: str, step: int = -1) -> None:
        pass

    def has_command(self, command: str) -> bool:
        return command == "stop" and self._is_asked_to_stop()


def _forget(learner: Learner) -> None:
    """Lose all state, as a process does that ends: what the next fit has comes by its snapshot."""
    for device in range(learner.group.devices):
        variables = keras_adapter.all_variables(learner.model)
        with learner.group.copies(variables, device):
            for variable in variables:
                variable.assign(keras.ops.zeros_like(variable))


def run_alone(prepared: Prepared, group: Group, who: str) -> Outcome:
    """Train while one rank alone wants to end: `only rank R asks to stop` or `... is out of time`.

    The outcome's `steps` and `stopped` are those of every rank.
    """
    job = _with_epochs(prepared.job, 50, 10**6)
    train = job.train.model_copy(update={"steps_per_execution": 2, "max_time_s": 1e6})
    job = job.model_copy(update={"train": train})
    learner = Learner(job, prepared.data, group)
    is_mine = who.startswith(f"only rank {group.rank} ")
    asked = itertools.count()

    def wants_to_end(*_: Any) -> bool:
        return is_mine and next(asked) > 5

    link = Ears(wants_to_end if who.endswith("asks to stop") else lambda: False)
    loop = make_loop(TrainingPayload(job, prepared.data, job.runs_dir), learner, link)
    with contextlib.ExitStack() as stack:
        if who.endswith("is out of time"):
            stack.enter_context(mock.patch.object(loop, "_is_spent", wants_to_end))
        loop.run()
    return {
        "steps": group.gather(np.array([loop.progress.step])).ravel().tolist(),
        "stopped": group.gather(np.array([int(loop.is_stopped)])).ravel().tolist(),
        "of": 50 * prepared.data.plan.steps_per_epoch,
    }


def _with_epochs(job: Job, epochs: int, validation_freq: int) -> Job:
    train = {"epochs": epochs, "validation_freq": validation_freq}
    return job.model_copy(update={"train": job.train.model_copy(update=train)})


def _history(reports: list[tuple[str, Any]]) -> Outcome:
    hidden = ("epoch", "step", "learning_rate", "epoch_s", "rows_per_s")
    return {
        f"history/{name}/{body['epoch']}": value
        for kind, body in reports
        if kind == "epoch"
        for name, value in body.items()
        if name not in hidden
    }


def _weights_and_predictions(learner: Learner, prepared: Prepared, fit: int) -> Outcome:
    model = learner.model
    source = prepared.data.sources["validation"]
    reader = BlockReader(source, prepared.data.layout, "error")
    blocks = [reader.read(number) for number in range(len(source.blocks))]
    columns = [
        np.concatenate(parts).reshape(source.rows, -1)
        for parts in zip(*(block.features for block in blocks), strict=True)
    ]
    inputs = np.concatenate(columns, axis=1).reshape(-1, *prepared.data.layout.input_shape)
    with learner.group.copies(model.variables, 0):
        outcome: Outcome = {
            f"weights/{fit}/{index}": np.array(variable.value)
            for index, variable in enumerate(model.weights)
        }
        predict = functools.partial(model, training=False)
        parts = [predict(tf.constant(inputs[i : i + 1024])) for i in range(0, len(inputs), 1024)]
        outcome[f"predictions/{fit}"] = np.concatenate([np.array(part) for part in parts])
    return outcome


def sabotaged(which: str | None, group: Group) -> Any:
    """Switch one feature of the exact step off: what then comes out must differ."""
    if which is None:
        return contextlib.nullcontext()
    if which == "divisor left local":
        alone = property(lambda _: tf.constant(1.0 / group.replicas))
        return mock.patch.object(batch.BatchRows, "part", alone)
    if which == "penalties on every worker":
        original = batch.Scorer._extra_losses

        def on_every_worker(self: Any, rows: Any, mode: Any) -> Any:
            return original(self, rows, mode) / rows.part

        return mock.patch.object(batch.Scorer, "_extra_losses", on_every_worker)
    reduced = step.TrainingStep._reduced

    def clipped_first(self: Any, replica: Any, gradients: Any, part: Any) -> Any:
        clipped = self._model.optimizer._clip_gradients(gradients)
        return reduced(self, replica, clipped, part)

    return mock.patch.object(step.TrainingStep, "_reduced", clipped_first)
