"""From a run to a registered version, to a new run that begins with it, to its use by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.support.jobs import make_job

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.long, pytest.mark.timeout(580)]


def lockstep(*arguments: str, cwd: Path, home: Path, status: int = 0) -> Any:
    environment = {name: text for name, text in os.environ.items() if "LOCKSTEP" not in name}
    environment |= {"PYTHONPATH": str(ROOT), "LOCKSTEP_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", "lockstep.cli", *arguments, "--json"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=250,
        env=environment,
    )
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout) if status == 0 else done.stderr


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_run_becomes_a_version_and_a_version_begins_a_run(rows: Path, tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    job = make_job(rows, "runs", cluster__workers=1, export={"register": "small"})
    (here / "job.yaml").write_text(yaml.safe_dump(job))
    git(here, "init", "-q")
    (here / ".gitignore").write_text("runs\n")
    git(here, "add", ".")
    git(here, "commit", "-qm", "job")

    summary = lockstep("train", "job.yaml", cwd=here, home=home)
    assert summary["version"] == "small/1"
    saved = json.loads((Path(summary["run_folder"]) / "summary.json").read_text())
    assert saved["version"] == "small/1"
    first = lockstep("models", "show", "small/1", cwd=here, home=home)
    assert first["metrics"] == summary["metrics"]
    lineage = first["lineage"]
    assert (lineage["run_id"], lineage["job"]) == (summary["run_id"], job["name"])
    assert lineage["code"] == {"commit": git(here, "rev-parse", "HEAD").strip(), "is_dirty": False}
    for file in lineage["data"]["train"]:
        found = os.stat(file["path"])
        assert (file["size_bytes"], file["modified_ns"]) == (found.st_size, found.st_mtime_ns)
        assert file["rows"] == pq.ParquetFile(file["path"]).metadata.num_rows
        assert len(file["ends_sha256"]) == 64

    # Resuming a finished run registers nothing new.
    again = lockstep("train", "job.yaml", "--resume", cwd=here, home=home)
    assert again["version"] == "small/1"
    lockstep("models", "promote", "small/1", cwd=here, home=home)

    # The next run goes on from it; the model is compiled, so `compile` may be left out.
    job["model"] = {"file": "small@champion"}
    job["name"] = "onwards"
    (here / "next.yaml").write_text(yaml.safe_dump(job))
    summary = lockstep("train", "next.yaml", cwd=here, home=home)
    assert summary["version"] == "small/2"
    second = lockstep("models", "show", "small/2", cwd=here, home=home)
    assert second["parent"] == 1
    assert second["lineage"]["parent"] == "small/1"
    assert second["lineage"]["code"]["is_dirty"]
    assert second["digest"] != first["digest"]

    test = str(rows / "test")
    by_name = lockstep("evaluate", "small/2", test, cwd=here, home=home)
    by_path = lockstep("evaluate", second["artifact"], test, cwd=here, home=home)
    assert by_name == by_path
    assert by_name["loss"] == pytest.approx(summary["metrics"]["test"]["loss"], rel=1e-5)
    output = str(tmp_path / "predictions")
    predicted = lockstep("predict", "small", test, "--output", output, cwd=here, home=home)
    assert predicted["rows"] > 0

    Path(first["artifact"], "model.keras").write_bytes(b"damaged")
    message = lockstep("predict", "small", test, "--output", output, cwd=here, home=home, status=3)
    assert "small/1 is not what was registered: model.keras was changed" in message
    message = lockstep("train", "next.yaml", cwd=here, home=home, status=3)
    assert "small/1 is not what was registered" in message
