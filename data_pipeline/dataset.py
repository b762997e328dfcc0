"""Chunks of rows as a `tf.data.Dataset`, assembled ahead of use.

The dataset is a range of chunk numbers, mapped: starting anywhere is starting the range there. The
only place of the data pipeline's way through a run that knows TensorFlow.
"""

import tensorflow as tf

from data_pipeline.features import InputLayout
from data_pipeline.reader import CHUNKS_AHEAD, ChunkSource


def chunk_dataset(source: ChunkSource, layout: InputLayout, first: int) -> tf.data.Dataset:
    """Chunks `first`, `first + 1`, ... of a source, assembled ahead of use."""
    signature = chunk_signature(layout)

    def assemble(number: tf.Tensor) -> tuple[tf.Tensor, ...]:
        arrays = tf.numpy_function(source.assemble, [number], [spec.dtype for spec in signature])
        return tuple(
            tf.ensure_shape(array, spec.shape)
            for array, spec in zip(arrays, signature, strict=True)
        )

    options = tf.data.Options()
    options.threading.private_threadpool_size = 2
    options.autotune.enabled = False
    return (
        tf.data.Dataset.range(first, source.chunks)
        .map(assemble, num_parallel_calls=1)
        .prefetch(CHUNKS_AHEAD)
        .with_options(options)
    )


def chunk_signature(layout: InputLayout) -> tuple[tf.TensorSpec, ...]:
    """Types and shapes of a chunk's tensors, in the order of the fields of `ChunkRows`."""
    return (
        tf.TensorSpec((None, *layout.input_shape), tf.float32),
        tf.TensorSpec((None, layout.label_size), layout.label_dtype),
        tf.TensorSpec((None,), tf.float32),
        tf.TensorSpec((None,), tf.int32),
        tf.TensorSpec((None,), tf.float32),
        tf.TensorSpec((None,), tf.int32),
    )
