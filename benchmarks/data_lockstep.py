"""Lockstep's side of `benchmarks.data`: one worker, several at a time, and their memory.

The way of the rows is that of a training: footers, scan, plan, `TrainingChunks`, `chunk_dataset`,
and a compiled loop that cuts batches out of chunks. Only the step itself is replaced by sums.
"""

import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data_files import Files, memory_files
from benchmarks.data_scale import resident_bytes
from configs.data import DataConfig
from data_pipeline.blocks import BlockReader
from data_pipeline.dataset import chunk_dataset
from data_pipeline.features import input_layout
from data_pipeline.plan import Plan, Share, auto_window_rows
from data_pipeline.reader import TrainingChunks, memory_bound_bytes
from data_pipeline.source import open_source

_EPOCHS = 10_000
_WAIT_S = 120.0
_CHUNKS_AHEAD = 6  # that were assembled while the workers waited for each other
_MEMORY_WINDOW_ROWS = 8_192


class Worker:
    """A worker that reads its share over and over.

    Args:
        files: Its rows.
        batch: Rows of a global batch.
        options: `rank`, `workers`, `cache_mb`, `window_rows`, all optional.
    """

    def __init__(self, files: Files, batch: int, options: dict[str, Any]) -> None:
        import tensorflow as tf

        self._tf = tf
        data = DataConfig(train=str(files.folder), features=files.features, label="y")
        source = open_source("train", data.train, data.columns)
        self.layout = _learned(source, input_layout(data, source))
        window = options.get("window_rows") or auto_window_rows(
            self.layout.row_bytes, data.virtual_shards
        )
        self.plan = Plan(source.block_rows, batch, data.virtual_shards, window, "window", 1)
        self.share = Share(self.plan, options.get("rank", 0), options.get("workers", 1))
        self._source = source
        self._cache_bytes = options.get("cache_mb", 0) * 2**20
        self._reader = BlockReader(source, self.layout, "error", self._cache_bytes)
        self.epochs = 0

    def chunks(self) -> Iterator[int]:
        """Rows of one chunk after the other, as the compiled loop has used them up."""
        tf = self._tf
        chunks = TrainingChunks(self.share, self._reader, self.layout, _EPOCHS)

        @tf.function(reduce_retracing=True)
        def touch(inputs: Any, labels: Any, offsets: Any) -> Any:
            total = tf.zeros(())
            for index in tf.range(tf.shape(offsets)[0] - 1):
                begin, end = offsets[index], offsets[index + 1]
                total += tf.reduce_sum(inputs[begin:end])
                total += tf.reduce_sum(tf.cast(labels[begin:end], tf.float32))
            return total

        for number, chunk in enumerate(chunk_dataset(chunks, self.layout, 0)):
            touch(chunk[0], chunk[1], chunk[3]).numpy()
            yield int(chunk[0].shape[0])
            self.epochs = (number + 1) // chunks.chunks_per_epoch

    def decoded_in_an_epoch(self) -> dict[str, Any]:
        """Blocks that are decoded while this worker's rows are gone through once, from cold."""
        reader = BlockReader(self._source, self.layout, "error", self._cache_bytes)
        chunks = TrainingChunks(self.share, reader, self.layout, 1)
        for number in range(chunks.chunks):
            chunks.assemble(number)
        return {"decoded_blocks": reader.decoded_blocks, "blocks": len(self.plan.block_rows)}

    def bound_bytes(self, block_rows: NDArray[np.int64] | None = None) -> int:
        """The bound on this worker's memory, or on one with the same options and other blocks."""
        plan = self.plan
        if block_rows is not None:
            plan = dataclasses.replace(plan, block_rows=block_rows)
        share = Share(plan, self.share.rank, self.share.workers)
        return memory_bound_bytes(share, self.layout, self._cache_bytes)


def _learned(source: Any, layout: Any) -> Any:
    """The layout with its vocabularies, where it has any."""
    if not getattr(layout, "encodings", None):
        return layout
    from data_pipeline.scan import learn

    return learn(source, layout, "error")


def run_together(files: Files, batch: int, options: dict[str, Any]) -> dict[str, Any]:
    """All workers at the same time, each in a process and on a core of its own.

    Rows are those of all of them, from the first one's begin to the last one's end.
    """
    workers = options["workers"]
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(workers), context.SimpleQueue()
    processes = [
        context.Process(
            target=_one_of_several,
            args=(files, batch, {**options, "rank": rank}, barrier, queue),
            daemon=True,
        )
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_WAIT_S + options["least_s"])
        if process.exitcode != 0:
            raise RuntimeError(f"a worker ended with {process.exitcode}")
    said = [queue.get() for _ in processes]
    begin = min(each["begin_s"] for each in said)
    end = max(each["end_s"] for each in said)
    rows = sum(each["rows"] for each in said)
    return {"rows": rows, "seconds": end - begin, "begin_s": begin, "end_s": end}


def _one_of_several(
    files: Files, batch: int, options: dict[str, Any], barrier: Any, queue: Any
) -> None:
    """One of the workers of `run_together`; whole epochs, so that all do the same share."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[options["rank"] % len(cores)]})
    worker = Worker(files, batch, options)
    counts = worker.chunks()
    while worker.epochs < 1:
        next(counts)
    barrier.wait(_WAIT_S)
    for _ in range(_CHUNKS_AHEAD):
        next(counts)
    rows, begin_s = 0, time.time()
    while time.time() - begin_s < options["least_s"]:
        rows += next(counts)
    queue.put({"rows": rows, "begin_s": begin_s, "end_s": time.time()})


def run_memory(batch: int, options: dict[str, Any]) -> dict[str, Any]:
    """Resident growth over two epochs of rows that are `times` as large as the bound on it.

    What TensorFlow itself takes is there before: a small share of rows goes through first.
    """
    small = memory_files(options["small_rows"])
    small.write()
    large = np.full(1_000, small.block_rows, np.int64)
    bound = Worker(small, batch, {"window_rows": _MEMORY_WINDOW_ROWS}).bound_bytes(large)
    for _ in zip(range(3), Worker(small, batch, {"window_rows": 256}).chunks(), strict=False):
        pass
    row_bytes = 4 * (small.columns + 1)
    rows = int(options["times"] * bound / row_bytes / small.block_rows + 1) * small.block_rows
    files = memory_files(rows)
    files.write()
    worker = Worker(files, batch, {"window_rows": _MEMORY_WINDOW_ROWS})
    begin_s, before = time.time(), resident_bytes()
    peak, is_over = [before], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            peak[0] = max(peak[0], resident_bytes())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    for _ in worker.chunks():
        if worker.epochs == 2:
            break
    is_over.set()
    watching.join()
    return {
        "growth_bytes": peak[0] - before,
        "bound_bytes": worker.bound_bytes(),
        "data_bytes": rows * row_bytes,
        "begin_s": begin_s,
        "end_s": time.time(),
    }
