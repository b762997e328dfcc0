"""The page a person opens after a run: `report.html`, written from the files of the run folder.

Owns what the page shows and how it looks, and hides its drawing: charts are inline SVG, so one
file is the whole report and opens without a network. Text becomes HTML in `_tag` alone, which
escapes it. Leaves the measuring to the coordinator: only what the run folder holds is shown, so a
report can be written again at any time, also for a run that failed and whose files lack fields.
"""

import html
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_NOT_METRICS = ("epoch", "step", "learning_rate", "epoch_s", "rows_per_s")
_ROWS_OPEN = 20  # a longer table of epochs is folded
_ROWS_SHOWN = 1_000
_BUCKETS = 100  # a chart of more than twice as many epochs keeps the extremes of each bucket
_DOTS = 30  # up to as many epochs, each value is marked by a dot
_COLORS = 8  # .color0 to .color7 in the style sheet
_FOOTER = "Legends give the last value. Epochs are counted from 1 here, from 0 in metrics.jsonl."
_STATUSES = ("done", "interrupted", "failed")
_WIDTH, _HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 430, 10, 200  # the plot area inside a chart
_ABSENT = "–"
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in {*range(32), 127} - {9, 10}}

# The policy makes the browser itself refuse whatever is not in the file.
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""

_STYLE = """
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--text:#1b2230;--soft:#5d6778;
--line:#dfe3e9;--good:#157347;--warn:#8a5a00;--bad:#b3261e;--color0:#2563eb;--color1:#dd6b10;
--color2:#0d9488;--color3:#be3a84;--color4:#7c5cdb;--color5:#b08900;--color6:#cf3a3a;--color7:#7b8698}
@media(prefers-color-scheme:dark){:root{--page:#10141b;--card:#191f29;--text:#e5e9f0;--soft:#9aa5b6;
--line:#2e3746;--good:#55c98b;--warn:#e6b450;--bad:#ff8a80;--color0:#6ea0ff;--color1:#ff9f4a;
--color2:#3ec9b8;--color3:#ec7bb8;--color4:#ab94ff;--color5:#dcb93c;--color6:#ff7b7b;--color7:#97a3b6}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}
main{max-width:1040px;margin:0 auto;padding:28px 16px 40px}
h1{margin:0;font-size:26px;line-height:1.25;overflow-wrap:anywhere}
h2{margin:34px 0 12px;font-size:18px} h3{margin:0;font-size:15px;overflow-wrap:anywhere}
.note,.legend,footer,dt,th{color:var(--soft);font-size:13px;font-weight:400}
.note{margin:8px 0 0} footer{margin-top:36px}
.head{margin:8px 0 20px;overflow-wrap:anywhere}
.status{margin-right:10px;padding:1px 10px;border:1px solid;border-radius:99px;font-size:13px;
font-weight:600}
.done{color:var(--good)} .interrupted{color:var(--warn)} .failed{color:var(--bad)}
.card,details{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card,details{margin:0;padding:14px 16px} details+details{margin-top:12px}
summary{cursor:pointer;font-weight:600} details>:not(summary){margin-top:12px}
code,pre{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
pre{margin:0;overflow-x:auto} pre+pre{margin-top:12px}
.facts{display:grid;gap:14px 16px}
.facts{grid-template-columns:repeat(auto-fit,minmax(min(145px,44%),1fr))}
dd{margin:0;font-size:18px;font-weight:600;overflow-wrap:anywhere}
.wide{grid-column:1/-1} .wide dd{font-size:14px;font-weight:400}
.charts{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
figure{min-width:0} figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline}
.key{display:inline-block;width:12px;height:12px;margin-right:6px;border-radius:3px}
.key{vertical-align:-1px;background:var(--color)}
svg{display:block;overflow:visible;width:100%;height:auto;margin-top:8px}
text{fill:var(--soft);font-size:12px} .end{text-anchor:end} .middle{text-anchor:middle}
.grid{stroke:var(--line)} .axis{stroke:var(--soft)} .band{fill:transparent}
.curve{fill:none;stroke:var(--color);stroke-width:2;stroke-linecap:round;stroke-linejoin:round}
circle{fill:var(--color);opacity:0} .dots circle,.point:hover circle{opacity:1}
.point:hover .band{fill:var(--soft);fill-opacity:.16}
.bar{height:26px;overflow:hidden;margin:0 0 12px;border-radius:6px} .bar rect{fill:var(--color)}
.scroll{overflow-x:auto} table{border-collapse:collapse;width:100%}
dd,table,.legend{font-variant-numeric:tabular-nums}
th,td{padding:5px 0 5px 16px;text-align:right;border-bottom:1px solid var(--line)}
td{white-space:nowrap} th{vertical-align:bottom} tr:last-child td{border-bottom:0}
th:first-child,td:first-child,.words *{padding-left:0;text-align:left;white-space:normal}
.words td{padding-left:16px;overflow-wrap:anywhere}
""" + "".join(f".color{index}{{--color:var(--color{index})}}" for index in range(_COLORS))


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Reads `summary.json` and, where they exist, `metrics.jsonl`, `job.yaml` and `environment.json`.
    The page appears whole or not at all, and replaces an earlier one; calling again is safe.

    Raises:
        OSError: The summary cannot be read, or the folder cannot be written.
        ValueError: `summary.json` or `environment.json` is not JSON.
    """
    summary = _mapping(json.loads((run_folder / "summary.json").read_text(encoding="utf-8")))
    records = _epoch_records(_read_if_exists(run_folder / "metrics.jsonl"))
    environment = _mapping(json.loads(_read_if_exists(run_folder / "environment.json") or "{}"))
    page = _page(summary, records, _read_if_exists(run_folder / "job.yaml"), environment)
    path = run_folder / "report.html"
    temporary = run_folder / f".report.html.{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            # JSON may carry half of a surrogate pair, which UTF-8 cannot.
            file.write(page.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# Reading: whatever a dead process left behind


def _read_if_exists(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _epoch_records(lines: str) -> list[Record]:
    """The epochs in order; the last line of a repeated epoch wins, a torn line is left out."""
    by_epoch: dict[int, Record] = {}
    for line in lines.split("\n"):
        try:
            record = _mapping(json.loads(line))
        except ValueError:
            continue
        if isinstance(record.get("epoch"), int):
            by_epoch[record["epoch"]] = record
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _mapping(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    """As a float: NaN for what is no number, infinite or 0 beyond what the axes can place."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    if abs(number) > 1e300:
        return math.copysign(math.inf, number)
    return 0.0 if abs(number) < 1e-300 else number


def _metric_names(records: list[Record]) -> list[str]:
    """Names without `val_`, the loss first, the others as they come."""
    names = {
        key.removeprefix("val_"): None
        for record in records
        for key, value in record.items()
        if key not in _NOT_METRICS and (value is None or isinstance(value, int | float))
    }
    return sorted(names, key=lambda name: name != "loss")


# HTML: the one place where text becomes markup


class _Markup(str):
    """Text that is HTML already; any other `str` is escaped."""


def _tag(name: str, *children: str, **attributes: object) -> _Markup:
    """An element; `aria_label` gives the attribute `aria-label`, `class_` gives `class`.

    Floats are positions in a drawing, where one decimal is enough.
    """
    texts = {k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in attributes.items()}
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(text)}"' for key, text in texts.items()
    )
    return _Markup(f"<{name}{written}>{_join(children)}</{name}>")


def _join(parts: Iterable[str]) -> _Markup:
    return _Markup("".join(part if isinstance(part, _Markup) else _escape(part) for part in parts))


def _escape(text: str) -> str:
    return html.escape(text.translate(_CONTROLS))


def _text(value: Any) -> str:
    """A value of a JSON file as a person reads it."""
    if value is None:
        return _ABSENT
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:,.{0 if size >= 1e4 else 1}f}" if 1e3 <= size < 1e15 else f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value)


def _duration(value: Any) -> str:
    seconds = _number(value)
    if not math.isfinite(seconds):
        return _ABSENT
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s" if minutes else f"{seconds:.1f} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def _table(heads: Sequence[str], rows: Iterable[Iterable[str]], class_: str = "") -> _Markup:
    head = _tag("tr", *(_tag("th", text) for text in heads))
    body = (_tag("tr", *(_tag("td", cell) for cell in row)) for row in rows)
    table = _tag("table", _tag("thead", head), _tag("tbody", *body), class_=class_)
    return _tag("div", table, class_="scroll")


def _section(title: str, *content: str, class_: str = "card") -> _Markup:
    """A titled part of the page, or nothing if it would be empty."""
    if not any(content):
        return _Markup()
    return _tag("section", _tag("h2", title), _tag("div", *content, class_=class_))


def _folded(title: str, content: str) -> _Markup:
    return _tag("details", _tag("summary", title), content)


# Charts


@dataclass(frozen=True)
class _Curve:
    """One value an epoch: None where none was written, NaN or infinite where the line breaks."""

    name: str
    color: int
    values: list[float | None]


@dataclass(frozen=True)
class _Axis:
    """Places values between two pixels, on a linear or a logarithmic scale."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high, at = (
            math.log10(edge) if self.is_log else edge for edge in (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, is_whole: bool = False) -> dict[float, str]:
        """Values to mark, with their labels."""
        if self.is_log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            values = [10.0**power for power in range(first, last + 1, (last - first) // 6 + 1)]
        else:
            rough = (self.high - self.low) / 6
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(k * power for k in (1, 2, 5, 10, 20) if k * power >= rough)
            step = max(step, 1.0) if is_whole else step
            first, last = math.ceil(self.low / step), math.floor(self.high / step)
            values = [count * step for count in range(first, last + 1)]
        return {value: f"{value:,.6g}" for value in values}


def _value_axis(curves: list[_Curve], from_zero: bool) -> _Axis:
    finite = [v for curve in curves for v in curve.values if v is not None and math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if low > 0 and high / low >= 100 and not from_zero:
        return _Axis(low / 1.3, high * 1.3, _BOTTOM, _TOP, is_log=True)
    size = max(abs(low), abs(high)) or 1.0
    # A curve that is flat up to rounding must not fill the chart with its noise.
    span = max(high - low, 2e-3 * size) if high > low else size
    middle, reach = (low + high) / 2, 0.56 * span
    bottom = 0.0 if from_zero else max(middle - reach, 0.0) if low >= 0 else middle - reach
    return _Axis(bottom, middle + reach, _BOTTOM, _TOP)


def _sampled(epochs: list[int], curves: list[_Curve]) -> tuple[list[int], list[_Curve]]:
    """The epochs to draw: all, or of each bucket the extremes and a break, so no spike is lost."""
    if len(epochs) <= 2 * _BUCKETS:
        return epochs, curves
    kept = {0, len(epochs) - 1}
    width = math.ceil(len(epochs) / _BUCKETS)
    for curve in curves:
        for start in range(0, len(epochs), width):
            bucket = enumerate(curve.values[start : start + width], start)
            written = [(value, at) for at, value in bucket if value is not None]
            finite = sorted(pair for pair in written if math.isfinite(pair[0]))
            breaks = [pair for pair in written if not math.isfinite(pair[0])]
            kept.update(at for _, at in (*finite[:1], *finite[-1:], *breaks[:1]))
    order = sorted(kept)
    sampled = [_Curve(c.name, c.color, [c.values[at] for at in order]) for c in curves]
    return [epochs[at] for at in order], sampled


def _chart(title: str, records: list[Record], curves: list[_Curve], from_zero: bool = False) -> str:
    """A figure: the last values as legend, axes, curves, tooltips, and a note on what is not drawn.

    Returns nothing if no curve has a value.
    """
    curves = [c for c in curves if any(value is not None for value in c.values)]
    if not curves:
        return ""
    epochs = [record["epoch"] + 1 for record in records]
    margin = 0.5 if len(epochs) == 1 else 0.0
    x = _Axis(epochs[0] - margin, epochs[-1] + margin, _LEFT + 8, _RIGHT - 8)
    y = _value_axis(curves, from_zero)
    drawn, sampled = _sampled(epochs, curves)
    drawing = _tag(
        "svg",
        _grid(x, y),
        *(_tag("path", class_=f"curve color{c.color}", d=_path(c, drawn, x, y)) for c in sampled),
        _tag("g", *_points(drawn, sampled, x, y), class_="dots" if len(drawn) <= _DOTS else ""),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title} by epoch",
    )
    heading = _tag("h3", f"{title} (log scale)" if y.is_log else title)
    caption = _tag("figcaption", heading, *map(_legend, curves))
    notes = (_tag("p", note, class_="note") for c in curves if (note := _breaks(epochs, c)))
    return _tag("figure", caption, drawing, *notes, class_="card")


def _legend(curve: _Curve) -> _Markup:
    last = next(value for value in reversed(curve.values) if value is not None)
    key = _tag("span", class_=f"key color{curve.color}")
    return _tag("span", key, f"{curve.name} {_text(last)}", class_="legend")


def _breaks(epochs: list[int], curve: _Curve) -> str:
    pairs = zip(epochs, curve.values, strict=True)
    at = [str(epoch) for epoch, v in pairs if v is not None and not math.isfinite(v)]
    more = f" and {len(at) - 5:,} more" if len(at) > 5 else ""
    return f"Not finite, not drawn: {curve.name}, epoch {', '.join(at[:5])}{more}." if at else ""


def _grid(x: _Axis, y: _Axis) -> _Markup:
    """Axes with ticks, and a line across at each tick of the value axis."""
    parts = []
    for value, label in y.ticks().items():
        at = y.place(value)
        parts.append(_tag("line", x1=_LEFT, y1=at, x2=_RIGHT, y2=at, class_="grid"))
        parts.append(_tag("text", label, x=_LEFT - 6, y=at + 4, class_="end"))
    for value, label in x.ticks(is_whole=True).items():
        at = x.place(value)
        parts.append(_tag("line", x1=at, y1=_BOTTOM, x2=at, y2=_BOTTOM + 4, class_="axis"))
        parts.append(_tag("text", label, x=at, y=_BOTTOM + 18, class_="middle"))
    parts.append(_tag("line", x1=_LEFT, y1=_BOTTOM, x2=_RIGHT, y2=_BOTTOM, class_="axis"))
    middle = (_LEFT + _RIGHT) / 2
    return _join([*parts, _tag("text", "epoch", x=middle, y=_HEIGHT - 4, class_="middle")])


def _path(curve: _Curve, epochs: list[int], x: _Axis, y: _Axis) -> str:
    """Lines between the values; `h0` makes a value without neighbours a dot (round line caps)."""
    steps, pen = [], "M"
    for epoch, value in zip(epochs, curve.values, strict=True):
        if value is None:
            continue
        if not math.isfinite(value):
            pen = "M"
            continue
        steps.append(f"{pen}{x.place(epoch):.1f} {y.place(value):.1f}{'h0' if pen == 'M' else ''}")
        pen = "L"
    return "".join(steps)


def _points(epochs: list[int], curves: list[_Curve], x: _Axis, y: _Axis) -> Iterator[_Markup]:
    """For each epoch a transparent band to hover over, its dots, and its values as the tooltip."""
    at = [x.place(epoch) for epoch in epochs]
    edges = [_LEFT, *((left + right) / 2 for left, right in pairwise(at)), _RIGHT]
    for index, epoch in enumerate(epochs):
        values = [(c, v) for c in curves if (v := c.values[index]) is not None]
        texts = [f"epoch {epoch:,}", *(f"{curve.name} {_text(value)}" for curve, value in values)]
        left, right = edges[index], edges[index + 1]
        band = {"x": left, "y": _TOP, "width": right - left, "height": _BOTTOM - _TOP}
        dots = (
            _tag("circle", class_=f"color{c.color}", cx=at[index], cy=y.place(v), r=3)
            for c, v in values
            if math.isfinite(v)
        )
        title = _tag("title", "\n".join(texts))
        yield _tag("g", title, _tag("rect", class_="band", **band), *dots, class_="point")


# The page


def _page(summary: Record, records: list[Record], job: str, environment: Record) -> str:
    name, run_id = _text(summary.get("job")), _text(summary.get("run_id"))
    status = _text(summary.get("status"))
    failure = [_tag("pre", _text(summary[k])) for k in ("error", "traceback") if summary.get(k)]
    title = _tag("title", f"{name} · {run_id} · {status}")
    pill = _tag("span", status, class_=f"status {status if status in _STATUSES else ''}")
    body = _tag(
        "main",
        _tag("h1", name),
        _tag("div", pill, "run ", _tag("code", run_id), class_="head"),
        _facts(summary),
        _section("What went wrong", *failure),
        _section("Final metrics", _final_metrics(_mapping(summary.get("metrics")))),
        _section("Learning curves", *_curves(records), class_="charts"),
        _section("Where the time went", *_goodput(_mapping(summary.get("goodput")))),
        _section("Recoveries", _recoveries(summary.get("recoveries"))),
        _section("Epochs", _epochs(records), class_=""),
        _section("Set-up", *_setup(job, environment), class_=""),
        _tag("footer", _FOOTER),
    )
    return (
        _HEAD + title + _tag("style", _Markup(_STYLE)) + "</head><body>" + body + "</body></html>\n"
    )


def _facts(summary: Record) -> _Markup:
    fields = ("workers", "epochs", "steps", "rows_seen", "rows_per_s")
    texts = {key: _text(summary.get(key)) for key in fields}
    texts["wall time"] = _duration(summary.get("wall_s"))
    facts = [_tag("div", _tag("dt", key), _tag("dd", text)) for key, text in texts.items()]
    artifact = _tag("dd", _tag("code", _text(summary.get("artifact"))))
    wide = _tag("div", _tag("dt", "artifact"), artifact, class_="wide")
    return _tag("dl", *facts, wide, class_="card facts")


def _final_metrics(metrics: Record) -> _Markup:
    """A row a metric; the columns are those of train, validation, test and constant with values."""
    kinds = ("train", "validation", "test", "constant")
    columns = {kind: column for kind in kinds if (column := _mapping(metrics.get(kind)))}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(_text(c.get(name)) for c in columns.values())] for name in names]
    titles = ["best constant prediction" if kind == "constant" else kind for kind in columns]
    return _table(["metric", *titles], rows) if rows else _Markup()


def _curves(records: list[Record]) -> Iterator[str]:
    for name in _metric_names(records):
        train = _curve(records, name, "train", 0)
        yield _chart(name, records, [train, _curve(records, f"val_{name}", "validation", 1)])
    yield _chart("learning_rate", records, [_curve(records, "learning_rate", "rate", 4)])
    throughput = _curve(records, "rows_per_s", "throughput", 2)
    yield _chart("rows_per_s", records, [throughput], from_zero=True)


def _curve(records: list[Record], key: str, name: str, color: int) -> _Curve:
    values = [_number(record[key]) if key in record else None for record in records]
    return _Curve(name, color, values)


def _goodput(goodput: Record) -> Iterator[_Markup]:
    """A stacked bar of seconds, and the table that is its legend."""
    seconds = {key: _number(_mapping(part).get("seconds")) for key, part in goodput.items()}
    seconds = {key: value for key, value in seconds.items() if math.isfinite(value)}
    total_s = sum(seconds.values())
    if not total_s > 0:
        return
    bars, rows, start = [], [], 0.0
    for index, (key, value) in enumerate(seconds.items()):
        color, width = index % _COLORS, 1000 * value / total_s
        share = f"{_number(goodput[key].get('share', value / total_s)):.1%}"
        title = _tag("title", f"{key} {_duration(value)}, {share}")
        bar = {"x": start, "width": width, "height": 10}
        bars.append(_tag("rect", title, class_=f"color{color}", **bar))
        name = _join([_tag("span", class_=f"key color{color}"), key])
        rows.append([name, f"{value:,.1f}", share])
        start += width
    shape = {"viewBox": "0 0 1000 10", "preserveAspectRatio": "none"}
    yield _tag("svg", *bars, class_="bar", role="img", aria_label="Where the time went", **shape)
    yield _table(["part", "seconds", "share"], rows)


def _recoveries(recoveries: Any) -> _Markup:
    records = map(_mapping, recoveries if isinstance(recoveries, list) else [])
    keys = ("kind", "detected_s", "recovered_s", "steps_replayed")
    rows = [[_text(record.get(key)) for key in keys] for record in records]
    return _table(keys, rows) if rows else _Markup()


def _epochs(records: list[Record]) -> _Markup:
    if not records:
        return _tag("p", "No epoch was completed.", class_="card")
    keys = list(dict.fromkeys(key for r in records for key in r if key != "epoch"))
    shown = records[-_ROWS_SHOWN:]
    rows = ([str(r["epoch"] + 1), *(_text(r.get(key)) for key in keys)] for r in shown)
    table = _table(["epoch", *keys], rows)
    if len(records) <= _ROWS_OPEN:
        return _tag("div", table, class_="card")
    last = f"the last {len(shown):,} of " if len(shown) < len(records) else ""
    return _folded(f"Table of {last}{len(records):,} epochs", table)


def _setup(job: str, environment: Record) -> Iterator[_Markup]:
    if job:
        yield _folded("job.yaml", _tag("pre", job))
    if environment:
        rows = ([key, _text(value)] for key, value in _flattened(environment))
        yield _folded("Environment", _table(["name", "value"], rows, class_="words"))


def _flattened(values: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
