"""What can go wrong between a finished run and a served model.

UserError
`-- RegistryError        an unknown model, version or alias; a change that is not allowed
    `-- AliasConflict    an alias does not point to what was expected
EnvironmentFailure
|-- DatabaseFailure      the database cannot be reached, is locked, full or damaged
|-- ArtifactFailure      storage failed, or an artifact is not what was registered
|-- LeaseHeld            another process is at work; later it may not be
`-- LeaseLost            this process was given up for dead, and another took over
"""

from configs.errors import EnvironmentFailure, UserError


class RegistryError(UserError):
    """A mistake of the user's: what was asked for is not there, or not allowed."""


class SchedulerSuperseded(EnvironmentFailure):
    """This scheduler was silent for so long that another one has taken over."""

    is_retryable = False


class DatabaseFailure(EnvironmentFailure):
    """The database failed; nothing of the transaction was kept."""


class ArtifactFailure(EnvironmentFailure):
    """An artifact cannot be read or written, or its digest no longer fits."""


class AliasConflict(RegistryError):
    """An alias does not point to what was expected: somebody else moved it."""


class LeaseHeld(EnvironmentFailure):
    """Another process holds the lease; nothing was changed."""


class LeaseLost(EnvironmentFailure):
    """The lease went to another process; nothing that it guards was changed."""
