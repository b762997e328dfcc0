"""The gang: the workers of a run, and the formations that they go through.

Owns the meeting of one generation, what is said in it, and its end. Whom there is to form is the
roster's knowledge; whom and when, the coordinator's decision.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.util.placement_group import get_placement_group, remove_placement_group

from cluster.channel import Message
from cluster.errors import GangFailure, StartTimeout
from cluster.host import Heard
from cluster.lease import Lessor
from cluster.lifeline import Lifelines
from cluster.placement import GangSpec, Seat
from cluster.roster import Restored, Roster, is_unexplained
from cluster.template import Launch

__all__ = ["Gang", "GangSpec", "Restored", "release"]

_POLL_S = 2.0
_LOOK_S = 0.25
_EXPLAIN_S = 0.3
_ANSWER_S = 15.0
_PARTS_AHEAD = 8


class Gang:
    """Workers in their ranks. Used by one thread."""

    STRIKES = ("kill", "stop", "term", "host", "template")

    def __init__(self, spec: GangSpec) -> None:
        self.spec = spec
        self._roster = Roster(spec)
        self._silence_s = _POLL_S + spec.lease_s  # by then a lease has run out
        self._size = spec.workers
        self._generation = 0
        self._formed: list[Seat] = []
        self._addresses: dict[Seat, str] = {}
        self._polls: dict[Any, tuple[Seat, float]] = {}
        self._sent = 0
        self._lessor = Lessor(spec.lease_s)
        self._lifelines: Lifelines[Seat] = Lifelines()

    @property
    def size(self) -> int:
        """Ranks of the next formation, after `restore`."""
        return len(self._roster.hosts)

    @property
    def nodes(self) -> list[str]:
        """Network address of each rank's node."""
        return [seat.address for seat in self._roster.hosts]

    def place(self) -> list[dict[str, Any]]:
        """Reserve the resources of all workers, start their hosts and templates.

        Standbys are asked for afterwards; nothing waits for them.

        Returns:
            What each host's `start` told, by rank.

        Raises:
            StartTimeout: Resources or templates did not come within `start_timeout_s`.
        """
        told = self._roster.place()
        self._size = len(told)
        return told

    def restore(self) -> Restored:
        """End what is left of the last generation, and put hosts in the place of lost ones.

        A warm standby takes a lost host's rank at once; else a new host is awaited for
        `replace_timeout_s`, and then the others go on without it. Hosts that came up since the
        gang shrank are taken in. Hosts on draining nodes are let go.

        Raises:
            StartTimeout: Fewer than `min_workers` hosts are left.
        """
        roster, spec = self._roster, self.spec
        before = list(roster.hosts)
        deadline = time.monotonic() + spec.replace_timeout_s
        self._lessor.lease([])
        self._addresses = {}
        roster.tend()
        while True:
            self._prepare()
            roster.tend()
            roster.fill()
            standing = [seat for seat in roster.hosts if seat.is_standing]
            if any(seat not in self._addresses for seat in standing):
                continue
            if len(standing) >= self._size or time.monotonic() >= deadline:
                break
            roster.wait(min(0.25, max(0.0, deadline - time.monotonic())))
        for seat in before:
            if seat.is_leaving and not seat.is_lost:
                roster.retire(seat)
        if len(standing) < (spec.min_workers or spec.workers):
            raise StartTimeout(self._too_few(len(standing)))
        restored = roster.compared_with(before)
        roster.close_ranks()
        self._size = len(roster.hosts)
        return restored

    def form(
        self, generation: int, workers: int, entry: str, payload: Any, faults: Sequence[Any] = ()
    ) -> list[int]:
        """Fork one training process on each of the first `workers` hosts.

        Restores the gang first where that was not done since the last formation.

        Args:
            generation: Larger than all before.
            workers: At most `size`.
            entry: `module:function`, called in each training process with (Channel, Launch).
            payload: Plain values for all of them.
            faults: For each rank what it is to suffer; empty for nothing.

        Returns:
            Their process ids by rank.

        Raises:
            GangFailure: A host was lost meanwhile, or there are fewer than `workers`.
            StartTimeout: As `restore`.
        """
        if not self._addresses:
            self.restore()
        seats, addresses = self._roster.hosts[:workers], self._addresses
        if len(seats) < workers:
            raise GangFailure(f"{workers} workers are to form, {len(seats)} are left", "not_formed")
        self._generation, self._formed, self._sent, self._addresses = generation, seats, 0, {}
        meeting = _reachable([addresses[seat] for seat in seats])
        launches = [
            Launch(
                generation,
                rank,
                meeting,
                entry,
                payload,
                f"{self.spec.log_dir}/rank-{rank}.log",
                tuple(faults[rank]) if faults else (),
            )
            for rank in range(workers)
        ]
        pids: list[int] = self._ask(
            [seat.actor.launch.remote(launch) for seat, launch in zip(seats, launches, strict=True)]
        )
        self._lessor.lease([seat.actor for seat in seats])
        return pids

    def messages(self) -> Iterator[Message | None]:
        """Messages of the present generation as they come; None every quarter second of silence.

        Raises:
            GangFailure: A host was lost.
        """
        # A poll outlives its generation: given up, it would take the next one's messages with it.
        polled = {seat for seat, _ in self._polls.values()}
        for seat in self._formed:
            self._lifelines.connect(seat, seat.address, seat.lifeline_port)
            if seat not in polled:
                self._poll(seat)
        while True:
            ready, _ = ray.wait(list(self._polls), num_returns=1, timeout=_LOOK_S)
            said = [message for reference in ready for message in self._collect(reference)]
            for message in said:
                if message.generation == self._generation:
                    yield message
            if not said:
                yield None
            self._check_lifelines()
            self._check_answers()

    def send(self, command: str, body: Any = None) -> None:
        """Send a command to every training process of the present generation."""
        number, self._sent = self._sent, self._sent + 1
        for seat in self._formed:
            seat.actor.send.remote(self._generation, number, command, body)

    def send_large(self, parts: Iterable[Any]) -> None:
        """Send what `cluster.bulk.split` gave, a command "part" each; hosts of a node share them.

        Blocks while the hosts are more than a few parts behind.

        Raises:
            GangFailure: A host was lost meanwhile, or took nothing for `start_timeout_s`.
        """
        ahead: list[list[Any]] = []
        for part in parts:
            number, self._sent = self._sent, self._sent + 1
            shared = ray.put(part)
            ahead.append(
                [
                    seat.actor.send.remote(self._generation, number, "part", shared)
                    for seat in self._formed
                ]
            )
            if len(ahead) > _PARTS_AHEAD:
                self._ask(ahead.pop(0))
        for references in ahead:
            self._ask(references)

    def can_grow(self) -> bool:
        """Whether a host waits that the gang lacks. Cheap; keeps looking for room meanwhile."""
        self._roster.tend()
        return len(self._roster.hosts) < self.spec.workers and bool(self._roster.spares)

    def leaving(self) -> set[int]:
        """Ranks whose node is draining or whose host got SIGTERM; new hosts start meanwhile."""
        self._roster.tend()
        return {rank for rank, seat in enumerate(self._roster.hosts) if seat.is_leaving}

    def strike(self, rank: int, kind: str) -> bool:
        """Hurt a worker, in a rehearsal; returns whether there was something to hurt.

        Kinds: kill, stop, term (signals to the training process), host, template (killed).
        """
        struck = self._formed[rank].actor.strike.remote(self._generation, kind)
        try:
            return bool(ray.get(struck, timeout=_ANSWER_S))
        except ray.exceptions.RayActorError:
            return kind == "host"
        except ray.exceptions.GetTimeoutError:
            return False

    def stacks(self, timeout_s: float) -> dict[int, str]:
        """Every worker's Python stacks by rank, or why there are none. Wakes stopped processes."""
        asked = [seat.actor.stacks.remote(timeout_s) for seat in self._formed]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=timeout_s + 1)
        return {rank: _text_of(reference) for rank, reference in enumerate(asked)}

    def kill(self) -> None:
        """End all training processes at once; hosts and templates stay."""
        self._lessor.lease([])
        asked = {seat.actor.kill.remote(): seat for seat in self._roster.hosts if not seat.is_lost}
        if not asked:
            return
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=self._silence_s)
        for reference in silent:
            self._roster.lose(asked[reference], is_unexplained=True)

    def close(self) -> None:
        """End everything and give the resources back. Idempotent; never raises for a dead host."""
        self._lessor.end()
        self._lifelines.close()
        self._roster.close()

    def _prepare(self) -> None:
        """Make all hosts that stand ready for a launch; those that cannot do not stand any more."""
        asked = {
            seat.actor.prepare.remote(self._generation + 1): seat
            for seat in self._roster.hosts
            if seat.is_standing and seat not in self._addresses
        }
        if not asked:
            return
        ray.wait(list(asked), num_returns=len(asked), timeout=self._silence_s)
        for reference, seat in asked.items():
            try:
                can_fork, address = ray.get(reference, timeout=0)
            except ray.exceptions.GetTimeoutError:
                self._lose(seat, is_unexplained=True)
            except ray.exceptions.RayError as error:
                self._lose(seat, is_unexplained(error))
            else:
                if can_fork:
                    self._addresses[seat] = address
                else:
                    self._roster.restart(seat)

    def _too_few(self, left: int) -> str:
        spec = self.spec
        return (
            f"{left} of {spec.workers} workers are left; no host replaced the lost ones within "
            f"{spec.replace_timeout_s:g} s (cluster.replace_timeout_s): "
            f"{len(self._roster.starting)} were waited for, of {spec.cpus} CPU(s) and {spec.gpus} "
            f"GPU(s) each. Add nodes, see {spec.log_dir}, or set cluster.min_workers to {left} or "
            "fewer to go on without them."
        )

    def _ask(self, references: Sequence[Any]) -> list[Any]:
        try:
            answers: list[Any] = ray.get(list(references), timeout=self.spec.start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise GangFailure(
                f"hosts did not answer within {self.spec.start_timeout_s:g} s "
                "(cluster.start_timeout_s).",
                "not_formed",
            ) from None
        except ray.exceptions.RayActorError as error:
            raise GangFailure(f"a host was lost: {error}", "host_lost") from error
        except ray.exceptions.RayTaskError as error:
            raise GangFailure(f"a host could not fork: {error.cause}", "not_formed") from error
        return answers

    def _poll(self, seat: Seat) -> None:
        self._polls[seat.actor.poll.remote(_POLL_S)] = (seat, time.monotonic())

    def _collect(self, reference: Any) -> list[Message]:
        seat, _ = self._polls.pop(reference)
        try:
            heard: Heard = ray.get(reference)
        except ray.exceptions.RayError as error:
            failure = self._lost(seat, is_unexplained(error), "was lost")
            if seat in self._formed:
                raise failure from error
            return []
        seat.is_leaving = seat.is_leaving or heard.is_leaving
        if seat in self._formed:
            self._poll(seat)
        return heard.messages

    def _check_lifelines(self) -> None:
        """Take a host whose lifeline ended for lost, unless its poll tells more in a moment.

        Ray knows where only the host died: then its node is good for another.
        """
        for seat in self._lifelines.broken():
            if seat.is_lost or seat not in self._formed:
                continue
            pending = [ref for ref, (polled, _) in self._polls.items() if polled is seat]
            if not ray.wait(pending, timeout=_EXPLAIN_S)[0]:
                raise self._lost(seat, True, "has ended, and its node with it")

    def _check_answers(self) -> None:
        """A host that has not answered for so long has ended its training process by itself."""
        since = time.monotonic() - self._silence_s
        late = {ref: seat for ref, (seat, asked_at) in self._polls.items() if asked_at < since}
        if not late:
            return
        # What was answered while the coordinator was busy only waits to be collected.
        _, silent = ray.wait(list(late), num_returns=len(late), timeout=0)
        how = f"has not answered for {self._silence_s:g} s"
        failures = [self._lost(late[reference], True, how) for reference in silent]
        if failures:
            raise failures[0]

    def _lost(self, seat: Seat, is_unexplained: bool, how: str) -> GangFailure:
        rank = self._formed.index(seat) if seat in self._formed else -1
        self._lose(seat, is_unexplained)
        self._roster.tend()  # a new host comes up while the others are being ended
        return GangFailure(f"the host of rank {rank} on {seat.address} {how}.", "host_lost", rank)

    def _lose(self, seat: Seat, is_unexplained: bool) -> None:
        self._roster.lose(seat, is_unexplained)
        self._lifelines.drop(seat)
        self._polls = {
            reference: asked for reference, asked in self._polls.items() if asked[0] is not seat
        }


def release(name: str) -> None:
    """Give back what a gang has reserved, where its coordinator cannot; nothing if it has."""
    with contextlib.suppress(ValueError):  # no reservation of this name
        remove_placement_group(get_placement_group(name))


def _text_of(reference: Any) -> str:
    try:
        return str(ray.get(reference, timeout=0))
    except ray.exceptions.GetTimeoutError:
        return "the host did not answer\n"
    except ray.exceptions.RayError as error:
        return f"the host did not answer: {type(error).__name__}\n"


def _reachable(addresses: Sequence[str]) -> tuple[str, ...]:
    """Addresses under which the ranks meet: over loopback where one node holds them all."""
    nodes = {address.rpartition(":")[0] for address in addresses}
    if len(nodes) > 1:
        return tuple(addresses)
    return tuple(f"127.0.0.1:{address.rpartition(':')[2]}" for address in addresses)
