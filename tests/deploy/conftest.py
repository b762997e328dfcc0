"""Each overlay is rendered once a session; faults are put into copies of the render."""

import copy
import os

import pytest

from lockstep.kustomize import render
from tests.deploy.checks.objects import Manifest
from tests.deploy.checks.references import DEPLOY
from tests.deploy.checks.renderer import ensure_renderer

OVERLAYS = tuple(sorted(path.name for path in (DEPLOY / "overlays").iterdir()))


class Renders:
    """Renders by name, fresh copies each time."""

    def __init__(self) -> None:
        self._found: dict[str, list[Manifest]] = {}

    def __call__(self, name: str) -> list[Manifest]:
        if name not in self._found:
            folder = DEPLOY / name if name == "cluster-admin" else DEPLOY / "overlays" / name
            self._found[name] = render(folder)
        return copy.deepcopy(self._found[name])


@pytest.fixture(scope="session")
def renders() -> Renders:
    before = os.environ.get("LOCKSTEP_KUSTOMIZE")
    ensure_renderer()
    yield Renders()
    if before is None:
        os.environ.pop("LOCKSTEP_KUSTOMIZE", None)


@pytest.fixture(scope="session")
def of_cluster(renders: Renders) -> list[Manifest]:
    return renders("cluster-admin")
