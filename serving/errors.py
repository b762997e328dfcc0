"""What can go wrong with predictions.

UserError
|-- ModelFileError   a model that cannot be loaded, or does not say what it needs
|-- InputError       values that do not fit the model
|-- OutputError      an output folder that must not be written
|-- AccountError     a change of users that is not allowed
`-- RequestError     a request that is refused, with the status that tells why
    |-- AuthenticationError   no key, or one that does not count (401)
    |-- QuotaExceeded         more than the user or the service can take now (429)
    |-- LocationError         a file or folder that the user may not name (403)
    `-- BatchError            a batch job that is refused, or has failed for a reason of its own
EnvironmentFailure
|-- WriteError       storage failed under an output; nothing of it appears
`-- OwnershipLost    another process dispatches the jobs of this database now
"""

from configs.errors import EnvironmentFailure, UserError


class ModelFileError(UserError):
    """A model file or folder that cannot be loaded, or cannot be used for what was asked."""


class InputError(UserError):
    """Columns or values that do not fit the model's signature.

    Attributes:
        column: The column that it is about; None where it is about all of them.
    """

    def __init__(self, message: str, column: str | None = None) -> None:
        super().__init__(message)
        self.column = column


class OutputError(UserError):
    """An output folder that holds something else, or may not be written."""


class WriteError(EnvironmentFailure):
    """An output that could not be written to its end."""


class OwnershipLost(EnvironmentFailure):
    """Another process owns the dispatching of batch jobs; nothing was changed."""


class AccountError(UserError):
    """A change of users, keys or grants that is not allowed."""


class RequestError(UserError):
    """A request that is refused.

    Attributes:
        status: HTTP status.
        code: The reason in one word, for programs.
        retry_after_s: When the same request may succeed, in seconds; None: not by waiting.
    """

    def __init__(
        self, message: str, status: int, code: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


class AuthenticationError(RequestError):
    """No key, or one that is unknown, expired or revoked."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 401, "unauthenticated")


class QuotaExceeded(RequestError):
    """More than a quota allows now; `code` is the quota's name."""

    def __init__(self, message: str, code: str, retry_after_s: float) -> None:
        super().__init__(message, 429, code, retry_after_s)


class LocationError(RequestError):
    """A location outside those that the user may use, or that is not understood."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 403, "location_refused")


class BatchError(RequestError):
    """A batch job that is refused, or that fails for a reason that lies in the job.

    Attributes:
        line: Line or row of the input that it is about, from 1; None where there is none.
        column: Column that it is about.
    """

    def __init__(
        self,
        message: str,
        code: str,
        *,
        status: int = 422,
        line: int | None = None,
        column: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, status, code, retry_after_s)
        self.line = line
        self.column = column
