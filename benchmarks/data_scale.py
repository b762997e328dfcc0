"""The planner beyond one machine: 10^5 files, 10^6 blocks, 10^10 rows, 1,000 workers."""

import os
import time
from pathlib import Path

import numpy as np

from data_pipeline.plan import EpochOrder, Plan, Share
from data_pipeline.source import Column, DataFile, Source


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def plan_at_scale(files: int = 100_000) -> dict[str, float]:
    """Time and memory of a plan for 1,000 workers: files of 10 blocks, blocks of 10,000 rows.

    Returns:
        Seconds until the first step of the first epoch is known; bytes of resident growth, the
        list of files included; milliseconds of the median and of the slowest of a hundred seeks to
        any step of any worker.
    """
    before = resident_bytes()
    found = tuple(DataFile(f"{index}", 1, 1, (10_000,) * 10) for index in range(files))
    source = Source("train", found, (Column("x", "float32", 1, False),))
    begin = time.perf_counter()
    plan = Plan(source.block_rows, 65_536, 1_024, 65_536, "window", 1)
    order = plan.for_epoch(0)
    _seek(order, Share(plan, 0, 1_000), 0)
    plan_s = time.perf_counter() - begin
    growth = resident_bytes() - before
    random = np.random.default_rng(0)
    seeks = []
    for _ in range(2_000):
        rank, step = int(random.integers(1_000)), int(random.integers(plan.steps_per_epoch))
        begin = time.perf_counter()
        _seek(order, Share(plan, rank, 1_000), step)
        seeks.append(time.perf_counter() - begin)
    return {
        "plan_s": plan_s,
        "growth_bytes": growth,
        "seek_ms": 1e3 * float(np.median(seeks)),
        "slow_seek_ms": 1e3 * float(np.quantile(seeks, 0.99)),
    }


def _seek(order: EpochOrder, share: Share, step: int) -> None:
    """Where a worker's rows of a step are: offsets, windows, segments of blocks."""
    plan = share.plan
    share.step_offsets(step, step + 1)
    first = plan.rows_before_step(step)
    for shard in share.shards:
        order.window_segments(shard, share.positions(shard, first) // plan.rows_per_window)
