"""Chaos plans: faults that are put into a run on purpose, to see that they leave no trace.

A plan is a text, `KIND:TARGET@WHEN[xTIMES]` with `;` between faults (docs/failures.md). This file
owns its grammar, the count of what has fired, and the blow itself. It is pure but for `strike`:
clocks, ranks and phases are told to it. A fault by the clock is struck by the coordinator
(`FaultPlan.due`); a fault at a step or a phase travels along with the training process it aims at,
which says that it fires and then strikes itself (`FaultTrigger`, `strike`), or is struck (`TOLD`).
"""

import ctypes
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Self, get_args

from configs.errors import UserError, did_you_mean

PHASES = ("forming", "trace", "step", "epoch_end", "evaluation", "checkpoint", "export")
TARGETS = ("any", "other", "all")
COORDINATOR = "coordinator"
COORDINATOR_RANK = -1
HOST = "host"
TOLD = (HOST, COORDINATOR)
"""Kinds that a training process only tells of: the coordinator strikes once it knows, for a word
on its way through a host that dies would be lost."""
GRAMMAR = "KIND:TARGET@WHEN[xTIMES], such as 'kill:any@every=20s' or 'stop:1@step=120'"
EXIT_STATUS = 7

TriggerKind = Literal["every", "at", "step", "phase"]

_FAULT = re.compile(r"([^:@]*)(?::([^@]*))?@([^=]*)=(.*?)(?:x(\d+))?")
_SECONDS = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)s")
_PHASE = re.compile(r"([^:]*)(?::(\d+))?")


@dataclass(frozen=True)
class Trigger:
    """When a fault fires.

    Attributes:
        kind: every and at go by the clock; step and phase by what the worker does.
        seconds: Period of every; of at, seconds since the first step of the run.
        step: The step that the worker is about to take, or has passed.
        phase: One of `PHASES`.
        nth: Which of the entries into the phase, from 1, counted in each process anew.
    """

    kind: TriggerKind
    seconds: float = 0.0
    step: int = 0
    phase: str = ""
    nth: int = 1

    @property
    def is_timed(self) -> bool:
        """Whether the coordinator's clock decides, not the worker's doing."""
        return self.kind in ("every", "at")

    def __str__(self) -> str:
        """What stands behind `@`."""
        if self.is_timed:
            return f"{self.kind}={self.seconds:.12g}s"
        if self.kind == "step":
            return f"step={self.step}"
        return f"phase={self.phase}" + (f":{self.nth}" if self.nth > 1 else "")


@dataclass(frozen=True)
class Fault:
    """One fault of a plan.

    Attributes:
        number: Its place in the plan, from 0.
        kind: What is done, one of `KINDS`.
        target: A rank, one of `TARGETS`, or nothing for the coordinator.
        trigger: When.
        times: How often in all generations together; None without bound.
    """

    number: int
    kind: str
    target: str
    trigger: Trigger
    times: int | None

    def __str__(self) -> str:
        """The fault in the grammar."""
        aim = f"{self.kind}:{self.target}" if self.target else self.kind
        usual = None if self.trigger.kind == "every" else 1
        return f"{aim}@{self.trigger}" + (f"x{self.times}" if self.times != usual else "")


class FaultPlan:
    """The faults of a run and what has fired of them; lives in the coordinator, in one thread.

    The ranks that `any` and `other` hit follow from (plan, seed, how often the fault has fired,
    number of workers) alone: whoever asks gets the same answer.
    """

    def __init__(self, faults: Iterable[Fault], seed: int = 0) -> None:
        self.faults = tuple(faults)
        self._seed = seed
        self._fired: Counter[int] = Counter()
        self._periods: Counter[int] = Counter()  # of every: the last one that was used
        self._handed_out: set[int] = set()

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Self:
        """The plan that a text describes; `seed` is of the generator that draws ranks.

        Raises:
            UserError: The text is not in the grammar, or asks for what cannot be.
        """
        parts = [part.strip() for part in text.split(";")]
        faults = [_parse_fault(n, part) for n, part in enumerate(filter(None, parts))]
        if not faults:
            raise UserError(
                f"received the empty chaos plan {text!r}; a plan is one fault or more, {GRAMMAR}, "
                "with ';' between them. Name a fault, or leave the plan out."
            )
        return cls(faults, seed)

    def check(self, workers: int) -> None:
        """Refuse faults that can never hit anybody.

        Raises:
            UserError: A rank is not among `workers`, or `other` is said to a lone worker.
        """
        for fault in self.faults:
            if not self._hits(fault, workers):
                raise _refusal(
                    str(fault),
                    f"target {fault.target!r} with cluster.workers={workers}",
                    f"ranks 0 to {workers - 1}, any, all, and other with two workers or more",
                    "Name one of these, or raise cluster.workers.",
                )

    def for_rank(self, rank: int, workers: int) -> tuple[Fault, ...]:
        """Faults at a step or a phase that a rank of the next generation carries along.

        Those at the coordinator go with rank 0, whose report tells the coordinator that its time
        has come. Call for every rank before the generation starts; what has fired as often as it
        may is left out.
        """
        carried = [
            fault
            for fault in self.faults
            if not fault.trigger.is_timed
            and self._is_open(fault)
            and rank in (self._hits(fault, workers) if fault.kind != COORDINATOR else (0,))
        ]
        self._handed_out.update(fault.number for fault in carried)
        return tuple(carried)

    def due(self, now_s: float | None, workers: int) -> list[tuple[Fault, int]]:
        """Timed faults to strike now, each with the rank it hits; -1 for the coordinator.

        They count as fired. A period that passed without a call is not made up for.

        Args:
            now_s: Seconds since the first step of the run; None before it.
            workers: Ranks there are now. A fault at a rank that is missing waits for it.
        """
        if now_s is None:
            return []
        struck: list[tuple[Fault, int]] = []
        for fault in self.faults:
            if self._is_open(fault) and self._is_time(fault, now_s):
                ranks = self._hits(fault, workers)
                self._fired[fault.number] += bool(ranks)
                struck += [(fault, rank) for rank in ranks]
        return struck

    def fired(self, number: int) -> None:
        """A worker said that it fires this fault. Ranks that fire it together count once."""
        if number in self._handed_out:
            self._handed_out.discard(number)
            self._fired[number] += 1

    def fired_before(self, faults: Iterable[str]) -> None:
        """An earlier coordinator saw these fire, each text once for each time."""
        for text in faults:
            for fault in self.faults:
                if str(fault) == text and self._is_open(fault):
                    self._fired[fault.number] += 1
                    break

    @property
    def is_spent(self) -> bool:
        """Whether nothing of the plan can fire any more."""
        return not any(self._is_open(fault) for fault in self.faults)

    def summary(self) -> list[dict[str, Any]]:
        """For the record: each fault as text with the times it has fired."""
        return [{"fault": str(fault), "fired": self._fired[fault.number]} for fault in self.faults]

    def _is_open(self, fault: Fault) -> bool:
        return fault.times is None or self._fired[fault.number] < fault.times

    def _is_time(self, fault: Fault, now_s: float) -> bool:
        trigger = fault.trigger
        if trigger.kind == "at":
            return now_s >= trigger.seconds
        if trigger.kind != "every":
            return False
        period = int(now_s // trigger.seconds)
        is_new = period > self._periods[fault.number]
        self._periods[fault.number] = max(period, self._periods[fault.number])
        return is_new

    def _hits(self, fault: Fault, workers: int) -> tuple[int, ...]:
        """The ranks of the next firing; nobody where there is no such rank."""
        if fault.kind == COORDINATOR:
            return (COORDINATOR_RANK,)
        if fault.target == "all":
            return tuple(range(workers))
        if fault.target not in TARGETS:
            return (int(fault.target),) if int(fault.target) < workers else ()
        first = 1 if fault.target == "other" else 0
        if first >= workers:
            return ()
        # Seeded by text: unlike hash() this is the same in every process.
        draw = random.Random(f"{self._seed}/{fault.number}/{self._fired[fault.number]}")
        return (draw.randrange(first, workers),)


class FaultTrigger:
    """Tells a training process when a fault that it carries is to fire; each one once at most.

    `reached` belongs to the thread that trains; `order` may come from another.
    """

    def __init__(self, faults: Iterable[Fault]) -> None:
        self._waiting = list(faults)
        self._ordered: list[Fault] = []
        self._entries: Counter[str] = Counter()

    def order(self, fault: Fault) -> None:
        """Have the next `reached` return a fault that the coordinator's clock decided on."""
        self._ordered.append(fault)

    def reached(self, phase: str, step: int) -> Fault | None:
        """Count one entry into a phase, and return the fault to fire now, if any.

        Args:
            phase: One of `PHASES`. A call of the compiled loop is one entry into "step".
            step: In the phase "step" the last step that is about to be taken, counted from 1;
                elsewhere the steps completed.
        """
        if phase not in PHASES:
            raise ValueError(f"received phase {phase!r}; there are {', '.join(PHASES)}")
        self._entries[phase] += 1
        if self._ordered:
            return self._ordered.pop(0)
        for fault in self._waiting:
            if self._matches(fault.trigger, phase, step):
                self._waiting.remove(fault)
                return fault
        return None

    def _matches(self, trigger: Trigger, phase: str, step: int) -> bool:
        if trigger.kind == "step":
            return step >= trigger.step
        # "at least": of two faults at one entry the second has its turn at the next.
        return trigger.phase == phase and self._entries[phase] >= trigger.nth


def strike(kind: str) -> None:
    """Do a fault to the calling process; of template, to its parent.

    Returns at most for stop (once continued), term (where it is handled) and, for an instant,
    template, whose death takes its children along. Linux only.

    Raises:
        RuntimeError: The fault is raise.
        ValueError: No process can do this kind to itself (`TOLD`).
    """
    if kind not in _STRIKES:
        raise ValueError(f"received fault {kind!r}; a process can do {', '.join(_STRIKES)}")
    _STRIKES[kind]()


def _send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _segfault() -> None:
    ctypes.string_at(0)


def _leave() -> NoReturn:
    os._exit(EXIT_STATUS)


def _raise() -> NoReturn:
    raise RuntimeError("chaos: the plan asked for an exception")


def _kill_template() -> None:
    if os.getppid() > 1:  # 1: the template is dead already
        os.kill(os.getppid(), signal.SIGKILL)


_STRIKES: dict[str, Callable[[], None]] = {
    "kill": _send(signal.SIGKILL),
    "segv": _segfault,
    "exit": _leave,
    "raise": _raise,
    "stop": _send(signal.SIGSTOP),
    "term": _send(signal.SIGTERM),
    "template": _kill_template,
}

KINDS = (*_STRIKES, *TOLD)


def _parse_fault(number: int, text: str) -> Fault:
    shape = _FAULT.fullmatch(text)
    if shape is None:
        raise _refusal(text, "no fault", GRAMMAR, "Write it so.")
    kind, target, when, value, times = (part and part.strip() for part in shape.groups())
    if kind not in KINDS:
        raise _refusal(text, f"kind {kind!r}", ", ".join(KINDS), did_you_mean(kind, KINDS))
    target = _parse_target(text, kind, target or "")
    trigger = _parse_trigger(text, when, value)
    return Fault(number, kind, target, trigger, _parse_times(text, trigger, times))


def _parse_target(text: str, kind: str, target: str) -> str:
    if kind == COORDINATOR:
        if target:
            allowed = "none, there is one coordinator"
            raise _refusal(text, f"target {target!r}", allowed, f"Write {kind}@WHEN.")
    elif target.isdecimal():
        return str(int(target))
    elif target not in TARGETS:
        allowed = f"a rank such as 0, {', '.join(TARGETS)}"
        remedy = did_you_mean(target, TARGETS) or f"Write {kind}:any@WHEN."
        raise _refusal(text, f"target {target!r}", allowed, remedy)
    return target


def _parse_trigger(text: str, when: str, value: str) -> Trigger:
    if when == "every" or when == "at":
        found = _SECONDS.fullmatch(value)
        if not found or (when == "every" and float(found[1]) == 0):
            allowed = "seconds such as 20s or 0.125s"
            raise _refusal(text, f"{when}={value}", allowed, f"Write {when}=20s.")
        return Trigger("at" if when == "at" else "every", seconds=float(found[1]))
    if when == "step":
        if not value.isdecimal() or int(value) < 1:
            raise _refusal(text, f"step={value}", "a step from 1 on", "Write step=120.")
        return Trigger("step", step=int(value))
    if when == "phase":
        return _parse_phase(text, value)
    allowed = "every=SECONDSs, at=SECONDSs, step=NUMBER, phase=NAME and phase=NAME:NTH"
    raise _refusal(text, f"{when}={value}", allowed, did_you_mean(when, get_args(TriggerKind)))


def _parse_phase(text: str, value: str) -> Trigger:
    found = _PHASE.fullmatch(value)
    phase, nth = (found[1], int(found[2] or 1)) if found else (value, 1)
    if phase not in PHASES:
        remedy = did_you_mean(phase, PHASES)
        raise _refusal(text, f"phase {phase!r}", ", ".join(PHASES), remedy)
    if nth < 1:
        raise _refusal(text, f"phase={value}", "entries from 1 on", f"Write phase={phase}:1.")
    return Trigger("phase", phase=phase, nth=nth)


def _parse_times(text: str, trigger: Trigger, times: str | None) -> int | None:
    if times is None:
        return None if trigger.kind == "every" else 1
    if int(times) < 1:
        raise _refusal(text, f"x{times}", "x1 or more", "Write x1, or leave it out.")
    if trigger.kind == "at" and int(times) > 1:
        allowed = "x1, a moment comes once"
        raise _refusal(text, f"x{times}", allowed, f"Write every=SECONDSsx{times} instead.")
    return int(times)


def _refusal(text: str, received: str, allowed: str, remedy: str) -> UserError:
    remedy = remedy.strip() or "Name one of these."
    return UserError(
        f"chaos plan, fault {text!r}: received {received}; allowed: {allowed}. {remedy}"
    )
