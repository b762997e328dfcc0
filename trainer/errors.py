"""What can go wrong in training.

UserError
|-- ModelError       a model, loss or metric that does not fit the data or Keras
|-- ImportRefused    a model file that is damaged, could run code, or has no equal in Keras 3
`-- RunFolderError   a run folder that cannot be used or gone on from
EnvironmentFailure
|-- CallbackFailed   a callback raised; it may not the next time
|-- CheckpointError  no whole checkpoint where one is needed
`-- RecordsError     the files that tell of a run cannot be written
"""

import traceback
from types import TracebackType

from configs.errors import EnvironmentFailure, UserCodeError, UserError


class ModelError(UserError):
    """The model cannot be built, or does not fit the data or the loss."""


class ImportRefused(UserError):
    """A model file that cannot be imported, or may not be."""


class RunFolderError(UserError):
    """A run folder that holds another job, or nothing to go on from."""


class CheckpointError(EnvironmentFailure):
    """A checkpoint that is needed is damaged or missing."""


class RecordsError(EnvironmentFailure):
    """The summary and the report of a run cannot be written."""


class CallbackFailed(EnvironmentFailure):
    """A callback raised, as it may for a moment: a service of its own did not answer.

    Attributes:
        traceback: From the user's code on.
    """

    def __init__(self, hook: str, error: BaseException) -> None:
        super().__init__(f"a callback ({hook}) raised {type(error).__name__}: {error}")
        self.traceback = _users_traceback(error)


def user_code_error(what: str, error: BaseException) -> UserCodeError:
    """Convert what the user's code raised; the traceback begins in the user's code."""
    return UserCodeError(f"{what} raised {type(error).__name__}: {error}", _users_traceback(error))


def _users_traceback(error: BaseException) -> str:
    frames: TracebackType | None = error.__traceback__
    while frames is not None and frames.tb_next is not None and _is_ours(frames):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _is_ours(frame: TracebackType) -> bool:
    module = str(frame.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in ("trainer", "lockstep", "importlib", "cluster")
