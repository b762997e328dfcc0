"""JSON for other programs: null for numbers that JSON does not have (NaN, infinity)."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def dump_finite(
    value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None
) -> str:
    """The value as JSON that every reader accepts.

    Args:
        value: Plain values.
        indent: As in `json.dumps`.
        default: Makes a plain value of another one.
    """
    return json.dumps(finite(value), indent=indent, default=default, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
