"""`lockstep data show`, for people: sources, columns, the first rows, and who gets what."""

from typing import Any

from rich.console import Console
from rich.table import Table

from lockstep.render import number


def show_data(console: Console, facts: dict[str, Any]) -> None:
    """Print what `lockstep.data.describe_data` found."""
    _show_sources(console, facts["sources"])
    _show_columns(console, facts["columns"])
    _show_sample(console, facts["sample"])
    _show_order(console, facts["order"], facts["shuffle_quality"])
    _show_workers(console, facts["workers"])


def _show_sources(console: Console, sources: dict[str, dict[str, Any]]) -> None:
    table = _table("files", "", "files", "blocks", "rows", "rows a block", "MiB")
    for role, source in sources.items():
        low, high = source["rows_a_block"]
        table.add_row(
            role,
            f"{source['files']:,}",
            f"{source['blocks']:,}",
            f"{source['rows']:,}",
            f"{low:,}" if low == high else f"{low:,} to {high:,}",
            number(source["bytes"] / 2**20),
        )
    console.print(table)


def _show_columns(console: Console, columns: list[dict[str, Any]]) -> None:
    table = _table("columns (training rows)", "name", "role", "type", "becomes", "nulls", "values")
    for column in columns:
        table.add_row(
            column["name"],
            column["role"],
            column["type"],
            column["becomes"],
            f"{column['null_rows']:,}",
            _values(column),
        )
    console.print(table)


def _values(column: dict[str, Any]) -> str:
    if "most_frequent" in column:
        frequent = ", ".join(
            f"{value} {count:,}" for value, count in column["most_frequent"].items()
        )
        return f"{column['distinct']:,} different: {frequent}"
    if column.get("least") is None:
        return "none"
    span = f"{_shown(column['least'])} to {_shown(column['greatest'])}"
    if "mean" not in column:
        return span
    return f"{span}, mean {number(column['mean'])} ± {number(column['standard_deviation'])}"


def _show_sample(console: Console, sample: list[dict[str, Any]]) -> None:
    if not sample:
        return
    rows = [str(number) for number in range(1, len(sample) + 1)]
    table = _table("first rows of the first batch", "", *rows)
    for name in sample[0]:
        table.add_row(name, *(_shown(row[name]) for row in sample))
    console.print(table)


def _show_order(console: Console, order: dict[str, Any], quality: dict[str, Any]) -> None:
    window = f", {order['window_rows']:,} rows a window" if order["shuffle"] == "window" else ""
    console.print(
        f"order: shuffle {order['shuffle']}{window}; {order['steps_per_epoch']:,} steps an epoch "
        f"of {order['global_batch_size']:,} rows from {order['virtual_shards']} virtual shards"
    )
    console.print(
        "if the files were sorted by the label: rows travel "
        f"{quality['travel']:.0%} of the way that a full permutation takes them, neighbours in a "
        f"batch correlate by {quality['autocorrelation']:.2g}, the means of batches spread "
        f"{quality['mean_spread']:.3g} times as far"
    )


def _show_workers(console: Console, workers: list[dict[str, Any]]) -> None:
    table = _table(
        "workers", "rank", "virtual shards", "rows", "blocks", "rows a step", "at most MiB"
    )
    for worker in workers:
        first, last = worker["virtual_shards"]
        low, high = worker["rows_a_step"]
        table.add_row(
            str(worker["rank"]),
            f"{first} to {last}",
            f"{worker['rows']:,}",
            f"{worker['blocks']:,}",
            str(low) if low == high else f"{low} to {high}",
            number(worker["memory_bound_bytes"] / 2**20),
        )
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        head = ", ".join(_shown(element) for element in value[:3])
        return f"[{head}{', ...' if len(value) > 3 else ''}] ({len(value)})"
    return "null" if value is None else str(value)


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, box=None, header_style="dim")
    table.title_justify = "left"
    return table
