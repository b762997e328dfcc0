"""One generation, followed from its forming to the common end of its ranks.

All ranks leave together: one that exits early would fail the others' last collectives. A request to
stop or to pause goes to all ranks; they agree on a step among themselves.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

from cluster.bulk import Assembly
from cluster.channel import Message
from cluster.errors import GangFailure
from cluster.gang import Gang
from cluster.stacks import was_stopped
from cluster.watch import Stall, Watch
from configs.errors import UserCodeError

_ANSWER_S = 60.0
_STACKS_S = 5.0
_CAUSE_S = 0.3  # from the exceptions of those that a death left alone to the word of the death


class Formation:
    """The training processes of one generation. Used by one thread.

    Args:
        gang: Has formed it.
        generation: Its number.
        workers: Its ranks.
        stall_after_s: Standstill that counts as a failure.

    Attributes:
        is_paused: Whether they left off, at request, with work undone; known at the end.
        last_said: When a rank last said anything but its pulse or its end; monotonic seconds.
        leaving: Ranks that were told to go, by a signal.
        struck: Numbers of the chaos plan's faults that its ranks did to themselves.
        stacks: Stacks of all ranks, where they stalled.
    """

    def __init__(self, gang: Gang, generation: int, workers: int, stall_after_s: float) -> None:
        self._gang = gang
        self._generation = generation
        self._workers = workers
        now = time.monotonic()
        self._watch = Watch(workers, gang.spec.start_timeout_s, stall_after_s, now)
        self._assemblies = [Assembly() for _ in range(workers)]
        self._ready: set[int] = set()
        self._finished: set[int] = set()
        self._left: set[int] = set()
        self._raised: list[Message] = []
        self._raised_at = 0.0
        self._frozen: Stall | None = None
        self._asked: str | None = None
        self._asked_at = 0.0
        self.last_said = now
        self.is_paused = False
        self.leaving: set[int] = set()
        self.struck: list[int] = []
        self.stacks: dict[int, str] = {}

    @property
    def is_ready(self) -> bool:
        """Whether all ranks have formed."""
        return len(self._ready) == self._workers

    def ask(self, command: str, reason: str) -> bool:
        """Ask all ranks to "stop" or to "pause" at a common step; returns whether it is news.

        A stop is answered within a bound. A pause is for as long as training goes on: who evaluates
        at the end of it does not heed it.
        """
        if self._asked in (command, "stop") or self._finished:
            return False
        self._asked, self._asked_at = command, time.monotonic()
        self._gang.send(command, reason)
        return True

    def follow(self) -> Iterator[Message | None]:
        """Messages for the delegate until all ranks have left; None now and then in silence.

        Raises:
            GangFailure: A rank died, raised, or nothing goes on.
            UserCodeError: The user's code raised.
        """
        for message in self._gang.messages():
            if message is not None:
                message = self._take(message)
                yield message
            else:
                yield None
            if len(self._left) == self._workers:
                return
            self._check()

    def _take(self, message: Message) -> Message | None:
        """What a message means to the formation; returns what is left for the delegate."""
        rank, kind = message.rank, message.kind
        now = time.monotonic()
        if kind == "pulse":
            actions, place = message.body
            self._watch.pulse(rank, actions, place, now)
            return None
        self._watch.heard(rank, now)
        if kind not in ("exited", "exception"):
            self.last_said = now
        if kind == "part":
            whole = self._assemblies[rank].add(message.body)
            return None if whole is None else Message(self._generation, rank, *whole)
        if kind == "fault":
            self.struck.append(message.body.number)
            return message
        if kind == "leaving":
            self.leaving.add(rank)
        elif kind == "exception":
            self._note_exception(message, now)
        elif kind == "exited":
            self._note_exit(message)
        elif kind == "ready":
            self._ready.add(rank)
            self._watch.ready(rank)
            return message
        elif kind in ("finished", "paused"):
            self.is_paused = self.is_paused or kind == "paused"
            self._finished.add(rank)
            self._watch.finished(rank)
            if len(self._finished) == self._workers:
                self._gang.send("leave")
            return message
        else:
            return message
        return None

    def _note_exception(self, message: Message, now: float) -> None:
        """The user's ends the run at once; another may only tell that a peer has died."""
        body = message.body
        if body["is_user_error"]:
            raise UserCodeError(body["message"], body["traceback"])
        if not self._raised:
            self._raised_at = now
            self._frozen = self._watch.frozen(now)
        self._raised.append(message)

    def _note_exit(self, message: Message) -> None:
        if message.rank in self._finished:
            self._left.add(message.rank)
        elif message.rank not in [raised.rank for raised in self._raised]:
            raise _exit_failure(message)

    def _check(self) -> None:
        """Raise where a bound is passed."""
        now = time.monotonic()
        may_be_explained = len(self._raised) < self._workers and now - self._raised_at < _CAUSE_S
        if self._raised and not may_be_explained:
            raise self._failure_of_exceptions()
        if stall := self._watch.check(now):
            raise self._failure_of_stall(stall)
        is_late = self._asked == "stop" and now - self._asked_at > _ANSWER_S
        if is_late and not self._finished:
            raise GangFailure(
                f"the workers were asked to stop and did not within {_ANSWER_S:g} s.", "stalled"
            )

    def _failure_of_exceptions(self) -> GangFailure:
        """The first one's, or the frozen rank's where TensorFlow tired of waiting for it first."""
        frozen = self._frozen
        if frozen is None or frozen.rank in [raised.rank for raised in self._raised]:
            return _exception_failure(self._raised[0])
        first = self._raised[0]
        raised = f" rank {first.rank} raised {first.body['error']}"
        return self._failure_of_stall(replace(frozen, sentence=frozen.sentence + raised))

    def _failure_of_stall(self, stall: Stall) -> GangFailure:
        self.stacks = self._gang.stacks(_STACKS_S)
        stopped = [rank for rank, text in self.stacks.items() if was_stopped(text)]
        if stall.rank < 0 and len(stopped) == 1:
            # Forming waits inside of TensorFlow, where nobody can give a sign of life.
            stall = replace(
                stall, rank=stopped[0], sentence=f"{stall.sentence} rank {stopped[0]} is stopped."
            )
        return GangFailure(stall.sentence, stall.kind, stall.rank)


def _exception_failure(message: Message) -> GangFailure:
    body = message.body
    return GangFailure(
        f"rank {message.rank} raised {body['error']}",
        "exception",
        message.rank,
        body["traceback"] or body["full_traceback"],
        body["error"],
    )


def _exit_failure(message: Message) -> GangFailure:
    code = message.body
    how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
    hint = " The kernel does so when memory runs short." if code == -9 else ""
    return GangFailure(
        f"the training process of rank {message.rank} {how}.{hint}", "exited", message.rank
    )
