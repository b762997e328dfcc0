"""Names that one object uses and another has to have: none may dangle.

What the cluster provides instead is listed in deploy/provided.yaml.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.checks.objects import (
    Finding,
    Manifest,
    Pod,
    cluster_spec,
    matches,
    name_of,
    of_kind,
    pods,
    walk,
)

DEPLOY = Path(__file__).parents[3] / "deploy"
_PRIORITIES = ("system-cluster-critical", "system-node-critical")
# Ports of a head that no container declares: the autoscaler's metrics beside it.
_UNDECLARED_PORTS = {"head": {44217}}


@functools.cache
def provided() -> dict[str, Any]:
    """What the administrators of a cluster make: deploy/provided.yaml."""
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "provided.yaml").read_text())
    return found


def references(objects: list[Manifest], of_cluster: list[Manifest]) -> Iterator[Finding]:
    """Findings under the rule `reference`. `of_cluster` is what cluster-admin/ renders to."""
    maker = _Names(objects, of_cluster)
    for pod in pods(objects):
        for text in [*_volumes(pod, maker), *_environment(pod, maker), *_of_pod(pod, maker)]:
            yield Finding("reference", pod.where, text)
    for manifest in objects:
        for text in _of_object(manifest, objects, maker):
            yield Finding("reference", name_of(manifest), text)


class _Names:
    """Which names there are."""

    def __init__(self, objects: list[Manifest], of_cluster: list[Manifest]) -> None:
        self.pods = list(pods(objects))
        self.keys = {
            each["metadata"]["name"]: {*(each.get("data") or {}), *(each.get("binaryData") or {})}
            for each in of_kind(objects, "ConfigMap")
        }
        self.secrets = {name: set(keys) for name, keys in provided()["secrets"].items()}
        for each in of_kind(objects, "Secret"):
            values = {**(each.get("data") or {}), **(each.get("stringData") or {})}
            self.secrets[each["metadata"]["name"]] = set(values)
        self.by_kind: dict[str, set[str]] = {}
        for each in [*objects, *of_cluster]:
            self.by_kind.setdefault(each["kind"], set()).add(each["metadata"]["name"])
        self.services = dict(_services(objects))

    def has(self, kind: str, name: str) -> bool:
        return name in self.by_kind.get(kind, ())


def _services(objects: list[Manifest]) -> Iterator[tuple[str, dict[str, int]]]:
    """Services and their ports by name, those that KubeRay makes too."""
    for each in of_kind(objects, "Service"):
        ports = each["spec"].get("ports", ())
        yield each["metadata"]["name"], {port.get("name", ""): port["port"] for port in ports}
    for each in of_kind(objects, "RayService", "RayCluster"):
        name = each["metadata"]["name"]
        yield f"{name}-head-svc", {"dashboard": 8265, "gcs-server": 6379, "serve": 8000}
        if each["kind"] == "RayService":
            yield f"{name}-serve-svc", {"serve": 8000}


def _volumes(pod: Pod, names: _Names) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes") or ()}
    claims = {
        each["metadata"]["name"] for each in pod.owner["spec"].get("volumeClaimTemplates", ())
    }
    for name, volume in volumes.items():
        if source := volume.get("configMap"):
            yield from _config_map(source, names, f"volume {name}")
        if (source := volume.get("secret")) and source.get("secretName") not in names.secrets:
            yield f"volume {name}: no secret {source.get('secretName')}"
        if source := volume.get("persistentVolumeClaim"):
            claim = source.get("claimName", "")
            if not names.has("PersistentVolumeClaim", claim):
                yield f"volume {name}: no claim {claim}"
    for container in pod.containers:
        for mount in container.get("volumeMounts") or ():
            if mount["name"] not in volumes and mount["name"] not in claims:
                yield f"{container['name']}: no volume {mount['name']}"


def _config_map(source: Manifest, names: _Names, where: str) -> Iterator[str]:
    name = source.get("name", "")
    if name not in names.keys:
        if not source.get("optional"):
            yield f"{where}: no config map {name}"
        return
    for item in source.get("items") or ():
        if item["key"] not in names.keys[name]:
            yield f"{where}: config map {name} has no key {item['key']}"


def _environment(pod: Pod, names: _Names) -> Iterator[str]:
    for container in pod.containers:
        where = container["name"]
        for source in container.get("envFrom") or ():
            if reference := source.get("configMapRef"):
                yield from _config_map(reference, names, where)
            if (reference := source.get("secretRef")) and reference["name"] not in names.secrets:
                yield f"{where}: no secret {reference['name']}"
        for variable in container.get("env") or ():
            source = variable.get("valueFrom") or {}
            if reference := source.get("secretKeyRef"):
                yield from _secret_key(reference, names, f"{where} {variable['name']}")
            if reference := source.get("configMapKeyRef"):
                with_items = {**reference, "items": [{"key": reference["key"]}]}
                yield from _config_map(with_items, names, f"{where} {variable['name']}")


def _secret_key(reference: Manifest, names: _Names, where: str) -> Iterator[str]:
    name, key = reference.get("name", ""), reference.get("key", "")
    if name not in names.secrets:
        yield f"{where}: no secret {name}"
    elif key not in names.secrets[name]:
        yield f"{where}: secret {name} has no key {key}"


def _of_pod(pod: Pod, names: _Names) -> Iterator[str]:
    account = pod.spec.get("serviceAccountName")
    if account and not names.has("ServiceAccount", account):
        yield f"no account {account}"
    priority = pod.spec.get("priorityClassName")
    if priority and priority not in _PRIORITIES and not names.has("PriorityClass", priority):
        yield f"no priority class {priority}"
    for secret in pod.spec.get("imagePullSecrets") or ():
        if secret["name"] not in names.secrets:
            yield f"no secret {secret['name']} to pull images with"
    for container in pod.containers:
        ports = {port.get("name"): port["containerPort"] for port in container.get("ports") or ()}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            port = _probe_port(container.get(probe) or {})
            if port is not None and port not in ports and port not in ports.values():
                yield f"{container['name']} {probe}: nobody listens on port {port}"
    for path, value in walk(pod.spec.get("affinity") or {}):
        if path[-1:] == ("labelSelector",) and not _any(value, names.pods):
            yield "affinity: its selector picks no pod"
    for spread in pod.spec.get("topologySpreadConstraints") or ():
        if not _any(spread.get("labelSelector"), names.pods):
            yield "topologySpreadConstraints: its selector picks no pod"


def _probe_port(probe: Manifest) -> Any:
    for kind in ("httpGet", "tcpSocket"):
        if kind in probe:
            return probe[kind]["port"]
    return None


def _any(selector: Manifest | None, of: list[Pod]) -> list[Pod]:
    return [pod for pod in of if matches(selector, pod.labels)]


def _of_object(manifest: Manifest, objects: list[Manifest], names: _Names) -> Iterator[str]:
    kind, spec = manifest["kind"], manifest.get("spec") or {}
    if kind == "Service":
        yield from _service(spec, names)
    elif kind == "PodDisruptionBudget":
        yield from _budget(spec, names)
    elif kind == "NetworkPolicy":
        yield from _policy(spec, names)
    elif kind == "PodMonitor":
        yield from _monitor(spec, names)
    elif kind == "Ingress":
        yield from _ingress(spec, names)
    elif kind == "RoleBinding":
        yield from _binding(manifest, names)
    elif kind in ("Deployment", "StatefulSet"):
        if not matches(spec["selector"], next(iter(pods([manifest]))).labels):
            yield "its selector does not pick its own pods"
        if kind == "StatefulSet" and spec.get("serviceName") not in names.services:
            yield f"no service {spec.get('serviceName')}"
    elif kind == "PersistentVolumeClaim":
        storage = spec.get("storageClassName")
        if storage and storage not in provided()["storage_classes"]:
            yield f"no storage class {storage}"
    elif kind == "LocalQueue":
        if not names.has("ClusterQueue", spec.get("clusterQueue", "")):
            yield f"no cluster queue {spec.get('clusterQueue')}"
    elif kind == "ClusterQueue":
        for group in spec.get("resourceGroups", ()):
            for flavor in group["flavors"]:
                if not names.has("ResourceFlavor", flavor["name"]):
                    yield f"no resource flavor {flavor['name']}"
    if kind in ("RayJob", "RayCluster", "RayService"):
        yield from _ray(manifest, names)


def _service(spec: Manifest, names: _Names) -> Iterator[str]:
    picked = _any({"matchLabels": spec.get("selector") or {}}, names.pods)
    if not spec.get("selector") or not picked:
        yield "its selector picks no pod"
        return
    for port in spec.get("ports", ()):
        target = port.get("targetPort", port["port"])
        if not any(target in _listening(pod) for pod in picked):
            yield f"nobody listens on port {target}"


def _listening(pod: Pod) -> set[Any]:
    found: set[Any] = set(_UNDECLARED_PORTS.get(pod.node, ()))
    for container in pod.containers:
        for port in container.get("ports") or ():
            found |= {port["containerPort"], port.get("name")}
    return found


def _budget(spec: Manifest, names: _Names) -> Iterator[str]:
    picked = _any(spec.get("selector"), names.pods)
    if not picked:
        yield "its selector picks no pod"
    if any(pod.node for pod in picked) and not isinstance(spec.get("minAvailable"), int):
        yield "for pods of Ray's kinds Kubernetes takes a whole number of minAvailable only"


def _policy(spec: Manifest, names: _Names) -> Iterator[str]:
    picked = _any(spec.get("podSelector"), names.pods)
    if not picked:
        yield "its selector picks no pod"
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction) or ():
            others = list(_peers(rule.get(peers) or (), names))
            yield from (text for _, text in others if text)
            listeners = (
                picked if direction == "ingress" else [p for found, _ in others for p in found]
            )
            for port in rule.get("ports") or ():
                number = port.get("port")
                if listeners and not any(number in _listening(pod) for pod in listeners):
                    yield f"{direction}: nobody listens on port {number}"


def _peers(peers: Any, names: _Names) -> Iterator[tuple[list[Pod], str]]:
    for peer in peers:
        labels = (peer.get("namespaceSelector") or {}).get("matchLabels") or {}
        namespace = labels.get("kubernetes.io/metadata.name")
        if namespace and namespace not in provided()["namespaces"]:
            yield [], f"no namespace {namespace}"
        elif "podSelector" in peer and "namespaceSelector" not in peer:
            found = _any(peer["podSelector"], names.pods)
            operators_own = "redis-cleanup" in str(peer["podSelector"])
            yield found, "" if found or operators_own else "a peer's selector picks no pod"


def _monitor(spec: Manifest, names: _Names) -> Iterator[str]:
    picked = _any(spec.get("selector"), names.pods)
    if not picked:
        yield "its selector picks no pod"
    for endpoint in spec.get("podMetricsEndpoints", ()):
        missing = [pod.where for pod in picked if endpoint.get("port") not in _listening(pod)]
        if missing:
            yield f"no port {endpoint.get('port')} in {missing[0]}"


def _ingress(spec: Manifest, names: _Names) -> Iterator[str]:
    if spec.get("ingressClassName") not in provided()["ingress_classes"]:
        yield f"no ingress class {spec.get('ingressClassName')}"
    for entry in spec.get("tls") or ():
        if entry.get("secretName") not in names.secrets:
            yield f"no secret {entry.get('secretName')}"
    for rule in spec.get("rules") or ():
        for path in rule["http"]["paths"]:
            service = path["backend"]["service"]
            ports = names.services.get(service["name"])
            if ports is None:
                yield f"no service {service['name']}"
            elif not {service["port"].get("name"), service["port"].get("number")} & {
                *ports,
                *ports.values(),
            }:
                yield f"service {service['name']} has no port {service['port']}"


def _binding(manifest: Manifest, names: _Names) -> Iterator[str]:
    role = manifest["roleRef"]
    if not names.has(role["kind"], role["name"]):
        yield f"no {role['kind']} {role['name']}"
    for subject in manifest.get("subjects") or ():
        if subject["kind"] == "ServiceAccount" and not names.has("ServiceAccount", subject["name"]):
            yield f"no account {subject['name']}"
        namespace = manifest["metadata"].get("namespace")
        if subject["kind"] == "ServiceAccount" and subject.get("namespace") != namespace:
            yield f"account {subject['name']} is looked for in {subject.get('namespace')}"


def _ray(manifest: Manifest, names: _Names) -> Iterator[str]:
    state = cluster_spec(manifest).get("gcsFaultToleranceOptions") or {}
    if address := state.get("redisAddress"):
        host, _, port = re.sub(r"^rediss?://", "", address).partition(":")
        if int(port or 6379) not in names.services.get(host, {}).values():
            yield f"no service {host} with port {port}"
    for name in ("redisPassword", "redisUsername"):
        source = (state.get(name) or {}).get("valueFrom") or {}
        if reference := source.get("secretKeyRef"):
            yield from _secret_key(reference, names, name)
    metadata = manifest["metadata"]
    marks = {**(metadata.get("annotations") or {}), **(metadata.get("labels") or {})}
    for key, kind in (("queue-name", "LocalQueue"), ("priority-class", "WorkloadPriorityClass")):
        for prefix in ("lockstep", "kueue.x-k8s.io"):
            name = marks.get(f"{prefix}/{key}")
            if name and not names.has(kind, name):
                yield f"no {kind} {name}"
