"""What a cluster has of what a run needs, node by node: versions, and paths."""

import glob
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PACKAGES = ("lockstep", "ray", "tensorflow", "keras")
_MOST_NODES = 32
_WAIT_S = 30.0


def versions() -> dict[str, str | None]:
    """Of the packages on which a run's numbers depend; None for one that is not there."""
    found: dict[str, str | None] = {"python": ".".join(map(str, sys.version_info[:2]))}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def look_here(inputs: Mapping[str, Sequence[str]], outputs: Mapping[str, str]) -> dict[str, Any]:
    """Versions here, inputs that are missing and outputs that cannot be made, as [field, path]."""
    return {
        "versions": versions(),
        "missing": [
            [name, path]
            for name, paths in inputs.items()
            for path in paths
            if not (glob.glob(path, recursive=True) if glob.has_magic(path) else _exists(path))
        ],
        "unwritable": [[name, path] for name, path in outputs.items() if not _can_make(Path(path))],
    }


def look_everywhere(
    inputs: Mapping[str, Sequence[str]], outputs: Mapping[str, str]
) -> dict[str, Any]:
    """`look_here` on the head and on up to 32 other nodes; needs a joined Ray.

    Returns:
        `nodes`: for each that answered `address` and what it found; `silent`: addresses of those
        that did not within half a minute, or have no Lockstep.
    """
    me = ray.get_runtime_context().get_node_id()
    here = {"address": "head", **look_here(inputs, outputs)}
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != me]
    task = ray.remote(look_here)
    asked = {}
    for node in others[:_MOST_NODES]:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answer = task.options(num_cpus=0, scheduling_strategy=where, max_retries=0).remote(
            dict(inputs), dict(outputs)
        )
        asked[answer] = str(node["NodeManagerAddress"])
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_WAIT_S) if asked else ([], [])
    found, silent = [here], [address for answer, address in asked.items() if answer not in ready]
    for answer in ready:
        try:
            found.append({"address": asked[answer], **ray.get(answer)})
        except ray.exceptions.RayError:
            silent.append(asked[answer])
    return {"nodes": found, "silent": silent}


def _exists(path: str) -> bool:
    return os.path.exists(path)


def _can_make(folder: Path) -> bool:
    """Whether a folder is there to be written to, or can be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # rights alone do not tell: it may be read-only
            return True
    except OSError:
        return False
