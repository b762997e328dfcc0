"""Submission from a host that is not of the cluster, to a cluster of several hosts."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.jobs import make_job, write_data
from tests.support.netns import Network, Node, why_not

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A head without CPUs, three hosts with one each, and a laptop."""
    if reason := why_not():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin")
        patch.setenv("LOCKSTEP_HOME", str(tmp_path_factory.mktemp("home")))
        with Network(has_dashboard=True) as network:
            network.start_head()
            for _ in range(3):
                network.add_node(cpus=1)
            network.add_host()
            yield network


def client(laptop: Node, *arguments: str, **options: Any) -> "subprocess.Popen[Any]":
    head = "http://10.77.0.1:8265"
    command = ["python", "-m", "lockstep.cli", *arguments, "--address", head]
    return laptop.popen(command, text=True, **options)


def told(laptop: Node, *arguments: str) -> Any:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = client(laptop, *arguments, "--json", **pipes)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out)


def test_a_run_outlives_its_client_and_a_killed_host(network: Network, tmp_path: Path) -> None:
    laptop = network.nodes[-1]
    rows = write_data(tmp_path / "data")
    job = make_job(
        rows,
        tmp_path / "runs",
        train__epochs=40,
        train__steps_per_execution=2,
        checkpoint__snapshot_every_s=1.0,
        cluster__stall_after_s=10.0,
        export={"h5": False, "saved_model": False},
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    runs = tmp_path / "runs" / "small"

    def finish(run_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + 240
        while told(laptop, "jobs", "status", run_id)["status"] != "done":
            assert time.monotonic() < deadline
            time.sleep(1.0)
        summary = told(laptop, "jobs", "result", run_id)["summary"]
        assert isinstance(summary, dict)
        return summary

    told(laptop, "submit", str(tmp_path / "job.yaml"), "--run-id", "calm")
    with (tmp_path / "followed").open("wb") as log:
        following = client(laptop, "jobs", "logs", "-f", "calm", stdout=log, stderr=log)
        while "epoch 2/" not in (tmp_path / "followed").read_text():
            assert following.poll() is None, (tmp_path / "followed").read_text()
            time.sleep(0.2)
        laptop.kill()  # it closes
    following.wait(20)
    calm = finish("calm")

    told(laptop, "submit", str(tmp_path / "job.yaml"), "--run-id", "killed")
    metrics = runs / "killed" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 10:
        time.sleep(0.2)
    lines = (runs / "killed" / "events.jsonl").read_text().splitlines()
    placed = [event for event in map(json.loads, lines) if event["event"] == "placed"]
    next(node for node in network.nodes if node.address == placed[-1]["nodes"][1]).kill()
    killed = finish("killed")
    assert killed["recoveries"]
    assert killed["weights_sha256"] == calm["weights_sha256"]
