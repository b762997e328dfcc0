"""What all sections of a job are made of: the base, Keras objects by name, paths.

Names of layers, losses and the like are checked against the catalogue (`configs.catalog`).
"""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from configs.catalog import check_spec

KerasSpec = str | dict[str, Any]
"""A Keras object: its name, or a mapping of its class name to its arguments."""


def _known(kind: str) -> Callable[[KerasSpec], KerasSpec]:
    """A validator that refuses names and arguments that `keras.<kind>` does not have."""

    def check(spec: KerasSpec) -> KerasSpec:
        check_spec(kind, spec)
        return spec

    return check


LayerSpec = Annotated[KerasSpec, AfterValidator(_known("layers"))]
LossSpec = Annotated[KerasSpec, AfterValidator(_known("losses"))]
MetricSpec = Annotated[KerasSpec, AfterValidator(_known("metrics"))]
OptimizerSpec = Annotated[KerasSpec, AfterValidator(_known("optimizers"))]
CallbackSpec = Annotated[KerasSpec, AfterValidator(_known("callbacks"))]

Paths = str | list[str]
"""A file, a folder, a glob, or a list of these."""

PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
