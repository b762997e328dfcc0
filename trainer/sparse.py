"""Sparse gradients of all replicas, put together slice by slice.

Keras's optimizers treat slices as they come, repeated rows included (Adam squares each), so a
global step needs the same slices as a single process, not their sums. They travel at a fixed size:
TensorFlow ties a collective inside a loop to the shape that it saw first, and its own gathering of
slices fails when parts of batches differ. What is left free is filled with zeros for row 0, which
change nothing.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from trainer.strategy import Replica


def most_slices(model: keras.Model, input_shape: Sequence[int], most_rows: int) -> dict[int, int]:
    """How many slices a replica's gradient may have, by index of the trainable variable.

    Found by trial on one row and on two: the number grows evenly with the rows. Only variables
    with sparse gradients are named.
    """
    found: list[dict[int, int]] = []
    variables = [variable.value for variable in model.trainable_variables]
    for count in (1, 2):
        with tf.GradientTape() as tape:
            output = model(tf.zeros((count, *input_shape)), training=False)
            total = tf.reduce_sum(output)
        gradients = tape.gradient(total, variables)
        found.append(
            {
                index: int(gradient.indices.shape[0])
                for index, gradient in enumerate(gradients)
                if isinstance(gradient, tf.IndexedSlices)
            }
        )
    return {
        index: found[0][index] + (found[1][index] - found[0][index]) * (most_rows - 1)
        for index in found[0]
    }


def padded(gradient: tf.IndexedSlices, slices: int, replica: Replica) -> tuple[tf.Tensor, Any]:
    """Values `(replicas, slices, ...)` and indices of a replica, zero elsewhere, to be summed."""
    values, indices = gradient.values, gradient.indices
    free = slices - tf.shape(indices)[0]
    dense_axes = [[0, 0]] * (len(values.shape) - 1)
    values = tf.pad(values, [[0, free], *dense_axes])
    values = tf.ensure_shape(values, (slices, *values.shape[1:]))
    indices = tf.ensure_shape(tf.pad(indices, [[0, free]]), (slices,))
    return replica.slot(values), replica.slot(indices)


def joined(values: tf.Tensor, indices: tf.Tensor, like: tf.IndexedSlices) -> tf.IndexedSlices:
    """One sparse gradient of what all replicas brought."""
    flat = tf.reshape(values, (-1, *values.shape[2:]))
    return tf.IndexedSlices(flat, tf.reshape(indices, (-1,)), like.dense_shape)


def zero_slices(like: tf.IndexedSlices, shape: Sequence[int]) -> tf.IndexedSlices:
    """A sparse gradient of the types of `like` that touches no row of a variable of this shape."""
    values = tf.zeros((0, *shape[1:]), like.values.dtype)
    dense_shape = tf.constant(list(shape), like.dense_shape.dtype)
    return tf.IndexedSlices(values, tf.zeros((0,), like.indices.dtype), dense_shape)
