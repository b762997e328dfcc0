"""`lockstep schedule` as it is called: a real daemon, on the real clock or one that is off."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.database import Database
from registry.schedules import Holder, ScheduleRecord, Schedules

LOCKSTEP = [sys.executable, "-m", "lockstep.cli", "schedule"]


class Daemon:
    """`lockstep schedule run --json`, and what it says."""

    def __init__(self, home: Path, *arguments: str, offset_s: float = 0.0) -> None:
        self.environment = {
            **os.environ,
            "COLUMNS": "200",
            "LOCKSTEP_HOME": str(home),
            "LOCKSTEP_CLOCK_OFFSET_S": str(offset_s),
        }
        self.environment.pop("LOCKSTEP_DATABASE", None)
        self._process = subprocess.Popen(
            [*LOCKSTEP, "run", *arguments, "--json"],
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    def heard(self, event: str) -> dict[str, Any]:
        """The next event of this name; earlier ones are passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said: dict[str, Any] = json.loads(line)
            if said["event"] == event:
                return said
        raise AssertionError(f"the daemon ended without {event}")

    def stop(self) -> int:
        """Ask for an end; returns the exit status."""
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status

    def answer(self, *arguments: str) -> Any:
        """What another command says, with its database."""
        done = subprocess.run(
            [*LOCKSTEP, *arguments, "--json"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline that is due each minute, and refused by `lockstep retrain`: there is no job."""
    path = tmp_path / "nightly.yaml"
    path.write_text("name: nightly\nschedule: {cron: '* * * * *', timezone: Europe/Zurich}\n")
    return path


@pytest.fixture
def soon(tmp_path: Path, pipeline: Path) -> Iterator[Daemon]:
    """A daemon whose clock shows some seconds to the full minute.

    The schedule is known from before: a daemon that comes up late has a tick to make good.
    """
    offset_s = 57.0 - time.time() % 60
    database = Database(f"sqlite:///{tmp_path / 'metadata.db'}")
    store = Schedules(database)
    me = Holder("before", "here", 0, "", 1.0)
    store.claim(me)
    with store.round(me) as round_:
        name = ("nightly", str(pipeline), "* * * * *", "Europe/Zurich")
        round_.put(ScheduleRecord(*name, 0.0, "skip", looked_until=time.time() + offset_s))
    store.release(me)
    database.close()
    daemon = Daemon(tmp_path, str(pipeline), offset_s=offset_s)
    yield daemon
    daemon.stop()


def test_a_daemon_runs_a_pipeline_when_it_is_due(soon: Daemon) -> None:
    assert soon.heard("at_work")["schedules"] == 1
    due = soon.heard("due")
    assert due["planned_at"] % 60 == 0
    log = soon.heard("failed")["log"]
    assert "job is missing" in Path(log).read_text()  # what `lockstep retrain` says of this file
    listed = soon.answer("list")
    (schedule,) = listed["schedules"]
    assert schedule["name"] == "nightly"
    assert schedule["last"]["outcome"] == "failed"
    assert schedule["last"]["exit_status"] == 2
    assert len(schedule["next"]) == 3
    assert listed["scheduler"]["is_alive"]
    assert soon.stop() == 0


@pytest.mark.long
def test_the_other_commands_answer(soon: Daemon, tmp_path: Path) -> None:
    soon.heard("failed")
    (tick,) = soon.answer("history", "nightly")["ticks"]
    assert (tick["missed"], tick["attempt"], tick["exit_status"]) == (0, 1, 2)
    assert tick["planned_at"][-9:] in (":00+01:00", ":00+02:00")
    assert soon.answer("start", "nightly")["is_new"]
    soon.heard("failed")
    ticks = soon.answer("history", "nightly")["ticks"]
    assert {tick["is_by_hand"] for tick in ticks} == {False, True}
    assert len(soon.answer("check", "@hourly", "--timezone", "Asia/Tokyo")["next"]) == 5
    second = Daemon(tmp_path, str(tmp_path / "nightly.yaml"))
    assert second._process.wait(30) == 2
    second.stop()
    assert soon.stop() == 0
    for command in (["list"], ["history", "nightly"]):
        shown = subprocess.run(
            [*LOCKSTEP, *command], env=soon.environment, capture_output=True, text=True, check=True
        )
        assert "failed (status 2)" in shown.stdout
    assert (
        "no scheduler is at work"
        in subprocess.run(
            [*LOCKSTEP, "start", "nightly"],
            env=soon.environment,
            capture_output=True,
            text=True,
            check=False,
        ).stderr
    )


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_daemon_waits_for_a_real_minute(tmp_path: Path, pipeline: Path) -> None:
    if time.time() % 60 > 50:
        time.sleep(11)  # so that the minute does not come before the daemon is at work
    daemon = Daemon(tmp_path, str(pipeline))
    daemon.heard("at_work")
    due = daemon.heard("due")
    late_s = time.time() - due["planned_at"]
    assert 0 <= late_s < 5
    assert due["planned_at"] % 60 == 0
    daemon.heard("failed")
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "0 0 30 2 *"], "would never be due"),
        (["check", "0 2 * * *", "--timezone", "Europe/Zuerich"], "Did you mean 'Europe/Zurich'?"),
        (["history", "nightly"], "no schedule 'nightly'"),
        (["run"], "received no pipeline"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from configs.errors import UserError
    from lockstep.cli import app

    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path))
    monkeypatch.delenv("LOCKSTEP_DATABASE", raising=False)
    with pytest.raises(UserError, match=words):
        app(["schedule", *arguments], standalone_mode=False)
