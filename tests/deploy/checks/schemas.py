"""Shapes: built-in kinds by kubernetes-validate's schemas, strictly; others by their definitions.

The definitions of Ray, Kueue and Prometheus's operator lie in tests/data/crds, without their
descriptions. Defaults are filled in before what is required is asked for, as the API server does.
"""

import copy
import functools
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import importlib_resources
import jsonschema
from kubernetes_validate.utils import all_versions
from referencing import Registry, Resource

from tests.deploy.checks.objects import Finding, Manifest, name_of, pods

OLDEST = (1, 30)
_DEFINITIONS = Path(__file__).parents[2] / "data" / "crds"
_FORMATS = jsonschema.FormatChecker(formats=())


@functools.cache
def versions() -> tuple[str, ...]:
    """Versions of Kubernetes from 1.30 to the newest that kubernetes-validate has."""
    found = [tuple(int(part) for part in version.split(".")[:2]) for version in all_versions()]
    return tuple(
        f"{major}.{minor}" for major, minor in sorted(set(found)) if (major, minor) >= OLDEST
    )


def shapes(objects: list[Manifest], of_versions: tuple[str, ...]) -> Iterator[Finding]:
    """What the API servers of these versions would refuse."""
    for manifest in objects:
        key = (manifest.get("apiVersion", ""), manifest.get("kind", ""))
        if key in definitions():
            yield from _by_definition(manifest, key)
        else:
            yield from _built_in(manifest, name_of(manifest), of_versions)
    for pod in pods(objects):
        if pod.node:  # Ray's kinds hold pods as deep as the API server looks, and no enums
            alone = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod.spec}
            yield from _built_in(alone, pod.where, of_versions)


def _built_in(manifest: Manifest, where: str, of_versions: tuple[str, ...]) -> Iterator[Finding]:
    text = json.dumps(manifest, sort_keys=True)
    for version in of_versions:
        problems = _problems(text, version)
        if problems:
            for problem in problems:
                yield Finding("schema", where, f"{problem} (Kubernetes {version})")
            return


@functools.lru_cache(maxsize=4096)
def _problems(text: str, version: str) -> tuple[str, ...]:
    manifest = json.loads(text)
    validator = _validator(version, manifest.get("kind", ""), manifest.get("apiVersion", ""))
    if validator is None:
        return (f"{manifest.get('apiVersion')} has no kind {manifest.get('kind')}",)
    return tuple(_said(error) for error in validator.iter_errors(manifest))


def _said(error: Any) -> str:
    return f"{'.'.join(map(str, error.absolute_path)) or 'object'}: {error.message[:200]}"


@functools.cache
def _folder(version: str) -> Any:
    folder = importlib_resources.files("kubernetes_validate") / "kubernetes-json-schema"
    names = [path.name for path in folder.iterdir()]
    name = next(name for name in names if name.startswith(f"v{version}.") and "strict" in name)
    return folder / name


@functools.cache
def _registry(version: str) -> Any:
    definitions = json.loads((_folder(version) / "_definitions.json").read_text())
    return Resource.from_contents(definitions) @ Registry()


@functools.cache
def _validator(version: str, kind: str, api_version: str) -> Any:
    group, _, number = api_version.rpartition("/")
    prefix = f"{group.partition('.')[0]}-{number}" if group else number
    path = _folder(version) / f"{kind.lower()}-{prefix}.json"
    if not kind or not path.is_file():
        return None
    schema = json.loads(path.read_text())
    registry = Resource.from_contents(schema) @ _registry(version)
    return jsonschema.Draft202012Validator(schema, registry=registry)


@functools.cache
def definitions() -> dict[tuple[str, str], Any]:
    """(apiVersion, kind) of each custom kind and its schema, made strict."""
    found = {}
    for path in sorted(_DEFINITIONS.glob("*.json.gz")):
        definition = json.loads(gzip.decompress(path.read_bytes()))
        for version, schema in definition["versions"].items():
            schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}}
            found[(f"{definition['group']}/{version}", definition["kind"])] = _strict(schema)
    return found


def _by_definition(manifest: Manifest, key: tuple[str, str]) -> Iterator[Finding]:
    for problem in _definition_problems(json.dumps(manifest, sort_keys=True), key):
        yield Finding("definition", name_of(manifest), problem)


@functools.lru_cache(maxsize=4096)
def _definition_problems(text: str, key: tuple[str, str]) -> tuple[str, ...]:
    filled = with_defaults(json.loads(text), definitions()[key])
    return tuple(_said(error) for error in _definition_validator(key).iter_errors(filled))


@functools.cache
def _definition_validator(key: tuple[str, str]) -> Any:
    return jsonschema.Draft202012Validator(definitions()[key])


def with_defaults(value: Any, schema: Manifest) -> Any:
    """Fill in the defaults that a definition gives, in place."""
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
            if name in value:
                with_defaults(value[name], inner)
        others = schema.get("additionalProperties")
        if isinstance(others, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                with_defaults(value[name], others)
    elif isinstance(value, list):
        for element in value:
            with_defaults(element, schema.get("items", {}))
    return value


def _strict(schema: Any) -> Any:
    """A structural schema as JSON Schema that refuses unknown keys, as strict validation does."""
    if not isinstance(schema, dict):
        return schema
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    result.pop("nullable", None)
    result.pop("format", None)
    result.pop("default", None)
    if "properties" in schema:
        result["properties"] = {k: _strict(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
        # `default` is wanted by with_defaults
        for name, inner in schema["properties"].items():
            if "default" in inner:
                result["properties"][name]["default"] = inner["default"]
    for key in ("items", "additionalProperties", "not"):
        if isinstance(result.get(key), dict):
            result[key] = _strict(result[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in result:
            result[key] = [
                {k: v for k, v in part.items() if k in ("required", "not", "properties", "pattern")}
                for part in result[key]
            ]
    return result
