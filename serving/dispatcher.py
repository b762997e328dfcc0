"""Whose shard is computed next: fair shares of measured compute, decided without clock or I/O.

Each user has a *virtual time*: the seconds of compute had so far, divided by the user's weight. The
user with the least of it is served. A shard is charged at dispatch with what it is estimated to
take, and corrected when it was measured. Who was away comes back at the virtual time of those who
wait, neither with credit from the past nor with debt. So two users with work to do differ by a
bounded number of seconds, whatever they submit (start-time fair queueing, Goyal, Guo and Vin 1996;
virtual token counters, arXiv 2401.00588), and a predictor never idles while anybody waits.

Around that: a user with more than the own share of predictors gives way to those with less; among
users that are about even, one is preferred whose model the predictor holds already. A decision
takes O(log users). Online requests are no matter of this: they have processes of their own.
"""

import heapq
import math
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

_SMOOTHING = 0.3
_LEAST_S = 0.01
_LOOKED_AT = 8
_PRIOR_S_A_ROW = 1e-6


@dataclass(frozen=True)
class Turn:
    """A shard that was given out.

    Attributes:
        ticket: Names the turn.
        user: Whose it is.
        job: Of which job.
        shard: Number in the job.
        model: The model that it needs.
        rows: Rows of the shard; 0 for work that has none, such as planning.
        estimate_s: What it was charged with.
    """

    ticket: int
    user: str
    job: str
    shard: int
    model: str
    rows: int
    estimate_s: float


@dataclass(eq=False)
class _Job:
    name: str
    user: "_User"
    model: str
    order: tuple[int, int]  # priority first, then age
    pending: deque[tuple[int, int]] = field(default_factory=deque)  # (shard, rows)
    pending_rows: int = 0
    is_listed: bool = False

    def __lt__(self, other: "_Job") -> bool:
        return self.order < other.order


@dataclass(eq=False)
class _User:
    name: str
    weight: float = 1.0
    most_running: int | None = None
    virtual_s: float = 0.0
    running: int = 0
    pending: int = 0
    passes: int = 0
    served_s: float = 0.0
    stamp: int = 0  # entries of the heaps with another stamp are out of date
    jobs: dict[str, _Job] = field(default_factory=dict)
    queue: list[_Job] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        return self.most_running is not None and self.running >= self.most_running

    def next_job(self) -> _Job | None:
        """The job that goes first; those without pending shards are forgotten."""
        while self.queue and not self.queue[0].pending:
            heapq.heappop(self.queue).is_listed = False
        return self.queue[0] if self.queue else None


_Entry = tuple[float, int, int, _User]  # virtual time, tie-break, stamp


class Dispatcher:
    """Decides turns. Not safe to share between threads; does nothing by itself.

    Args:
        predictors: How many shards can be computed at the same time.
        affinity_s: How far, in virtual seconds, a user may be from the one who is due and still be
            preferred for the model. Adds as much to the bound of unfairness; nobody is passed over
            more often than there are predictors, which is about the time of one shard.
    """

    def __init__(self, predictors: int, *, affinity_s: float = 2.0) -> None:
        self._predictors = predictors
        self._affinity_s = affinity_s
        self._users: dict[str, _User] = {}
        self._jobs: dict[str, _Job] = {}
        self._turns: dict[int, Turn] = {}
        self._s_a_row: dict[str, float] = {}
        # Users below their share of the predictors, and users at or above it.
        self._under: list[_Entry] = []
        self._over: list[_Entry] = []
        self._active: set[str] = set()
        self._active_weight = 0.0
        self._clock_s = 0.0  # the largest virtual time at which a turn began
        self._count = 0
        self._waiting = 0

    # -- what there is ---------------------------------------------------------------------------

    def resize(self, predictors: int) -> None:
        """There are so many predictors now."""
        self._predictors = predictors

    def set_user(self, user: str, weight: float = 1.0, most_running: int | None = None) -> None:
        """Make a user known, or change what holds from now on.

        Args:
            user: Who.
            weight: Twice the weight gets twice the compute where both wait. Above 0.
            most_running: Shards at the same time, even where predictors idle. None: any number.
        """
        known = self._user(user)
        if (known.weight, known.most_running) == (weight, most_running):
            return
        if user in self._active:
            self._active_weight += weight - known.weight
        known.weight, known.most_running = weight, most_running
        self._list(known)

    def add_job(self, job: str, user: str, model: str, *, priority: int = 0) -> None:
        """Make a job known, without shards yet; of a user's jobs the higher priority goes first."""
        self._count += 1
        owner = self._user(user)
        made = _Job(job, owner, model, (-priority, self._count))
        self._jobs[job] = owner.jobs[job] = made

    def add_shards(self, job: str, shards: Iterable[tuple[int, int]]) -> None:
        """Shards, as (number, rows), that wait from now on."""
        found = self._jobs[job]
        user, was_waiting = found.user, found.user.pending > 0
        added = list(shards)
        if not added:
            return
        floor_s = None if was_waiting else self._least_waiting()
        found.pending.extend(added)
        found.pending_rows += sum(rows for _, rows in added)
        user.pending += len(added)
        self._waiting += len(added)
        if not was_waiting:
            user.virtual_s = max(user.virtual_s, self._clock_s if floor_s is None else floor_s)
        self._offer(found)

    def drop_job(self, job: str) -> None:
        """Forget a job; turns of it that are out may still be completed."""
        found = self._jobs.pop(job, None)
        if found is None:
            return
        found.user.jobs.pop(job)
        found.user.pending -= len(found.pending)
        self._waiting -= len(found.pending)
        found.pending.clear()
        found.pending_rows = 0
        self._settle(found.user)

    # -- turns -----------------------------------------------------------------------------------

    def next(self, loaded: Container[str] = ()) -> Turn | None:
        """Give out the next shard, for a predictor that holds the models `loaded`.

        Returns:
            None where nobody waits that may be served.
        """
        user = self._choose(loaded)
        return None if user is None else self._give(user)

    def complete(self, turn: Turn, measured_s: float) -> None:
        """The shard is done and took so many seconds of a predictor."""
        if turn.rows:
            self.learn(turn.model, measured_s, turn.rows)
        self._end(turn, measured_s)

    def give_back(self, turn: Turn, measured_s: float = 0.0, *, waits: bool = True) -> None:
        """The shard was not done: the user is charged `measured_s` only.

        Args:
            turn: The turn.
            measured_s: Compute that the user is to pay for all the same.
            waits: The shard waits again, in front of the others of its job.
        """
        job = self._jobs.get(turn.job)
        if waits and job is not None:
            job.pending.appendleft((turn.shard, turn.rows))
            job.pending_rows += turn.rows
            job.user.pending += 1
            self._waiting += 1
            self._enter(job)
        self._end(turn, measured_s)

    def learn(self, model: str, seconds: float, rows: int) -> None:
        """So many rows of a model took so long; later measurements count for more."""
        found = seconds / rows
        before = self._s_a_row.get(model)
        self._s_a_row[model] = found if before is None else before + _SMOOTHING * (found - before)

    # -- what is told ----------------------------------------------------------------------------

    def s_a_row(self, model: str) -> float | None:
        """Measured seconds a row of a model, smoothed; None where nothing was measured."""
        return self._s_a_row.get(model)

    def standings(self) -> dict[str, tuple[int | None, float | None]]:
        """Each job's place among its user's, and the seconds until it is done.

        The place is the number of jobs that go before it; None where nothing of it waits. The time
        holds if users and speeds stay; None where the model's speed is not known. One pass over all
        jobs, each user's by their order.
        """
        out_s: dict[str, float] = {}
        for turn in self._turns.values():
            out_s[turn.job] = out_s.get(turn.job, 0.0) + turn.estimate_s / 2
        told: dict[str, tuple[int | None, float | None]] = {}
        for user in self._users.values():
            share, before, work_s = self._share(user), 0, 0.0
            for job in sorted(user.jobs.values()):
                place = None
                if job.pending:
                    work_s += self._s_a_row.get(job.model, _PRIOR_S_A_ROW) * job.pending_rows
                    place, before = before, before + 1
                eta_s = (work_s + out_s.get(job.name, 0.0)) / share
                told[job.name] = place, eta_s if job.model in self._s_a_row else None
        return told

    def served_s(self) -> dict[str, float]:
        """Measured seconds of compute by user."""
        return {name: user.served_s for name, user in self._users.items()}

    @property
    def waiting(self) -> int:
        """Shards that wait."""
        return self._waiting

    @property
    def running(self) -> int:
        """Turns that are out."""
        return len(self._turns)

    # -- inside ----------------------------------------------------------------------------------

    def _user(self, name: str) -> _User:
        return self._users.setdefault(name, _User(name))

    def _share(self, user: _User) -> float:
        """Predictors that are a user's by weight."""
        weight = self._active_weight if user.name in self._active else 0.0
        if weight <= user.weight:
            share = float(self._predictors)
        else:
            share = self._predictors * user.weight / weight
        most = share if user.most_running is None else min(share, user.most_running)
        return max(most, 1e-9)

    def _least_waiting(self) -> float | None:
        """The least virtual time among those who wait."""
        tops = [self._top(heap) for heap in (self._under, self._over)]
        return min((user.virtual_s for user in tops if user is not None), default=None)

    def _top(self, heap: list[_Entry]) -> _User | None:
        """The first of a heap who waits and may be served; entries out of date are dropped."""
        while heap:
            _, _, stamp, user = heap[0]
            if stamp == user.stamp and not user.is_full and user.next_job() is not None:
                return user
            heapq.heappop(heap)
        return None

    def _first(self) -> tuple[_User, list[_Entry]] | None:
        """Who is due: of those below their share, else of all; and the heap he is the top of."""
        under, over = self._under, self._over
        while (user := self._top(under)) is not None:
            if user.running < math.ceil(self._share(user)):
                return user, under
            heapq.heappush(over, heapq.heappop(under))
        user = self._top(over)
        return None if user is None else (user, over)

    def _choose(self, loaded: Container[str]) -> _User | None:
        found = self._first()
        if found is None:
            return None
        due, heap = found
        if not loaded or due.passes >= self._predictors or self._holds(due, loaded):
            return self._taken(due, due)
        looked_at: list[_Entry] = []
        chosen = due
        while len(looked_at) < _LOOKED_AT:
            looked_at.append(heapq.heappop(heap))
            found = self._first()
            if found is None or found[1] is not heap:
                break
            other = found[0]
            if other.virtual_s > due.virtual_s + self._affinity_s:
                break
            if self._holds(other, loaded):
                chosen = other
                break
        for entry in looked_at:
            heapq.heappush(heap, entry)
        return self._taken(chosen, due)

    def _taken(self, chosen: _User, due: _User) -> _User:
        due.passes = 0 if chosen is due else due.passes + 1
        chosen.passes = 0
        return chosen

    def _holds(self, user: _User, loaded: Container[str]) -> bool:
        job = user.next_job()
        return job is not None and job.model in loaded

    def _give(self, user: _User) -> Turn | None:
        job = user.next_job()
        if job is None:
            return None
        shard, rows = job.pending.popleft()
        job.pending_rows -= rows
        estimate_s = max(_LEAST_S, rows * self._s_a_row.get(job.model, _PRIOR_S_A_ROW))
        self._count += 1
        turn = Turn(self._count, user.name, job.name, shard, job.model, rows, estimate_s)
        self._turns[turn.ticket] = turn
        self._clock_s = max(self._clock_s, user.virtual_s)
        user.virtual_s += estimate_s / user.weight
        user.running += 1
        user.pending -= 1
        self._waiting -= 1
        self._list(user)
        return turn

    def _end(self, turn: Turn, measured_s: float) -> None:
        if self._turns.pop(turn.ticket, None) is None:
            return  # told twice
        user = self._users[turn.user]
        user.virtual_s += (measured_s - turn.estimate_s) / user.weight
        user.served_s += measured_s
        user.running -= 1
        self._settle(user)

    def _offer(self, job: _Job) -> None:
        self._enter(job)
        self._settle(job.user)

    def _enter(self, job: _Job) -> None:
        if not job.is_listed:
            job.is_listed = True
            heapq.heappush(job.user.queue, job)

    def _settle(self, user: _User) -> None:
        """Put a user, changed in whatever way, where he belongs."""
        is_active = user.pending > 0 or user.running > 0
        if is_active and user.name not in self._active:
            self._active.add(user.name)
            self._active_weight += user.weight
        elif not is_active and user.name in self._active:
            self._active.discard(user.name)
            # Sums of fractions drift; an empty house is the time to forget that.
            self._active_weight = (self._active_weight - user.weight) if self._active else 0.0
        self._list(user)

    def _list(self, user: _User) -> None:
        """Enter a user into the heaps anew; what is there of him is out of date."""
        user.stamp += 1
        if user.pending <= 0 or user.is_full:
            return
        if user.next_job() is not None:
            self._count += 1
            heapq.heappush(self._under, (user.virtual_s, self._count, user.stamp, user))
