"""TensorFlow's operations for reading files: on the CPU, with errors in plain words."""

import re
from typing import Any

import tensorflow as tf

_PLACES = re.compile(r"\{\{.*?\}\} ?| \[Op:.*")


def on_cpu() -> Any:
    """A context in which eager operations run on the CPU.

    Starting TensorFlow takes hold of the GPUs of a machine; here it takes no more of their memory
    than it has to, unless the process uses them already.
    """
    try:
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError:
        pass  # initialised by the process's owner, who knows better
    return tf.device("CPU:0")


def reason(error: Exception) -> str:
    """What an operation says of its failure, without the places in TensorFlow's graph."""
    lines = str(getattr(error, "message", error)).strip().splitlines()
    return _PLACES.sub("", lines[0]).rstrip(" .") if lines else "no reason"
