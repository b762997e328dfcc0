"""Numbers for Prometheus: counters, gauges and histograms, summed over the processes of a service.

Owns the text format and the summing. Counting is a dictionary entry and nothing else, for it
happens several times a request. Several processes serve behind one address, and a scrape reaches
one of them: each leaves its numbers in a file of a common folder once in a while, and whoever is
asked adds up the files; how many of them are fresh tells how many processes there are. Files of
processes that have ended stay, so counters never fall; their
gauges no longer count.
"""

import bisect
import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_S = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0),
)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 4_096, 16_384, 65_536)

Labels = tuple[str, ...]

_PRESENT_S = 5.0  # whoever left no numbers for so long is gone; they are left once a second


@dataclass
class Family:
    """One metric with its values by label values.

    Attributes:
        name: With its unit.
        kind: counter, gauge or histogram.
        help: What is counted.
        labels: Names of the labels.
        bounds: Upper bounds of a histogram's buckets, ascending.
        values: By label values: a number; of a histogram the count of each bucket, of what is
            beyond, and the sum.
    """

    name: str
    kind: str
    help: str
    labels: Labels
    bounds: tuple[float, ...] = ()
    values: dict[Labels, Any] = field(default_factory=dict)

    def add(self, amount: float, *labels: str) -> None:
        """Add to a counter."""
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def set(self, value: float, *labels: str) -> None:
        """Set a gauge."""
        self.values[labels] = value

    def observe(self, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        buckets = self.values.get(labels)
        if buckets is None:
            buckets = self.values[labels] = [0.0] * (len(self.bounds) + 2)
        buckets[bisect.bisect_left(self.bounds, value)] += 1
        buckets[-1] += value

    def clear(self) -> None:
        """Forget all values, of a gauge whose labels come and go."""
        self.values.clear()


class Metrics:
    """The metrics of one process of the service; used from one thread.

    Args:
        folder: Where all processes of the service leave their numbers; None: this one is alone.
        process: A name no other process of the service has or had.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        folder: Path | None = None,
        process: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._process = process or f"{os.getpid()}-{os.urandom(4).hex()}"
        self._families: dict[str, Family] = {}
        model = ("model", "version")
        counter, gauge, histogram = self.counter, self.gauge, self.histogram
        self.requests = counter(
            "lockstep_requests_total", "Requests answered.", "route", "method", "status"
        )
        self.latency = histogram(
            "lockstep_request_seconds", "Time from request to answer.", LATENCY_S, "route"
        )
        self.in_flight = gauge("lockstep_requests_in_flight", "Requests being answered.")
        self.rows = counter("lockstep_rows_total", "Rows predicted.", *model)
        self.batch_rows = histogram(
            "lockstep_batch_rows", "Rows in a call of the model.", BATCH_ROWS, *model
        )
        self.batch_requests = histogram(
            "lockstep_batch_requests", "Requests in a call of the model.", BATCH_ROWS, *model
        )
        self.batch_seconds = histogram(
            "lockstep_batch_seconds", "Computation of a batch.", LATENCY_S, *model
        )
        self.waited = histogram(
            "lockstep_queue_seconds", "Longest wait of a batch's requests.", LATENCY_S, *model
        )
        self.queue_rows = gauge("lockstep_queue_rows", "Rows that wait.", *model)
        self.user_compute = counter(
            "lockstep_user_compute_seconds_total", "Computation by user.", "user"
        )
        self.user_rows = counter("lockstep_user_rows_total", "Rows by user.", "user")
        self.loaded = gauge("lockstep_models_loaded", "Model versions in memory.", *model)
        self.loaded_bytes = gauge("lockstep_models_bytes", "Estimated memory of loaded models.")
        self.loads = counter("lockstep_model_loads_total", "Loads by outcome.", *model, "outcome")
        self.unloads = counter("lockstep_model_unloads_total", "Versions that left.", *model)
        self.batch_jobs = gauge("lockstep_batch_jobs", "Batch jobs that are not finished.")
        self.batch_shards = gauge("lockstep_batch_shards", "Shards of batch jobs.", "state")
        self.batch_compute = counter(
            "lockstep_batch_compute_seconds_total", "Computation of batch jobs by user.", "user"
        )
        self.poll_failures = counter(
            "lockstep_registry_poll_failures_total", "Looks at the registry that failed."
        )

    def counter(self, name: str, text: str, *labels: str) -> Family:
        """A new counter."""
        return self._new(Family(name, "counter", text, labels))

    def gauge(self, name: str, text: str, *labels: str) -> Family:
        """A new gauge."""
        return self._new(Family(name, "gauge", text, labels))

    def histogram(self, name: str, text: str, bounds: Sequence[float], *labels: str) -> Family:
        """A new histogram with the given upper bounds."""
        return self._new(Family(name, "histogram", text, labels, tuple(bounds)))

    def save(self) -> None:
        """Leave the numbers of this process in the folder. Whole or not at all.

        Raises:
            OSError: The folder cannot be written to.
        """
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        record = {
            "pid": os.getpid(),
            "families": {
                family.name: [[labels, value] for labels, value in family.values.items()]
                for family in self._families.values()
            },
        }
        waiting = self._folder / f".{self._process}"
        waiting.write_text(json.dumps(record))
        waiting.replace(self._folder / f"{self._process}.json")

    def processes(self, kind: str) -> int:
        """How many processes whose names begin with a kind leave numbers now; this one is one."""
        if self._folder is None:
            return 1
        since = self._clock() - _PRESENT_S
        count = 1
        for path in self._folder.glob(f"{kind}*.json"):
            with contextlib.suppress(OSError):  # it went between the two looks
                count += path.stem != self._process and path.stat().st_mtime >= since
        return count

    def render(self) -> str:
        """The text that Prometheus reads, over all processes of the service."""
        others = self._others()
        lines: list[str] = []
        for family in self._families.values():
            kept = others.get(family.name, ()) if family.kind != "gauge" else ()
            live = others.get(f"live {family.name}", ())
            values = _summed([family.values.items(), live if family.kind == "gauge" else kept])
            lines += _lines(family, values)
        return "\n".join(lines) + "\n"

    def _new(self, family: Family) -> Family:
        self._families[family.name] = family
        return family

    def _others(self) -> dict[str, list[tuple[Labels, Any]]]:
        """Values that other processes left, by family; of those alive under "live NAME" too."""
        found: dict[str, list[tuple[Labels, Any]]] = defaultdict(list)
        if self._folder is None:
            return found
        for path in sorted(self._folder.glob("*.json")):
            if path.stem == self._process:
                continue
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                record = json.loads(path.read_text())
                is_alive = Path(f"/proc/{record['pid']}").exists()
                for name, entries in record["families"].items():
                    values = [(tuple(labels), value) for labels, value in entries]
                    found[name] += values
                    if is_alive:
                        found[f"live {name}"] += values
        return found


def _summed(parts: Iterable[Iterable[tuple[Labels, Any]]]) -> dict[Labels, Any]:
    total: dict[Labels, Any] = {}
    for part in parts:
        for labels, value in part:
            before = total.get(labels)
            if before is None:
                total[labels] = value
            elif isinstance(value, list):
                total[labels] = [a + b for a, b in zip(before, value, strict=True)]
            else:
                total[labels] = before + value
    return total


def _lines(family: Family, values: Mapping[Labels, Any]) -> list[str]:
    lines = [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
    for labels, value in sorted(values.items()):
        pairs = [f'{n}="{_escaped(v)}"' for n, v in zip(family.labels, labels, strict=True)]
        if family.kind != "histogram":
            lines.append(f"{family.name}{_braced(pairs)} {value:.10g}")
            continue
        count = 0.0
        for bound, inside in zip((*family.bounds, "+Inf"), value[:-1], strict=True):
            count += inside
            inner = _braced([*pairs, f'le="{bound}"'])
            lines.append(f"{family.name}_bucket{inner} {count:.10g}")
        lines.append(f"{family.name}_sum{_braced(pairs)} {value[-1]:.10g}")
        lines.append(f"{family.name}_count{_braced(pairs)} {count:.10g}")
    return lines


def _braced(pairs: list[str]) -> str:
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
