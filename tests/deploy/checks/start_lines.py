"""The `ray start` lines that KubeRay 1.7 builds from a group, for a replay without Kubernetes."""

import math
from collections.abc import Iterator, Mapping

from tests.deploy.checks.objects import Manifest

_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1}
# Options whose "false" is said; others are left out then.
_SAY_FALSE = ("log-color", "include-dashboard", "include-log-monitor")


def start_parameters(group: Manifest, node: str, head_address: str) -> dict[str, str]:
    """Options of `ray start` for a group: its own, and what the operator adds."""
    container = group["template"]["spec"]["containers"][0]
    resources = container.get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    params = {key: str(value) for key, value in (group.get("rayStartParams") or {}).items()}
    if node == "worker":
        params.setdefault("address", head_address)
    else:
        params.setdefault("dashboard-host", "0.0.0.0")
    params.setdefault("metrics-export-port", "8080")
    params.setdefault("dashboard-agent-listen-port", "52365")
    params["block"] = "true"
    cpus = limits.get("cpu", requests.get("cpu"))
    if cpus is not None:
        params.setdefault("num-cpus", str(math.ceil(amount(cpus))))
    if "memory" in limits:
        params.setdefault("memory", str(int(amount(limits["memory"]))))
    for name, value in limits.items():
        if name.endswith("gpu"):
            params.setdefault("num-gpus", str(int(amount(value))))
    return params


def start_line(params: Mapping[str, str], node: str) -> list[str]:
    """The words of the line, options in the order of their names."""
    return ["ray", "start", *(["--head"] if node == "head" else []), *_words(params)]


def _words(params: Mapping[str, str]) -> Iterator[str]:
    for name, value in sorted(params.items()):
        if value.lower() in ("true", "false") and name not in _SAY_FALSE:
            if value.lower() == "true":
                yield f"--{name}"
        else:
            yield f"--{name}={value}"


def amount(text: str | int | float) -> float:
    """A quantity of Kubernetes as a number: 500m, 4Gi, 2."""
    text = str(text)
    if text.endswith("m"):
        return float(text[:-1]) / 1000
    for unit, factor in _UNITS.items():
        if unit and text.endswith(unit):
            return float(text[: -len(unit)]) * factor
    return float(text)
