"""The queue: which runs start, which make room, and why the others wait. Pure; knows no Ray.

A run is a gang: all of its workers find room, or it does not start. Runs come in the order of
`cluster.shares`: who has had least of the cluster, moved by priority. Then, run by run:

- There is room: it starts.
- Others must make room: running ones that are behind it by more than a margin are asked to write
  a checkpoint and go back to the queue, where they have their old place; as few of them as make
  enough room. What the run needs of the free nodes is kept for it meanwhile.
- Neither: the first such run is the *head*. Smaller runs behind it may use what it cannot use yet,
  as a loan: as soon as the head could start without them, they make room for it. So back-filling
  leaves no node idle, and delays the head by the time of a checkpoint at most; nobody has to guess
  how long a run will take.

Runs that only the order of submission tells apart wait in a line (`cluster.lines`), and are looked
at as one, so that a decision takes time by the number of lines, not of runs.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from cluster.lines import RUNNING, WAITING, YIELDING, Line, QueuedRun, WaitingLines, line_of
from cluster.room import Placed, Room, Shape, Trial, Worker
from cluster.shares import Policy, Shares, Terms

_DECISIONS = 8  # of one call, so that each call is short
_ATTEMPTS = 4  # runs for which others are looked for to make room, in one call
_MOST_ASKED = 64  # of which one that is not the first may ask so many


@dataclass(frozen=True)
class Start:
    """A run is to start."""

    run_id: str
    placed: Placed


@dataclass(frozen=True)
class Yield:
    """A run is to write a checkpoint and go back to the queue, so that another can start."""

    run_id: str
    for_run: str


Decision = Start | Yield

_Entry = tuple[float, int, Line | str]
"""Key, sequence of the first run, line; or the least key of a user's lines, and the user."""


class Queue:
    """All runs of one cluster. Not thread-safe; times are seconds of one clock.

    The owner says what happens (`submit`, `returned`, `remove`, `set_nodes`) and then asks `decide`
    until nothing comes. A decision counts as carried out.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.shares = Shares(policy or Policy())
        self._runs: dict[str, QueuedRun] = {}
        self._lines = WaitingLines()
        self._running: dict[Line, dict[str, QueuedRun]] = {}  # those of a line by their start
        self._lent: dict[str, dict[str, QueuedRun]] = {}  # by the head that lends
        self._whole = Room({})
        self._free = Room({})
        self._soon = Room({})  # once those that yield have gone
        self.head = ""
        """The run for which the room that is free now is not enough; smaller ones borrow it."""
        self.awaited: set[str] = set()
        """Runs that start as soon as those that yield for them have gone."""
        self.looked_at = 0
        """Lines and runs that decisions have looked at: what their time goes by."""

    def run(self, run_id: str) -> QueuedRun | None:
        """A run that waits or runs."""
        return self._runs.get(run_id)

    def runs(self) -> list[QueuedRun]:
        """All runs that wait or run, by submission."""
        return sorted(self._runs.values(), key=lambda run: run.sequence)

    def set_terms(self, user: str, terms: Terms, now: float) -> None:
        """Say what a user may have, from now on. What runs goes on."""
        self.shares.charge(now)
        self.shares.set_terms(user, terms)

    def set_nodes(
        self, nodes: Mapping[str, Worker], others: Mapping[str, Worker], now: float
    ) -> None:
        """Say what the nodes have in all, and what on them others than this queue use."""
        self.shares.charge(now)
        self.shares.set_total(
            Worker(sum(node.cpus for node in nodes.values()), sum(n.gpus for n in nodes.values()))
        )
        self._whole = Room(nodes)
        nothing = Worker(0.0, 0.0)
        usable = {
            name: Worker(
                node.cpus - others.get(name, nothing).cpus,
                node.gpus - others.get(name, nothing).gpus,
            )
            for name, node in nodes.items()
        }
        self._free, self._soon = Room(usable), Room(usable)
        for run in self._runs.values():
            if run.state != WAITING:
                self._free.take(run.shape.worker, run.placed)
            if run.state == RUNNING:
                self._soon.take(run.shape.worker, run.placed)

    def submit(self, run: QueuedRun, now: float) -> None:
        """A new run, or one that an earlier queue knew in any state. Idempotent by run id."""
        if run.run_id in self._runs:
            return
        self.shares.charge(now)
        self._runs[run.run_id] = run
        if run.state == WAITING:
            self.shares.wait(run.user)
            self._lines.enter(run)
            return
        self.shares.hold(run.user, run.shape)
        self._free.take(run.shape.worker, run.placed)
        if run.state == RUNNING:
            self._note_running(run)

    def returned(self, run_id: str, now: float) -> None:
        """A run has ended before its end and goes on later, from its old place in the queue."""
        run = self._runs.get(run_id)
        if run is None or run.state == WAITING:
            return
        self.shares.charge(now)
        self.shares.wait(run.user)
        self._lines.enter(run)
        self._leave_nodes(run)
        run.state, run.placed, run.lent_by = WAITING, {}, ""

    def remove(self, run_id: str, now: float) -> None:
        """A run has ended for good, or is not wanted any more. Idempotent."""
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        self.shares.charge(now)
        if run.state == WAITING:
            self.shares.wait(run.user, -1)
            self._lines.leave(run)
        else:
            self._leave_nodes(run)

    def asked_to_go(self, run_id: str, now: float) -> None:
        """A running run was asked to end by somebody else: what it holds will soon be free."""
        run = self._runs.get(run_id)
        if run is not None and run.state == RUNNING:
            self.shares.charge(now)
            self._begin_yielding(run)

    def waiting(self) -> dict[str, list[QueuedRun]]:
        """Waiting runs by user, each user's in the order in which they come."""
        by_user: dict[str, list[QueuedRun]] = {}
        for run in self._runs.values():
            if run.state == WAITING:
                by_user.setdefault(run.user, []).append(run)
        for runs in by_user.values():
            runs.sort(key=lambda run: (-run.priority, run.sequence))
        return by_user

    def wanted(self) -> list[Shape]:
        """The gangs that run, and one of each kind that waits for nothing but room."""
        running = [run.shape for run in self._runs.values() if run.state != WAITING]
        waiting = [
            shape
            for shape in self._lines.shapes()
            if any(
                self._lines.first(line) and not self.shares.over_quota(line[0], shape)
                for line in self._lines.of(shape)
            )
        ]
        return [*sorted(running), *sorted(waiting)]

    def moved(self, run_id: str, placed: Placed) -> None:
        """Say where a run really is; `set_nodes` must follow."""
        run = self._runs.get(run_id)
        if run is not None and run.state != WAITING:
            run.placed = placed

    def can_ever_start(self, shape: Shape) -> bool:
        """Whether the nodes, were they empty, had room for such a gang."""
        return self._whole.has(shape)

    def most_workers(self, worker: Worker) -> int:
        """How many such workers the nodes, were they empty, would hold."""
        return self._whole.places(worker)

    def places(self, worker: Worker) -> int:
        """How many more such workers the nodes hold now."""
        return self._free.places(worker)

    def decide(self, now: float) -> list[Decision]:
        """The next decisions, a few at a time; empty when everything is as it should be."""
        self.shares.charge(now)
        self.head, self.awaited = "", set()
        one = _Pass(self, now)
        try:
            return list(one.decide())
        finally:
            one.undo()

    def _begin(self, run: QueuedRun, placed: Placed, now: float) -> None:
        self.shares.hold(run.user, run.shape)
        self.shares.wait(run.user, -1)
        self._lines.leave(run)
        run.state, run.placed, run.lent_by, run.started_at = RUNNING, placed, self.head, now
        self._free.take(run.shape.worker, placed)
        self._note_running(run)

    def _note_running(self, run: QueuedRun) -> None:
        self._soon.take(run.shape.worker, run.placed)
        self._running.setdefault(line_of(run), {})[run.run_id] = run
        if run.lent_by:
            self._lent.setdefault(run.lent_by, {})[run.run_id] = run

    def _note_not_running(self, run: QueuedRun) -> None:
        self._soon.give(run.shape.worker, run.placed)
        _drop(self._running, line_of(run), run.run_id)
        _drop(self._lent, run.lent_by, run.run_id)

    def _begin_yielding(self, run: QueuedRun) -> None:
        self._note_not_running(run)
        run.state = YIELDING

    def _leave_nodes(self, run: QueuedRun) -> None:
        self.shares.hold(run.user, run.shape, -1)
        self._free.give(run.shape.worker, run.placed)
        if run.state == RUNNING:
            self._note_not_running(run)


class _Pass:
    """One round of decisions: each line is looked at once, in order."""

    def __init__(self, queue: Queue, now: float) -> None:
        self._queue = queue
        self._now = now
        self._attempts = 0
        self._keys: dict[tuple[str, int], float] = {}
        self._behind: list[tuple[float, Line, dict[str, QueuedRun]]] | None = None
        self._total: Worker | None = None
        self._kept: list[tuple[Worker, Placed]] = []
        self._withheld: list[tuple[str, Worker]] = []

    def decide(self) -> Iterator[Decision]:
        """In the order of keys; of a user's lines no more is looked at than is needed."""
        queue, heap, made, is_whole = self._queue, self._users(), 0, True
        while heap and made < _DECISIONS:
            key, _, line = heapq.heappop(heap)
            if isinstance(line, str):
                self._push(heap, queue._lines.of(line))
                continue
            entry = self._entry(line)
            if entry is None:
                continue
            if entry[0] > key:  # its user has been given something meanwhile
                heapq.heappush(heap, entry)
                continue
            run = queue._lines.first(line)
            if run is None:
                continue
            if placed := queue._free.plan(run.shape):
                queue._begin(run, placed, self._now)
                self._keys.clear()
                made += 1
                yield Start(run.run_id, placed)
                self._push(heap, [line])
            elif self._attempts < _ATTEMPTS:
                for going in self._make_room(run, key):
                    made += 1
                    yield Yield(going.run_id, run.run_id)
            elif is_whole:  # from here on only what fits
                is_whole = False
                heap = self._fitting()

    def _users(self) -> list[_Entry]:
        """Users by where the first of their lines may stand."""
        queue = self._queue
        heap: list[_Entry] = [
            (queue.shares.key(user, queue._lines.top_of(user)), -1 - number, user)
            for number, user in enumerate(queue._lines.users())
        ]
        queue.looked_at += len(heap)
        heapq.heapify(heap)
        return heap

    def _fitting(self) -> list[_Entry]:
        """The lines of shapes for which there is room."""
        queue = self._queue
        heap: list[_Entry] = []
        for shape in queue._lines.shapes():
            if queue._free.has(shape):
                self._push(heap, queue._lines.of(shape))
        return heap

    def _push(self, heap: list[_Entry], lines: Iterable[Line]) -> None:
        for line in lines:
            if entry := self._entry(line):
                heapq.heappush(heap, entry)

    def undo(self) -> None:
        """Give back what was kept for runs that cannot start yet: the next round keeps it anew."""
        for worker, placed in self._kept:
            self._queue._soon.give(worker, placed)
        for node, amount in self._withheld:
            self._queue._free.give(amount, {node: 1})

    def _entry(self, line: Line) -> _Entry | None:
        """Where a line stands; None where nobody in it could start, were there room."""
        queue, (user, shape, priority) = self._queue, line
        queue.looked_at += 1
        run = queue._lines.first(line)
        if run is None or not queue._whole.has(shape) or queue.shares.over_quota(user, shape):
            return None
        key = self._keys.get((user, priority))
        if key is None:
            key = self._keys[user, priority] = queue.shares.key(user, priority)
        return key, run.sequence, line

    def _make_room(self, run: QueuedRun, key: float) -> list[QueuedRun]:
        """Runs that are to yield so that `run` can start; what it needs is kept for it."""
        queue, shape = self._queue, run.shape
        going: list[QueuedRun] = []
        if not queue._soon.has(shape):
            self._attempts += 1
            candidates = self._candidates(run, key)
            if queue.head:  # the head may ask any number, the others' calls are to stay short
                candidates = itertools.islice(candidates, _MOST_ASKED)
            if self._could_be_enough(run, key):
                going = self._enough_of(candidates, shape)
            if not going:
                queue.head = queue.head or run.run_id
                return []
            for other in going:
                queue._begin_yielding(other)
            self._behind = self._total = None
        queue.awaited.add(run.run_id)
        self._keep(shape)
        return going

    def _candidates(self, run: QueuedRun, key: float) -> Iterator[QueuedRun]:
        """Running runs that `run` may displace: what it lent, then those behind it, last first."""
        queue = self._queue
        lent = queue._lent.get(run.run_id, {}) if not queue.head else {}
        yield from reversed(lent.values())
        for behind, _, runs in self._sorted_running():
            if behind <= key + queue.shares.policy.margin_s:
                return
            yield from (other for other in reversed(runs.values()) if other.run_id not in lent)

    def _could_be_enough(self, run: QueuedRun, key: float) -> bool:
        """A bound that costs little: whether all candidates together hold what `run` asks for."""
        queue = self._queue
        if self._total is None:
            self._total = queue._soon.total()
        cpus, gpus = self._total.cpus, self._total.gpus
        for other in queue._lent.get(run.run_id, {}).values():
            cpus, gpus = cpus + other.shape.cpus, gpus + other.shape.gpus
        for behind, (_, shape, _), runs in self._sorted_running():
            if behind <= key + queue.shares.policy.margin_s:
                break
            cpus, gpus = cpus + len(runs) * shape.cpus, gpus + len(runs) * shape.gpus
            if cpus >= run.shape.cpus and gpus >= run.shape.gpus:
                break
        return cpus + 1e-6 >= run.shape.cpus and gpus + 1e-6 >= run.shape.gpus

    def _sorted_running(self) -> list[tuple[float, Line, dict[str, QueuedRun]]]:
        """Running runs by where they would stand, were they waiting; the last first."""
        if self._behind is None:
            key = self._queue.shares.key
            self._behind = [
                (key(user, priority, without=shape), (user, shape, priority), runs)
                for (user, shape, priority), runs in self._queue._running.items()
            ]
            self._behind.sort(key=lambda entry: -entry[0])
            self._queue.looked_at += len(self._behind)
        return self._behind

    def _enough_of(self, candidates: Iterable[QueuedRun], shape: Shape) -> list[QueuedRun]:
        """As few of the candidates as make room; empty where all together do not."""
        trial = Trial(self._queue._soon, shape)
        going: list[QueuedRun] = []
        for other in candidates:
            trial.give(other.shape.worker, other.placed)
            going.append(other)
            self._queue.looked_at += 1
            if trial.fits():
                break
        if not trial.fits():
            return []
        needed: list[QueuedRun] = []
        for other in reversed(going):  # the one nearest to the front is spared first
            trial.give(other.shape.worker, other.placed, -1)
            if not trial.fits():
                trial.give(other.shape.worker, other.placed)
                needed.append(other)
        return needed

    def _keep(self, shape: Shape) -> None:
        """Let nobody else use what a run will need that starts once others have gone."""
        queue = self._queue
        placed = queue._soon.plan(shape)
        if placed is None:
            return
        queue._soon.take(shape.worker, placed)
        self._kept.append((shape.worker, placed))
        for node in placed:
            before = queue._free.limit(node, queue._soon.free(node))
            after = queue._free.free(node)
            withheld = Worker(before.cpus - after.cpus, before.gpus - after.gpus)
            self._withheld.append((node, withheld))


_Key = TypeVar("_Key")


def _drop(runs: dict[_Key, dict[str, QueuedRun]], key: _Key, run_id: str) -> None:
    of_key = runs.get(key, {})
    of_key.pop(run_id, None)
    if not of_key:
        runs.pop(key, None)
