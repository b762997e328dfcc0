"""Names of metrics in alerts and dashboards: Ray exports them, or they are known from elsewhere."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import ray

from tests.deploy.checks.objects import Finding, Manifest, name_of, of_kind

# kube-state-metrics, the kubelet, and KubeRay's operator (its metrics reference, 1.4 and later).
ELSEWHERE = {
    "kube_cronjob_created",
    "kube_cronjob_status_last_successful_time",
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_used_bytes",
    "kubelet_volume_stats_capacity_bytes",
    "kuberay_job_deployment_status",
    "kuberay_service_condition_ready",
}
_NAMES = re.compile(r"\b(?:ray|kube|kubelet|kuberay|lockstep)_[a-z_]+[a-z]\b")


def metrics(objects: list[Manifest]) -> Iterator[Finding]:
    """Findings under the rule `metric`."""
    for rule in of_kind(objects, "PrometheusRule"):
        for group in rule["spec"]["groups"]:
            for each in group["rules"]:
                yield from _unknown(each["expr"], f"{name_of(rule)} {each.get('alert')}")
    for board in of_kind(objects, "ConfigMap"):
        if "grafana_dashboard" in (board["metadata"].get("labels") or {}):
            for text in board["data"].values():
                try:
                    panels = json.loads(text)["panels"]
                except (ValueError, KeyError) as error:
                    yield Finding("metric", name_of(board), f"no dashboard: {error}")
                    continue
                for panel in panels:
                    for target in panel["targets"]:
                        yield from _unknown(target["expr"], f"{name_of(board)} {panel['title']}")


def _unknown(expression: str, where: str) -> Iterator[Finding]:
    names = set(_NAMES.findall(expression))
    if not names:
        yield Finding("metric", where, "names no metric")
    for name in sorted(names - ELSEWHERE):
        plain = re.sub(r"_(bucket|count|sum)$", "", name)
        if not {name, plain, plain.removesuffix("_total")} & exported():
            yield Finding("metric", where, f"{name}: nobody exports it")


@functools.cache
def exported() -> frozenset[str]:
    """Metrics that Ray exports, as far as its own dashboards and its source tell."""
    folder = Path(ray.__file__).parent
    places = [
        *folder.glob("dashboard/modules/metrics/dashboards/*_panels.py"),
        *folder.glob("serve/_private/*.py"),
    ]
    found: set[str] = set()
    for path in places:
        text = path.read_text()
        found |= set(re.findall(r"\bray_[a-z_]+[a-z]\b", text))
        found |= {f"ray_{name}" for name in re.findall(r'"(serve_[a-z_]+[a-z])"', text)}
    return frozenset(found)
