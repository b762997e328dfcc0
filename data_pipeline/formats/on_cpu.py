"""TensorFlow for reading files: on the CPU, leaving the memory of GPUs to those who train."""

from typing import Any

import tensorflow as tf


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
