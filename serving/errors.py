"""What can go wrong with predictions.

UserError
|-- ModelFileError   a model that cannot be loaded, or does not say what it needs
|-- InputError       values that do not fit the model
`-- OutputError      an output folder that must not be written
EnvironmentFailure
`-- WriteError       storage failed under an output; nothing of it appears
"""

from configs.errors import EnvironmentFailure, UserError


class ModelFileError(UserError):
    """A model file or folder that cannot be loaded, or cannot be used for what was asked."""


class InputError(UserError):
    """Columns or values that do not fit the model's signature."""


class OutputError(UserError):
    """An output folder that holds something else, or may not be written."""


class WriteError(EnvironmentFailure):
    """An output that could not be written to its end."""
