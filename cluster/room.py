"""Room: what is free on each node, and how many workers it would hold. Pure arithmetic.

A gang's workers are all alike, so that a gang fits exactly where the workers that the nodes hold,
each by itself, add up to enough. These sums are kept for every kind of worker that was ever asked
about and follow each change of a node: a question costs nothing, whatever the number of nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_NOTHING = (0.0, 0.0)
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
        self._free = {node: (free.cpus, free.gpus) for node, free in nodes.items()}
        self._places: dict[Worker, int] = {}

    def free(self, node: str) -> Worker:
        """What is free on a node; nothing on one that is not there."""
        return Worker(*self._free.get(node, _NOTHING))

    @property
    def amounts(self) -> Mapping[str, tuple[float, float]]:
        """CPUs and GPUs that are free, by node."""
        return self._free

    def total(self) -> Worker:
        """What is free on all nodes together, whether or not it is of use."""
        cpus, gpus = zip(*self._free.values(), strict=True) if self._free else ((), ())
        return Worker(sum(cpus), sum(gpus))

    def places(self, worker: Worker) -> int:
        """How many such workers would find room, over all nodes."""
        known = self._places.get(worker)
        if known is None:
            known = sum(
                _holds(cpus, gpus, worker.cpus, worker.gpus) for cpus, gpus in self._free.values()
            )
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
        worker = shape.worker
        holding = [
            (held, node)
            for node, (cpus, gpus) in self._free.items()
            if (held := _holds(cpus, gpus, worker.cpus, worker.gpus))
        ]
        enough = [entry for entry in holding if entry[0] >= shape.workers]
        if enough:
            return {min(enough)[1]: shape.workers}
        plan: dict[str, int] = {}
        left = shape.workers
        for held, node in sorted(holding, reverse=True):
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
        if node in self._free:
            self._put(node, min(before.cpus, most.cpus), min(before.gpus, most.gpus))
        return before

    def _change(self, worker: Worker, placed: Placed, sign: int) -> None:
        for node, count in placed.items():
            before = self._free.get(node)
            if before is not None:
                change = sign * count
                self._put(node, before[0] + change * worker.cpus, before[1] + change * worker.gpus)

    def _put(self, node: str, cpus: float, gpus: float) -> None:
        had_cpus, had_gpus = self._free[node]
        self._free[node] = (cpus, gpus)
        for worker, places in self._places.items():
            each_cpus, each_gpus = worker.cpus, worker.gpus
            self._places[worker] = (
                places
                + _holds(cpus, gpus, each_cpus, each_gpus)
                - _holds(had_cpus, had_gpus, each_cpus, each_gpus)
            )


class Trial:
    """What a room would hold of one gang if others gave theirs back. Changes nothing."""

    def __init__(self, room: Room, shape: Shape) -> None:
        self._room, self._shape = room, shape
        self._places = room.places(shape.worker)
        self._free: dict[str, tuple[float, float]] = {}

    def fits(self) -> bool:
        """Whether the gang would fit."""
        return self._places >= self._shape.workers

    def give(self, worker: Worker, placed: Placed, sign: int = 1) -> None:
        """Suppose that a gang gives back what it holds; with sign -1, that it does not."""
        # A call looks at the nodes of hundreds of gangs: no objects are made on the way.
        wanted_cpus, wanted_gpus = self._shape.worker.cpus, self._shape.worker.gpus
        cpus, gpus = sign * worker.cpus, sign * worker.gpus
        supposed, room = self._free, self._room.amounts
        for node, count in placed.items():
            before = supposed.get(node) or room.get(node, _NOTHING)
            after = (before[0] + count * cpus, before[1] + count * gpus)
            supposed[node] = after
            self._places += _holds(*after, wanted_cpus, wanted_gpus)
            self._places -= _holds(*before, wanted_cpus, wanted_gpus)


def _holds(cpus: float, gpus: float, each_cpus: float, each_gpus: float) -> int:
    """How many workers of a kind fit into what is free; each asks for some CPUs or GPUs."""
    if cpus + _SLACK < each_cpus or gpus + _SLACK < each_gpus:
        return 0
    if not each_gpus:
        return int((cpus + _SLACK) // each_cpus) if each_cpus else 0
    held = (gpus + _SLACK) // each_gpus
    return int(min(held, (cpus + _SLACK) // each_cpus) if each_cpus else held)
