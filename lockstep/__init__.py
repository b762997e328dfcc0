"""Train Keras Sequential models on a cluster as if on one machine, and serve them to many users.

Names are loaded when they are first used, so that the command line can answer before Ray and
pyarrow are imported. `Job` and `TrainOptions`, which few programs name, are here too.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.errors import EnvironmentFailure, UserError
    from configs.schema import Job as Job
    from data_pipeline.arrays import from_arrays, from_dataset
    from lockstep.api import Run, train, verify
    from lockstep.api import TrainOptions as TrainOptions
    from lockstep.follow import Interrupted

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
    "Interrupted": "lockstep.follow",
    "UserError": "configs.errors",
    "Job": "configs.schema",
    "TrainOptions": "lockstep.api",
    "from_arrays": "data_pipeline.arrays",
    "from_dataset": "data_pipeline.arrays",
}


def __getattr__(name: str) -> Any:
    if name not in __all__ and name not in _HOME:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "lockstep.api")), name)
