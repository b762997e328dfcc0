"""The `lockstep` command as a user types it: output, exit status, and nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lockstep.examples import write_example
from tests.support.jobs import make_job

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "lockstep.cli"]


def run(*arguments: str, cwd: Path = ROOT, timeout_s: float = 200) -> Any:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


FORMATS = ("model.keras", "trained_model.h5", "saved_model")


def write_job(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def processes_of(marker: str) -> list[str]:
    """Command lines of live processes whose environment carries the marker."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        try:
            if process.info["status"] == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            if process.environ().get("LOCKSTEP_TEST") == marker:
                found.append(" ".join(process.info["cmdline"] or [])[:80])
        except psutil.Error:
            continue
    return found


def assert_none_left(marker: str) -> None:
    # Ray's agents see within 10 s that their node died, but first report it to its store, which
    # may be dead, too; that request has a limit of Ray's own, 60 s.
    deadline = time.monotonic() + 100
    while processes_of(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(marker) == []


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("from lockstep import cli; cli.app(['--help'], standalone_mode=False)", "pyarrow"),
        ("from lockstep import cli; cli.app(['schema'], standalone_mode=False)", "pyarrow"),
        ("from configs.load import load_job; load_job('configs/flights.yaml')", "pyarrow"),
        ("import lockstep.api, trainer.preflight, trainer.probe", "keras"),
    ],
)
def test_light_commands_stay_light(code: str, forbidden: str) -> None:
    heavy = {"tensorflow", forbidden, *(["ray"] if forbidden == "pyarrow" else [])}
    check = f"{code}\nimport sys; print('LOADED', sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert "LOADED []" in done.stdout, done.stderr


def test_schema_is_a_json_schema_of_all_sections() -> None:
    schema = json.loads(run("schema").stdout)
    assert {"model", "compile", "data", "train", "cluster"} <= set(schema["properties"])
    for section in schema["$defs"].values():
        assert all("description" in field for field in section["properties"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__epoch": 3}, "unknown key train.epoch; allowed here: epochs, global_batch_size"),
        ({"data__train": "nowhere/*.parquet"}, "data.train: 'nowhere/*.parquet' matches no file"),
        ({"data__label": "yy"}, "data.train: no column 'yy' in"),
        ({"cluster__workers": 20}, "data.virtual_shards=16 cannot feed 20 workers"),
        ({"train__global_batch_size": 1}, "is smaller than cluster.workers=2"),
    ],
)
def test_a_mistake_ends_with_status_2_and_one_message(
    rows: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    done = run("train", write_job(tmp_path, make_job(rows, tmp_path / "runs", **change)))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_unknown_commands_and_options_end_with_status_2() -> None:
    assert run("trian").returncode == 2
    assert run("train").returncode == 2
    assert run("example", "flihgts").returncode == 2
    assert "Did you mean 'flights'?" in run("example", "flihgts").stderr


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("examples")
    for name in ("digits", "weather"):
        write_example(name, root / "data")
    return root


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "metric", "epochs"), [("digits", "accuracy", 6), ("weather", "mae", 1)]
)
def test_the_other_examples_learn(examples: Path, name: str, metric: str, epochs: int) -> None:
    job = str(ROOT / "configs" / f"{name}.yaml")
    done = run("train", job, "--set", f"train.epochs={epochs}", "--json", cwd=examples)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    test, constant = summary["metrics"]["test"][metric], summary["metrics"]["constant"][metric]
    assert test > 0.85 > constant if metric == "accuracy" else test < constant / 2
    assert len(set(summary["weights_sha256"])) == 1
    assert "epoch 1/" in done.stderr


def start_training(tmp_path: Path, rows: Path, marker: str) -> "subprocess.Popen[str]":
    values = make_job(rows, tmp_path / "runs", train__epochs=100_000, cluster__workers=2)
    process = subprocess.Popen(
        [*COMMAND, "train", write_job(tmp_path, values)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LOCKSTEP_TEST": marker},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            return process
    raise AssertionError("the run ended before its second epoch")


def drain(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=120)
    return output


def test_ctrl_c_keeps_a_checkpoint_and_leaves_no_process(rows: Path, tmp_path: Path) -> None:
    marker = f"ctrl-c-{os.getpid()}"
    process = start_training(tmp_path, rows, marker)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    output = drain(process)
    assert process.returncode == 130, output
    assert "Go on with --resume" in output
    assert "Traceback" not in output
    assert_none_left(marker)
    folder = next((tmp_path / "runs" / "small").iterdir())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert (folder / "checkpoints" / f"step-{summary['steps']:010d}-g000001.h5").exists()


def test_a_killed_driver_leaves_no_process(rows: Path, tmp_path: Path) -> None:
    marker = f"kill-{os.getpid()}"
    process = start_training(tmp_path, rows, marker)
    process.kill()
    drain(process)
    assert_none_left(marker)


@pytest.fixture(scope="module")
def digits_run(examples: Path) -> dict[str, Any]:
    """The summary of a short run of the digits example."""
    job = str(ROOT / "configs" / "digits.yaml")
    done = run("train", job, "--set", "train.epochs=1", "--workers", "1", "--json", cwd=examples)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


@pytest.mark.parametrize(
    "name",
    ["", *(pytest.param(name, marks=pytest.mark.long) for name in FORMATS)],
)
def test_evaluate_and_predict_each_format_quietly(
    examples: Path, digits_run: dict[str, Any], name: str
) -> None:
    model = str(Path(digits_run["artifact"]) / name)
    done = run("evaluate", model, "data/digits/test", "--json", cwd=examples)
    assert done.stderr == ""
    for metric, value in json.loads(done.stdout).items():
        assert value == pytest.approx(digits_run["metrics"]["test"][metric], rel=1e-5)
    output = ["--output", f"out-{name}"]
    done = run("predict", model, "data/digits/test", *output, "--json", cwd=examples)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rows"] == 270


@pytest.fixture
def cluster_address() -> Iterator[str]:
    """A Ray cluster of two CPUs that somebody else has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
        + [f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "LOCKSTEP_TEST": f"cluster-{os.getpid()}"},
    )
    assert process.stdout is not None
    while "Ray runtime started" not in (line := process.stdout.readline()):
        assert line, "the cluster did not start"
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.communicate(timeout=60)
    assert_none_left(f"cluster-{os.getpid()}")


def test_a_cluster_is_joined_and_left_running(
    cluster_address: str, rows: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path, make_job(rows, tmp_path / "runs"))
    done = run("train", job, "--workers", "3", "--address", cluster_address)
    assert done.returncode == 2
    assert "asks for 3 workers with 1 CPU(s) each; the cluster has 1 node(s)" in done.stderr
    done = run("train", job, "--address", cluster_address, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"
