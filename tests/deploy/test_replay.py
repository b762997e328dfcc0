"""The manifests without Kubernetes: the operator's own lines as processes, the real entrypoint.

Proves what no schema can: that the options start Ray, that the probes are answered, that the
entrypoint finds job, code and volume and trains to its end, and that a node that is told to go
hands over.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.load import load_job
from lockstep.manifests import run_manifests, volume_folder
from lockstep.submit import SubmitOptions, packing
from tests.deploy.checks.objects import Manifest, of_kind
from tests.deploy.replay import Replay, until
from tests.support.jobs import make_job, write_data

BUILDER = """
import sizes
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
    (tmp_path / "sizes.py").write_text("UNITS = 8\n")
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
def test_a_run_trains_to_its_end(renders, tmp_path, monkeypatch):
    with replayed(renders, tmp_path, monkeypatch, train__epochs=2) as replay:
        assert replay.healthz() == [200, 200, 200]
        done = replay.submit(timeout_s=240)
        assert "SUCCEEDED" in done.stdout + done.stderr, done.stdout[-3000:] + done.stderr[-2000:]
        summary = summary_of(replay)
        assert (summary["status"], summary["workers"]) == ("done", 2)
        again = replay.submit(timeout_s=60)  # a submitter that is started anew submits nothing
        assert "SUCCEEDED" in again.stdout + again.stderr


@pytest.mark.long
def test_a_node_that_is_told_to_go_hands_over(renders, tmp_path, monkeypatch):
    changes = {"train__epochs": 400, "cluster__min_workers": 1, "cluster__replace_timeout_s": 2}
    with replayed(renders, tmp_path, monkeypatch, **changes) as replay:
        worker = replay.manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        hook = worker["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"][
            "command"
        ]
        events = replay.home / "runs/small/small-run/metrics.jsonl"
        job = replay.node_command(0, ["bash", "-c", "true"])
        job.wait(10)
        import threading

        ended: list[object] = []
        thread = threading.Thread(target=lambda: ended.append(replay.submit(timeout_s=240)))
        thread.start()
        try:
            until(lambda: events.exists() and events.read_text().count("\n") > 3, 120)
            left = replay.node_command(2, hook)
            said, _ = left.communicate(timeout=110)
            assert left.returncode == 0, said
            assert "handed over" in said
            replay.nodes[2].kill()
        finally:
            thread.join(250)
        summary = summary_of(replay)
        assert summary["status"] == "done"
        kinds = [recovery["kind"] for recovery in summary["recoveries"]]
        assert all("lost" not in kind for kind in kinds), kinds
