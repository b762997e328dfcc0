"""What a failure of the gang is answered with: another generation, giving up, or the user's turn.

Owns the count of failures in a window of time, the back-off between attempts, and the recognition
of failures that would come back for ever: the same exception at the same step is a fault of the
program, not of a machine. Pure: failures and the time are told to it. What a chaos plan did on
purpose is never counted.
"""

import re
from collections import deque
from dataclasses import dataclass
from typing import Literal

_SAME_IN_A_ROW = 3
_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 30.0
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
# TensorFlow numbers traced functions as a process comes to them.
_FUNCTION = re.compile(r"(__(?:inference|forward|backward)_\w*?)_\d+(?:_\d+)*\b")


@dataclass(frozen=True)
class Failed:
    """One failure of a generation.

    Attributes:
        kind: exception where a worker raised; exited, host_lost, stalled, not_formed and others.
        rank: The rank it happened to, or -1.
        message: What happened; of an exception its type and message, without the rank.
        traceback: Of an exception.
        step: The last step that is known to have been completed.
        is_injected: Whether a chaos plan did it.
        resumed_at: The step that the failed generation went on from; None if not known.
    """

    kind: str
    rank: int
    message: str
    traceback: str = ""
    step: int = 0
    is_injected: bool = False
    resumed_at: int | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer to a failure.

    Attributes:
        action: retry: form a new generation after `delay_s`. give_up: end the run, which can be
            resumed. users: end the run as the user's mistake, with `traceback`.
        delay_s: Seconds to wait before the next generation.
        reason: Why the run ends; empty for retry.
        traceback: What the user needs to see; empty otherwise.
    """

    action: Literal["retry", "give_up", "users"]
    delay_s: float = 0.0
    reason: str = ""
    traceback: str = ""


class RetryPolicy:
    """Judges the failures of one run, in the order in which they happen; one thread.

    Args:
        max_failures: Failures within the window that are retried (`cluster.max_failures`).
        window_s: The window (`cluster.failure_window_s`).
    """

    def __init__(self, max_failures: int, window_s: float) -> None:
        self._max_failures = max_failures
        self._window_s = window_s
        self._times_s: deque[float] = deque()
        self._last: Failed | None = None
        self._same_in_a_row = 0
        self._in_vain = 0

    def judge(self, failure: Failed, now: float) -> Verdict:
        """What to do about a failure that happened at `now`, in seconds of any steady clock."""
        if failure.is_injected:
            return Verdict("retry")
        while self._times_s and now - self._times_s[0] > self._window_s:
            self._times_s.popleft()
        is_first = not self._times_s
        self._times_s.append(now)
        last, self._last = self._last, failure
        self._same_in_a_row = self._same_in_a_row + 1 if _is_same(last, failure) else 1
        if self._same_in_a_row >= _SAME_IN_A_ROW:
            return self._users(failure)
        if len(self._times_s) > self._max_failures:
            return self._give_up(failure)
        self._in_vain = 0 if is_first or _has_progress(last, failure) else self._in_vain + 1
        return Verdict("retry", _delay_s(self._in_vain))

    def _users(self, failure: Failed) -> Verdict:
        return Verdict(
            "users",
            reason=f"the same exception came {_SAME_IN_A_ROW} times in a row, always after step "
            f"{failure.step}, so that another attempt would not help. Rank {failure.rank} raised "
            f"{_sentence(failure.message)} Correct its cause; --resume goes on from the newest "
            "checkpoint.",
            traceback=failure.traceback,
        )

    def _give_up(self, failure: Failed) -> Verdict:
        count = len(self._times_s)
        return Verdict(
            "give_up",
            reason=f"{count} failure{'s' if count > 1 else ''} within {self._window_s:g} s "
            f"(cluster.failure_window_s), {self._max_failures} are allowed "
            f"(cluster.max_failures). The last: {_sentence(failure.message)} Look for the cause "
            "in the logs of the workers, or allow more; --resume goes on from the newest "
            "checkpoint.",
        )


def _is_same(last: Failed | None, failure: Failed) -> bool:
    """Whether both are one exception at one step; numbers that processes give aside."""
    if last is None or failure.kind != "exception" or last.kind != "exception":
        return False
    return last.step == failure.step and _plain(last.message) == _plain(failure.message)


def _plain(message: str) -> str:
    return _FUNCTION.sub(r"\1", _ADDRESS.sub("0x", message))


def _sentence(message: str) -> str:
    return message if message.endswith((".", "!", "?")) else f"{message}."


def _has_progress(last: Failed | None, failure: Failed) -> bool:
    """Whether steps were completed since the last failure, repeated ones included."""
    if last is None or failure.step > last.step:
        return True
    return failure.resumed_at is not None and failure.step > failure.resumed_at


def _delay_s(in_vain: int) -> float:
    """0, 1, 2, 4 ... seconds for so many attempts in a row without a step."""
    if in_vain == 0:
        return 0.0
    # The exponent is bounded too: 2.0 ** 1100 overflows.
    return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(in_vain - 1, 10))
