"""What KubeRay refuses after the API server has accepted: its validation runs in the operator.

Rules of KubeRay 1.7 in our own words, for the kinds that are used here.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.deploy.checks.objects import (
    RAY_KINDS,
    Finding,
    Manifest,
    cluster_spec,
    groups,
    name_of,
    of_kind,
)

LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
LONGEST_CRON_NAME = 36
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
_QUEUE = "kueue.x-k8s.io/queue-name"


def operator_rules(objects: list[Manifest]) -> Iterator[Finding]:
    """Findings under the rule `operator`."""
    for manifest in of_kind(objects, *RAY_KINDS):
        problems = [*_names(manifest), *_groups(manifest), *_cluster(manifest)]
        if manifest["kind"] == "RayJob":
            problems += _job(manifest)
        if manifest["kind"] == "RayService":
            problems += _service(manifest)
        for problem in problems:
            yield Finding("operator", name_of(manifest), problem)
    for manifest in of_kind(objects, "RayCronJob"):
        for problem in _cron_job(manifest):
            yield Finding("operator", name_of(manifest), problem)


def _cron_job(manifest: Manifest) -> Iterator[str]:
    yield "RayCronJob needs a feature gate that is off by default; a CronJob that launches does not"
    if len(manifest["metadata"].get("name", "")) > LONGEST_CRON_NAME:
        yield f"the name has more than {LONGEST_CRON_NAME} characters"
    if "TZ=" in str(manifest["spec"].get("schedule", "")):
        yield "a time zone inside of schedule is refused; use timeZone"


def _names(manifest: Manifest) -> Iterator[str]:
    name, longest = manifest["metadata"].get("name", ""), LONGEST_NAME[manifest["kind"]]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the name {name!r} is no DNS-1035 label"
    if len(name) > longest:
        yield f"the name has {len(name)} characters, more than {longest}"
    if manifest["apiVersion"] != "ray.io/v1":
        yield f"{manifest['apiVersion']} is deprecated; ray.io/v1"


def _groups(manifest: Manifest) -> Iterator[str]:
    seen: set[str] = set()
    for place, node, group in groups(manifest):
        spec = group.get("template", {}).get("spec", {})
        containers = spec.get("containers") or []
        if not containers:
            yield f"{place}: no container"
            continue
        if containers[0].get("name") != "ray":
            yield f"{place}: Ray has to be the first container, not {containers[0].get('name')}"
        params = group.get("rayStartParams") or {}
        if "labels" in params:
            yield f"{place}: rayStartParams.labels is forbidden; use labels of the group"
        twice = [name for name in RESOURCE_PARAMS if name in params]
        if group.get("resources") and twice:
            yield f"{place}: resources and rayStartParams {', '.join(twice)} exclude each other"
        if any("ray start" in " ".join(each.get("command") or ()) for each in containers):
            yield f"{place}: a command with 'ray start' switches the operator's own off"
        for container in containers:
            yield from _environment(place, container)
        if "gcsFaultToleranceOptions" in cluster_spec(manifest) and "redis-password" in params:
            yield f"{place}: redis-password belongs into gcsFaultToleranceOptions"
        if node == "worker":
            name = group.get("groupName", "")
            if name in seen:
                yield f"two groups are named {name}"
            seen.add(name)
            yield from _bounds(place, group)


def _bounds(place: str, group: Manifest) -> Iterator[str]:
    low, high = group.get("minReplicas"), group.get("maxReplicas")
    if low is None or high is None:
        yield f"{place}: minReplicas and maxReplicas have to be given"
        return
    count = group.get("replicas")
    if low < 0 or low > high:
        yield f"{place}: minReplicas {low} and maxReplicas {high} leave nothing"
    elif count is not None and not low <= count <= high:
        yield f"{place}: replicas {count} lie outside {low} to {high}"


def _environment(place: str, container: Manifest) -> Iterator[str]:
    names = {each["name"] for each in container.get("env") or ()}
    for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD"):
        if name in names:
            yield f"{place}: {name} belongs into gcsFaultToleranceOptions"
    if "RAY_enable_autoscaler_v2" in names:
        yield f"{place}: RAY_enable_autoscaler_v2 belongs into autoscalerOptions.version"


def _cluster(manifest: Manifest) -> Iterator[str]:
    cluster = cluster_spec(manifest)
    if manifest["kind"] == "RayJob" and not cluster:
        return
    if not cluster.get("rayVersion"):
        yield "rayVersion is missing: probes and authentication depend on it"
    authentication = cluster.get("authOptions") or {}
    if authentication.get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches the dashboard may run code"
    if authentication.get("enableK8sTokenAuth") and manifest["kind"] != "RayCluster":
        yield "enableK8sTokenAuth is refused for this kind"
    for name in GATED:
        if name in cluster:
            yield f"{name} needs a feature gate that is off by default"
    state = cluster.get("gcsFaultToleranceOptions")
    if state is not None:
        yield from _external_state(manifest, state)
    if cluster.get("enableInTreeAutoscaling"):
        yield from _autoscaling(manifest, cluster)
    else:
        for place, _, group in groups(manifest):
            if "idleTimeoutSeconds" in group or group.get("priority"):
                yield f"{place}: idleTimeoutSeconds and priority need autoscaling, version v2"
    if "upgradeStrategy" in cluster and manifest["kind"] != "RayCluster":
        yield "upgradeStrategy of a cluster is for RayCluster alone"


def _external_state(manifest: Manifest, state: Manifest) -> Iterator[str]:
    if state.get("backend") == "rocksdb":
        yield "the backend rocksdb needs a feature gate that is off by default"
    elif "storage" in state:
        yield "gcsFaultToleranceOptions.storage is for rocksdb alone"
    if not state.get("redisAddress") and state.get("backend") != "rocksdb":
        yield "gcsFaultToleranceOptions.redisAddress is missing"
    metadata = [manifest["metadata"]]
    metadata += [group.get("template", {}).get("metadata", {}) for _, _, group in groups(manifest)]
    for name in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if any(name in (each.get("annotations") or {}) for each in metadata):
            yield f"the annotation {name} and gcsFaultToleranceOptions exclude each other"


def _autoscaling(manifest: Manifest, cluster: Manifest) -> Iterator[str]:
    options = cluster.get("autoscalerOptions") or {}
    if options.get("version") != "v2":
        yield "autoscalerOptions.version has to be written out as v2"
    for place, node, group in groups(manifest):
        spec = group.get("template", {}).get("spec", {})
        if spec.get("restartPolicy") not in (None, "Never"):
            yield f"{place}: restartPolicy has to be Never under autoscaling"
        if node == "worker" and "replicas" in group:
            yield f"{place}: replicas under autoscaling fights with the autoscaler; leave it out"
        if node == "head" and spec.get("automountServiceAccountToken") is False:
            yield "head: the autoscaler needs the account's token"
    if manifest["kind"] == "RayJob" and _QUEUE in (manifest["metadata"].get("labels") or {}):
        yield "Kueue admits no autoscaling cluster without its gate for elastic jobs"


def _job(manifest: Manifest) -> Iterator[str]:
    spec = manifest["spec"]
    annotations = manifest["metadata"].get("annotations") or {}
    labels = manifest["metadata"].get("labels") or {}
    is_queued = _QUEUE in labels or "lockstep/queue-name" in annotations
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        yield "exactly one of rayClusterSpec and clusterSelector is needed"
    stays = not spec.get("shutdownAfterJobFinishes")
    if stays and spec.get("ttlSecondsAfterFinished", 0) > 0:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if stays and "suspend" in spec:
        yield "suspend needs shutdownAfterJobFinishes"
    if stays and is_queued:
        yield "Kueue needs shutdownAfterJobFinishes"
    if "deletionStrategy" in spec and not stays:
        yield "deletionStrategy and shutdownAfterJobFinishes exclude each other"
    yield from _deletion(spec)
    mode = spec.get("submissionMode", "K8sJobMode")
    if spec.get("backoffLimit", 0) > 0 and ("clusterSelector" in spec or mode == "InteractiveMode"):
        yield "backoffLimit makes new clusters: it excludes clusterSelector and InteractiveMode"
    if mode == "SidecarMode":
        yield "SidecarMode brings a container that a restricted namespace refuses"
    if mode == "K8sJobMode" and "submitterPodTemplate" not in spec:
        yield "without submitterPodTemplate the submitter is refused in a restricted namespace"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if not spec.get(name, 0) >= 1:
            yield f"{name} is missing: a run that hangs would hold its pods for ever"
    if len(spec.get("rayClusterSpec", {}).get("workerGroupSpecs", ())) > 17 and is_queued:
        yield "Kueue takes at most 17 groups of workers"
    if re.search(r"[;&|<>$`\"'\\\n]", spec.get("entrypoint", "").strip()):
        yield "the entrypoint is put unquoted into the submitter's script: plain words only"
    yield from _runtime_environment(spec.get("runtimeEnvYAML"))
    if "lockstep/template" in labels and not spec.get("suspend"):
        yield "a template that is not suspended would run"
    if "lockstep/template" in labels and _QUEUE in labels:
        yield "a template with a queue's label would itself be queued"


def _deletion(spec: Manifest) -> Iterator[str]:
    """Rules of what is deleted when; a run's cluster goes by `shutdownAfterJobFinishes` here."""
    rules = (spec.get("deletionStrategy") or {}).get("deletionRules") or []
    if rules and "ttlSecondsAfterFinished" in spec:
        yield "deletionRules and ttlSecondsAfterFinished exclude each other"
    seen: dict[tuple[str, str], int] = {}
    for rule in rules:
        condition = rule.get("condition") or {}
        status = str(condition.get("jobStatus") or condition.get("jobDeploymentStatus"))
        key = status, str(rule.get("policy"))
        if key in seen:
            yield f"deletionRules: two rules of {key[1]} for {status}"
        seen[key] = condition.get("ttlSeconds", 0)
    is_growing = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    if is_growing and any(policy == "DeleteWorkers" for _, policy in seen):
        yield "deletionRules: DeleteWorkers fights with the autoscaler"
    for status in {status for status, _ in seen}:
        order = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
        waits = [seen[status, policy] for policy in order if (status, policy) in seen]
        if waits != sorted(waits):
            yield f"deletionRules: for {status} workers go first, then the cluster, then the job"


def _runtime_environment(text: Any) -> Iterator[str]:
    if text is None:
        return
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield f"runtimeEnvYAML is no YAML: {error}"
        return
    extra = sorted(set(values or {}) - {"env_vars"})
    if extra:
        yield f"runtimeEnvYAML holds {', '.join(extra)}: what a run needs is in the image"


def _service(manifest: Manifest) -> Iterator[str]:
    spec = manifest["spec"]
    head = spec.get("rayClusterConfig", {}).get("headGroupSpec", {})
    if head.get("headService", {}).get("metadata", {}).get("name"):
        yield "headService.metadata.name must not be set"
    strategy = spec.get("upgradeStrategy") or {}
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        yield "an incremental upgrade needs a gateway and autoscaling, which are not here"
    if not spec.get("excludeHeadPodFromServeSvc"):
        yield "excludeHeadPodFromServeSvc is not set: the head would get requests"
    if "ray.io/initializing-timeout" in (manifest["metadata"].get("annotations") or {}):
        yield "ray.io/initializing-timeout fails a service for good"
