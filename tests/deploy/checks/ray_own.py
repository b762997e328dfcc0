"""Ray's own validators, run on what the manifests hand to Ray.

They are private to Ray: the versions they were tried with are named, and others are skipped.
"""

import copy
import functools
import json
import warnings
from collections.abc import Iterator
from importlib import import_module, metadata
from typing import Any

import yaml

from tests.deploy.checks.objects import (
    RAY_KINDS,
    Finding,
    Manifest,
    cluster_spec,
    name_of,
    of_kind,
    pods,
)
from tests.deploy.checks.schemas import definitions, with_defaults

TRIED_WITH = ("2.60",)


def ray_own(objects: list[Manifest]) -> Iterator[Finding]:
    """Findings under the rule `ray`."""
    version = metadata.version("ray")
    for manifest in of_kind(objects, *RAY_KINDS):
        for problem in _problems(json.dumps(manifest, sort_keys=True), version):
            yield Finding("ray", name_of(manifest), problem)


@functools.lru_cache(maxsize=4096)
def _problems(text: str, version: str) -> tuple[str, ...]:
    return tuple(_found(json.loads(text), version))


def _found(manifest: Manifest, version: str) -> Iterator[str]:
    cluster, spec = cluster_spec(manifest), manifest["spec"]
    if cluster and cluster.get("rayVersion") != version:
        yield f"rayVersion {cluster.get('rayVersion')} is not that of the image, {version}"
    if not version.startswith(TRIED_WITH):
        return
    if cluster:
        yield from _node_types(manifest, cluster)
    if "serveConfigV2" in spec:
        text = spec["serveConfigV2"]
        yield from _raised(
            lambda: _of_ray("serve.schema").ServeDeploySchema.parse_obj(yaml.safe_load(text))
        )
    if "runtimeEnvYAML" in spec:
        values = yaml.safe_load(spec["runtimeEnvYAML"])
        yield from _raised(lambda: _of_ray("runtime_env").RuntimeEnv(**values))
    for pod in pods([manifest]):
        params = pod.group.get("rayStartParams") or {}
        for name in sorted(set(params) - ray_start_options()):
            yield f"{pod.place}: ray start has no option --{name}"


def _node_types(manifest: Manifest, cluster: Manifest) -> Iterator[str]:
    """The autoscaler's reading of the cluster: it wants CPUs of each group."""
    schema = definitions()[("ray.io/v1", "RayCluster")]
    filled = with_defaults({"spec": copy.deepcopy(cluster)}, schema)
    named = {"namespace": "x", **manifest["metadata"]}
    resource = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": named, **filled}
    reader = _of_ray("autoscaler._private.kuberay.autoscaling_config")
    yield from _raised(lambda: reader._derive_autoscaling_config_from_ray_cr(resource))


def _of_ray(module: str) -> Any:
    """A module of Ray's; what it says about its own dependencies is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(f"ray.{module}")


def _raised(call: Any) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as error:  # a validator of Ray's may raise anything
        yield f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@functools.cache
def ray_start_options() -> set[str]:
    """Options that `ray start` takes."""
    start = _of_ray("scripts.scripts").start
    return {name.lstrip("-") for option in start.params for name in option.opts}
