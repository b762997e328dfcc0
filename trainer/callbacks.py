"""Keras callbacks in a group of workers: run once, on rank 0; what they decide holds for all.

Callbacks see a plain Keras model (the *shadow*: a copy outside the strategy, brought up to date
before each hook), so they may save, predict or evaluate without any collective. Afterwards whatever
they changed, weights, learning rate or `stop_training`, is broadcast, so ranks cannot disagree.
With one worker the shadow is the model itself.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from configs.schema import Job
from trainer.errors import user_code_error
from trainer.model import make
from trainer.payloads import Arrays
from trainer.state import capture, named_variables, restore
from trainer.strategy import Group

_PATH_ARGUMENTS = ("filename", "filepath", "log_dir", "backup_dir")
# What the constructor or `on_train_begin` finds anew: parameters, places, a file's header.
_NOT_STATE = {"params", "_params", *_PATH_ARGUMENTS, "append", "append_header"}
_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
_TEST_HOOKS = ("on_test_begin", "on_test_end")
_TEST_BATCH_HOOKS = ("on_test_batch_begin", "on_test_batch_end")
_PLAIN = (bool, int, float, str, type(None))
_LOG_BYTES = "bytes written"


@dataclass(frozen=True)
class _Decision:
    """What callbacks changed."""

    stop: bool
    arrays: Arrays


class CallbackRunner:
    """Calls the job's callbacks in Keras's order. Every method is a collective.

    Args:
        job: Names the callbacks.
        group: Who takes part.
        model: The model under the strategy.
        make_shadow: Builds the same model outside the strategy; called on rank 0 only, and only
            with several replicas.
        run_folder: Relative paths in callbacks lie in it.
        steps_per_epoch: Told to the callbacks, as `fit` does.
    """

    def __init__(
        self,
        job: Job,
        group: Group,
        model: keras.Model,
        make_shadow: Callable[[], keras.Model],
        run_folder: Path,
        steps_per_epoch: int,
    ) -> None:
        self._group = group
        self._model = model
        self._callbacks: list[keras.callbacks.Callback] = []
        self._list: keras.callbacks.CallbackList | None = None
        self._shadow = model
        self.should_stop = False
        self.is_empty = not job.train.callbacks
        if group.rank == 0 and not self.is_empty:
            self._callbacks = [_make_callback(spec, run_folder) for spec in job.train.callbacks]
            if group.replicas > 1:
                self._shadow = make_shadow()
            self._shadow.stop_training = False
            self._list = keras.callbacks.CallbackList(
                self._callbacks,
                add_history=True,
                model=self._shadow,
                epochs=job.train.epochs,
                steps=steps_per_epoch,
                verbose=0,
            )
        wants = (
            any(_wants_batches(callback) for callback in self._callbacks),
            self._overrides(_TEST_HOOKS),
            self._overrides(_TEST_BATCH_HOOKS),
        )
        agreed = (False, False, False) if self.is_empty else group.broadcast(wants)
        self.wants_batches = bool(agreed[0])
        self._wants_tests = bool(agreed[1])
        self.wants_test_batches = bool(agreed[2])

    def on_train_begin(self, state: dict[str, Any], arrays: Arrays) -> None:
        """Begin, or go on from the state that an earlier run's `state` gave."""
        for callback in self._callbacks:
            if state and isinstance(callback, keras.callbacks.CSVLogger):
                callback.append = True
        for index, callback in enumerate(self._callbacks):
            _cut_log(callback, state.get(str(index), {}))
        self._call("on_train_begin")
        for index, callback in enumerate(self._callbacks):
            _restore_callback(callback, state.get(str(index), {}), arrays, index)

    def on_train_end(self, logs: dict[str, float]) -> None:
        """After the last epoch."""
        self._call("on_train_end", logs)

    def on_epoch_begin(self, epoch: int) -> None:
        """Before an epoch's first step."""
        self._call("on_epoch_begin", epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """After validation."""
        self._call("on_epoch_end", epoch, logs)

    def on_train_batch_begin(self, step: int) -> None:
        """Before a call of the compiled loop; `step` counts within the epoch."""
        if self.wants_batches:
            self._call("on_train_batch_begin", step)

    def on_train_batch_end(self, step: int, logs: dict[str, float]) -> None:
        """After a call of the compiled loop; `step` is its last one."""
        if self.wants_batches:
            self._call("on_train_batch_end", step, logs)

    def on_test_begin(self) -> None:
        """Before validation."""
        if self._wants_tests:
            self._call("on_test_begin")

    def on_test_batch_begin(self, step: int) -> None:
        """Before a call of the compiled evaluation; `step` counts its batches."""
        self._call("on_test_batch_begin", step)

    def on_test_batch_end(self, step: int, logs: dict[str, float]) -> None:
        """After a call of the compiled evaluation."""
        self._call("on_test_batch_end", step, logs)

    def on_test_end(self, logs: dict[str, float]) -> None:
        """After validation, with its metrics, which `on_epoch_end` shows as `val_...`."""
        if self._wants_tests:
            self._call("on_test_end", logs)

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """Plain attributes and arrays of all callbacks, for a snapshot; empty but on rank 0."""
        plain: dict[str, Any] = {}
        arrays: Arrays = {}
        for index, callback in enumerate(self._callbacks):
            plain[str(index)] = {}
            for name, value in vars(callback).items():
                if isinstance(value, np.generic):
                    value = value.item()
                if name in _NOT_STATE:
                    continue
                if _is_plain(value):
                    plain[str(index)][name] = value
                elif _is_array_list(value):
                    for place, array in enumerate(value):
                        arrays[f"callbacks/{index}/{name}/{place:04d}"] = np.asarray(array)
            if isinstance(callback, keras.callbacks.CSVLogger):
                plain[str(index)][_LOG_BYTES] = _log_bytes(callback)
        return plain, arrays

    def _overrides(self, hooks: Sequence[str]) -> bool:
        return any(_has_hook(callback, hook) for callback in self._callbacks for hook in hooks)

    def _call(self, hook: str, *arguments: Any) -> None:
        if self.is_empty:
            return
        decision = self._decide(hook, *arguments) if self._list is not None else None
        decision = self._group.broadcast(decision)
        self.should_stop = self.should_stop or decision.stop
        if self._group.replicas > 1 and decision.arrays:
            variables = named_variables(self._model)
            for name, array in decision.arrays.items():
                variables[name].assign(array)

    def _decide(self, hook: str, *arguments: Any) -> _Decision:
        """Run one hook of every callback on the shadow, and find what changed."""
        before: Arrays = {}
        if self._shadow is not self._model:
            before = capture(self._model)
            restore(self._shadow, before)
        try:
            getattr(self._list, hook)(*arguments)
        except Exception as error:
            raise user_code_error(f"a callback ({hook})", error) from error
        changed: Arrays = {}
        if self._shadow is not self._model:
            after = capture(self._shadow)
            changed = {
                name: new
                for (name, old), new in zip(before.items(), after.values(), strict=True)
                if not np.array_equal(old, new, equal_nan=True)
            }
        return _Decision(bool(self._shadow.stop_training), changed)


def _make_callback(spec: Any, run_folder: Path) -> keras.callbacks.Callback:
    if isinstance(spec, dict):
        name, arguments = next(iter(spec.items()))
        arguments = dict(arguments or {})
        for key in _PATH_ARGUMENTS:
            if isinstance(arguments.get(key), str):
                path = run_folder / arguments[key]
                path.parent.mkdir(parents=True, exist_ok=True)
                arguments[key] = str(path)
        spec = {name: arguments}
    callback = make("callbacks", spec if isinstance(spec, dict) else {spec: {}})
    if not isinstance(callback, keras.callbacks.Callback):
        raise user_code_error(
            str(spec), TypeError(f"{type(callback).__name__} is not a keras.callbacks.Callback")
        )
    return callback


def _wants_batches(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback does something at batches; those of Keras that only might do not."""
    if isinstance(callback, keras.callbacks.ModelCheckpoint):
        return bool(callback.save_freq != "epoch")
    if isinstance(callback, keras.callbacks.TensorBoard):
        return bool(callback.update_freq != "epoch")
    return any(_has_hook(callback, hook) for hook in _BATCH_HOOKS)


def _has_hook(callback: keras.callbacks.Callback, hook: str) -> bool:
    """Whether a hook does something; it may be the instance's, as in LambdaCallback."""
    own = getattr(callback, hook)
    return getattr(own, "__func__", own) is not getattr(keras.callbacks.Callback, hook)


def _log_bytes(callback: keras.callbacks.CSVLogger) -> int:
    if callback.csv_file is not None and not callback.csv_file.closed:
        callback.csv_file.flush()
    path = Path(callback.filename)
    return path.stat().st_size if path.exists() else 0


def _cut_log(callback: keras.callbacks.Callback, state: dict[str, Any]) -> None:
    """Take back the lines of epochs that will be trained to their end once more."""
    if isinstance(callback, keras.callbacks.CSVLogger) and _LOG_BYTES in state:
        path = Path(callback.filename)
        if path.exists() and path.stat().st_size > state[_LOG_BYTES]:
            os.truncate(path, state[_LOG_BYTES])


def _restore_callback(
    callback: keras.callbacks.Callback, plain: dict[str, Any], arrays: Arrays, index: int
) -> None:
    for name, value in plain.items():
        if name in vars(callback):
            setattr(callback, name, value)
    lists: dict[str, list[Any]] = {}
    for key in sorted(arrays):
        if key.startswith(f"callbacks/{index}/"):
            lists.setdefault(key.split("/")[2], []).append(arrays[key])
    for name, values in lists.items():
        setattr(callback, name, values)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(element) for element in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return isinstance(value, _PLAIN)


def _is_array_list(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(element, np.ndarray) for element in value)
    )
