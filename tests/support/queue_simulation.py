"""A cluster in which time is a number: runs start, yield, end and fail as the queue decides."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.lines import RUNNING, WAITING, YIELDING, QueuedRun
from cluster.queue import Queue, Start, Yield
from cluster.room import Worker


@dataclass
class Work:
    """A run, when it comes, and how long it has to run."""

    run: QueuedRun
    at: float
    left_s: float
    started_at: float = 0.0
    ended_at: float = -1.0
    starts: list[float] = field(default_factory=list)


class Simulation:
    """Events in order of time; `checkpoint_s` passes between the request to yield and its end."""

    def __init__(
        self,
        queue: Queue,
        nodes: dict[str, Worker],
        work: list[Work],
        checkpoint_s: float = 0.0,
        tick_s: float = 10.0,
        look: Callable[["Simulation"], None] = lambda _: None,
    ) -> None:
        self.queue, self.nodes, self.now = queue, nodes, 0.0
        self.work = {one.run.run_id: one for one in work}
        self.yields = 0
        self._checkpoint_s, self._tick_s, self._look = checkpoint_s, tick_s, look
        self._events: list[tuple[float, int, str, str, int]] = []
        self._number = 0
        for one in sorted(work, key=lambda one: one.at):
            self._push(one.at, "submit", one.run.run_id)
        queue.set_nodes(nodes, {}, 0.0)

    def _push(self, at: float, kind: str, run_id: str = "", start: int = 0) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, kind, run_id, start))

    def settle(self) -> None:
        while decisions := self.queue.decide(self.now):
            for decision in decisions:
                one = self.work[decision.run_id]
                if isinstance(decision, Start):
                    one.started_at = self.now
                    one.starts.append(self.now)
                    self._push(self.now + one.left_s, "end", decision.run_id, len(one.starts))
                elif isinstance(decision, Yield):
                    self.yields += 1
                    done_at = self.now + self._checkpoint_s
                    self._push(done_at, "yielded", decision.run_id, len(one.starts))
        self._look(self)

    def run(self, until: float = float("inf"), max_events: int = 1_000_000) -> None:
        """To the end of all work, or of time."""
        self._push(self._tick_s, "tick")
        for _ in range(max_events):
            if not self._events or self._events[0][0] > until:
                return
            if all(one.ended_at >= 0 for one in self.work.values()):
                return
            self.step()
        raise AssertionError("no end in sight")

    def step(self) -> None:
        self.now, _, kind, run_id, start = heapq.heappop(self._events)
        if kind == "tick":
            self._push(self.now + self._tick_s, "tick")
            self.settle()
            return
        one = self.work[run_id]
        if kind == "submit":
            self.queue.submit(one.run, self.now)
        elif start != len(one.starts) or one.ended_at >= 0:
            return  # of an earlier start
        elif kind == "end" and one.run.state in (RUNNING, YIELDING):
            one.ended_at = self.now
            self.queue.remove(run_id, self.now)
        elif kind == "yielded" and one.run.state == YIELDING:
            one.left_s -= self.now - one.started_at
            one.starts.append(-1.0)  # so that the end of this start does not count
            self.queue.returned(run_id, self.now)
        self.settle()

    def used(self) -> dict[str, Worker]:
        used = {node: Worker(0.0) for node in self.nodes}
        for run in self.queue.runs():
            if run.state == WAITING:
                assert run.placed == {}
                continue
            for node, count in run.placed.items():
                held = used[node]
                used[node] = Worker(
                    held.cpus + count * run.shape.worker.cpus,
                    held.gpus + count * run.shape.worker.gpus,
                )
        return used
