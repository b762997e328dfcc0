"""The page a person opens after a run: `report.html`, written from the files of the run folder.

Owns what the page shows; how it looks is `trainer.page`'s, curves are `trainer.charts`'s. Leaves
the measuring to the coordinator: only what the run folder holds is shown, so a report can be
written again at any time, also for a run that failed and whose files lack fields.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.charts import Curve, chart
from trainer.page import (
    COLORS,
    Markup,
    Record,
    as_number,
    as_text,
    duration,
    folded,
    html_table,
    join,
    mapping,
    section,
    tag,
    whole_page,
    write_page,
)

_NOT_METRICS = ("epoch", "step", "learning_rate", "epoch_s", "rows_per_s")
_ROWS_OPEN = 20  # a longer table of epochs is folded
_ROWS_SHOWN = 1_000
_FOOTER = "Legends give the last value. Epochs are counted from 1 here, from 0 in metrics.jsonl."
_STATUSES = ("done", "interrupted", "failed")


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Reads `summary.json` and, where they exist, `metrics.jsonl`, `job.yaml` and `environment.json`.
    The page appears whole or not at all, and replaces an earlier one; calling again is safe.

    Raises:
        OSError: The summary cannot be read, or the folder cannot be written.
        ValueError: `summary.json` or `environment.json` is not JSON.
    """
    summary = mapping(json.loads((run_folder / "summary.json").read_text(encoding="utf-8")))
    records = _epoch_records(_read_if_exists(run_folder / "metrics.jsonl"))
    environment = mapping(json.loads(_read_if_exists(run_folder / "environment.json") or "{}"))
    page = _page(summary, records, _read_if_exists(run_folder / "job.yaml"), environment)
    path = run_folder / "report.html"
    write_page(path, page)
    return path


# Reading: whatever a dead process left behind


def _read_if_exists(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _epoch_records(lines: str) -> list[Record]:
    """The epochs in order; the last line of a repeated epoch wins, a torn line is left out."""
    by_epoch: dict[int, Record] = {}
    for line in lines.split("\n"):
        try:
            record = mapping(json.loads(line))
        except ValueError:
            continue
        if isinstance(record.get("epoch"), int):
            by_epoch[record["epoch"]] = record
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _metric_names(records: list[Record]) -> list[str]:
    """Names without `val_`, the loss first, the others as they come."""
    names = {
        key.removeprefix("val_"): None
        for record in records
        for key, value in record.items()
        if key not in _NOT_METRICS and (value is None or isinstance(value, int | float))
    }
    return sorted(names, key=lambda name: name != "loss")


# The page


def _page(summary: Record, records: list[Record], job: str, environment: Record) -> str:
    name, run_id = as_text(summary.get("job")), as_text(summary.get("run_id"))
    status = as_text(summary.get("status"))
    failure = [tag("pre", as_text(summary[k])) for k in ("error", "traceback") if summary.get(k)]
    pill = tag("span", status, class_=f"status {status if status in _STATUSES else ''}")
    return whole_page(
        f"{name} · {run_id} · {status}",
        tag("h1", name),
        tag("div", pill, "run ", tag("code", run_id), class_="head"),
        _facts(summary),
        section("What went wrong", *failure),
        section("Final metrics", _final_metrics(mapping(summary.get("metrics")))),
        section("Learning curves", *_curves(records), class_="charts"),
        section("Where the time went", *_goodput(mapping(summary.get("goodput")))),
        section("Recoveries", _recoveries(summary.get("recoveries"))),
        section("Epochs", _epochs(records), class_=""),
        section("Set-up", *_setup(job, environment), class_=""),
        tag("footer", _FOOTER),
    )


def _facts(summary: Record) -> Markup:
    fields = ("workers", "epochs", "steps", "rows_seen", "rows_per_s")
    texts = {key: as_text(summary.get(key)) for key in fields}
    texts["wall time"] = duration(summary.get("wall_s"))
    facts = [tag("div", tag("dt", key), tag("dd", text)) for key, text in texts.items()]
    artifact = tag("dd", tag("code", as_text(summary.get("artifact"))))
    wide = tag("div", tag("dt", "artifact"), artifact, class_="wide")
    return tag("dl", *facts, wide, class_="card facts")


def _final_metrics(metrics: Record) -> Markup:
    """A row a metric; the columns are those of train, validation, test and constant with values."""
    kinds = ("train", "validation", "test", "constant")
    columns = {kind: column for kind in kinds if (column := mapping(metrics.get(kind)))}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(as_text(c.get(name)) for c in columns.values())] for name in names]
    titles = ["best constant prediction" if kind == "constant" else kind for kind in columns]
    return html_table(["metric", *titles], rows) if rows else Markup()


def _curves(records: list[Record]) -> Iterator[str]:
    for name in _metric_names(records):
        train = _curve(records, name, "train", 0)
        yield chart(name, records, [train, _curve(records, f"val_{name}", "validation", 1)])
    yield chart("learning_rate", records, [_curve(records, "learning_rate", "rate", 4)])
    throughput = _curve(records, "rows_per_s", "throughput", 2)
    yield chart("rows_per_s", records, [throughput], from_zero=True)


def _curve(records: list[Record], key: str, name: str, color: int) -> Curve:
    values = [as_number(record[key]) if key in record else None for record in records]
    return Curve(name, color, values)


def _goodput(goodput: Record) -> Iterator[Markup]:
    """A stacked bar of seconds, and the table that is its legend."""
    seconds = {key: as_number(mapping(part).get("seconds")) for key, part in goodput.items()}
    seconds = {key: value for key, value in seconds.items() if math.isfinite(value)}
    total_s = sum(seconds.values())
    if not total_s > 0:
        return
    bars, rows, start = [], [], 0.0
    for index, (key, value) in enumerate(seconds.items()):
        color, width = index % COLORS, 1000 * value / total_s
        share = f"{as_number(goodput[key].get('share', value / total_s)):.1%}"
        title = tag("title", f"{key} {duration(value)}, {share}")
        bar = {"x": start, "width": width, "height": 10}
        bars.append(tag("rect", title, class_=f"color{color}", **bar))
        name = join([tag("span", class_=f"key color{color}"), key])
        rows.append([name, f"{value:,.1f}", share])
        start += width
    shape = {"viewBox": "0 0 1000 10", "preserveAspectRatio": "none"}
    yield tag("svg", *bars, class_="bar", role="img", aria_label="Where the time went", **shape)
    yield html_table(["part", "seconds", "share"], rows)


def _recoveries(recoveries: Any) -> Markup:
    records = map(mapping, recoveries if isinstance(recoveries, list) else [])
    keys = ("kind", "detected_s", "recovered_s", "steps_replayed")
    rows = [[as_text(record.get(key)) for key in keys] for record in records]
    return html_table(keys, rows) if rows else Markup()


def _epochs(records: list[Record]) -> Markup:
    if not records:
        return tag("p", "No epoch was completed.", class_="card")
    keys = list(dict.fromkeys(key for r in records for key in r if key != "epoch"))
    shown = records[-_ROWS_SHOWN:]
    rows = ([str(r["epoch"] + 1), *(as_text(r.get(key)) for key in keys)] for r in shown)
    table = html_table(["epoch", *keys], rows)
    if len(records) <= _ROWS_OPEN:
        return tag("div", table, class_="card")
    last = f"the last {len(shown):,} of " if len(shown) < len(records) else ""
    return folded(f"Table of {last}{len(records):,} epochs", table)


def _setup(job: str, environment: Record) -> Iterator[Markup]:
    if job:
        yield folded("job.yaml", tag("pre", job))
    if environment:
        rows = ([key, as_text(value)] for key, value in _flattened(environment))
        yield folded("Environment", html_table(["name", "value"], rows, class_="words"))


def _flattened(values: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
