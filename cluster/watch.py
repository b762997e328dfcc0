"""Who is behind: finds from the pulses of the ranks that nothing goes on any more, and whose doing.

Each training process reports once a second how many actions it has begun (calls of the compiled
loop, parts of an evaluation, files of an export) and where it is. Ranks act together, so that the
others wait in a collective for one that does not come: a gang is stalled when no count moves, and
the one with the smallest count, or without a pulse, is behind. Pure: told everything, the time too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PULSE_S = 1.0
"""Seconds from one pulse of a training process to the next."""

# A host keeps a pulse until it is asked, every two seconds at least.
_MISSED_PULSES_S = 3.5 * PULSE_S


@dataclass(frozen=True)
class Stall:
    """Nothing goes on any more.

    Attributes:
        kind: not_formed before all ranks were ready, stalled afterwards.
        rank: The rank that is behind, the lowest where there are several; -1 where unknown.
        sentence: Who waited for whom, where, how long, and the field that bounds the wait.
    """

    kind: Literal["not_formed", "stalled"]
    rank: int
    sentence: str


@dataclass
class _Rank:
    """What is known of one rank: times are of the watch's clock."""

    number: int
    heard_s: float
    actions: int = 0
    place: str = "its start"
    is_ready: bool = False
    is_finished: bool = False


class Watch:
    """Watches one generation of the gang; one thread.

    Args:
        workers: Ranks that take part.
        ready_timeout_s: Bound, from `now`, for all to be ready (`cluster.start_timeout_s`).
        stall_after_s: Standstill that counts as a stall (`cluster.stall_after_s`).
        now: The time of the clock that all calls use, in seconds.
    """

    def __init__(
        self, workers: int, ready_timeout_s: float, stall_after_s: float, now: float
    ) -> None:
        self._ready_timeout_s = ready_timeout_s
        self._stall_after_s = stall_after_s
        self._began_s = self._moved_s = self._latest_s = now
        self._ranks = [_Rank(number, now) for number in range(workers)]

    def pulse(self, rank: int, actions: int, place: str, now: float) -> None:
        """A rank said how many actions it has begun, and where it is, such as "step 1234"."""
        self.heard(rank, now)
        known = self._ranks[rank]
        if known.actions != actions:
            self._moved_s = max(self._moved_s, now)
        known.actions, known.place = actions, place

    def heard(self, rank: int, now: float) -> None:
        """A rank said something else: it lives."""
        self._ranks[rank].heard_s = max(self._ranks[rank].heard_s, now)
        self._latest_s = max(self._latest_s, now)

    def ready(self, rank: int) -> None:
        """A rank has formed. Once all have, stalls are looked for."""
        self._ranks[rank].is_ready = True
        self._moved_s = self._latest_s

    def finished(self, rank: int) -> None:
        """A rank has nothing more to do and waits for the others, whatever its count."""
        self._ranks[rank].is_finished = True
        self._moved_s = self._latest_s

    def check(self, now: float) -> Stall | None:
        """The stall there is now, or None; call every second or two."""
        self._latest_s = max(self._latest_s, now)
        if missing := [known for known in self._ranks if not known.is_ready]:
            return self._not_formed(missing, now)
        if now - self._moved_s < self._stall_after_s:
            return None
        return self._stalled(now)

    def frozen(self, now: float) -> Stall | None:
        """The rank whose pulse stopped while another's goes on, however short the standstill.

        For when the others raised: their runtime may tire of waiting before `stall_after_s`.
        """
        silent = [known for known in self._ranks if now - known.heard_s >= _MISSED_PULSES_S]
        if not silent or len(silent) == len(self._ranks):
            return None
        behind = min(silent, key=lambda known: known.heard_s)
        return self._behind(behind, silent, f"frozen: {_last_signs(silent, now)}")

    def _not_formed(self, missing: Sequence[_Rank], now: float) -> Stall | None:
        """At the bound of forming; before it where one is silent for as long as a stall takes."""
        is_late = now - self._began_s >= self._ready_timeout_s
        silence_s = max(_MISSED_PULSES_S, 0.0 if is_late else self._stall_after_s)
        silent = [known for known in missing if now - known.heard_s >= silence_s]
        if len(silent) == len(self._ranks):
            silent = []  # nobody can be told from the others
        if not is_late and not silent:
            return None
        late = silent or missing
        others = _without(self._ranks, late)
        waited = f"; {_names(others)} waited" if others else ""
        bound = f"within {self._ready_timeout_s:g} s (cluster.start_timeout_s)"
        if not is_late:
            bound = f"and is silent for {self._stall_after_s:g} s (cluster.stall_after_s)"
        rank = min(late, key=lambda known: known.heard_s).number if silent else late[0].number
        return Stall(
            "not_formed",
            rank if silent or len(late) == 1 else -1,
            f"{_names(late)} did not form {bound}{waited}. {_last_signs(late, now)}.",
        )

    def _stalled(self, now: float) -> Stall:
        bound = f"for {now - self._moved_s:.0f} s (cluster.stall_after_s={self._stall_after_s:g})"
        # A rank that lives was heard a pulse ago; one that froze was not since about the last move.
        silence_s = min(self._stall_after_s, max(_MISSED_PULSES_S, self._stall_after_s / 2))
        silent = [known for known in self._ranks if now - known.heard_s >= silence_s]
        if silent and (len(silent) < len(self._ranks) or len(self._ranks) == 1):
            behind = min(silent, key=lambda known: known.heard_s)
            return self._behind(behind, silent, f"{bound}: {_last_signs(silent, now)}")
        if silent:
            return Stall(
                "stalled", -1, f"no worker has been heard {bound}. {_last_signs(silent, now)}."
            )
        busy = [known for known in self._ranks if not known.is_finished] or self._ranks
        fewest = min(known.actions for known in busy)
        late = [known for known in busy if known.actions == fewest]
        if len(late) == len(self._ranks) > 1:
            return Stall(
                "stalled", -1, f"all {len(late)} workers live and stand {bound} at {_places(late)}."
            )
        return self._behind(late[0], late, f"at {_places(late)} {bound}")

    def _behind(self, behind: _Rank, late: Sequence[_Rank], where: str) -> Stall:
        others = _without(self._ranks, late)
        if not others:
            return Stall("stalled", behind.number, f"{_names(late)} stands still, {where}.")
        verb = "is" if len(late) == 1 else "are"
        waiting = f"{_names(others)} waited at {_places(others)}"
        sentence = f"{_names(late)} {verb} behind, {where}; {waiting}."
        return Stall("stalled", behind.number, sentence)


def _without(ranks: Sequence[_Rank], some: Sequence[_Rank]) -> list[_Rank]:
    numbers = {known.number for known in some}
    return [known for known in ranks if known.number not in numbers]


_NAMED = 8


def _names(ranks: Sequence[_Rank]) -> str:
    """`rank 1`, `ranks 0, 2 and 3`; of a thousand ranks the first few."""
    numbers = [str(known.number) for known in ranks]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > _NAMED:
        return f"ranks {', '.join(numbers[:_NAMED])} and {len(numbers) - _NAMED} more"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"


def _places(ranks: Sequence[_Rank]) -> str:
    """Where ranks are, each place once, in the order of the ranks."""
    places = list(dict.fromkeys(known.place for known in ranks))
    more = f" and {len(places) - _NAMED} more places" if len(places) > _NAMED else ""
    return ", ".join(places[:_NAMED]) + more


def _last_signs(ranks: Sequence[_Rank], now: float) -> str:
    signs = [
        f"rank {known.number} was last heard {now - known.heard_s:.0f} s ago at {known.place}"
        for known in ranks[:_NAMED]
    ]
    return ", ".join(signs)
