"""Rows a second: Lockstep's data pipeline beside other ways into TensorFlow, and what it holds.

Run as `python -m benchmarks.data`. Every reading comes from a fresh process
(`benchmarks.data_peers`) that goes through the same files. Memory, the planner at scale and the
quality of the shuffle have rows of their own.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.data_files import BATCH, all_files
from benchmarks.harness import (
    LookOut,
    Peer,
    Reading,
    Report,
    Row,
    Target,
    arguments,
    conditions,
    measure,
    ratio,
    ratio_of_medians,
    run_fresh,
)
from data_pipeline.features import InputColumn
from data_pipeline.plan import Plan, Shuffle
from data_pipeline.quality import shuffle_quality

_PACKAGES = ("lockstep", "tensorflow", "ray", "numpy", "pyarrow")
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2", "RAY_DEDUP_LOGS": "0"}
_LEAST_S = 4.0
_QUICK_LEAST_S = 0.5
_TIMEOUT_S = 180.0
_SMALL_ROWS = 200_000
_CACHE_MB = 512

HAS_CATEGORIES = "encoding" in {field.name for field in dataclasses.fields(InputColumn)}
"""Whether columns of strings can be read."""

_ABOUT = (
    "Files: numbers is 4 million rows of 10 float32 columns (9 features, a label) in one Parquet "
    "file with row groups of 100,000; images is 20,000 rows of 64x64x3 bytes as fixed-size lists; "
    "wide is 100,000 rows of 500 float32 columns; small files is 2 million rows of 10 columns in "
    "2,000 files; strings is 2 million rows of 5 float32 columns and 4 of strings. Random values, "
    f"snappy. Global batches of {BATCH:,} rows reach a compiled function that sums every value; "
    "rows are counted for some seconds, after a first pass that is not measured.",
    "Lockstep: one worker, `data.shuffle: window`, 16 virtual shards, exact batches, nothing kept "
    "in memory between epochs (`data.cache_mb: 0`) unless the row says so. Ray Data reads without "
    "shuffling, on both cores, with four batches ahead; its columns are joined in the compiled "
    "function. `from_generator` yields finished batches from shuffled row groups, the slices and "
    "the TFRecords go through a shuffle buffer of 65,536 rows; these three are used up inside of a "
    "compiled loop, with prefetching. Plain decoding is two threads, each with its own "
    "`ParquetFile`, that fill a matrix for each row group; no TensorFlow, no order.",
    "Two workers share the rows, each in a process that may use one core only, beside one worker "
    "on one core. Decoded blocks are those of one pass of a worker with `data.cache_mb: 0`.",
    "Memory: resident growth over two epochs of a file that is four times as large, decoded, as "
    "the bound that `memory_bound_bytes` computes for it, and of one as large as the bound.",
    "Planner: 10^5 files, 10^6 blocks, 10^10 rows, 1,000 workers, 1,024 virtual shards. A seek "
    "finds offsets, windows and block segments of any step of any worker; the bar holds for the "
    "slowest of a hundred.",
    "Quality of the shuffle: the plan of numbers, its rows sorted by the label. See "
    "`data_pipeline.quality`; a full permutation has travel 1, autocorrelation 0, spread 1.",
)
_NOT_MEASURED = (
    "Object stores; more than one machine; GPUs. Files are in the page cache.",
    "The conversion of other formats into Parquet, and the scan before a run.",
    "A training step: the compiled function only sums. See the benchmark `step`.",
)
_DECODING = "numbers, plain decoding"
_NUMBERS = "numbers, Lockstep"
_BARS = (
    ("numbers to Ray Data iter_tf_batches", _NUMBERS, "numbers, Ray Data iter_tf_batches", 8.0),
    ("numbers to Ray Data to_tf", _NUMBERS, "numbers, Ray Data to_tf", None),
    ("numbers to from_generator", _NUMBERS, "numbers, from_generator", None),
    ("numbers to from_tensor_slices", _NUMBERS, "numbers, from_tensor_slices", 4.0),
    ("numbers to TFRecord", _NUMBERS, "numbers, TFRecord", None),
    ("numbers to plain decoding", _NUMBERS, _DECODING, 0.35),
    ("images to Ray Data", "images, Lockstep", "images, Ray Data iter_tf_batches", None),
    ("images to plain decoding", "images, Lockstep", "images, plain decoding", None),
    ("wide to plain decoding", "wide, Lockstep", "wide, plain decoding", None),
    ("small files to plain decoding", "small files, Lockstep", "small files, plain decoding", None),
    ("strings to Ray Data", "strings, Lockstep", "strings, Ray Data iter_tf_batches", None),
    ("strings to plain decoding", "strings, Lockstep", "strings, plain decoding", None),
    ("two workers to one", f"{_NUMBERS} 2 workers, 1 core each", f"{_NUMBERS} 1 core", 1.6),
)
_LIMITS = {
    "memory, share of the bound, file of 4 x the bound": 1.0,
    "planner, 10^6 blocks": 10.0,
    "planner, growth": 1000.0,
    "planner, slowest seek of 100": 1.0,
}
_ONCE = "decoded blocks to blocks"


class Trials:
    """Takes readings of the peers of `benchmarks.data_peers`.

    Args:
        is_quick: Few rows, little time.
    """

    def __init__(self, is_quick: bool) -> None:
        self._is_quick = is_quick
        self._files = all_files(is_quick)
        self.decoded: dict[str, list[float]] = {}

    def write_files(self) -> None:
        """Write what the peers read, where it is not there."""
        for files in self._files.values():
            files.write()
        _run("tfrecord-file", {"files": "numbers", "is_quick": self._is_quick})

    def peers(self) -> list[Peer]:
        """Everything that is timed, in the order of a repeat."""
        peers = [
            self._peer(_NUMBERS, "lockstep", "numbers"),
            self._peer(f"{_NUMBERS}, kept in memory", "lockstep", "numbers", cache_mb=_CACHE_MB),
            self._peer(_DECODING, "decoding", "numbers"),
            self._ray("numbers", "iter_tf_batches"),
            self._ray("numbers", "to_tf"),
            self._peer("numbers, from_generator", "generator", "numbers"),
            self._peer("numbers, from_tensor_slices", "slices", "numbers"),
            self._peer("numbers, TFRecord", "tfrecord", "numbers"),
            self._peer(f"{_NUMBERS} 1 core", "together", "numbers", workers=1),
            self._peer(f"{_NUMBERS} 2 workers, 1 core each", "together", "numbers", workers=2),
        ]
        for kind in ("images", "wide", "small-files"):
            name = kind.replace("-", " ")
            peers.append(self._peer(f"{name}, Lockstep", "lockstep", kind))
            peers.append(self._peer(f"{name}, plain decoding", "decoding", kind))
        peers.append(self._ray("images", "iter_tf_batches"))
        if HAS_CATEGORIES:
            peers.append(self._peer("strings, Lockstep", "lockstep", "strings"))
            peers.append(self._peer("strings, plain decoding", "decoding", "strings"))
        return peers

    def facts(self) -> dict[str, float]:
        """One reading of what is no rate: memory and the planner."""
        found: dict[str, float] = {}
        for times in (1, 4):
            options = {"times": times, "small_rows": _SMALL_ROWS}
            said = _run("memory", options)
            found[f"memory, growth, file of {times} x the bound|MB"] = said["growth_bytes"] / 1e6
            found[f"memory, share of the bound, file of {times} x the bound|x"] = (
                said["growth_bytes"] / said["bound_bytes"]
            )
        said = _run("planner", {})
        found["planner, 10^6 blocks|s"] = said["plan_s"]
        found["planner, growth|MB"] = said["growth_bytes"] / 1e6
        found["planner, median seek|ms"] = said["seek_ms"]
        found["planner, slowest seek of 100|ms"] = said["slow_seek_ms"]
        return found

    def quality(self) -> dict[str, float]:
        """Quality of each kind of shuffle."""
        numbers = self._files["numbers"]
        blocks = np.full(numbers.rows // numbers.block_rows, numbers.block_rows, np.int64)
        found: dict[str, float] = {}
        shuffles: tuple[Shuffle, ...] = ("none", "window", "full")
        for shuffle in shuffles:
            quality = shuffle_quality(Plan(blocks, BATCH, 16, 65_536, shuffle, 1))
            found[f"shuffle {shuffle}, travel|x"] = quality.travel
            found[f"shuffle {shuffle}, autocorrelation|x"] = quality.autocorrelation
            found[f"shuffle {shuffle}, spread of batch means|x"] = quality.mean_spread
        return found

    def _ray(self, kind: str, method: str) -> Peer:
        return self._peer(f"{kind}, Ray Data {method}", "ray", kind, method=method)

    def _peer(self, name: str, program: str, kind: str, **more: Any) -> Peer:
        least_s = _QUICK_LEAST_S if self._is_quick else _LEAST_S
        options = {"files": kind, "is_quick": self._is_quick, "least_s": least_s, **more}

        def read() -> Reading:
            said = _run(program, options)
            if "decoded_blocks" in said and not more:
                share = said["decoded_blocks"] / said["blocks"]
                self.decoded.setdefault(f"{name}, {_ONCE}", []).append(share)
            return Reading(said["rows"] / said["seconds"], said["begin_s"], said["end_s"])

        return Peer(name, "rows/s", read)


def compare(rows: Mapping[str, Row]) -> tuple[list[Row], list[Target]]:
    """Ratios by repeat, and targets held against medians, of what was measured."""
    ratios, targets = [], []
    for name, above, below, target in _BARS:
        if above not in rows or below not in rows:
            continue
        ratios.append(ratio(name, rows, above, below))
        if target is not None:
            targets.append(Target(name, ratio_of_medians(rows, above, below), target))
    for name, row in rows.items():
        limit = _LIMITS.get(name)
        if limit is None and name.endswith(_ONCE):
            limit = 1.0
        if limit is not None:
            targets.append(Target(name, row.median, limit, is_limit=True))
    return ratios, targets


def fact_rows(readings: Sequence[Mapping[str, float]]) -> dict[str, Row]:
    """Rows of readings whose keys are "name|unit"."""
    rows = {}
    for key in readings[0]:
        name, _, unit = key.partition("|")
        rows[name] = Row(name, unit, tuple(reading[key] for reading in readings))
    return rows


def main() -> int:
    """Measure, print, write; returns the exit status."""
    options = arguments("Rows a second beside other ways into TensorFlow.").parse_args()
    trials = Trials(options.quick)
    trials.write_files()
    repeats = 1 if options.quick else options.repeats
    with LookOut(0.0 if options.quick else 120.0) as look_out:
        rows = measure(trials.peers(), repeats, look_out, retries=0 if options.quick else 2)
    rows |= {name: Row(name, "x", tuple(found)) for name, found in trials.decoded.items()}
    rows |= fact_rows([trials.facts() for _ in range(repeats)])
    rows |= fact_rows([trials.quality()])
    ratios, targets = compare(rows)
    return Report(
        topic="data",
        is_quick=options.quick,
        rows=[*rows.values(), *ratios],
        targets=targets,
        about=_ABOUT,
        not_measured=_NOT_MEASURED,
        conditions=conditions(_PACKAGES),
    ).conclude()


def _run(program: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one peer in a fresh process; what it reported.

    A peer that does not end (TensorFlow's generator was seen to hang) is given a second chance.
    """
    command = ("benchmarks.data_peers", program, json.dumps(options))
    try:
        return run_fresh([command], [_ENVIRONMENT], _TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"{program} did not end within {_TIMEOUT_S:g} s; once more", flush=True)
        return run_fresh([command], [_ENVIRONMENT], _TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main())
