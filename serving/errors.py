"""What can go wrong with predictions.

UserError
|-- ModelFileError   a model that cannot be loaded, or does not say what it needs
|-- InputError       values that do not fit the model
|-- OutputError      an output folder that must not be written
|-- AccountError     a change of users that is not allowed
`-- RequestError     a request that is refused, with the status that tells why
    |-- AuthenticationError   no key, or one that does not count (401)
    |-- LocationError         a file or folder that the user may not name (403)
    |-- BatchError            a batch job that is refused, or that fails for its own reasons
    |-- RefusedRequest        a body, header or right that is not as it must be (400 to 422)
    |-- NotFound              no such model, version, or route, or not for this user (404)
    |-- QuotaExceeded         more than the user may ask for now (429)
    |-- Overloaded            more than the service can take now (429)
    |-- PredictionFailure     the model failed with these rows (500)
    |-- Unavailable           what is needed cannot be loaded now (503)
    `-- DeadlineExceeded      no answer within the time that the caller allowed (504)
EnvironmentFailure
|-- WriteError       storage failed under an output; nothing of it appears
`-- OwnershipLost    another process dispatches the jobs of this database now
"""

from collections.abc import Mapping

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


class RefusedRequest(RequestError):
    """A request that is not as it must be: 400, 403, 405, 413, 415 or 422.

    Attributes:
        headers: To be sent with the refusal.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str = "invalid_request",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, status, code)
        self.headers = dict(headers or {})


class NotFound(RequestError):
    """What was asked for does not exist, or the user may not know of it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 404, "not_found")


class Overloaded(RequestError):
    """The queue is full."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, 429, "overloaded", retry_after_s)


class PredictionFailure(RequestError):
    """The model raised while it computed the rows of this request alone."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 500, "prediction_failed")


class Unavailable(RequestError):
    """A model that cannot be loaded now, or a service that is about to end."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, 503, "unavailable", retry_after_s)


class DeadlineExceeded(RequestError):
    """No answer within the time that the caller allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 504, "deadline_exceeded")


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
