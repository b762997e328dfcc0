"""How long the queue takes to decide: 10,000 runs of 100 users on 1,000 nodes, simulated.

Time passes in the simulation only; what is measured is the scheduler itself: the processor time of
each call, after an arrival, an end, a run that made room, and the tick of the clock. A call makes
up to 8 decisions.
"""

import gc
import random
import sys
import time

from benchmarks.harness import Report, Row, Target, arguments, conditions
from cluster.lines import QueuedRun
from cluster.queue import Decision, Queue
from cluster.room import Room, Shape, Worker
from cluster.shares import Terms
from tests.support.queue_simulation import Simulation, Work

_ABOUT = (
    "A simulated cluster of 1,000 nodes with 8 CPUs, every tenth with 8 GPUs besides, 100 users "
    "of weights 1 to 3, 10,000 runs of 20 shapes (1 to 200 workers) and 4 priorities, which come "
    "three times faster than they can be run: thousands wait. One thread, processor time, garbage "
    "collection included.",
    "`call` is one call of `Queue.decide`, with up to 8 decisions; `decision` is a call's time by "
    "its decisions, of calls that made some. `idle call` makes none: the cluster is full.",
)
_NOT_MEASURED = (
    "What Ray takes to start what was decided.",
    "The queue's file: one transaction a decision.",
)
_SHAPES = [
    *(Shape(workers, Worker(1.0)) for workers in (1, 2, 4, 8, 16, 64)),
    *(Shape(workers, Worker(4.0)) for workers in (1, 4, 16, 50, 200)),
    *(Shape(workers, Worker(8.0)) for workers in (1, 8, 100)),
    *(Shape(workers, Worker(2.0, 1.0)) for workers in (1, 2, 8, 32)),
    *(Shape(workers, Worker(8.0, 8.0)) for workers in (1, 10)),
]


class TimedQueue(Queue):
    """A queue that notes what its calls take: (milliseconds, decisions, runs that wait)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[float, int]] = []

    def decide(self, now: float) -> list[Decision]:
        """As the queue does."""
        began = time.thread_time()
        made = super().decide(now)
        self.calls.append(((time.thread_time() - began) * 1000, len(made)))
        return made


def simulate(seed: int, nodes: int, runs: int) -> TimedQueue:
    """One workload, to its end."""
    draw = random.Random(seed)
    cluster = {
        f"n{number}": Worker(8.0, 8.0 if number % 10 == 0 else 0.0) for number in range(nodes)
    }
    queue = TimedQueue()
    for user in range(100):
        queue.set_terms(f"u{user}", Terms(weight=float(1 + user % 3)), 0.0)
    whole = Room(cluster)
    shapes = [one for one in _SHAPES if whole.has(one)]
    work = []
    at = 0.0
    for number in range(runs):
        shape = draw.choice(shapes)
        run = QueuedRun(
            f"r{number}", f"u{draw.randrange(100)}", shape, draw.choice((0, 0, 0, 1, 2, -1)), number
        )
        length_s = draw.expovariate(1 / 3000)
        at += length_s * shape.cpus / (nodes * 8) / 3
        work.append(Work(run, at, length_s))
    simulation = Simulation(queue, cluster, work, checkpoint_s=10.0, tick_s=300.0)
    gc.collect()
    simulation.run(max_events=10_000_000)
    return queue


def main() -> int:
    """Run the benchmark; returns its exit status."""
    options = arguments(__doc__ or "").parse_args()
    nodes, runs = (50, 500) if options.quick else (1000, 10_000)
    repeats = 1 if options.quick else options.repeats
    found: dict[str, list[float]] = {}
    for seed in range(repeats):
        calls = simulate(seed, nodes, runs).calls
        times = sorted(took for took, _ in calls)
        by_decision = sorted(took / made for took, made in calls if made)
        idle = sorted(took for took, made in calls if not made)
        for name, values in (("call", times), ("decision", by_decision), ("idle call", idle)):
            for part, share in (("median", 0.5), ("99 %", 0.99), ("longest", 1.0)):
                value = values[min(len(values) - 1, int(share * len(values)))]
                found.setdefault(f"{name}, {part}", []).append(value)
        found.setdefault("calls", []).append(float(len(calls)))
    rows = [
        Row(name, "" if name == "calls" else "ms", tuple(values), (0.0,) * repeats)
        for name, values in found.items()
    ]
    by_name = {row.name: row for row in rows}
    return Report(
        topic="queue",
        is_quick=options.quick,
        rows=rows,
        targets=[
            Target("a decision, longest, ms", max(by_name["decision, longest"].values), 10.0, True),
            Target("a call, 99 %, ms", max(by_name["call, 99 %"].values), 10.0, True),
        ],
        about=_ABOUT,
        not_measured=_NOT_MEASURED,
        conditions=conditions(("ray",)),
    ).conclude()


if __name__ == "__main__":
    sys.exit(main())
