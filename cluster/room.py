"""Room: what is free on each node, and how many workers it would hold. Pure arithmetic.

A gang's workers are all alike, so that a gang fits exactly where the workers that the nodes hold,
each by itself, add up to enough. These sums are kept for every kind of worker that was ever asked
about and follow each change of a node: a question costs nothing, whatever the number of nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_SLACK = 1e-6  # sums of fractions of a CPU, as Ray counts them


@dataclass(frozen=True, order=True)
class Worker:
    """What one worker reserves, in CPUs and GPUs."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True, order=True)
class Shape:
    """What a gang asks for: so many workers of one kind, all of them or none."""

    workers: int
    worker: Worker

    @property
    def cpus(self) -> float:
        """Of all workers."""
        return self.workers * self.worker.cpus

    @property
    def gpus(self) -> float:
        """Of all workers."""
        return self.workers * self.worker.gpus

    def __str__(self) -> str:
        """As a phrase for messages."""
        gpus = f" and {self.worker.gpus:g} GPU" if self.worker.gpus else ""
        each = f"{self.worker.cpus:g} CPU{gpus}"
        return (
            f"1 worker with {each}"
            if self.workers == 1
            else f"{self.workers} workers with {each} each"
        )


Placed = Mapping[str, int]
"""Workers of a gang by the name of their node."""


class Room:
    """Free CPUs and GPUs by node. An amount may be negative where more is used than there is."""

    def __init__(self, nodes: Mapping[str, Worker]) -> None:
        self._free = dict(nodes)
        self._places: dict[Worker, int] = {}

    def free(self, node: str) -> Worker:
        """What is free on a node; nothing on one that is not there."""
        return self._free.get(node, Worker(0.0, 0.0))

    def places(self, worker: Worker) -> int:
        """How many such workers would find room, over all nodes."""
        known = self._places.get(worker)
        if known is None:
            known = sum(_holds(free, worker) for free in self._free.values())
            self._places[worker] = known
        return known

    def has(self, shape: Shape) -> bool:
        """Whether a whole gang would find room."""
        return self.places(shape.worker) >= shape.workers

    def plan(self, shape: Shape) -> Placed | None:
        """Where a gang would go, on few nodes; None where there is no room for all of it.

        The node that it fills best, where one holds all; else the emptiest ones.
        """
        if not self.has(shape):
            return None
        holding = {
            node: held for node, free in self._free.items() if (held := _holds(free, shape.worker))
        }
        enough = [(held, node) for node, held in holding.items() if held >= shape.workers]
        if enough:
            return {min(enough)[1]: shape.workers}
        plan: dict[str, int] = {}
        left = shape.workers
        for held, node in sorted(((held, node) for node, held in holding.items()), reverse=True):
            plan[node] = min(held, left)
            left -= plan[node]
            if not left:
                break
        return plan

    def take(self, worker: Worker, placed: Placed) -> None:
        """Workers begin to use what they reserve."""
        self._change(worker, placed, -1)

    def give(self, worker: Worker, placed: Placed) -> None:
        """Workers use it no longer. What was on a node that has gone is gone."""
        self._change(worker, placed, 1)

    def limit(self, node: str, most: Worker) -> Worker:
        """Leave at most so much free on a node; returns what was free before."""
        before = self.free(node)
        self.put(node, Worker(min(before.cpus, most.cpus), min(before.gpus, most.gpus)))
        return before

    def put(self, node: str, free: Worker) -> None:
        """Say what is free on a node."""
        before = self._free.get(node)
        if before is None:
            return
        self._free[node] = free
        for worker in self._places:
            self._places[worker] += _holds(free, worker) - _holds(before, worker)

    def _change(self, worker: Worker, placed: Placed, sign: int) -> None:
        for node, count in placed.items():
            free = self.free(node)
            change = sign * count
            self.put(
                node, Worker(free.cpus + change * worker.cpus, free.gpus + change * worker.gpus)
            )


def _holds(free: Worker, worker: Worker) -> int:
    if free.cpus + _SLACK < worker.cpus or free.gpus + _SLACK < worker.gpus:
        return 0
    held = float("inf")
    if worker.cpus:
        held = (free.cpus + _SLACK) // worker.cpus
    if worker.gpus:
        held = min(held, (free.gpus + _SLACK) // worker.gpus)
    return int(held)
