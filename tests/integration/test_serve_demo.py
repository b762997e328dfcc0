"""`lockstep serve --demo` as a newcomer meets it: one command, and the lines it prints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from registry.database import Database
from serving.accounts import Accounts
from serving.haproxy import free_ports
from tests.support.served import ROOT

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

START_S = 600  # the example is trained first
LINES = 5


def printed(process: "subprocess.Popen[Any]", log: Path) -> list[str]:
    """The commands that the service prints when it answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        text = log.read_text()
        lines = [line.strip() for line in text.partition("\ntry:\n")[2].splitlines()]
        if len(lines) >= LINES:
            return lines[:LINES]
        time.sleep(0.2)
    raise AssertionError(f"the demonstration did not start:\n{log.read_text()[-3000:]}")


def test_the_lines_it_prints_work_as_they_stand(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    home = tmp_path / "home"
    environment = {**os.environ, "LOCKSTEP_HOME": str(home), "PYTHONPATH": str(ROOT)}
    database = f"sqlite:///{tmp_path / 'demo.db'}"
    command = [sys.executable, "-m", "lockstep.cli", "serve", "--demo", "--port", str(port)]
    command += ["--database", database, "--artifacts", str(tmp_path / "artifacts")]
    log = tmp_path / "demo.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment
        )
        try:
            answers = []
            for line in printed(process, log):
                done = subprocess.run(
                    line, shell=True, capture_output=True, text=True, timeout=60, check=True
                )
                answers.append(json.loads(done.stdout))
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0, log.read_text()[-3000:]
    rows, columns, tensors, status, ready = answers
    ((predicted,),) = rows["predictions"]
    first, second = columns["outputs"]
    assert first == second == [pytest.approx(predicted, rel=1e-5)]  # padded to another size
    assert tensors["outputs"][0]["data"] == [pytest.approx(predicted, rel=1e-5)]
    assert status["model_version_status"][0]["state"] == "AVAILABLE"
    assert ready == {"ready": True}
    assert f"model flights/{tensors['model_version']}" in log.read_text()
    users = Database(database)
    assert [record.account.user for record in Accounts(users).users()] == ["demo"]
    users.close()
