"""Rendered objects as the checks see them: findings, and the pods inside every kind."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Manifest = dict[str, Any]

RAY_KINDS = ("RayCluster", "RayJob", "RayService")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the rule, the object, what and why."""

    rule: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.where}: {self.text}"


@dataclass(frozen=True)
class Pod:
    """A pod template and where it stands.

    `node` is head, worker or submitter in Ray's kinds, else "".
    """

    owner: Manifest
    place: str
    labels: dict[str, str]
    spec: Manifest
    node: str = ""
    group: Manifest = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{name_of(self.owner)} {self.place}"

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", ()), *self.spec.get("containers", ())]


def name_of(manifest: Manifest) -> str:
    return f"{manifest.get('kind')}/{manifest.get('metadata', {}).get('name')}"


def of_kind(objects: list[Manifest], *kinds: str) -> list[Manifest]:
    return [each for each in objects if each.get("kind") in kinds]


def cluster_spec(manifest: Manifest) -> Manifest:
    """The cluster inside one of Ray's kinds; empty where there is none."""
    spec: Manifest = manifest.get("spec", {})
    if manifest["kind"] == "RayCluster":
        return spec
    key = "rayClusterSpec" if manifest["kind"] == "RayJob" else "rayClusterConfig"
    found: Manifest = spec.get(key, {})
    return found


def groups(manifest: Manifest) -> Iterator[tuple[str, str, Manifest]]:
    """(place, node, group) of the head and each group of workers."""
    cluster = cluster_spec(manifest)
    if "headGroupSpec" in cluster:
        yield "head", "head", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", ()):
        yield f"workers {group.get('groupName')}", "worker", group


def pods(objects: list[Manifest]) -> Iterator[Pod]:
    """Every pod template of every kind."""
    for manifest in objects:
        kind, spec = manifest.get("kind"), manifest.get("spec") or {}
        if kind in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            yield _pod(manifest, "pod", spec.get("template", {}))
        elif kind == "CronJob":
            yield _pod(manifest, "pod", spec["jobTemplate"]["spec"].get("template", {}))
        elif kind == "Pod":
            yield _pod(manifest, "pod", manifest)
        elif kind in RAY_KINDS:
            for place, node, group in groups(manifest):
                yield _pod(manifest, place, group.get("template", {}), node, group)
            if "submitterPodTemplate" in spec:
                yield _pod(manifest, "submitter", spec["submitterPodTemplate"], "submitter")


def _pod(
    owner: Manifest, place: str, template: Manifest, node: str = "", group: Manifest | None = None
) -> Pod:
    labels = dict(template.get("metadata", {}).get("labels") or {})
    if node in ("head", "worker"):  # what KubeRay adds
        labels |= {"ray.io/node-type": node, "ray.io/is-ray-node": "yes"}
    return Pod(owner, place, labels, template.get("spec", {}), node, group or {})


def matches(selector: Manifest | None, labels: dict[str, str]) -> bool:
    """Whether a label selector picks these labels; an empty one picks all."""
    selector = selector or {}
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for term in selector.get("matchExpressions") or ():
        value, operator = labels.get(term["key"]), term["operator"]
        is_met = {
            "In": value in (term.get("values") or ()),
            "NotIn": value not in (term.get("values") or ()),
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }.get(operator, False)
        if not is_met:
            return False
    return True


def walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value inside a value, with its path; places in lists are left out of the path."""
    yield path, value
    if isinstance(value, dict):
        for key, element in value.items():
            yield from walk(element, (*path, str(key)))
    elif isinstance(value, list):
        for element in value:
            yield from walk(element, path)
