"""Rendering an overlay of `deploy/` by kustomize: the program, its bounds, what it answers.

Owns how the renderer is found (`kubectl`, or `kustomize` by itself), and where overlays lie. The
manifests mean nothing here.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from configs.errors import EnvironmentFailure, UserError, did_you_mean

_RENDERER_VARIABLE = "LOCKSTEP_KUSTOMIZE"
_RENDER_S = 60.0

Manifest = dict[str, Any]
"""A Kubernetes object."""


def overlay_folder(name: str, deploy: Path | None = None) -> Path:
    """The folder of an overlay: a path with a kustomization.yaml, or a name below deploy/overlays.

    Raises:
        UserError: There is no such overlay.
    """
    if (Path(name) / "kustomization.yaml").is_file():
        return Path(name)
    overlays = (deploy or _deploy_folder()) / "overlays"
    folder = overlays / name
    if (folder / "kustomization.yaml").is_file():
        return folder
    names = sorted(path.parent.name for path in overlays.glob("*/kustomization.yaml"))
    if not names:
        raise UserError(
            f"--overlay received {name!r}, and there are no overlays in {overlays}. Give the path "
            "of a folder with a kustomization.yaml, or work in Lockstep's source folder."
        )
    raise UserError(
        f"--overlay received {name!r}; {', '.join(names)} and paths of folders with a "
        f"kustomization.yaml are allowed.{did_you_mean(name, names)}"
    )


def render(folder: Path) -> list[Manifest]:
    """All objects of a kustomization, in kustomize's order.

    Blocks for a minute at most.

    Raises:
        UserError: No renderer is installed, or kustomize refuses the folder.
        EnvironmentFailure: It did not end in time.
    """
    command = [*renderer(), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_RENDER_S)
    except subprocess.TimeoutExpired:
        raise EnvironmentFailure(
            f"{' '.join(command)} did not end within {_RENDER_S:g} s. Try it by hand."
        ) from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason given"
        raise UserError(f"{folder} cannot be rendered: {reason}. Correct its kustomization.")
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def write(objects: list[Manifest], out: TextIO) -> None:
    """Objects as YAML documents, texts of many lines as such."""
    yaml.dump_all(objects, out, Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Writes texts of many lines as blocks, and no references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _text)


def renderer(environment: Mapping[str, str] | None = None) -> list[str]:
    """The command that renders a folder: LOCKSTEP_KUSTOMIZE, else kubectl, else kustomize.

    Raises:
        UserError: There is none.
    """
    environment = os.environ if environment is None else environment
    chosen = environment.get(_RENDERER_VARIABLE)
    if chosen:
        return [chosen, "build"]
    search = environment.get("PATH")
    if kubectl := shutil.which("kubectl", path=search):
        return [kubectl, "kustomize"]
    if kustomize := shutil.which("kustomize", path=search):
        return [kustomize, "build"]
    raise UserError(
        "rendering an overlay needs kubectl or kustomize, and neither is on PATH. Install one "
        f"(Debian has the package kustomize), or name it in {_RENDERER_VARIABLE}."
    )


def _deploy_folder() -> Path:
    """`deploy/` here, or beside the package."""
    here = Path("deploy")
    return here if here.is_dir() else Path(__file__).parents[1] / "deploy"
