"""Schedules and their history as people and machines read them."""

import itertools
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cluster.cron import Cron, zone_of
from cluster.schedule import Schedule
from lockstep.run_process import ProcessName, host_name, is_alive
from registry.schedules import Holder, ScheduleRecord, Schedules, TickRecord

_NEXT = 3


def next_ticks(cron: str, timezone: str, now: float, count: int) -> list[str]:
    """The next ticks of an expression, in its zone, as ISO 8601.

    Raises:
        ScheduleError: The expression or the zone is wrong.
    """
    ticks = Cron.parse(cron, timezone).ticks(now)
    return [_local(tick, timezone) for tick in itertools.islice(ticks, count)]


def overview(store: Schedules, now: float) -> dict[str, Any]:
    """All schedules with last and next runs, and the scheduler at work."""
    schedules = [_facts_of(store, record, now) for record in store.schedules()]
    return {"scheduler": _scheduler_facts(store.holder()), "schedules": schedules}


def history_of(store: Schedules, name: str, limit: int) -> dict[str, Any]:
    """The newest ticks of a schedule, the newest first.

    Raises:
        RegistryError: There is no schedule of this name.
    """
    timezone = store.schedule(name).timezone
    ticks = [_tick_facts(tick, timezone) for tick in store.history(name, limit)]
    return {"schedule": name, "timezone": timezone, "ticks": ticks}


def show_overview(console: Console, facts: dict[str, Any]) -> None:
    """A table, and a line on the scheduler."""
    table = Table("schedule", "cron", "last run", "outcome", "next run", box=box.SIMPLE)
    for each in facts["schedules"]:
        last = each["running"] or each["last"] or {}
        following = _short(each["next"][0]) if each["next"] else "not scheduled any more"
        table.add_row(
            each["name"],
            f"{each['cron']} ({each['timezone']})",
            _short(last.get("started_at")) or "never",
            _outcome_text(last) if last else "",
            "when a run has ended" if each["queued"] else following,
        )
    if facts["schedules"]:
        console.print(table)
    else:
        console.print("no schedules yet; `lockstep schedule run PIPELINE` makes them")
    scheduler = facts["scheduler"]
    if scheduler is None:
        console.print("no scheduler is at work: nothing is started. `lockstep schedule run`")
    elif scheduler["is_alive"] is False:
        console.print(f"the scheduler (process {scheduler['pid']}) has died: nothing is started")
    else:
        console.print(f"scheduler: process {scheduler['pid']} on {scheduler['host']}")


def show_history(console: Console, facts: dict[str, Any]) -> None:
    """A table, the newest tick first."""
    table = Table("planned", "started", "ended", "outcome", "missed before", box=box.SIMPLE)
    for tick in facts["ticks"]:
        table.add_row(
            _short(tick["planned_at"]) + (" by hand" if tick["is_by_hand"] else ""),
            _short(tick["started_at"]),
            _short(tick["ended_at"]),
            _outcome_text(tick),
            str(tick["missed"] or ""),
        )
    console.print(table)
    for tick in facts["ticks"][:1]:
        console.print(f"newest log: {tick['log']}" if tick["log"] else "no log", soft_wrap=True)


def sentence_of(event: dict[str, Any]) -> str:
    """One line on what a scheduler says."""
    name, reason = event.get("schedule", ""), event.get("reason", "")
    after = f": {reason}" if reason else ""
    planned = ""
    if "planned_at" in event:
        planned = f" {datetime.fromtimestamp(event['planned_at'], UTC):%Y-%m-%d %H:%M UTC}"
    missed = f", for {event['missed']} missed ticks before it as well" if "missed" in event else ""
    said = {
        "at_work": "at work as process {pid}, {schedules} schedules",
        "waiting": "a scheduler on {host} was at work; waiting {lease_s} s whether it still is",
        "stopped": "stopped while another scheduler was at work",
        "refused": "not taken" + after,
        "database": "the database failed, trying again" + after,
        "due": f"{name}: due{planned}{missed}",
        "skipped": f"{name}: skipped{planned}{missed}{after}",
        "started": f"{name}: started as process {{pid}}, log {{log}}",
        "found": f"{name}: goes on as process {{pid}}",
        "done": f"{name}: done",
        "failed": f"{name}: failed with status {{exit_status}}{after}, log {{log}}",
        "lost": f"{name}: {reason}; it will be started once more",
        "interrupted": f"{name}: interrupted; it goes on when a scheduler is at work again",
        "stopping": "stopping: {runs} runs have {grace_s} s to end",
    }[event["event"]]
    for field, value in event.items():  # not `format`: a reason may hold braces of its own
        said = said.replace(f"{{{field}}}", str(value))
    return said


def _facts_of(store: Schedules, record: ScheduleRecord, now: float) -> dict[str, Any]:
    cron = Cron.parse(record.cron, record.timezone)
    schedule = Schedule(record.name, cron, record.jitter_s, record.overlap)
    following: list[str] = []
    moment = now
    while record.is_active and len(following) < _NEXT:
        tick, moment = schedule.next_start(moment)
        following.append(_local(moment, record.timezone))
    tick_of = {
        "last": store.newest(record.name, ("done", "failed")),
        "running": store.newest(record.name, ("running",)),
        "queued": store.newest(record.name, ("queued",)),
    }
    return {
        "name": record.name,
        "pipeline": record.pipeline,
        "cron": record.cron,
        "timezone": record.timezone,
        "jitter_s": record.jitter_s,
        "overlap": record.overlap,
        "is_active": record.is_active,
        **{
            role: None if tick is None else _tick_facts(tick, record.timezone)
            for role, tick in tick_of.items()
        },
        "next": following,
    }


def _scheduler_facts(holder: Holder | None) -> dict[str, Any] | None:
    if holder is None:
        return None
    is_here = holder.host == host_name()
    alive = is_alive(ProcessName(holder.pid, holder.process)) if is_here else None
    return {"host": holder.host, "pid": holder.pid, "is_alive": alive}


def _tick_facts(tick: TickRecord, timezone: str) -> dict[str, Any]:
    def shown(moment: float | None) -> str | None:
        return None if moment is None else _local(moment, timezone)

    return {
        "planned_at": _local(tick.planned_at, timezone),
        "is_by_hand": tick.is_by_hand,
        "outcome": tick.outcome,
        "missed": tick.missed,
        "attempt": tick.attempt,
        "started_at": shown(tick.started_at),
        "ended_at": shown(tick.ended_at),
        "exit_status": tick.exit_status,
        "reason": tick.reason,
        "log": tick.log,
        "host": tick.host,
        "pid": tick.pid,
    }


def _short(moment: str | None) -> str:
    """To the minute, for tables: the zone stands beside."""
    return "" if moment is None else moment[:16].replace("T", " ")


def _outcome_text(tick: dict[str, Any]) -> str:
    status = f" (status {tick['exit_status']})" if tick["exit_status"] else ""
    return f"{tick['outcome']}{status}" + (f": {tick['reason']}" if tick["reason"] else "")


def _local(moment: float, timezone: str) -> str:
    at = datetime.fromtimestamp(moment, UTC).astimezone(zone_of(timezone))
    return at.isoformat(timespec="seconds")
