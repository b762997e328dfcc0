"""Keras callbacks in a group of workers: run once, on rank 0; what they decide holds for all.

Callbacks see a plain Keras model (the *shadow*: a copy outside the strategy, brought up to date
before each hook), so they may save, predict or evaluate without any collective. Afterwards whatever
they changed, weights, learning rate or `stop_training`, is broadcast, so ranks cannot disagree.
With one worker the shadow is the model itself.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from configs.schema import Job
from trainer.callback_state import pack, unpack
from trainer.errors import CallbackFailed, user_code_error
from trainer.model import make
from trainer.payloads import Arrays
from trainer.state import capture, named_variables, restore
from trainer.strategy import Group

_PATH_ARGUMENTS = ("filename", "filepath", "log_dir", "backup_dir")
_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
_TEST_HOOKS = ("on_test_begin", "on_test_end")
_TEST_BATCH_HOOKS = ("on_test_batch_begin", "on_test_batch_end")
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
        self._told: set[tuple[int, str]] = set()
        self._warnings: list[str] = []
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
            kept = {k: v for k, v in state.get(str(index), {}).items() if k != _LOG_BYTES}
            unpack(callback, kept, arrays)

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
            packed = pack(callback, f"callbacks/{index}")
            plain[str(index)] = packed.plain
            arrays |= packed.arrays
            self._note_left_out(callback, packed.left_out)
            if isinstance(callback, keras.callbacks.CSVLogger):
                plain[str(index)][_LOG_BYTES] = _log_bytes(callback)
        return plain, arrays

    def take_warnings(self) -> list[str]:
        """What of the callbacks' state cannot be kept; each attribute is told once."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def _note_left_out(
        self, callback: keras.callbacks.Callback, left_out: Mapping[str, str]
    ) -> None:
        for name, kind in left_out.items():
            if (id(callback), name) in self._told:
                continue
            self._told.add((id(callback), name))
            self._warnings.append(
                f"callback {type(callback).__name__}: its attribute {name!r} ({kind}) is in no "
                "checkpoint. Numbers, texts, arrays, and lists, tuples, sets and dictionaries of "
                "them are kept; or give the callback get_state() and set_state(state)."
            )

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
            raise CallbackFailed(hook, error) from error
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
