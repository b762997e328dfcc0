"""The processes that `benchmarks.data` times: Lockstep, other ways into TensorFlow, bare decoding.

Run as `python -m benchmarks.data_peers PEER JSON`. Each feeds a compiled function that touches
every value of every batch, first unmeasured until it runs evenly, then for some seconds, and prints
rows, seconds and clock times on its last line.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.data_files import BATCH, Files, all_files, write_tfrecords

_CALL_BATCHES = 100
_SHUFFLE_ROWS = 65_536


def main() -> None:
    """Run one peer and print what it measured."""
    options = json.loads(sys.argv[2])
    print(json.dumps(PEERS[sys.argv[1]](options)))


def timed(counts: Iterator[int], warm_rows: int, least_s: float) -> dict[str, Any]:
    """Rows that arrive in `least_s` seconds, after the first `warm_rows`.

    Args:
        counts: Rows of each batch or chunk, as it is used up.
        warm_rows: Not measured.
        least_s: How long to measure; what arrives at the end of it counts whole.
    """
    while warm_rows > 0:
        warm_rows -= next(counts)
    rows, begin_s, begin = 0, time.time(), time.perf_counter()
    while (seconds := time.perf_counter() - begin) < least_s:
        rows += next(counts)
    return {"rows": rows, "seconds": seconds, "begin_s": begin_s, "end_s": time.time()}


def files_of(options: dict[str, Any]) -> Files:
    """The files that the options name."""
    return all_files(options["is_quick"])[options["files"]]


def run_decoding(options: dict[str, Any]) -> dict[str, Any]:
    """The ceiling: pyarrow on two threads, a matrix for each row group, no TensorFlow."""
    import pyarrow.parquet as pq

    files = files_of(options)
    paths = sorted(map(str, files.folder.glob("*.parquet")))
    per_file = -(-files.rows // files.files // files.block_rows)
    groups = list(itertools.product(paths, range(per_file)))

    def decode(part: list[tuple[str, int]]) -> int:
        rows, opened, name = 0, None, ""
        for path, group in part:
            if opened is None or name != path:
                opened, name = pq.ParquetFile(path, pre_buffer=False), path
            table = opened.read_row_group(group, columns=files.column_names, use_threads=False)
            rows += len(_matrix(table))
        return rows

    def passes() -> Iterator[int]:
        half = len(groups) // 2
        with ThreadPoolExecutor(2) as pool:
            while True:
                yield sum(pool.map(decode, (groups[:half], groups[half:])))

    return timed(passes(), 1, options["least_s"])


def _matrix(table: Any) -> Any:
    """The columns of a row group in one array; what is no number stays a column."""
    import pyarrow as pa

    columns = [column.combine_chunks() for column in table.columns]
    if pa.types.is_fixed_size_list(columns[0].type):
        return columns[0].flatten().to_numpy().reshape(len(table), -1)
    numbers = [column for column in columns if pa.types.is_floating(column.type)]
    matrix = np.empty((len(table), len(numbers)), np.float32)
    for index, column in enumerate(numbers):
        matrix[:, index] = column.to_numpy()
    return matrix


def run_ray(options: dict[str, Any]) -> dict[str, Any]:
    """Ray Data on both cores, unshuffled; the parts of a batch are joined in the compiled function.

    `method` is "iter_tf_batches" or "to_tf".
    """
    import ray

    files = files_of(options)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.read_parquet(str(files.folder), columns=files.column_names)
    *features, label = files.column_names
    touch = _touch_columns(features, label)

    def batches() -> Iterator[int]:
        while True:
            if options["method"] == "to_tf":
                for inputs, labels in dataset.to_tf(
                    feature_columns=features, label_columns=label, batch_size=BATCH
                ):
                    columns = inputs if isinstance(inputs, dict) else {features[0]: inputs}
                    touch({**columns, label: labels})
                    yield len(labels)
            else:
                for batch in dataset.iter_tf_batches(batch_size=BATCH, prefetch_batches=4):
                    touch(batch)
                    yield len(batch[label])

    return timed(batches(), min(20 * BATCH, files.rows // 2), options["least_s"])


def _touch_columns(features: list[str], label: str) -> Callable[[Any], Any]:
    import tensorflow as tf

    @tf.function(reduce_retracing=True)
    def touch(columns: Any) -> Any:
        values = [tf.cast(columns[name], tf.float32) for name in features]
        inputs = values[0] if len(values) == 1 else tf.stack(values, axis=1)
        return tf.reduce_sum(inputs) + tf.reduce_sum(tf.cast(columns[label], tf.float32))

    return touch


def run_generator(options: dict[str, Any]) -> dict[str, Any]:
    """`from_generator` over finished batches, cut from shuffled row groups."""
    import pyarrow.parquet as pq
    import tensorflow as tf

    files = files_of(options)
    paths = sorted(map(str, files.folder.glob("*.parquet")))
    random = np.random.default_rng(0)

    def generate() -> Iterator[tuple[Any, Any]]:
        for path in paths:
            source = pq.ParquetFile(path)
            for group in random.permutation(source.num_row_groups):
                matrix = _matrix(source.read_row_group(group, columns=files.column_names))
                matrix = np.take(matrix, random.permutation(len(matrix)), axis=0)
                for first in range(0, len(matrix) - BATCH + 1, BATCH):
                    batch = matrix[first : first + BATCH]
                    yield batch[:, :-1], batch[:, -1:]

    signature = (
        tf.TensorSpec((BATCH, files.columns), tf.float32),
        tf.TensorSpec((BATCH, 1), tf.float32),
    )
    batches = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return _timed_batches(batches, options)


def run_slices(options: dict[str, Any]) -> dict[str, Any]:
    """`from_tensor_slices().shuffle().batch()` on arrays in memory."""
    import pyarrow.parquet as pq
    import tensorflow as tf

    files = files_of(options)
    matrix = _matrix(pq.read_table(files.folder, columns=files.column_names))
    rows = tf.data.Dataset.from_tensor_slices((matrix[:, :-1], matrix[:, -1:]))
    batches = rows.shuffle(_SHUFFLE_ROWS).batch(BATCH, drop_remainder=True)
    return _timed_batches(batches, options)


def run_tfrecord(options: dict[str, Any]) -> dict[str, Any]:
    """TFRecord: batches of serialised examples, shuffled, parsed by two calls at a time."""
    import tensorflow as tf

    files = files_of(options)
    path = write_tfrecords(files)
    row = {"row": tf.io.FixedLenFeature((files.columns + 1,), tf.float32)}

    def parse(examples: Any) -> tuple[Any, Any]:
        values = tf.io.parse_example(examples, row)["row"]
        return values[:, :-1], values[:, -1:]

    records = tf.data.TFRecordDataset(str(path), buffer_size=2**20).shuffle(_SHUFFLE_ROWS)
    batches = records.batch(BATCH, drop_remainder=True).map(parse, num_parallel_calls=2)
    return _timed_batches(batches, options)


def write_tfrecord_file(options: dict[str, Any]) -> dict[str, Any]:
    """What `run_tfrecord` reads, where it is not there yet."""
    return {"path": str(write_tfrecords(files_of(options)))}


def _timed_batches(batches: Any, options: dict[str, Any]) -> dict[str, Any]:
    """A `tf.data` pipeline, used up inside of a compiled loop."""
    import tensorflow as tf

    iterator = iter(batches.repeat().prefetch(tf.data.AUTOTUNE))

    @tf.function
    def touch() -> Any:
        total = tf.zeros(())
        for _ in tf.range(_CALL_BATCHES):
            inputs, labels = next(iterator)
            total += tf.reduce_sum(inputs) + tf.reduce_sum(labels)
        return total

    def calls() -> Iterator[int]:
        while True:
            touch().numpy()
            yield _CALL_BATCHES * BATCH

    return timed(calls(), 2 * _CALL_BATCHES * BATCH, options["least_s"])


def run_lockstep(options: dict[str, Any]) -> dict[str, Any]:
    """One worker of Lockstep; see `benchmarks.data_lockstep`."""
    from benchmarks.data_lockstep import Worker

    worker = Worker(files_of(options), BATCH, options)
    measured = timed(worker.chunks(), worker.plan.rows, options["least_s"])
    return {**measured, **worker.decoded_in_an_epoch()}


def run_together(options: dict[str, Any]) -> dict[str, Any]:
    """All workers of Lockstep at the same time, one core each."""
    from benchmarks.data_lockstep import run_together

    return run_together(files_of(options), BATCH, options)


def run_memory(options: dict[str, Any]) -> dict[str, Any]:
    """Growth of a worker's resident memory, in bytes."""
    from benchmarks.data_lockstep import run_memory

    return run_memory(BATCH, options)


def run_planner(options: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of a plan at scale."""
    from benchmarks.data_scale import plan_at_scale

    return plan_at_scale()


PEERS = {
    "decoding": run_decoding,
    "ray": run_ray,
    "generator": run_generator,
    "slices": run_slices,
    "tfrecord": run_tfrecord,
    "tfrecord-file": write_tfrecord_file,
    "lockstep": run_lockstep,
    "together": run_together,
    "memory": run_memory,
    "planner": run_planner,
}

if __name__ == "__main__":
    main()
