"""What can go wrong with processes.

UserError
|-- CapacityError        the cluster can never place what the job asks for
|-- ScheduleError        a cron expression or a time zone that cannot be read, or is never due
|-- RunUnknown           no such run on the cluster, or nothing of it yet
`-- JobRefused           Ray Jobs does not take a job
EnvironmentFailure
|-- DeskFailure          the cluster did not answer a question
|-- StartTimeout         machines or processes did not come up in time
|-- TemplateLost         a host cannot fork any more; it has to be replaced or started again
|-- StaleGeneration      a launch came too late: a newer generation has been seen
|-- NodeStays            a node was to be drained, and Ray refuses
|-- CoordinatorLost      the coordinator is gone; the run can be resumed
|-- GangFailure          a worker died, stalled or failed; a new gang may succeed
`-- RetriesExhausted     as often as cluster.max_failures allows; not retried     exit 3
"""

from configs.errors import EnvironmentFailure, UserError


class CapacityError(UserError):
    """The cluster can never place the gang: received what it has and what was asked."""


class ScheduleError(UserError):
    """When a schedule is due cannot be told: the expression or the time zone is wrong."""


class RunUnknown(UserError):
    """The cluster remembers no such run, or has nothing of it yet."""


class JobRefused(UserError):
    """Ray Jobs does not take a job, or knows none of this name."""


class DeskFailure(EnvironmentFailure):
    """The cluster gave no answer to a question that was asked by a small job."""


class StartTimeout(EnvironmentFailure):
    """Machines or processes did not come up within `cluster.start_timeout_s`."""


class GangFailure(EnvironmentFailure):
    """One generation of the gang failed.

    Attributes:
        kind: What happened: exited, exception, host_lost, stalled or not_formed.
        rank: The rank it happened to, or -1.
        traceback: Of an exception.
        cause: What is the same when the same happens again; the message by default.
    """

    def __init__(
        self,
        message: str,
        kind: str = "exited",
        rank: int = -1,
        traceback: str = "",
        cause: str = "",
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.rank = rank
        self.traceback = traceback
        self.cause = cause or message


class TemplateLost(EnvironmentFailure):
    """A host's template process has ended: the host cannot fork any more."""


class StaleGeneration(EnvironmentFailure):
    """A generation that was given up was to be launched; the newer one goes on."""

    is_retryable = False


class NodeStays(EnvironmentFailure):
    """Ray refuses to drain a node, such as the head's."""


class CoordinatorLost(EnvironmentFailure):
    """The coordinator's process is gone; the run can be resumed."""


class RetriesExhausted(EnvironmentFailure):
    """The gang failed more often than `cluster.max_failures` allows."""

    is_retryable = False
