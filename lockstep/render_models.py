"""`lockstep models`, for people: tables of models, versions, moves and comparisons."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lockstep.render import number

_MOVES = 10


def show_models(console: Console, models: Sequence[dict[str, Any]]) -> None:
    """All models."""
    if not models:
        console.print("no model is registered yet: lockstep models register ARTIFACT --name NAME")
        return
    table = _table("models", "name", "versions", "newest", "aliases")
    for model in models:
        aliases = ", ".join(f"{alias} {held}" for alias, held in model["aliases"].items())
        newest = "" if model["version"] is None else str(model["version"])
        table.add_row(model["name"], str(model["versions"]), newest, escape(aliases))
    console.print(table)


def show_versions(console: Console, model: dict[str, Any]) -> None:
    """One model: its versions and the newest moves of its aliases."""
    table = _table(model["name"], "version", "aliases", "when", "metrics", "parent", "description")
    for version in model["versions"]:
        is_deleted = version["state"] == "deleted"
        table.add_row(
            str(version["version"]),
            ", ".join(version["aliases"]),
            _when(version["created_at"]),
            "deleted" if is_deleted else escape(_headline(version["metrics"])),
            "" if version["parent"] is None else str(version["parent"]),
            escape(version["description"]),
        )
    console.print(table)
    show_moves(console, model["history"][-_MOVES:])


def show_moves(console: Console, moves: Sequence[dict[str, Any]]) -> None:
    """Moves of aliases, the oldest first."""
    if not moves:
        return
    table = _table("history", "", "alias", "from", "to", "when", "who", "why")
    for move in moves:
        ends = ["" if move[end] is None else str(move[end]) for end in ("from_number", "to_number")]
        if move["kind"] == "rollback":
            ends[1] += " (back)"
        texts = [escape(move["who"]), escape(move["why"])]
        table.add_row(str(move["sequence"]), move["alias"], *ends, _when(move["at"]), *texts)
    console.print(table)


def show_version(console: Console, version: dict[str, Any]) -> None:
    """All of one version."""
    table = Table(title=f"{version['name']}/{version['version']}", show_header=False, box=None)
    for field in ("aliases", "state", "digest", "artifact", "size_bytes", "description", "key"):
        value = version[field]
        text = ", ".join(value) if isinstance(value, list) else str(value)
        if value not in (None, "", []):
            table.add_row(field, escape(text))
    table.add_row("created", _when(version["created_at"]))
    if version["parent"] is not None:
        table.add_row("parent", f"{version['name']}/{version['parent']}")
    for tag, value in version["tags"].items():
        table.add_row("tag", escape(f"{tag}={value}"))
    for role, metrics in version["metrics"].items():
        values = ", ".join(f"{name} {number(value)}" for name, value in metrics.items())
        table.add_row(escape(role), escape(values))
    for field, value in version["lineage"].items():
        if field != "metrics":
            table.add_row(escape(field), escape(_shortly(value)))
    console.print(table)


def show_compared(console: Console, compared: dict[str, Any]) -> None:
    """Versions beside each other; with two, the difference too."""
    names = [f"{version['name']}/{version['version']}" for version in compared["versions"]]
    has_difference = len(names) == 2
    table = _table("metrics", "", *names, *(["difference"] if has_difference else []))
    for role, metrics in compared["metrics"].items():
        for metric, values in metrics.items():
            cells = ["" if value is None else number(value) for value in values]
            if has_difference:
                first, second = values
                is_known = first is not None and second is not None
                cells.append(number(second - first) if is_known else "")
            table.add_row(escape(f"{role} {metric}"), *cells)
    console.print(table)
    if compared["lineage"]:
        table = _table("where they differ", "", *names)
        for field, values in compared["lineage"].items():
            table.add_row(escape(field), *(escape(_shortly(value)) for value in values))
        console.print(table)


def show_verified(console: Console, versions: Sequence[dict[str, Any]]) -> None:
    """What is wrong with the files of each version."""
    table = _table("artifacts", "version", "MiB", "state")
    for version in versions:
        state = "; ".join(version["problems"]) or "intact"
        size = number(version["size_bytes"] / 2**20)
        table.add_row(f"{version['name']}/{version['version']}", size, escape(state))
    console.print(table)


def move_line(move: dict[str, Any]) -> str:
    """One move, in a sentence."""
    before = "nowhere" if move["from_number"] is None else f"version {move['from_number']}"
    after = "nowhere" if move["to_number"] is None else f"version {move['to_number']}"
    return f"{move['name']}@{move['alias']}: from {before} to {after}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(escape(column), overflow="fold", no_wrap=column == "when")
    return table


def _headline(metrics: dict[str, dict[str, float]]) -> str:
    """The metrics that judge a model best: the test's, or the validation's, or training's."""
    for role in ("test", "validation", "train"):
        if metrics.get(role):
            values = ", ".join(f"{name} {number(value)}" for name, value in metrics[role].items())
            return f"{role} {values}"
    return ""


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _shortly(value: Any) -> str:
    """A value of the lineage on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shortly(element)}" for key, element in value.items())
    if isinstance(value, list):
        if value and all(isinstance(element, dict) and "rows" in element for element in value):
            files = "1 file" if len(value) == 1 else f"{len(value):,} files"
            return f"{files} of {sum(element['rows'] for element in value):,} rows"
        return f"{len(value):,} values"
    return "" if value is None else str(value)
