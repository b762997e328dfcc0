"""The manifests of a run: from a template and a job, checked like an overlay."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import JobError, UserError
from configs.load import load_job
from lockstep.commands.manifests import _packed
from lockstep.kubernetes_result import reader_pod
from lockstep.kustomize import overlay_folder, renderer, write
from lockstep.manifests import (
    DIGEST,
    RunOptions,
    check_ray,
    check_run_id,
    default_run_id,
    new_run_id,
    run_manifests,
    training_template,
)
from lockstep.submit import MANIFEST, SubmitOptions
from tests.deploy.checks.objects import Manifest, of_kind, pods
from tests.deploy.checks.schemas import shapes, versions
from tests.deploy.checks.security import security
from tests.deploy.checks.start_lines import start_line, start_parameters
from tests.deploy.checks.suite import check
from tests.deploy.conftest import OVERLAYS
from tests.support.jobs import make_job

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def job(**changes: Any) -> Any:
    return load_job(make_job(Path("data"), Path("runs"), **changes))


JOB = job()


def manifests(template: Manifest, run_id: str | None = None, **changes: Any) -> list[Manifest]:
    options, sending = changes.pop("options", RunOptions()), changes.pop("sending", None)
    loaded = job(**changes)
    kept = SubmitOptions(run_id or default_run_id(loaded), is_reproducible=True)
    with _packed(loaded, template, sending or kept) as (packed, _):
        return run_manifests(template, packed, options)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_run_has_nothing_wrong_in_any_overlay(overlay, renders, of_cluster):
    objects = renders(overlay)
    gpus = int(overlay == "airgapped")
    run = manifests(training_template(objects), cluster__gpus_per_worker=gpus)
    found = check([*objects, *run], of_cluster, versions()[-1:])
    assert [str(finding) for finding in found] == []


def test_the_run_is_the_jobs_and_everything_else_is_the_templates(renders):
    template = training_template(renders("prod"))
    _, ray_job, budget = manifests(
        template, "my-run", cluster__workers=4, cluster__cpus_per_worker=3
    )
    group = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)
    container = group["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "3", "memory": "4Gi"}
    assert container["resources"]["requests"]["cpu"] == "3"
    of_template = template["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert container["image"] == of_template["containers"][0]["image"]
    assert group["template"]["spec"]["tolerations"] == of_template["tolerations"]
    labels = ray_job["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "lockstep"
    assert "lockstep/template" not in labels
    assert "suspend" not in ray_job["spec"]
    assert budget["spec"]["selector"]["matchLabels"]["lockstep/run"] == "my-run"
    heads = [pod for pod in pods([ray_job]) if pod.node == "head"]
    assert heads[0].labels["lockstep/run"] == "my-run"


def test_standbys_are_pods_too(renders):
    template = training_template(renders("dev"))
    _, ray_job, _ = manifests(template, options=RunOptions(standbys=1), cluster__workers=2)
    assert ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 3


def test_the_same_job_has_the_same_name_and_the_same_manifests(renders):
    """So that an attempt, or a second submission, goes on with the run's checkpoints."""
    template = training_template(renders("prod"))
    assert manifests(template) == manifests(template)
    other = manifests(template, train__seed=4)
    assert other[1]["metadata"]["name"] != manifests(template)[1]["metadata"]["name"]


def test_who_sends_a_job_and_when_does_not_make_it_another(renders, monkeypatch):
    template = training_template(renders("dev"))
    kept, other_machine = [], {"python": "3.12", "ray": "2.59.0"}
    for versions_here in (None, other_machine):
        if versions_here:
            monkeypatch.setattr("lockstep.submit.versions", lambda: other_machine)
        kept.append((manifests(template), manifests(template, sending=SubmitOptions("r"))))
    assert kept[0][0] == kept[1][0]  # rendered: the same bytes
    sent = [json.loads(one[0]["data"][MANIFEST]) for _, one in kept]
    assert sent[0]["versions"] != sent[1]["versions"] == other_machine
    assert sent[0]["submission"] != sent[1]["submission"]
    digests = {one[1]["metadata"]["annotations"][DIGEST] for _, one in kept}
    assert len(digests) == 1
    changed = manifests(template, sending=SubmitOptions("r"), train__seed=4)
    assert changed[1]["metadata"]["annotations"][DIGEST] not in digests


def test_a_ray_that_differs_from_the_templates_is_told(renders):
    template = training_template(renders("dev"))
    there = template["spec"]["rayClusterSpec"]["rayVersion"]
    assert check_ray(template, there) == []
    with pytest.raises(UserError, match=f"ray 2.1.0 here, {there} in the cluster's template"):
        check_ray(template, "2.1.0")
    assert len(check_ray(template, "2.1.0", is_any_version=True)) == 1


def test_a_run_is_rendered_as_the_golden_one(renders, monkeypatch, tmp_path):
    """Whatever changes what users hand to `kubectl apply` shows in a diff.

    LOCKSTEP_UPDATE_GOLDEN=1 writes it anew.
    """
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "sizes.py").write_text("UNITS = 8\n")
    (tmp_path / "model.py").write_text("from parts import sizes\n")
    monkeypatch.chdir(tmp_path)
    model = {"builder": "model.py:build"}
    run = manifests(training_template(renders("prod")), "golden-run", model=model)
    path = GOLDEN / "run.yaml"
    if os.environ.get("LOCKSTEP_UPDATE_GOLDEN"):
        path.write_text(yaml.safe_dump_all(run, sort_keys=False, width=100))
    assert list(yaml.safe_load_all(path.read_text())) == run


def test_checkpoints_go_where_the_template_wants_them_unless_the_job_says(renders):
    template = training_template(renders("prod"))
    config_map = manifests(template)[0]
    assert yaml.safe_load(config_map["data"]["job.yaml"])["checkpoint"]["uri"] == (
        "s3://lockstep-checkpoints"
    )
    config_map = manifests(template, checkpoint__uri="s3://mine")[0]
    assert yaml.safe_load(config_map["data"]["job.yaml"])["checkpoint"]["uri"] == "s3://mine"


def test_paths_are_those_of_the_pods(renders):
    config_map = manifests(training_template(renders("dev")))[0]
    there = yaml.safe_load(config_map["data"]["job.yaml"])
    assert there["data"]["train"] == "/var/lib/lockstep/data/train"
    assert there["runs_dir"] == "/var/lib/lockstep/runs"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data__train": "/home/ann/train"}, "data.train=/home/ann/train, which pods do not see"),
        ({"data__test": "../test"}, "data.test"),
        ({"runs_dir": "/tmp/runs"}, "runs_dir"),
        ({"cluster__gpus_per_worker": 1}, "component gpu"),
        ({"run_id": "Flights_1"}, "--run-id received 'Flights_1'"),
        ({"run_id": "f" * 48}, "48 characters"),
        ({"options": RunOptions(worker_memory="8GB")}, "--worker-memory received '8GB'"),
        ({"options": RunOptions(priority_class="urgent")}, "component kueue"),
    ],
)
def test_what_does_not_fit_the_cluster_is_told(changes, text, renders):
    with pytest.raises((JobError, UserError)) as caught:
        manifests(training_template(renders("dev")), **changes)
    assert text in str(caught.value)


@given(name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z"))
def test_any_jobs_name_gives_a_name_that_kubernetes_takes(name):
    loaded = JOB.model_copy(update={"name": name})
    check_run_id(default_run_id(loaded))
    check_run_id(new_run_id(loaded, 1_800_000_000.0))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_reader_of_a_result_is_let_in_where_runs_are(overlay, renders):
    template = training_template(renders(overlay))
    pod = reader_pod(template, "r-reader", "/var/lib/lockstep/runs/a/r", wants_files=True)
    found = [*security([pod]), *shapes([pod], versions()[-1:])]
    assert [str(finding) for finding in found] == []
    assert pod["spec"]["containers"][0]["volumeMounts"][0]["readOnly"] is True


def test_written_manifests_read_back(renders):
    run = manifests(training_template(renders("prod")))
    out = io.StringIO()
    write(run, out)
    assert list(yaml.safe_load_all(out.getvalue())) == run
    assert "job.yaml: |" in out.getvalue()


def test_an_overlay_that_is_not_there_is_told():
    with pytest.raises(UserError, match="Did you mean 'prod'"):
        overlay_folder("prd")
    with pytest.raises(UserError, match="kubectl or kustomize"):
        renderer({"PATH": ""})
    assert renderer({"LOCKSTEP_KUSTOMIZE": "/x/kustomize"}) == ["/x/kustomize", "build"]


def test_the_lines_that_start_ray_are_the_operators(renders):
    ray_job = of_kind(renders("prod"), "RayJob")[0]
    cluster = ray_job["spec"]["rayClusterSpec"]
    head = start_parameters(cluster["headGroupSpec"], "head", "")
    assert " ".join(start_line(head, "head")) == (
        "ray start --head --block --dashboard-agent-listen-port=52365 --dashboard-host=0.0.0.0 "
        "--memory=8589934592 --metrics-export-port=8080 --num-cpus=0"
    )
    worker = start_parameters(cluster["workerGroupSpecs"][0], "worker", "head:6379")
    assert " ".join(start_line(worker, "worker")) == (
        "ray start --address=head:6379 --block --dashboard-agent-listen-port=52365 "
        "--memory=4294967296 --metrics-export-port=8080 --num-cpus=1"
    )
