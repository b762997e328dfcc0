"""Runs on Kubernetes against an API server of a few routes: made once, followed, stopped."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import RunUnknown
from cluster.room import Shape, Worker
from cluster.submit import Packed
from configs.errors import EnvironmentFailure, UserError
from lockstep.kubernetes_client import KubernetesClient, KubernetesError, Unreachable
from lockstep.kubernetes_jobs import KubernetesJobs, RunFailed, RunStopped
from lockstep.manifests import RUN_LABEL, RunOptions
from lockstep.submit import MANIFEST
from tests.deploy.checks.objects import of_kind
from tests.deploy.checks.references import DEPLOY
from tests.support.jobs import make_job
from tests.support.kube_api import FakeApi

RUN = "flights-1"


@pytest.fixture
def api(tmp_path, monkeypatch, renders):
    with FakeApi(tmp_path) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        for template in of_kind(renders("prod"), "RayJob"):
            api.add(template)
        yield api


class Cluster:
    """Jobs with a clock of their own; each wait lets the cluster go one step on."""

    def __init__(self, api: FakeApi) -> None:
        self.api, self.now, self.steps = api, 0.0, []
        client = KubernetesClient(answer_s=(5.0, 5.0))
        self.jobs = KubernetesJobs(client, sleep=self.sleep, clock=lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.api.collect()
        if self.steps:
            self.steps.pop(0)()

    def state(self, state: str, run: str = RUN, **status: Any) -> None:
        self.api.objects[("RayJob", run)]["status"] = {"jobDeploymentStatus": state, **status}

    def pod(self, name: str, lines: list[str | None], run: str = RUN) -> None:
        labels = {"job-name": run}
        self.api.add(
            {
                "kind": "Pod",
                "metadata": {"name": name, "labels": labels},
                "status": {"phase": "Running"},
            }
        )
        self.api.logs[name] = lines


@pytest.fixture
def cluster(api) -> Cluster:
    return Cluster(api)


def packed(
    folder: Path, run_id: str = RUN, text: str = "name: flights\n", **changes: Any
) -> Packed:
    sent = folder / f"sent-{run_id}"
    sent.mkdir(exist_ok=True)
    (sent / "job.yaml").write_text(text)
    fields: dict[str, Any] = {
        "entrypoint": "exec python -P -m lockstep.remote",
        "run_folder": f"/var/lib/lockstep/runs/flights/{run_id}",
        "shape": Shape(3, Worker(2.0)),
        **changes,
    }
    return Packed(run_id, "flights", sent, **fields)


def stamped(second: int, text: str) -> str:
    return f"2026-01-01T00:01:{second:02}.000000001Z {text}"


def test_a_run_is_made_of_three_objects_that_go_together(api, cluster, tmp_path):
    assert cluster.jobs.submit(packed(tmp_path), RunOptions(user="ann")) == RUN
    ray_job = api.objects[("RayJob", RUN)]
    for kind in ("ConfigMap", "PodDisruptionBudget"):
        owner = api.objects[(kind, RUN)]["metadata"]["ownerReferences"][0]
        assert (owner["kind"], owner["uid"]) == ("RayJob", ray_job["metadata"]["uid"])
    assert "suspend" not in ray_job["spec"]
    view = cluster.jobs.status(RUN)
    assert (view.status, view.name, view.user) == ("starting", "flights", "ann")
    assert [one.run_id for one in cluster.jobs.list()] == [RUN]  # templates are no runs


def test_submitted_again_it_is_the_same_run(api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    before = copy.deepcopy(api.objects)
    cluster.jobs.submit(packed(tmp_path))
    assert api.objects == before


@pytest.mark.parametrize("missing", ["ConfigMap", "PodDisruptionBudget"])
def test_what_a_cut_off_submission_left_out_is_made(missing, api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    del api.objects[(missing, RUN)]
    cluster.jobs.submit(packed(tmp_path))
    assert (missing, RUN) in api.objects


def test_another_job_does_not_get_the_name_of_a_run(cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    with pytest.raises(UserError, match="is another job's"):
        cluster.jobs.submit(packed(tmp_path, text="name: other\n"))


ENDED = [
    ("Failed", {}),
    ("ValidationFailed", {}),
    ("Complete", {"jobStatus": "STOPPED"}),
]


@pytest.mark.parametrize(("state", "status"), ENDED)
def test_a_run_that_failed_or_was_stopped_is_made_anew(state, status, api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    cluster.state(state, **status)
    cluster.jobs.submit(packed(tmp_path))
    assert api.objects[("RayJob", RUN)].get("status") is None
    api.collect()  # what is left of the former attempt is nobody's any more
    owners = {
        kind: api.objects[(kind, RUN)]["metadata"]["ownerReferences"][0]["uid"]
        for kind in ("ConfigMap", "PodDisruptionBudget")
    }
    assert set(owners.values()) == {api.objects[("RayJob", RUN)]["metadata"]["uid"]}


def test_a_done_run_is_left_as_it_is(api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    first = api.objects[("RayJob", RUN)]["metadata"]["uid"]
    cluster.state("Complete", jobStatus="SUCCEEDED")
    cluster.jobs.submit(packed(tmp_path))
    assert api.objects[("RayJob", RUN)]["metadata"]["uid"] == first


def test_a_run_that_is_being_deleted_is_no_run_to_find(api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    cluster.state("Running")
    first = api.objects[("RayJob", RUN)]["metadata"]["uid"]
    api.held = {"RayJob"}
    KubernetesClient().delete("RayJob", RUN)
    assert cluster.jobs.status(RUN).status == "stopping"
    cluster.pod("head", [])
    api.objects[("Pod", "head")]["metadata"]["labels"] = {RUN_LABEL: RUN}
    at: list[str] = []

    def note(what: str) -> None:
        at.append(f"{what} {api.objects.get(('RayJob', RUN), {}).get('metadata', {}).get('uid')}")

    cluster.steps = [
        lambda: None,
        lambda: (note("held"), api.release()),
        lambda: (note("gone"), api.remove("Pod", "head")),
    ]
    cluster.jobs.submit(packed(tmp_path))
    assert at == [f"held {first}", "gone None"]  # the old head wrote until then
    assert api.objects[("RayJob", RUN)]["metadata"]["uid"] != first


def test_what_does_not_go_is_told(api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    cluster.state("Failed")
    api.held = {"RayJob"}
    with pytest.raises(EnvironmentFailure, match="has not gone within 300 s"):
        cluster.jobs.submit(packed(tmp_path))


def test_what_was_applied_by_hand_is_kept_with_its_run_and_no_other(api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    for kind in ("RayJob", "ConfigMap"):
        api.objects[(kind, RUN)]["metadata"].pop("ownerReferences", None)
    by_hand = api.objects[("ConfigMap", RUN)]["metadata"]["uid"]
    cluster.jobs.submit(packed(tmp_path))
    assert api.objects[("ConfigMap", RUN)]["metadata"]["uid"] == by_hand
    del api.objects[("RayJob", RUN)]
    cluster.jobs.submit(packed(tmp_path, text="name: other\n"))
    assert api.objects[("ConfigMap", RUN)]["data"] == {"job.yaml": "name: other\n"}


@pytest.mark.parametrize("state", ["", "Failed"])
def test_many_clients_at_the_same_time_make_one_run(state, api, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def submit(_: int) -> str:
        return Cluster(api).jobs.submit(run)

    run = packed(tmp_path)
    if state:
        submit(0)
        api.objects[("RayJob", RUN)]["status"] = {"jobDeploymentStatus": state}
    api.requests.clear()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(submit, range(8))) == {RUN}
    api.collect()
    uid = api.objects[("RayJob", RUN)]["metadata"]["uid"]
    assert api.objects[("RayJob", RUN)].get("status") is None
    for kind in ("ConfigMap", "PodDisruptionBudget"):
        assert api.objects[(kind, RUN)]["metadata"]["ownerReferences"][0]["uid"] == uid
    assert api.made.count(("RayJob", RUN)) == (2 if state else 1)


@pytest.mark.parametrize(
    ("state", "job_status", "shown"),
    [
        ("", "", "starting"),
        ("Initializing", "", "starting"),
        ("Running", "RUNNING", "running"),
        ("Suspended", "", "waiting"),
        ("Complete", "SUCCEEDED", "done"),
        ("Complete", "STOPPED", "stopped"),
        ("Failed", "FAILED", "failed"),
        ("ValidationFailed", "", "failed"),
    ],
)
def test_the_operators_words_become_ours(state, job_status, shown, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    cluster.state(state, jobStatus=job_status)
    assert cluster.jobs.status(RUN).status == shown


def workload(api: FakeApi, run: str, name: str, priority: int, message: str) -> None:
    owner = {"kind": "RayJob", "name": run, "uid": api.objects[("RayJob", run)]["metadata"]["uid"]}
    condition = {"type": "QuotaReserved", "status": "False", "message": message}
    api.add(
        {
            "kind": "Workload",
            "metadata": {"name": name, "ownerReferences": [owner]},
            "spec": {"priority": priority},
            "status": {"conditions": [condition]},
        }
    )


def test_a_queued_run_waits_and_the_queue_is_kueues(api, cluster, tmp_path):
    for number in (1, 2, 3):
        run = f"flights-{number}"
        cluster.jobs.submit(packed(tmp_path, run), RunOptions(user="ann"))
        api.objects[("RayJob", run)]["spec"]["suspend"] = True  # Kueue's doing
    assert cluster.jobs.status(RUN).status == "waiting"
    workload(api, "flights-1", "w1", 10, "insufficient unused quota for cpu")
    workload(api, "flights-3", "w3", 100, "")
    shown = [
        (one["position"], one["run_id"], one["priority"], one["reason"])
        for one in cluster.jobs.queue()
    ]
    assert shown == [
        (1, "flights-3", 100, "waits for Kueue to admit it"),
        (2, "flights-1", 10, "insufficient unused quota for cpu"),
        (None, "flights-2", 0, "Kueue has not taken it up"),
    ]
    listed = command("jobs", "queue", "--address", "kubernetes")
    assert "insufficient unused quota" in listed.output


def test_logs_are_followed_over_attempts_outages_and_cut_lines(api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    cluster.steps = [
        lambda: (
            cluster.state("Running"),
            cluster.pod("a", [stamped(1, "one"), stamped(2, "two"), None]),
        ),
        lambda: api.logs["a"].insert(2, stamped(3, "three")),
        lambda: api.failures.extend([503, 500]),
        lambda: None,
        lambda: None,
        lambda: cluster.pod("b", [stamped(5, "again"), None]),
        lambda: cluster.state("Complete", jobStatus="SUCCEEDED"),
    ]
    pieces = list(cluster.jobs.logs(RUN, follow=True))
    assert pieces == ["one\n", "two\n", "three\n", "again\n"]


def test_an_outage_without_end_is_told(api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    api.failures.extend([503] * 1000)
    with pytest.raises(Unreachable, match="503"):
        list(cluster.jobs.logs(RUN, follow=True))
    assert 600 <= cluster.now < 700


def test_the_end_of_a_followed_run_is_its_result(cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    cluster.pod("a", [stamped(1, "loss 1.0"), None])
    cluster.state("Failed", reason="AppFailed", message="exit code 3", failed=2)
    shown: list[str] = []
    with pytest.raises(RunFailed, match="attempt 3: AppFailed exit code 3"):
        cluster.jobs.follow(RUN, shown.append)
    assert shown == ["loss 1.0\n"]


def test_a_stop_waits_until_all_has_gone_and_is_remembered(api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path), RunOptions(user="ann"))
    cluster.state("Running")
    api.held = {"RayJob"}
    cluster.pod("head", [])
    api.objects[("Pod", "head")]["metadata"]["labels"] = {RUN_LABEL: RUN}
    cluster.steps = [
        lambda: None,
        api.release,
        lambda: None,
        lambda: api.objects[("Pod", "head")]["status"].update(phase="Succeeded"),
    ]
    view = cluster.jobs.stop(RUN)
    assert cluster.steps == []
    assert (view.status, view.user, view.name) == ("stopped", "ann", "flights")
    assert ("RayJob", RUN) not in api.objects
    assert cluster.jobs.stop(RUN) == cluster.jobs.status(RUN) == view
    assert cluster.jobs.list() == [view]
    cluster.jobs.submit(packed(tmp_path))
    assert [one.status for one in cluster.jobs.list()] == ["starting"]
    del api.objects[("RayJob", RUN)]
    with pytest.raises(RunUnknown):  # the record of the stop has gone with the new submission
        cluster.jobs.status(RUN)


@pytest.mark.parametrize(
    ("state", "status", "shown"),
    [
        ("Complete", "SUCCEEDED", "done"),
        ("Complete", "STOPPED", "stopped"),
        ("Failed", "", "failed"),
    ],
)
def test_a_stop_leaves_a_run_that_has_ended(state, status, shown, api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    cluster.state(state, jobStatus=status)
    assert cluster.jobs.stop(RUN).status == shown
    assert ("RayJob", RUN) in api.objects


def test_pods_that_do_not_go_are_told(api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    cluster.pod("head", [])
    api.objects[("Pod", "head")]["metadata"]["labels"] = {RUN_LABEL: RUN}
    with pytest.raises(EnvironmentFailure, match="get rayjobs,pods -l lockstep/run=flights-1"):
        cluster.jobs.stop(RUN)


def test_who_follows_a_run_that_is_stopped_is_told_so(api, cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    cluster.state("Running")
    cluster.steps = [lambda: Cluster(api).jobs.stop(RUN)]
    with pytest.raises(RunStopped) as caught:
        cluster.jobs.follow(RUN, print)
    assert caught.value.exit_status == 130


def test_an_unknown_run_is_told(cluster, tmp_path):
    cluster.jobs.submit(packed(tmp_path))
    with pytest.raises(RunUnknown, match="Did you mean 'flights-1'"):
        cluster.jobs.status("flight-1")
    with pytest.raises(RunUnknown):
        cluster.jobs.stop("flight-1")


def test_without_a_template_or_rights_the_remedy_is_said(api, cluster, tmp_path):
    api.failures.append(403)
    with pytest.raises(KubernetesError, match="Bind the role lockstep-submitter"):
        cluster.jobs.list()
    del api.objects[("RayJob", "training")]
    with pytest.raises(UserError, match="Apply an overlay of deploy/ first"):
        cluster.jobs.submit(packed(tmp_path))


def test_credentials_that_are_not_there_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    with pytest.raises(KubernetesError, match="KUBECONFIG"):
        KubernetesClient()


def test_no_token_in_what_is_said(api, cluster):
    api.failures.append(500)
    with pytest.raises(Unreachable) as caught:
        cluster.jobs.list()
    assert "for-tests-only" not in str(caught.value)


def test_a_launch_makes_a_copy_of_the_template_and_its_budget(api, cluster):
    run_id = cluster.jobs.launch("retraining")
    ray_job = api.objects[("RayJob", run_id)]
    template = api.objects[("RayJob", "retraining")]
    assert ray_job["spec"]["entrypoint"] == template["spec"]["entrypoint"]
    assert ("PodDisruptionBudget", run_id) in api.objects
    assert ray_job["metadata"]["labels"][RUN_LABEL] == run_id


def test_an_exclusive_launch_takes_the_run_that_is_under_way(api, cluster):
    first = cluster.jobs.launch("retraining", is_exclusive=True)
    cluster.state("Running", run=first)
    assert cluster.jobs.launch("retraining", is_exclusive=True) == first
    cluster.state("Complete", run=first, jobStatus="SUCCEEDED")
    api.objects[("RayJob", "before")] = api.objects.pop(("RayJob", first))
    api.objects[("RayJob", "before")]["metadata"]["name"] = "before"
    assert cluster.jobs.launch("retraining", is_exclusive=True) != "before"


def test_a_clock_leaves_no_heap_of_ended_runs(api, cluster):
    template = api.objects[("RayJob", "retraining")]
    for number in range(15):
        old = copy.deepcopy(template)
        old["metadata"] = {
            "name": f"old-{number:02}",
            "labels": {"lockstep/made-from": "retraining", RUN_LABEL: f"old-{number:02}"},
            "creationTimestamp": f"2026-01-02T00:00:{number:02}Z",
        }
        state = "Running" if number == 0 else "Complete"
        api.add(old | {"status": {"jobDeploymentStatus": state, "jobStatus": "SUCCEEDED"}})
    cluster.jobs.launch("retraining")
    left = sorted(name for kind, name in api.objects if kind == "RayJob" and name.startswith("old"))
    assert left == ["old-00", *(f"old-{number:02}" for number in range(5, 15))]


def reader_output(files: dict[str, bytes], summary: Any = None) -> list[str | None]:
    import base64
    import hashlib

    lines = [{"summary": summary}]
    for name, content in files.items():
        lines.append({"file": name, "part": base64.b64encode(content).decode()})
        lines.append({"file": name, "sha256": hashlib.sha256(content).hexdigest()})
    lines.append({"end": len(files), "total": sum(map(len, files.values()))})
    return [*(stamped(1, json.dumps(line)) for line in lines), None]


def with_reader(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, lines: list[str | None]) -> None:
    add = cluster.api.add

    def started(manifest: dict[str, Any]) -> dict[str, Any]:
        if manifest["kind"] == "Pod":
            manifest["status"] = {"phase": "Running"}
            cluster.api.logs[manifest["metadata"]["name"]] = lines
        return add(manifest)

    monkeypatch.setattr(cluster.api, "add", started)


def test_a_result_is_brought_by_a_reader_that_goes_afterwards(cluster, tmp_path, monkeypatch):
    cluster.jobs.submit(packed(tmp_path))
    files = {"artifact/model.keras": b"\x00weights", "summary.json": b"{}"}
    with_reader(cluster, monkeypatch, reader_output(files, {"status": "done"}))
    answer = cluster.jobs.result(RUN, tmp_path / "got")
    assert answer["summary"] == {"status": "done"}
    assert (tmp_path / "got/artifact/model.keras").read_bytes() == b"\x00weights"
    assert not [key for key in cluster.api.objects if key[0] == "Pod"]


def test_a_reader_that_is_cut_off_leaves_nothing(cluster, tmp_path, monkeypatch):
    cluster.jobs.submit(packed(tmp_path))
    lines = reader_output({"artifact/model.keras": b"weights"}, {"status": "done"})
    with_reader(cluster, monkeypatch, [*lines[:-2], None])
    with pytest.raises(Exception, match="cut off"):
        cluster.jobs.result(RUN, tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_the_readers_program_says_what_is_understood(tmp_path, monkeypatch, cluster):
    import subprocess
    import sys

    from lockstep.kubernetes_result import _READER

    (tmp_path / "run/artifact").mkdir(parents=True)
    (tmp_path / "run/summary.json").write_text('{"status": "done"}')
    (tmp_path / "run/artifact/model.bin").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "run/artifact/empty").write_bytes(b"")
    command = [sys.executable, "-c", _READER, str(tmp_path / "run"), "10000000", "files"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cluster.jobs.submit(packed(tmp_path))
    with_reader(cluster, monkeypatch, [*(stamped(1, line) for line in printed.splitlines()), None])
    cluster.jobs.result(RUN, tmp_path / "got")
    got = {path.name: path.read_bytes() for path in (tmp_path / "got").rglob("*") if path.is_file()}
    assert set(got) == {"summary.json", "model.bin", "empty"}
    assert got["model.bin"] == bytes(range(256)) * 1000


def command(*words: str) -> Any:
    from typer.testing import CliRunner

    from lockstep.cli import app

    return CliRunner().invoke(app, list(words))


@pytest.fixture
def job_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(make_job(Path("data"), Path("runs"))))
    return path


def test_the_command_submits_follows_and_ends_as_the_run_does(api, job_file, monkeypatch):
    add = api.add

    def run(manifest: dict[str, Any]) -> dict[str, Any]:
        if manifest["kind"] == "RayJob":
            manifest["status"] = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
            labels = {"job-name": manifest["metadata"]["name"]}
            pod = {"name": "submitter", "labels": labels}
            add({"kind": "Pod", "metadata": pod, "status": {"phase": "Succeeded"}})
            api.logs["submitter"] = [stamped(1, "epoch 1/2"), None]
        return add(manifest)

    monkeypatch.setattr(api, "add", run)
    options = ["--worker-memory", "9Gi", "--priority-class", "lockstep-urgent", "--user", "ann"]
    done = command("submit", str(job_file), "--kubernetes", "--run-id", "my-run", *options)
    assert done.exit_code == 0, done.output
    assert "epoch 1/2\nrun my-run: done" in done.output
    made = api.objects[("RayJob", "my-run")]
    assert made["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "lockstep-urgent"
    worker = made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert worker["containers"][0]["resources"]["limits"]["memory"] == "9Gi"
    listed = command("jobs", "list", "--address", "kubernetes://lockstep", "--json")
    assert json.loads(listed.output)["runs"][0]["user"] == "ann"
    logs = command("jobs", "logs", "my-run", "--address", "kubernetes")
    assert logs.output == "epoch 1/2\n"
    stopped = command("jobs", "stop", "my-run", "--address", "kubernetes", "--json")
    assert json.loads(stopped.output)["status"] == "done"
    assert ("RayJob", "my-run") in api.objects


def test_what_has_no_meaning_on_kubernetes_is_refused(api, job_file, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame")
    for words, text in [
        (["--queue"], "Kueue decides"),
        (["--env", "MY_KEY"], "secrets that the template refers to"),
        (["--run-id", "No_Good"], "--run-id received"),
    ]:
        done = command("submit", str(job_file), "--kubernetes", *words)
        assert isinstance(done.exception, UserError)
        assert text in str(done.exception)


def test_versions_that_differ_are_told_before_anything_is_made(api, job_file, monkeypatch):
    api.objects[("RayJob", "training")]["spec"]["rayClusterSpec"]["rayVersion"] = "2.1.0"
    words = ["submit", str(job_file), "--kubernetes", "--run-id", "r", "--json"]
    done = command(*words)
    assert "2.1.0 in the cluster's template" in str(done.exception)
    assert ("RayJob", "r") not in api.objects
    assert command(*words, "--any-version").exit_code == 0
    assert "versions" not in json.loads(api.objects[("ConfigMap", "r")]["data"][MANIFEST])


def test_remedies_name_options_that_are_there(api, cluster, tmp_path):
    """`submit` and `jobs` have neither --namespace nor --context."""
    told = []
    api.failures.append(404)
    for ask in (lambda: cluster.jobs.list(), lambda: KubernetesJobs(KubernetesClient()).template):
        api.objects.clear()
        with pytest.raises(UserError) as caught:
            ask()
        told.append(str(caught.value))
    assert all("--address kubernetes://NAMESPACE" in text for text in told)
    assert not any("--namespace" in text or "--context" in text for text in told)


def test_render_prints_what_kubectl_applies(renders, job_file):
    done = command("render", str(job_file), "--overlay", str(DEPLOY / "overlays/prod"))
    assert done.exit_code == 0, done.exception
    kinds = [each["kind"] for each in yaml.safe_load_all(done.output)]
    assert kinds == ["ConfigMap", "RayJob", "PodDisruptionBudget"]
    options = ["--worker-memory", "9Gi", "--priority-class", "lockstep-urgent", "--json"]
    done = command("render", str(job_file), "--overlay", str(DEPLOY / "overlays/prod"), *options)
    ray_job = json.loads(done.output)["items"][1]
    assert ray_job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "lockstep-urgent"
    assert "9Gi" in str(ray_job)


def test_launch_ends_as_its_run_does(api, monkeypatch):
    add = api.add

    def failed(manifest: dict[str, Any]) -> dict[str, Any]:
        if manifest["kind"] == "RayJob":
            manifest["status"] = {"jobDeploymentStatus": "Failed", "reason": "AppFailed"}
        return add(manifest)

    monkeypatch.setattr(api, "add", failed)
    done = command("launch", "retraining", "--exclusive")
    assert isinstance(done.exception, RunFailed)
    assert done.exception.exit_status == 3
