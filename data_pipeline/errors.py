"""What can be wrong with data.

UserError
`-- DataError        files, columns or values that the job cannot use
EnvironmentFailure
|-- ReadError        a store that does not answer, or a file that was fine when planned and is not
`-- ConvertError     the folder of converted data cannot be written
"""

from configs.errors import EnvironmentFailure, UserError


class DataError(UserError):
    """Files, columns or values that do not fit the job."""


class ReadError(EnvironmentFailure):
    """What cannot be read now: storage failed, or a file changed after planning."""


class ConvertError(EnvironmentFailure):
    """Converted data that cannot be written: storage failed, or is full."""
