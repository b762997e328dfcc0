"""What a callback remembers, as plain values and arrays that a checkpoint can hold, and back.

Everything that a callback keeps in its attributes is its state: numbers, texts, arrays, and lists,
tuples, sets and dictionaries of them, however deep. A callback that knows better has
`get_state()`, which returns such values, and `set_state(state)`, which takes them back; then its
attributes are left alone. What cannot be kept is named, never dropped in silence.
"""

import enum
import functools
import io
import logging
import re
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import keras
import numpy as np

from trainer.payloads import Arrays

# What the constructor or `on_train_begin` finds anew: parameters, the model, a file's header.
_NOT_STATE = {
    *("params", "_params", "model", "_model", "append", "append_header"),
    *("filename", "filepath", "log_dir", "backup_dir"),
}
_PLAIN = (bool, int, float, str, type(None))
_SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}
_DICTIONARIES: dict[str, Callable[[Iterable[Any]], Any]] = {"dict": dict, "ordered": OrderedDict}


@dataclass
class Packed:
    """A callback's state.

    Attributes:
        plain: Values that JSON can hold, with references into `arrays`.
        arrays: By names that begin with the prefix that was given.
        left_out: Attributes that cannot be kept though they may change, with their types; none of
            Keras's own callbacks, which make anew what they lack.
    """

    plain: dict[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


_STATELESS = (
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type),
    *(functools.partial, np.ufunc, io.IOBase, logging.Logger, PurePath, re.Pattern, enum.Enum),
)


class _CannotKeep(Exception):
    """A value that no checkpoint can hold; the message is its type."""


def pack(callback: keras.callbacks.Callback, prefix: str) -> Packed:
    """The present state of a callback.

    Args:
        callback: Any.
        prefix: Of the arrays' names.
    """
    packed = Packed()
    is_own = type(callback).__module__.partition(".")[0] != "keras"
    for name, value in _remembered(callback).items():
        arrays: Arrays = {}
        try:
            plain = _packed(value, f"{prefix}/{name}", arrays, is_own)
        except _CannotKeep as error:
            if is_own and not isinstance(value, _STATELESS):
                packed.left_out[name] = str(error)
            continue
        packed.plain[name] = plain
        packed.arrays |= arrays
    return packed


def unpack(callback: keras.callbacks.Callback, plain: dict[str, Any], arrays: Arrays) -> None:
    """Put a state back, also attributes that the callback makes only later."""
    values = {name: _unpacked(value, arrays) for name, value in plain.items()}
    if _has_own_state(callback):
        if values:
            callback.set_state(values["state"])
        return
    for name, value in values.items():
        setattr(callback, name, value)


def _remembered(callback: keras.callbacks.Callback) -> dict[str, Any]:
    if _has_own_state(callback):
        return {"state": callback.get_state()}
    return {name: value for name, value in vars(callback).items() if name not in _NOT_STATE}


def _has_own_state(callback: keras.callbacks.Callback) -> bool:
    return all(callable(getattr(callback, name, None)) for name in ("get_state", "set_state"))


def _packed(value: Any, place: str, arrays: Arrays, is_copied: bool) -> Any:
    """A value as JSON can hold it; arrays go beside, copied where they may be changed in place."""
    if isinstance(value, np.generic):
        if value.dtype.kind not in "biuf":
            raise _CannotKeep(type(value).__name__)
        value = value.item()
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise _CannotKeep(f"array of {value.dtype}")
        name = f"{place}/{len(arrays):04d}"
        arrays[name] = np.array(value) if is_copied else value
        return {"array": name}
    if isinstance(value, deque):
        kept = [_packed(one, place, arrays, is_copied) for one in value]
        return {"deque": kept, "longest": value.maxlen}
    for kind, of_type in _SEQUENCES.items():
        if type(value) is of_type:
            return {kind: [_packed(one, place, arrays, is_copied) for one in value]}
    for kind, of_type in _DICTIONARIES.items():
        if type(value) is of_type:
            items = value.items()
            pairs = [[_packed(one, place, arrays, is_copied) for one in pair] for pair in items]
            return {kind: pairs}
    raise _CannotKeep(type(value).__name__)


def _unpacked(value: Any, arrays: Arrays) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "array":
        return np.array(arrays[content])
    if kind in _DICTIONARIES:
        pairs = ([_unpacked(one, arrays) for one in pair] for pair in content)
        return _DICTIONARIES[kind](pairs)
    values = [_unpacked(one, arrays) for one in content]
    return deque(values, value["longest"]) if kind == "deque" else _SEQUENCES[kind](values)
