"""All checks over one render, in the order in which a cluster would object."""

from collections.abc import Iterator

from tests.deploy.checks.commands import commands
from tests.deploy.checks.metrics import metrics
from tests.deploy.checks.objects import Finding, Manifest, name_of
from tests.deploy.checks.operator_rules import operator_rules
from tests.deploy.checks.ray_own import ray_own
from tests.deploy.checks.references import references
from tests.deploy.checks.schemas import shapes
from tests.deploy.checks.security import security, walls
from tests.deploy.checks.values import values

CLUSTER_KINDS = (
    *("Namespace", "PriorityClass", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass"),
)


def check(
    objects: list[Manifest],
    of_cluster: list[Manifest],
    versions: tuple[str, ...],
    *,
    is_whole: bool = True,
) -> list[Finding]:
    """What is wrong with a render.

    Args:
        objects: The render.
        of_cluster: What the administrators of the cluster have applied before.
        versions: Of Kubernetes.
        is_whole: An overlay, with its namespace and walls; not a part such as one run.
    """
    return list(_findings(objects, of_cluster, versions, is_whole))


def _findings(
    objects: list[Manifest], of_cluster: list[Manifest], versions: tuple[str, ...], is_whole: bool
) -> Iterator[Finding]:
    yield from shapes(objects, versions)
    yield from _twice(objects)
    yield from operator_rules(objects)
    yield from ray_own(objects)
    yield from references(objects, of_cluster)
    yield from values(objects)
    yield from security(objects)
    yield from commands(objects)
    yield from metrics(objects)
    if is_whole:
        yield from walls(objects)
        yield from _namespaces(objects)


def _twice(objects: list[Manifest]) -> Iterator[Finding]:
    seen: set[tuple[str, str]] = set()
    for each in objects:
        key = (each["apiVersion"], name_of(each))
        if key in seen:
            yield Finding("reference", key[1], "is there twice")
        seen.add(key)


def _namespaces(objects: list[Manifest]) -> Iterator[Finding]:
    spaces = {each["metadata"]["name"] for each in objects if each["kind"] == "Namespace"}
    for each in objects:
        place = each["metadata"].get("namespace")
        if each["kind"] not in CLUSTER_KINDS and place not in spaces:
            yield Finding("reference", name_of(each), f"its namespace {place} is not here")
