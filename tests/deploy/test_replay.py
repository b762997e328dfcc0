"""The manifests without Kubernetes: the operator's own lines as processes, the real entrypoint.

Proves what no schema can: that the options start Ray, that the probes are answered, that the
entrypoint finds job, code and volume and trains to its end, and that a node that is told to go
hands over.
"""

import importlib.util
import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from configs.load import load_job
from lockstep.manifests import run_manifests, volume_folder
from lockstep.submit import SubmitOptions, packing
from tests.deploy.checks.objects import Manifest, of_kind
from tests.deploy.replay import TOKEN, Replay, until
from tests.support.jobs import make_job, write_data
from tests.support.ray_cluster import free_ports

BUILDER = """
from parts import sizes
import keras

def build():
    return keras.Sequential([keras.layers.Dense(sizes.UNITS), keras.layers.Dense(1)])
"""


@contextmanager
def replayed(renders, tmp_path: Path, monkeypatch, **changes: object) -> Iterator[Replay]:
    """A run of a small job with code of its own, made from the template of production."""
    objects = renders("dev")
    template = next(
        each for each in of_kind(objects, "RayJob") if each["metadata"]["name"] == "training"
    )
    (tmp_path / "model.py").write_text(BUILDER)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "sizes.py").write_text("UNITS = 8\n")
    monkeypatch.chdir(tmp_path)
    job = make_job(Path("data"), Path("runs"), **changes)
    job["model"] = {"builder": "model.py:build"}
    folder = volume_folder(template)
    with packing(load_job(job), SubmitOptions("small-run", cluster_dir=folder)) as packed:
        run: list[Manifest] = run_manifests(template, packed)
    with Replay(run[1], [*objects, *run]) as replay:
        write_data(replay.home / "data")
        yield replay


def summary_of(replay: Replay) -> dict[str, object]:
    path = replay.home / "runs/small/small-run/summary.json"
    return json.loads(path.read_text())


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_trains_to_its_end(renders, tmp_path, monkeypatch):
    with replayed(renders, tmp_path, monkeypatch, train__epochs=2) as replay:
        assert replay.healthz() == [200, 200, 200]
        done = replay.submit(timeout_s=600)
        assert "Job 'replayed' succeeded" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
        summary = summary_of(replay)
        assert (summary["status"], summary["workers"]) == ("done", 2)
        again = replay.submit(timeout_s=60)  # a submitter that is started anew submits nothing
        assert "Job 'replayed' succeeded" in again.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_node_that_is_told_to_go_hands_over(renders, tmp_path, monkeypatch):
    changes = {"train__epochs": 400, "cluster__min_workers": 1, "cluster__replace_timeout_s": 2}
    with replayed(renders, tmp_path, monkeypatch, **changes) as replay:
        worker = replay.manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        hook = worker["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"][
            "command"
        ]
        events = replay.home / "runs/small/small-run/metrics.jsonl"
        ended: list[object] = []
        thread = threading.Thread(target=lambda: ended.append(replay.submit(timeout_s=600)))
        thread.start()
        try:
            until(lambda: events.exists() and events.read_text().count("\n") > 3, 300)
            left = replay.node_command(2, [*hook, "--node-ip", "127.0.0.4"])
            said, _ = left.communicate(timeout=110)
            assert left.returncode == 0, said
            assert "handed over" in said
            replay.nodes[2].kill()
        finally:
            thread.join(610)
        summary = summary_of(replay)
        assert summary["status"] == "done"
        kinds = [recovery["kind"] for recovery in summary["recoveries"]]
        assert all("lost" not in kind for kind in kinds), kinds


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    importlib.util.find_spec("serving.deployment") is None, reason="needs serving.deployment"
)
def test_the_service_answers(renders):
    """What the operator does with a RayService: its cluster, then the configuration by HTTP."""
    objects = renders("dev")
    service = of_kind(objects, "RayService")[0]
    with Replay(service, objects) as replay:
        config = yaml.safe_load(replay.here(service["spec"]["serveConfigV2"]))
        (port,) = free_ports(1)
        config["http_options"] |= {"host": "127.0.0.1", "port": port}
        config["proxy_location"] = "HeadOnly"  # all nodes have this machine's ports
        request = urllib.request.Request(
            f"{replay.dashboard}/api/serve/applications/",
            json.dumps(config).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"},
            method="PUT",
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
        until(lambda: is_answered(f"http://127.0.0.1:{port}/livez"), 300)
        assert is_answered(f"http://127.0.0.1:{port}/-/healthz")


def is_answered(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
