"""A scheduler that tests move through time, and pipelines that are small shell scripts."""

import time
from pathlib import Path
from typing import Any

from lockstep.pipeline_files import PipelineFiles
from lockstep.scheduled_runs import RunSettings
from lockstep.scheduler import Scheduler
from registry.database import Database
from registry.schedules import Schedules, TickRecord

BEGIN = 1_800_000_000.0  # a full minute


class Bench:
    """A folder with a database, logs, and pipeline files whose field `run` is a shell script."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = BEGIN
        self.said: list[dict[str, Any]] = []
        self.store = Schedules(Database(f"sqlite:///{root / 'lockstep.db'}"))

    def write(self, name: str, script: str, cron: str = "* * * * *", more: str = "") -> Path:
        """A pipeline file."""
        path = self.root / f"{name}.yaml"
        schedule = f"schedule: {{cron: '{cron}'{more}}}"
        path.write_text(f"name: {name}\n{schedule}\nrun: |\n  {script}\n")
        return path

    def scheduler(self, **settings: Any) -> Scheduler:
        """A scheduler of all pipelines there are, or of those at `paths`."""
        paths = settings.pop("paths", [])
        lease_s = settings.pop("lease_s", 60.0)
        return Scheduler(
            self.store,
            PipelineFiles(paths, None if paths else self.root),
            RunSettings(self.root / "logs", script_of, clock=lambda: self.now, **settings),
            self.said.append,
            lease_s,
        )

    def work_until(self, scheduler: Scheduler, outcome: str, name: str = "p") -> TickRecord:
        """Let a scheduler work until the newest tick of a schedule has an outcome."""
        for _ in range(500):
            scheduler.work()
            ticks = self.store.history(name, 1)
            if ticks and ticks[0].outcome == outcome:
                return ticks[0]
            time.sleep(0.02)
        raise AssertionError(f"not {outcome}: {self.store.history(name, 5)}")

    def outcomes(self, name: str = "p") -> list[str]:
        """Of all ticks of a schedule, the oldest first."""
        return [tick.outcome for tick in reversed(self.store.history(name, 100))]

    def events(self) -> list[str]:
        """What was said."""
        return [each["event"] for each in self.said]


def script_of(pipeline: Path) -> list[str]:
    """The command of a pipeline file of a bench."""
    script = pipeline.read_text().partition("run: |\n")[2].strip()
    return ["/bin/sh", "-c", script]
