"""Words that schemas take as any text: enumerations, images, amounts."""

import re
from collections.abc import Iterator

from tests.deploy.checks.objects import Finding, Manifest, Pod, name_of, pods, walk

PULL = ("Always", "IfNotPresent", "Never")
ALLOWED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("concurrencyPolicy",): ("Allow", "Forbid", "Replace"),
    ("restartPolicy",): ("Always", "OnFailure", "Never"),
    ("imagePullPolicy",): PULL,
    ("accessModes",): ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"),
    ("policyTypes",): ("Ingress", "Egress"),
    ("ports", "protocol"): ("TCP", "UDP", "SCTP"),
    ("pathType",): ("Exact", "Prefix", "ImplementationSpecific"),
    ("tolerations", "operator"): ("Exists", "Equal"),
    ("tolerations", "effect"): ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    ("matchExpressions", "operator"): ("In", "NotIn", "Exists", "DoesNotExist"),
    ("whenUnsatisfiable",): ("DoNotSchedule", "ScheduleAnyway"),
    ("seccompProfile", "type"): ("RuntimeDefault", "Localhost", "Unconfined"),
    ("fsGroupChangePolicy",): ("OnRootMismatch", "Always"),
    ("unhealthyPodEvictionPolicy",): ("IfHealthyBudget", "AlwaysAllow"),
    ("preemptionPolicy",): ("Never", "PreemptLowerPriority"),
    ("strategy", "type"): ("Recreate", "RollingUpdate"),
    ("upgradeStrategy", "type"): ("NewCluster", "None", "NewClusterWithIncrementalUpgrade"),
    ("submissionMode",): ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    ("upscalingMode",): ("Default", "Aggressive", "Conservative"),
    ("podFailurePolicy", "rules", "action"): ("Ignore", "FailJob", "FailIndex", "Count"),
    ("onExitCodes", "operator"): ("In", "NotIn"),
    ("queueingStrategy",): ("BestEffortFIFO", "StrictFIFO"),
    ("withinClusterQueue",): ("Never", "LowerPriority", "LowerOrNewerEqualPriority"),
    ("emptyDir", "medium"): ("", "Memory"),
}
ZONE = re.compile(r"Etc/UTC|[A-Z]\w+/[A-Z]\w+")


def values(objects: list[Manifest]) -> Iterator[Finding]:
    """Findings under the rules `enum` and `values`."""
    for manifest in objects:
        for path, value in walk(manifest):
            if not isinstance(value, str):
                continue
            for ending, allowed in ALLOWED.items():
                if path[-len(ending) :] == ending and value not in allowed:
                    where = f"{name_of(manifest)} {'.'.join(path)}"
                    yield Finding("enum", where, f"{value!r} is none of {', '.join(allowed)}")
        if manifest["kind"] == "CronJob":
            for text in _clock(manifest["spec"]):
                yield Finding("values", name_of(manifest), text)
    for pod in pods(objects):
        for text in [*_images(pod), *_resources(pod)]:
            yield Finding("values", pod.where, text)


def _clock(spec: Manifest) -> Iterator[str]:
    fields = spec["schedule"].split()
    if len(fields) != 5 or "TZ=" in spec["schedule"]:
        yield f"the schedule {spec['schedule']!r} has not five fields"
    if not ZONE.fullmatch(spec.get("timeZone", "")):
        yield f"timeZone {spec.get('timeZone')!r} is missing or no zone"
    if spec.get("concurrencyPolicy") != "Forbid":
        yield "concurrencyPolicy has to be Forbid: one run at a time"
    for name in ("startingDeadlineSeconds", "failedJobsHistoryLimit", "successfulJobsHistoryLimit"):
        if name not in spec:
            yield f"{name} is missing"
    if "activeDeadlineSeconds" not in spec["jobTemplate"]["spec"]:
        yield "activeDeadlineSeconds is missing"


def _images(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        image = container.get("image", "")
        _, at, digest = image.partition("@")
        tag = image.rpartition("/")[2].partition(":")[2]
        if at and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            yield f"{container['name']}: {image} has no digest after the @"
        elif not at and tag in ("", "latest"):
            yield f"{container['name']}: the image {image!r} is not pinned"


def _resources(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        resources = container.get("resources") or {}
        requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
        for name in ("cpu", "memory"):
            if name not in requests or name not in limits:
                yield f"{container['name']}: {name} has no request or no limit"
        if requests.get("memory") != limits.get("memory"):
            yield f"{container['name']}: memory requested and its limit differ: it may be killed"
    if pod.node == "head" and (pod.group.get("rayStartParams") or {}).get("num-cpus") != "0":
        yield "head: num-cpus is not 0: training could land beside Ray's own processes"
    if pod.node == "worker" and pod.spec.get("terminationGracePeriodSeconds", 30) < 60:
        yield "terminationGracePeriodSeconds leaves no time to hand over"
