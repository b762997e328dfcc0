"""Every overlay as a cluster would take it, on every version of Kubernetes from 1.30."""

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.deploy.checks.objects import of_kind, pods
from tests.deploy.checks.references import DEPLOY, provided
from tests.deploy.checks.schemas import shapes, versions
from tests.deploy.checks.security import security
from tests.deploy.checks.suite import check
from tests.deploy.conftest import OVERLAYS

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_the_overlays_are_those_promised():
    assert set(OVERLAYS) == {"dev", "staging", "prod", "airgapped"}
    assert versions()[0] == "1.30"
    assert len(versions()) >= 5


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_has_nothing_wrong(overlay, renders, of_cluster):
    found = check(renders(overlay), of_cluster, versions())
    assert [str(finding) for finding in found] == []


def test_what_administrators_apply_has_nothing_wrong(renders, of_cluster):
    found = check(renders("cluster-admin"), of_cluster, versions(), is_whole=False)
    assert [str(finding) for finding in found] == []


@pytest.mark.parametrize("name", [*OVERLAYS, "cluster-admin"])
def test_render_is_the_golden_one(name, renders):
    """A change of a component shows in all overlays that it touches.

    LOCKSTEP_UPDATE_GOLDEN=1 writes them anew, to be read in the diff.
    """
    path, objects = GOLDEN / f"{name}.yaml", renders(name)
    if os.environ.get("LOCKSTEP_UPDATE_GOLDEN"):
        path.write_text(yaml.safe_dump_all(objects, sort_keys=False, width=100))
    assert list(yaml.safe_load_all(path.read_text())) == objects


def test_production_holds_what_a_user_expects(renders):
    kinds = {each["kind"] for each in renders("prod")}
    assert kinds >= {
        *("RayService", "RayJob", "CronJob", "NetworkPolicy", "PodDisruptionBudget", "Role"),
        *("RoleBinding", "ServiceAccount", "PersistentVolumeClaim", "PodMonitor", "LocalQueue"),
        *("PrometheusRule", "Ingress", "StatefulSet", "Service", "ConfigMap", "Namespace"),
    }
    assert "RayCluster" in {each["kind"] for each in renders("dev")}
    service = of_kind(renders("prod"), "RayService")[0]
    assert service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] == 2
    assert "gcsFaultToleranceOptions" in service["spec"]["rayClusterConfig"]


def test_airgapped_pulls_from_its_own_registry_and_sends_nothing_out(renders):
    objects = renders("airgapped")
    images = {each["image"] for pod in pods(objects) for each in pod.containers}
    assert images
    assert all(image.startswith("registry.internal/") for image in images)
    open_to_all = [
        policy["metadata"]["name"]
        for policy in of_kind(objects, "NetworkPolicy")
        for rule in policy["spec"].get("egress") or ()
        for peer in rule.get("to") or ()
        if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
    ]
    assert open_to_all == []


def test_a_run_that_is_stopped_has_the_time_that_it_takes(renders):
    """Ray's own bound is 30 s: then the node goes, whatever its jobs do."""
    objects = renders("prod")
    settings = next(
        each["data"]
        for each in of_kind(objects, "ConfigMap")
        if each["metadata"]["name"] == "lockstep-settings"
    )
    stop = float(settings["RAY_JOB_STOP_WAIT_TIME_S"])
    drain = float(settings["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    graces = [
        pod.spec["terminationGracePeriodSeconds"]
        for pod in pods(of_kind(objects, "RayJob"))
        if pod.node in ("head", "worker")
    ]
    assert graces
    assert stop < drain < min(graces)


def test_who_brings_a_dump_home_is_let_in(renders):
    reader = yaml.safe_load((DEPLOY / "components/postgres/reader-of-backups.yaml").read_text())
    assert [str(finding) for finding in (*security([reader]), *shapes([reader], versions()))] == []
    objects = renders("dev")
    claims = {each["metadata"]["name"] for each in of_kind(objects, "PersistentVolumeClaim")}
    assert reader["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] in claims
    images = {each["image"] for pod in pods(objects) for each in pod.containers}
    assert reader["spec"]["containers"][0]["image"] in images


def test_every_provided_secret_is_used_somewhere(renders):
    text = "".join(str(renders(name)) for name in OVERLAYS)
    assert [name for name in provided()["secrets"] if f"'{name}'" not in text] == []


def test_a_cluster_that_grows_says_how_far(renders):
    """What LOCKSTEP_GROWS_TO promises is what the operator makes."""
    (workbench,) = of_kind(renders("dev"), "RayCluster")
    (group,) = workbench["spec"]["workerGroupSpecs"]
    cpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    promised = [{"nodes": group["maxReplicas"], "CPU": int(cpus)}]
    for kind in (workbench["spec"]["headGroupSpec"], group):
        (container,) = kind["template"]["spec"]["containers"]
        (said,) = (e["value"] for e in container["env"] if e["name"] == "LOCKSTEP_GROWS_TO")
        assert json.loads(said) == promised


def test_heads_of_runs_register_and_workers_know_no_database(renders):
    objects = renders("dev")
    (run,) = (o for o in of_kind(objects, "RayJob") if o["metadata"]["name"] == "training")
    clusters = [run["spec"]["rayClusterSpec"], of_kind(objects, "RayCluster")[0]["spec"]]
    for cluster in clusters:
        named = {}
        for role, kind in (("head", cluster["headGroupSpec"]), *worker_groups(cluster)):
            container = kind["template"]["spec"]["containers"][0]
            named[role] = {each["name"] for each in container.get("env", [])}
        assert "LOCKSTEP_DATABASE" in named["head"]
        assert "LOCKSTEP_DATABASE" not in named["workers"]


def worker_groups(cluster):
    return [(group["groupName"], group) for group in cluster["workerGroupSpecs"]]
