"""Train Keras Sequential models on a cluster as if on one machine, and serve them to many users.

Names are loaded when they are first used, so that the command line can answer before Ray and
pyarrow are imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.errors import EnvironmentFailure, UserError
    from data_pipeline.arrays import from_arrays, from_dataset
    from lockstep.api import Interrupted, Run, train, verify

__all__ = [
    "EnvironmentFailure",
    "Interrupted",
    "Run",
    "UserError",
    "from_arrays",
    "from_dataset",
    "train",
    "verify",
]

_HOME = {
    "EnvironmentFailure": "configs.errors",
    "UserError": "configs.errors",
    "from_arrays": "data_pipeline.arrays",
    "from_dataset": "data_pipeline.arrays",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "lockstep.api")), name)
