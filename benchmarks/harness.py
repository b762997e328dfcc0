"""What benchmarks share: interleaved repeats, a look-out for disturbance, table, verdict.

A benchmark names its peers and how to take one reading of each; this module decides the order
(A B C A B C ...), repeats a reading during which other processes used the machine, and writes
`results/TOPIC.md` and `results/TOPIC.json`. It knows nothing of what is measured.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import psutil

RESULTS = Path(__file__).parent / "results"
"""Where `Report.write` puts its two files unless told otherwise."""

_ROOT = Path(__file__).parent.parent
_SAMPLE_EVERY_S = 1.0
_QUIET_SHARE = 0.05
_QUIET_FOR_S = 4.0


@dataclass(frozen=True)
class Reading:
    """One measured value and the clock time (`time.time()`) in which it arose."""

    value: float
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Peer:
    """Something that is measured.

    Attributes:
        name: Row of the table.
        unit: Of its values.
        read: Takes one reading, in processes of its own.
    """

    name: str
    unit: str
    read: Callable[[], Reading]


@dataclass(frozen=True)
class Row:
    """Values of one peer, or of a ratio of two, one a repeat.

    Attributes:
        name: Of the peer or the ratio.
        unit: Of the values; "x" for a ratio.
        values: By repeat.
        disturbance: By repeat: share of the machine that processes outside of the benchmark took
            while the value arose; empty for ratios.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    disturbance: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Of the repeats."""
        return statistics.median(self.values)

    def as_json(self) -> dict[str, Any]:
        """For TOPIC.json."""
        return {
            "name": self.name,
            "unit": self.unit,
            "values": list(self.values),
            "min": min(self.values),
            "median": self.median,
            "max": max(self.values),
            "disturbance": list(self.disturbance),
        }


@dataclass(frozen=True)
class Target:
    """A bar that a value must reach: at least `target`, or at most where `is_limit`."""

    name: str
    value: float
    target: float
    is_limit: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the value reaches the bar; a NaN never does."""
        return self.value <= self.target if self.is_limit else self.value >= self.target

    def as_json(self) -> dict[str, Any]:
        """For TOPIC.json."""
        return {
            "name": self.name,
            "value": self.value,
            "target": self.target,
            "met": self.is_met,
        }


def ratio(name: str, rows: Mapping[str, Row], above: str, below: str) -> Row:
    """The ratio of two rows, repeat by repeat."""
    pairs = zip(rows[above].values, rows[below].values, strict=True)
    return Row(name, "x", tuple(a / b for a, b in pairs))


def ratio_of_medians(rows: Mapping[str, Row], above: str, below: str) -> float:
    """What a target is held against."""
    return rows[above].median / rows[below].median


@dataclass(frozen=True)
class Report:
    """A benchmark's outcome.

    Attributes:
        topic: Names the files.
        is_quick: A quick run shows that the benchmark works; it has no verdict.
        rows: Of all peers, and ratios.
        targets: Bars.
        about: What is measured and how, as Markdown paragraphs.
        not_measured: What a reader could expect and will not find, one sentence each.
        conditions: Versions and machine.
        program: Module and options that gave it, where it is not the module named as the topic.
    """

    topic: str
    is_quick: bool
    rows: Sequence[Row]
    targets: Sequence[Target]
    about: Sequence[str]
    not_measured: Sequence[str]
    conditions: Mapping[str, str] = field(default_factory=lambda: conditions())
    program: str = ""

    @property
    def command(self) -> str:
        """What gave it."""
        program = self.program or self.topic
        return f"python -m benchmarks.{program}{' --quick' if self.is_quick else ''}"

    def conclude(self) -> int:
        """Print the tables, write the files unless it was a quick run; returns the exit status."""
        print(self.tables())
        if not self.is_quick:
            self.write()
        return self.exit_status

    @property
    def exit_status(self) -> int:
        """1 if a target is missed, 0 otherwise and for a quick run."""
        return 0 if self.is_quick else int(any(not target.is_met for target in self.targets))

    def as_json(self) -> dict[str, Any]:
        """The content of TOPIC.json; a quick run has no targets."""
        return {
            "topic": self.topic,
            "versions": dict(self.conditions),
            "rows": [row.as_json() for row in self.rows],
            "targets": [] if self.is_quick else [target.as_json() for target in self.targets],
        }

    def tables(self) -> str:
        """Medians with spread, and targets with verdict, as Markdown tables."""
        spread = [
            (row.name, row.unit, *map(_short, (min(row.values), row.median, max(row.values))))
            for row in self.rows
        ]
        text = table(("", "unit", "min", "median", "max"), spread)
        if self.is_quick:
            return text + "\nA quick run: no verdict.\n"
        verdicts = [
            (
                target.name,
                _short(target.value),
                f"{'at most' if target.is_limit else 'at least'} {target.target:g}",
                "met" if target.is_met else "MISSED",
            )
            for target in self.targets
        ]
        return text + "\n" + table(("target", "value", "wanted", ""), verdicts)

    def as_markdown(self) -> str:
        """The content of TOPIC.md."""
        raw = [
            (
                row.name,
                ", ".join(map(_short, row.values)),
                ", ".join(f"{share:.0%}" for share in row.disturbance) or "-",
            )
            for row in self.rows
        ]
        return "\n".join(
            [
                f"# Benchmark: {self.topic}\n",
                f"Command: `{self.command}`\n",
                *(f"{paragraph}\n" for paragraph in self.about),
                "Ratios of the targets are ratios of medians.\n",
                self.tables(),
                "## Raw numbers\n",
                "In the order of the repeats. The last column is the share of the machine that "
                "processes outside of the benchmark took meanwhile.\n",
                table(("", "repeats", "others"), raw),
                "## Not measured\n",
                *(f"- {sentence}" for sentence in self.not_measured),
                "\n## Versions and machine\n",
                *(f"- {name}: {value}" for name, value in self.conditions.items()),
                "",
            ]
        )

    def write(self, folder: Path = RESULTS) -> None:
        """Write TOPIC.md and TOPIC.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.topic}.md").write_text(self.as_markdown())
        (folder / f"{self.topic}.json").write_text(json.dumps(self.as_json(), indent=2) + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |\n"

    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return line(head) + line(rule) + "".join(line(row) for row in rows)


class Watch(Protocol):
    """Knows how much of the machine processes outside of the benchmark take."""

    def wait_for_quiet(self) -> None:
        """Return when they leave the machine alone, or after a bound."""

    def share_of_others(self, begin_s: float, end_s: float) -> float:
        """Share of all cores that they took between two clock times."""
        ...


def measure(peers: Sequence[Peer], repeats: int, watch: Watch, retries: int = 2) -> dict[str, Row]:
    """Read all peers in turn, `repeats` times over.

    A reading that other processes disturbed is taken again, at most `retries` times: the least
    disturbed one counts.
    """
    samples: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers}
    for repeat in range(repeats):
        for peer in peers:
            value, disturbance = _least_disturbed(peer, watch, retries)
            samples[peer.name].append((value, disturbance))
            print(
                f"{repeat + 1}/{repeats} {peer.name}: {_short(value)} {peer.unit}"
                f" (others {disturbance:.0%})",
                flush=True,
            )
    return {
        peer.name: Row(
            peer.name,
            peer.unit,
            tuple(value for value, _ in samples[peer.name]),
            tuple(disturbance for _, disturbance in samples[peer.name]),
        )
        for peer in peers
    }


def _least_disturbed(peer: Peer, watch: Watch, retries: int) -> tuple[float, float]:
    found = []
    for _ in range(1 + retries):
        watch.wait_for_quiet()
        reading = peer.read()
        disturbance = watch.share_of_others(reading.begin_s, reading.end_s)
        found.append((reading.value, disturbance))
        if disturbance <= _QUIET_SHARE:
            break
    return min(found, key=lambda sample: sample[1])


@dataclass(frozen=True)
class Usage:
    """Seconds of all cores up to a clock time: busy, and spent by the benchmark's processes."""

    at_s: float
    busy_s: float
    own_s: float


def share_of_others(usage: Sequence[Usage], begin_s: float, end_s: float, cores: int) -> float:
    """Share of `cores` that others took between two clock times; 0 without samples in between."""
    inside = [sample for sample in usage if begin_s <= sample.at_s <= end_s]
    if len(inside) < 2:
        return 0.0
    first, last = inside[0], inside[-1]
    others_s = (last.busy_s - first.busy_s) - (last.own_s - first.own_s)
    return max(0.0, others_s / ((last.at_s - first.at_s) * cores))


class LookOut:
    """A `Watch` over this machine, in a thread of its own; use as a context manager.

    Others' share is all of the machine's busy time, stolen time included, that was not spent by
    this process and its descendants.

    Args:
        wait_s: Longest wait for quiet; 0 for none.
    """

    def __init__(self, wait_s: float = 120.0) -> None:
        self._wait_s = wait_s
        self._usage: list[Usage] = []
        self._spent_s: dict[tuple[int, float], float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="look-out", daemon=True)

    def __enter__(self) -> "LookOut":
        """Start watching."""
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop watching."""
        self._is_over.set()
        self._thread.join()

    def share_of_others(self, begin_s: float, end_s: float) -> float:
        """Share of all cores that others took between two clock times."""
        return share_of_others(list(self._usage), begin_s, end_s, os.cpu_count() or 1)

    def wait_for_quiet(self) -> None:
        """Return when others have been quiet for some seconds, or after `wait_s`."""
        deadline = time.time() + self._wait_s
        while time.time() < deadline:
            time.sleep(_QUIET_FOR_S)
            now = time.time()
            if self.share_of_others(now - _QUIET_FOR_S, now) <= _QUIET_SHARE:
                return

    def _watch(self) -> None:
        while not self._is_over.wait(_SAMPLE_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)
        busy = sum(times) - idle - getattr(times, "guest_nice", 0.0)
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            try:
                spent = process.cpu_times()
                key = (process.pid, process.create_time())
            except psutil.Error:
                continue
            self._spent_s[key] = spent.user + spent.system
        self._usage.append(Usage(time.time(), busy, sum(self._spent_s.values())))


def run_fresh(
    modules_and_arguments: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    timeout_s: float = 1800.0,
) -> dict[str, Any]:
    """Run `python -m MODULE ARGUMENTS...` for each entry at the same time.

    Returns:
        What the first of them printed on its last line, as JSON.

    Raises:
        RuntimeError: One of them failed; the end of what it said is part of the message.
    """
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in modules_and_arguments]
        processes = []
        for entry, environment, log in zip(modules_and_arguments, environments, logs, strict=True):
            process = subprocess.Popen(
                [sys.executable, "-m", *entry],
                cwd=_ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        deadline = time.monotonic() + timeout_s
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
        said = []
        for entry, process, log in zip(modules_and_arguments, processes, logs, strict=True):
            log.seek(0)
            said.append(log.read().strip())
            if process.returncode:
                end = said[-1][-4000:]
                raise RuntimeError(f"{' '.join(entry)} ended with {process.returncode}:\n{end}")
    result: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return result


def conditions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python and of packages, and the machine."""
    memory_gib = psutil.virtual_memory().total / 2**30
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "machine": f"{_processor()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB of memory",
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; a benchmark may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="little data, one repeat, no verdict: does it run?"
    )
    parser.add_argument("--repeats", type=int, default=3, help="readings of each peer")
    return parser


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _short(value: float) -> str:
    """Three digits or more: 0.957, 12.3, 1,234."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
