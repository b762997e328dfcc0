"""`lockstep schedule`: run the scheduler, and look at what it did and will do."""

import os
import signal
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from lockstep.commands.options import Json, console, print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from lockstep.scheduler import Scheduler
    from registry.schedules import Schedules

app = typer.Typer(help="Run pipelines when they are due.", no_args_is_help=True)

_OFFSET = "LOCKSTEP_CLOCK_OFFSET_S"
"""Seconds that a scheduler's clock is ahead: to try a schedule out."""

Name = Annotated[str, typer.Argument(help="Name of a schedule, which is its pipeline's.")]


@app.command()
def run(
    pipelines: Annotated[
        list[Path] | None, typer.Argument(help="Pipeline files with a section schedule.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="All pipeline files of a folder, also later ones.")
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Start what is due, wait for it, and end; for cron.")
    ] = False,
    grace_s: Annotated[
        float, typer.Option(help="Seconds that runs may take to end on SIGTERM.", min=0)
    ] = 60.0,
    logs: Annotated[
        Path | None, typer.Option(help="Folder for what runs print; default below LOCKSTEP_HOME.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Start pipelines when they are due, until SIGTERM or Ctrl-C. One scheduler a database.

    Pipelines that run then are asked to end, and go on when the scheduler is started again.
    """
    from lockstep.pipeline_files import PipelineFiles
    from lockstep.scheduled_runs import RunSettings
    from lockstep.scheduler import Scheduler, retrain_command

    files = PipelineFiles(pipelines or [], folder)
    where = logs or _home() / "schedules"
    settings = RunSettings(where.absolute(), retrain_command, grace_s, _clock())
    scheduler = Scheduler(_schedules(), files, settings, _teller(is_json))
    _stop_on_signals(scheduler)
    if not once:
        scheduler.run()
        return
    if scheduler.run_once():
        raise typer.Exit(3)


@app.command("list")
def list_schedules(is_json: Json = False) -> None:
    """Schedules with their last and next runs."""
    from lockstep.schedule_view import overview, show_overview

    facts = overview(_schedules(), _clock()())
    if is_json:
        print_json(facts)
    else:
        show_overview(console(is_stderr=False), facts)


@app.command()
def history(
    name: Name,
    limit: Annotated[int, typer.Option(help="How many ticks, the newest first.", min=1)] = 20,
    is_json: Json = False,
) -> None:
    """What became of the ticks of a schedule."""
    from lockstep.schedule_view import history_of, show_history

    facts = history_of(_schedules(), name, limit)
    if is_json:
        print_json(facts)
    else:
        show_history(console(is_stderr=False), facts)


@app.command()
def start(name: Name, is_json: Json = False) -> None:
    """Ask the scheduler at work for a run now. Without a scheduler: `lockstep retrain`."""
    from registry.schedules import TickRecord

    store = _schedules()
    schedule = store.schedule(name)
    if store.holder() is None:
        raise UserError(
            f"no scheduler is at work that could start {name}. Start one by `lockstep schedule "
            f"run`, or run the pipeline here: lockstep retrain {schedule.pipeline}"
        )
    if not schedule.is_active:
        raise UserError(
            f"the scheduler at work does not look after {name}: {schedule.pipeline} is none of its "
            "files, or has no such name or no section schedule any more. `lockstep schedule list` "
            "shows what has next runs."
        )
    is_new = store.ask(TickRecord(name, int(_clock()()), is_by_hand=True))
    if is_json:
        print_json({"schedule": name, "is_queued": True, "is_new": is_new})
    else:
        print(f"{name} waits for the scheduler" if is_new else f"a run of {name} waits already")


@app.command()
def check(
    cron: Annotated[str, typer.Argument(help="A cron expression of five fields, quoted.")],
    timezone: Annotated[str, typer.Option(help="IANA name of the zone it is read in.")] = "UTC",
    count: Annotated[int, typer.Option(help="How many ticks.", min=1, max=1000)] = 5,
    is_json: Json = False,
) -> None:
    """Show when a cron expression is due next."""
    from lockstep.schedule_view import next_ticks

    ticks = next_ticks(cron, timezone, _clock()(), count)
    if is_json:
        print_json({"cron": cron, "timezone": timezone, "next": ticks})
        return
    for tick in ticks:
        print(tick)


def _schedules() -> "Schedules":
    from registry.database import Database
    from registry.schedules import Schedules

    return Schedules(Database())


def _home() -> Path:
    return Path(os.environ.get("LOCKSTEP_HOME") or Path.home() / ".lockstep")


def _clock() -> "Callable[[], float]":
    import time

    text = os.environ.get(_OFFSET, "0")
    try:
        offset_s = float(text)
    except ValueError:
        raise UserError(f"{_OFFSET} received {text!r}; a number of seconds is allowed.") from None
    return lambda: time.time() + offset_s


def _stop_on_signals(scheduler: "Scheduler") -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: scheduler.stop())


def _teller(is_json: bool) -> "Callable[[dict[str, Any]], None]":
    import json

    def tell(event: dict[str, Any]) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        if is_json:
            print(json.dumps({"time": now, **event}), flush=True)
            return
        from lockstep.schedule_view import sentence_of

        print(f"{now} {sentence_of(event)}", flush=True)

    return tell
