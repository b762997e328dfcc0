"""Where each run stands in the queue, and why it waits: the queue's decisions in words. Pure."""

import heapq
from dataclasses import dataclass

from cluster.lines import WAITING, YIELDING, QueuedRun
from cluster.queue import Queue


@dataclass(frozen=True)
class Standing:
    """What a user asks about a run in the queue.

    Attributes:
        run_id: The run.
        user: Whose it is.
        priority: As it was submitted.
        state: waiting, running or yielding.
        position: 1 for the run that comes next; 0 for one that does not wait.
        reason: Why it waits, or what it does, as a sentence.
    """

    run_id: str
    user: str
    priority: int
    state: str
    position: int
    reason: str


def standings(queue: Queue, now: float) -> list[Standing]:
    """All runs: those that hold room by their start, then those that wait, in their order.

    The order is the one in which they would start if room came one run after the other and none
    ended; what happens meanwhile changes it.
    """
    queue.shares.charge(now)
    holding = [run for run in queue.runs() if run.state != WAITING]
    holding.sort(key=lambda run: (run.started_at, run.sequence))
    found = [_standing(run, 0, _what_it_does(run)) for run in holding]
    before: QueuedRun | None = None
    for position, run in enumerate(_in_order(queue), start=1):
        found.append(_standing(run, position, _why_it_waits(queue, run, before)))
        before = run
    return found


def _standing(run: QueuedRun, position: int, reason: str) -> Standing:
    return Standing(run.run_id, run.user, run.priority, run.state, position, reason)


def _in_order(queue: Queue) -> list[QueuedRun]:
    by_user = queue.waiting()
    given = dict.fromkeys(by_user, 0.0)
    heap: list[tuple[float, int, str, int]] = []

    def push(user: str, place: int) -> None:
        if place < len(by_user[user]):
            run = by_user[user][place]
            key = queue.shares.key(user, run.priority, more=given[user])
            heapq.heappush(heap, (key, run.sequence, user, place))

    for user in by_user:
        push(user, 0)
    ordered = []
    while heap:
        _, _, user, place = heapq.heappop(heap)
        run = by_user[user][place]
        ordered.append(run)
        given[user] += queue.shares.share(run.shape)
        push(user, place + 1)
    return ordered


def _what_it_does(run: QueuedRun) -> str:
    if run.state == YIELDING:
        return "writes a checkpoint and makes room."
    if run.lent_by:
        return f"runs on room that {run.lent_by} cannot use yet; makes room for it when it can."
    return "runs."


def _why_it_waits(queue: Queue, run: QueuedRun, before: QueuedRun | None) -> str:
    shape = run.shape
    if not queue.can_ever_start(shape):
        return (
            f"asks for {shape}; the cluster, were it empty, has room for "
            f"{queue.most_workers(shape.worker)}. It waits for nodes to be added."
        )
    if quota := queue.shares.over_quota(run.user, shape):
        return f"waits for the user's own runs: {quota}."
    if run.run_id in queue.awaited:
        return "starts as soon as the runs that make room for it have written their checkpoints."
    free = f"asks for {shape}; {queue.places(shape.worker)} of them would find room now"
    if before is None or run.run_id == queue.head:
        return f"first in line: {free}."
    return f"behind {before.run_id} of {before.user}: {free}."
