"""The two families of failure that every package of Lockstep builds on.

    LockstepError
    |-- UserError            the user's mistake: told before start, never retried      exit 2
    |   |-- JobError         the job file, with the place in it
    |   `-- UserCodeError    the user's builder or callback raised
    `-- EnvironmentFailure   machines, storage, other processes: may be retried        exit 3

A `UserError` says what was received, what is allowed and what to do about it, in this order.
"""

import difflib
from collections.abc import Iterable


class LockstepError(Exception):
    """Any failure that Lockstep explains itself."""

    exit_status = 3


class UserError(LockstepError):
    """A mistake of the user's, told before anything was started."""

    exit_status = 2


class JobError(UserError):
    """A job file that cannot be used; the message names the file, the line and the field."""


class UserCodeError(UserError):
    """The user's own code raised.

    Attributes:
        traceback: The user's own traceback, without Lockstep's frames.
    """

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class EnvironmentFailure(LockstepError):
    """A failure of machines, storage or processes."""

    exit_status = 3
    is_retryable = True


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that `word` most likely stands for, compared without regard to case.

    Returns None when nothing is close.
    """
    by_lower = {candidate.lower(): candidate for candidate in allowed}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """A sentence ` Did you mean 'x'?`, or nothing when nothing is close."""
    found = nearest(word, allowed)
    return f" Did you mean {found!r}?" if found else ""
