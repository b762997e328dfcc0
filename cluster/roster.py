"""The roster: the hosts of a run in their ranks, those that stand by, and those still starting.

Notices who comes, goes or is told to leave, and asks for what is missing; where hosts go is the
placement's knowledge.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster.errors import StartTimeout
from cluster.host import Heard
from cluster.nodes import draining_nodes
from cluster.placement import GangSpec, Placement, Seat

_WATCH_S = 5.0
_STUCK_S = 20.0  # a process may take this long to come up on a busy node
_WAITING_S = 1.0  # between two looks for a better place
_DRAINING_CHECK_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_CLOSE_S = 15.0


@dataclass(frozen=True)
class Restored:
    """What the gang is after lost hosts were replaced.

    Attributes:
        workers: Ranks of the next formation.
        replaced: Hosts that are new in their rank: `rank` and `node`, with `was` the node of the
            host before, or "" where there was none.
        lost: Hosts that are gone and not replaced: `rank` that they had, and `node`.
    """

    workers: int
    replaced: list[dict[str, Any]]
    lost: list[dict[str, Any]]


class Roster:
    """Places hosts, keeps spares, replaces the lost. Used by one thread; only `place` blocks.

    Attributes:
        hosts: In rank order. One that is not standing keeps its rank for a replacement.
        spares: Warm, in the order of their coming.
        starting: Asked for, not there yet.
    """

    def __init__(self, spec: GangSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self.spec = spec
        self.hosts: list[Seat] = []
        self.spares: list[Seat] = []
        self.starting: list[Seat] = []
        self._clock = clock
        self._placement = Placement(spec, clock)
        self._retiring: list[tuple[Seat, Any]] = []
        self._failed_starts = 0
        self._next_start_at = 0.0
        self._draining_checked_at = float("-inf")

    def place(self) -> list[dict[str, Any]]:
        """Reserve the resources of all workers, start their hosts; then begin with the spares.

        Returns:
            What each host's `start` told, by rank.

        Raises:
            StartTimeout: Resources or templates did not come within `start_timeout_s`.
        """
        spec = self.spec
        self.hosts = self._placement.reserve()
        try:
            told: list[dict[str, Any]] = ray.get(
                [seat.started for seat in self.hosts], timeout=spec.start_timeout_s
            )
            places = ray.get([seat.placed for seat in self.hosts], timeout=spec.start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise StartTimeout(
                f"{len(self.hosts)} templates did not start within {spec.start_timeout_s:g} s. See "
                f"{spec.log_dir}, or raise cluster.start_timeout_s."
            ) from None
        for seat, place in zip(self.hosts, places, strict=True):
            seat.take_place(place)
            seat.started = None
        self.tend()
        return told

    def tend(self) -> None:
        """Note who has come, gone or been told to end, and ask for what is missing. Quick."""
        self._note_leaving()
        self._note_started()
        self._note_spares()
        self._let_go_of_retired()
        self._give_up_stuck()
        present = sum(seat.is_standing for seat in self.hosts) + len(self.spares)
        missing = self.spec.workers + self.spec.standbys - present - len(self.starting)
        if missing > 0 and self._clock() >= self._next_start_at:
            used = [seat.node_id for seat in (*self.hosts, *self.spares) if seat.is_standing]
            self.starting += self._placement.ask(missing, self._held_bundles(), used)

    def fill(self) -> None:
        """Give spares the ranks of hosts that do not stand, and those missing at the end."""
        for rank, seat in enumerate(self.hosts):
            if not seat.is_standing and self.spares:
                self.hosts[rank] = self._recruit()
        while len(self.hosts) < self.spec.workers and self.spares:
            self.hosts.append(self._recruit())

    def compared_with(self, before: Sequence[Seat]) -> Restored:
        """What has become of the hosts that were there before."""
        standing = [seat for seat in self.hosts if seat.is_standing]
        replaced = [
            {
                "rank": standing.index(seat),
                "node": seat.address,
                "was": before[rank].address if rank < len(before) else "",
            }
            for rank, seat in enumerate(self.hosts)
            if seat.is_standing and seat not in before
        ]
        lost = [
            {"rank": rank, "node": seat.address}
            for rank, seat in enumerate(self.hosts)
            if not seat.is_standing
        ]
        return Restored(len(standing), replaced, lost)

    def close_ranks(self) -> None:
        """Go on without the hosts that do not stand; the others keep their order."""
        self.hosts = [seat for seat in self.hosts if seat.is_standing]

    def wait(self, timeout_s: float) -> None:
        """Wait until one of those starting is there, or `timeout_s`."""
        pending = [seat.started for seat in self.starting if seat.started is not None]
        if pending:
            ray.wait(pending, timeout=timeout_s)
        else:
            time.sleep(timeout_s)

    def lose(self, seat: Seat, is_unexplained: bool = False) -> None:
        """Give up a host. Unexplained: nobody told of its death, so its node may be gone too."""
        if is_unexplained and seat.node_id:
            self._placement.shun(seat.node_id)
        seat.is_lost = True
        for group in (self.spares, self.starting):
            if seat in group:
                group.remove(seat)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(seat.actor)

    def retire(self, seat: Seat) -> None:
        """Let a host end in order: its node is leaving."""
        seat.is_lost = True
        if seat in self.spares:
            self.spares.remove(seat)
        self._retiring.append((seat, seat.actor.close.remote()))

    def restart(self, seat: Seat) -> None:
        """Start the template of a host anew."""
        self._placement.start_template(seat)
        self.starting.append(seat)

    def close(self) -> None:
        """End all hosts and give the resources back. Idempotent; never raises for a dead host."""
        self._note_started()
        seats = [seat for seat in (*self.hosts, *self.spares, *self.starting) if not seat.is_lost]
        placed = [seat for seat in seats if seat.node_id]
        closing = [seat.actor.close.remote() for seat in placed]
        closing += [reference for _, reference in self._retiring]
        with contextlib.suppress(ray.exceptions.RayError):
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)
        for seat in (*seats, *(seat for seat, _ in self._retiring)):
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(seat.actor)
        self.hosts, self.spares, self.starting, self._retiring = [], [], [], []
        self._placement.release()
        for scratch in Path(self.spec.log_dir).glob(".scratch-*"):  # of hosts that were killed
            shutil.rmtree(scratch, ignore_errors=True)

    def _recruit(self) -> Seat:
        seat = self.spares.pop(0)
        seat.watched = None
        return seat

    def _note_leaving(self) -> None:
        now = self._clock()
        if now - self._draining_checked_at >= _DRAINING_CHECK_S:
            self._draining_checked_at = now
            draining = draining_nodes()
            for seat in (*self.hosts, *self.spares, *self.starting):
                seat.is_leaving = seat.is_leaving or seat.node_id in draining
        for seat in [*self.spares]:
            if seat.is_leaving:
                self.retire(seat)
        for seat in [*self.starting]:
            if seat.is_leaving:
                self.lose(seat)

    def _note_started(self) -> None:
        for seat in [*self.starting]:
            try:
                if seat.placed is not None and _is_ready(seat.placed):
                    seat.take_place(ray.get(seat.placed))
                if seat.started is None or not _is_ready(seat.started):
                    continue
                ray.get(seat.started)
            except (ray.exceptions.RayError, StartTimeout):
                self.lose(seat)
                self._failed_starts += 1
                backoff_s = min(0.5 * 2.0 ** (self._failed_starts - 1), _LONGEST_BACKOFF_S)
                self._next_start_at = self._clock() + backoff_s
                continue
            seat.started = None
            self._failed_starts = 0
            self.starting.remove(seat)
            if seat not in self.hosts:
                self.spares.append(seat)

    def _note_spares(self) -> None:
        now = self._clock()
        for seat in [*self.spares]:
            if seat.watched is None:
                seat.watched, seat.watched_at = seat.actor.watch.remote(_WATCH_S), now
            elif _is_ready(seat.watched):
                try:
                    heard: Heard = ray.get(seat.watched)
                except ray.exceptions.RayError as error:
                    self.lose(seat, is_unexplained=is_unexplained(error))
                    continue
                seat.watched = None
                seat.is_leaving = seat.is_leaving or heard.is_leaving
                if not heard.can_fork:
                    self.spares.remove(seat)
                    self.restart(seat)
            elif now - seat.watched_at > _WATCH_S + self.spec.lease_s:
                self.lose(seat, is_unexplained=True)

    def _let_go_of_retired(self) -> None:
        for seat, reference in [*self._retiring]:
            if _is_ready(reference):
                self._retiring.remove((seat, reference))
                self.lose(seat)

    def _give_up_stuck(self) -> None:
        """Ask anew for hosts that wait for one place while there is room in another."""
        now = self._clock()
        stuck = [
            seat
            for seat in self.starting
            if seat.placed is not None
            and now - seat.born_at > (_STUCK_S if seat.has_room else _WAITING_S)
        ]
        if stuck and self._placement.has_room(self._held_bundles()):
            self.lose(stuck[0])

    def _held_bundles(self) -> set[int | None]:
        seats = (*self.hosts, *self.spares, *self.starting)
        retiring = {seat.bundle for seat, _ in self._retiring}
        return {seat.bundle for seat in seats if not seat.is_lost} | retiring


def is_unexplained(error: Exception) -> bool:
    """Whether Ray only knows that an actor does not answer, not that it has died."""
    return isinstance(error, ray.exceptions.ActorUnavailableError)


def _is_ready(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])
