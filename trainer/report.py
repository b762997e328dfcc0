"""The page a person opens after a run: `report.html`, written from the files of the run folder.

Owns what the page shows and how it looks, and hides its drawing: charts are inline SVG, so one file
is the whole report and opens without a network. Text becomes HTML in `_tag` alone, which escapes it.
Leaves the measuring to the coordinator: only what the run folder holds is shown, so a report can be
written again at any time, also for a run that failed and whose files lack fields.
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
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--text:#1b2230;--soft:#5d6778;--line:#dfe3e9;
--good:#157347;--warn:#8a5a00;--bad:#b3261e;--color0:#2563eb;--color1:#dd6b10;--color2:#0d9488;
--color3:#be3a84;--color4:#7c5cdb;--color5:#b08900;--color6:#cf3a3a;--color7:#7b8698}
@media(prefers-color-scheme:dark){:root{--page:#10141b;--card:#191f29;--text:#e5e9f0;--soft:#9aa5b6;
--line:#2e3746;--good:#55c98b;--warn:#e6b450;--bad:#ff8a80;--color0:#6ea0ff;--color1:#ff9f4a;
--color2:#3ec9b8;--color3:#ec7bb8;--color4:#ab94ff;--color5:#dcb93c;--color6:#ff7b7b;--color7:#97a3b6}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}
main{max-width:1040px;margin:0 auto;padding:28px 16px 40px}
h1{margin:0;font-size:26px;line-height:1.25;overflow-wrap:anywhere}
h2{margin:34px 0 12px;font-size:18px}h3{margin:0;font-size:15px;overflow-wrap:anywhere}
.soft,.note,footer{color:var(--soft)}.note,footer{font-size:13px;margin:8px 0 0}footer{margin-top:36px}
.status{display:inline-block;margin-right:10px;padding:0 10px;border:1px solid;border-radius:99px;
font-size:13px;font-weight:600}
.done{color:var(--good)}.interrupted{color:var(--warn)}.failed{color:var(--bad)}
.head{margin:8px 0 20px;overflow-wrap:anywhere}
code,pre{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}pre{margin:0;overflow-x:auto}
.card,details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.facts{display:grid;gap:14px 20px;margin:0;grid-template-columns:repeat(auto-fit,minmax(130px,1fr))}
.facts .wide{grid-column:1/-1}dt{color:var(--soft);font-size:13px}
dd{margin:0;font-size:19px;font-weight:600;font-variant-numeric:tabular-nums}
.wide dd{font-size:14px;font-weight:400;overflow-wrap:anywhere}
.charts{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
figure{margin:0;min-width:0}figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline}
.legend{color:var(--soft);font-size:13px;font-variant-numeric:tabular-nums}
.key{display:inline-block;width:12px;height:12px;margin-right:6px;border-radius:3px;
vertical-align:-1px;background:var(--color)}
svg{display:block;width:100%;height:auto}.chart{margin-top:8px}
.chart text{fill:var(--soft);font-size:12px}.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
.curve{fill:none;stroke:var(--color);stroke-width:2;stroke-linecap:round;stroke-linejoin:round}
.band{fill:transparent}.point circle{fill:var(--color);opacity:0}
.dots circle,.point:hover circle{opacity:1}.point:hover .band{fill:var(--soft);fill-opacity:.16}
.bar{height:26px;margin-bottom:12px;border-radius:6px}.bar rect{fill:var(--color)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px 5px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
tr:last-child td{border-bottom:0}th{color:var(--soft);font-size:13px;font-weight:500}
th:first-child,td:first-child,.words td,.words th{text-align:left}.words td{white-space:normal;
overflow-wrap:anywhere}
summary{cursor:pointer;font-weight:600}details>:not(summary){margin-top:12px}
details+details{margin-top:12px}
""" + "".join(f".color{index}{{--color:var(--color{index})}}" for index in range(_COLORS))


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Reads `summary.json` and, where they exist, `metrics.jsonl`, `job.yaml` and `environment.json`.
    The page appears whole or not at all, and replaces an earlier one; calling again is safe.

    Raises:
        OSError: The summary cannot be read, or the folder cannot be written.
        ValueError: `summary.json` or `environment.json` is not JSON.
    """
    summary = _mapping(json.loads(_read(run_folder / "summary.json")))
    environment = _mapping(json.loads(_read_if_exists(run_folder / "environment.json") or "{}"))
    records = _read_records(_read_if_exists(run_folder / "metrics.jsonl"))
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


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _read_if_exists(path: Path) -> str:
    return _read(path) if path.exists() else ""


def _read_records(lines: str) -> list[Record]:
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
    """As a float: NaN for what is no number, infinite or 0 beyond what the axes can compute with."""
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
    """An element; the keyword `aria_label` gives the attribute `aria-label`, `class_` gives `class`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(str(value))}"'
        for key, value in attributes.items()
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
        return f"{value:,.{0 if size >= 1e5 else 1}f}" if 1e3 <= size < 1e15 else f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value)


def _duration(value: Any) -> str:
    seconds = _number(value)
    if not math.isfinite(seconds):
        return _ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest_s:02d} s"


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
            powers = range(first, last + 1, (last - first) // 6 + 1)
            return {10.0**power: f"{10.0**power:g}" for power in powers}
        rough = (self.high - self.low) / 5
        power_of_ten = 10.0 ** math.floor(math.log10(rough))
        step = next(k * power_of_ten for k in (1, 2, 5, 10) if k * power_of_ten >= rough * 0.999)
        step = max(step, 1.0) if is_whole else step
        counts = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return {count * step: _tick_label(count * step, step, self.high) for count in counts}


def _tick_label(value: float, step: float, largest: float) -> str:
    """With as many decimals as tell neighbours apart; thousands as k, M, G, T."""
    largest = max(abs(value), abs(largest))
    if value and not 1e-3 <= largest < 1e15:
        return f"{value:.{max(0, math.floor(math.log10(largest / step)))}e}"
    group = int(math.log10(largest) // 3) if largest >= 1e4 else 0
    unit = 1000.0**group
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    return f"{value / unit:.{decimals}f}{('', 'k', 'M', 'G', 'T')[group]}" if value else "0"


def _value_axis(curves: list[_Curve], from_zero: bool) -> _Axis:
    finite = [v for curve in curves for v in curve.values if v is not None and math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if low > 0 and high / low >= 100 and not from_zero:
        return _Axis(low / 1.3, high * 1.3, _BOTTOM, _TOP, is_log=True)
    # A curve that is flat up to rounding must not fill the chart with its noise.
    span = max(high - low, 1e-4 * max(abs(low), abs(high))) or 1.0
    bottom = (low + high - span) / 2 - 0.06 * span
    if from_zero or low >= 0:
        bottom = 0.0 if from_zero else max(bottom, 0.0)
    return _Axis(bottom, (low + high + span) / 2 + 0.06 * span, _BOTTOM, _TOP)


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


def _chart(title: str, epochs: list[int], curves: list[_Curve], from_zero: bool = False) -> _Markup:
    """A figure: legend with the last values, axes, curves, a tooltip an epoch, what is not drawn."""
    y = _value_axis(curves, from_zero)
    margin = 0.5 if epochs[0] == epochs[-1] else 0.0
    x = _Axis(epochs[0] - margin, epochs[-1] + margin, _LEFT + 8, _RIGHT - 8)
    drawn, sampled = _sampled(epochs, curves)
    drawing = _tag(
        "svg",
        _grid(x, y),
        *(_tag("path", class_=f"curve color{c.color}", d=_path(c, drawn, x, y)) for c in sampled),
        _tag("g", *_points(drawn, sampled, x, y), class_="dots" if len(drawn) <= _DOTS else ""),
        class_="chart",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title} by epoch",
    )
    scale = " (log scale)" if y.is_log else ""
    caption = _tag("figcaption", _tag("h3", title + scale), *map(_legend, curves))
    notes = (_tag("p", note, class_="note") for note in _breaks(epochs, curves))
    return _tag("figure", caption, drawing, *notes, class_="card")


def _key(color: int) -> _Markup:
    return _tag("span", class_=f"key color{color}")


def _legend(curve: _Curve) -> _Markup:
    last = next((value for value in reversed(curve.values) if value is not None), None)
    return _tag("span", _key(curve.color), f"{curve.name} {_text(last)}", class_="legend")


def _breaks(epochs: list[int], curves: list[_Curve]) -> Iterator[str]:
    for curve in curves:
        pairs = zip(epochs, curve.values, strict=True)
        at = [str(epoch) for epoch, v in pairs if v is not None and not math.isfinite(v)]
        if at:
            more = f" and {len(at) - 5:,} more" if len(at) > 5 else ""
            yield f"Not finite, not drawn: {curve.name}, epoch {', '.join(at[:5])}{more}."


def _grid(x: _Axis, y: _Axis) -> _Markup:
    """Axes with ticks, and a line across at each tick of the value axis."""
    parts = [_line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis")]
    for value, label in y.ticks().items():
        at = y.place(value)
        parts += [_line(_LEFT, at, _RIGHT, at, "grid"), _label(_LEFT - 6, at + 4, label, "end")]
    for value, label in x.ticks(is_whole=True).items():
        at = x.place(value)
        parts += [_line(at, _BOTTOM, at, _BOTTOM + 4, "axis")]
        parts += [_label(at, _BOTTOM + 18, label, "middle")]
    parts += [_label((_LEFT + _RIGHT) / 2, _HEIGHT - 4, "epoch", "middle")]
    return _join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> _Markup:
    return _tag("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_=class_)


def _label(x: float, y: float, text: str, class_: str) -> _Markup:
    return _tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_)


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
        size = {"width": f"{edges[index + 1] - edges[index]:.1f}", "height": _BOTTOM - _TOP}
        band = _tag("rect", class_="band", x=f"{edges[index]:.1f}", y=_TOP, **size)
        dots = [
            _tag(
                "circle",
                class_=f"color{c.color}",
                cx=f"{at[index]:.1f}",
                cy=f"{y.place(v):.1f}",
                r=3,
            )
            for c, v in values
            if math.isfinite(v)
        ]
        yield _tag("g", _tag("title", "\n".join(texts)), band, *dots, class_="point")


# The page


def _page(summary: Record, records: list[Record], job: str, environment: Record) -> str:
    name, run_id = _text(summary.get("job")), _text(summary.get("run_id"))
    status = _text(summary.get("status"))
    title = _tag("title", f"{name} · {run_id} · {status}")
    pill = _tag("span", status, class_=f"status {status if status in _STATUSES else ''}")
    body = _tag(
        "main",
        _tag("h1", name),
        _tag("div", pill, "run ", _tag("code", run_id), class_="head"),
        _facts(summary),
        _section("What went wrong", *_failure(summary)),
        _section("Final metrics", _final_metrics(_mapping(summary.get("metrics")))),
        _section("Learning curves", *_curves(records), class_="charts"),
        _section("Where the time went", *_goodput(_mapping(summary.get("goodput")))),
        _section("Recoveries", _recoveries(summary.get("recoveries"))),
        _section("Epochs", _epochs(records), class_=""),
        _section("Set-up", *_setup(job, environment), class_=""),
        _tag("footer", "Epochs are counted from 1 here, from 0 in metrics.jsonl."),
    )
    return (
        _HEAD + title + _tag("style", _Markup(_STYLE)) + "</head><body>" + body + "</body></html>\n"
    )


def _facts(summary: Record) -> _Markup:
    texts = {
        "workers": _text(summary.get("workers")),
        "epochs": _text(summary.get("epochs")),
        "steps": _text(summary.get("steps")),
        "rows seen": _text(summary.get("rows_seen")),
        "rows/s": _text(summary.get("rows_per_s")),
        "wall time": _duration(summary.get("wall_s")),
    }
    facts = [_tag("div", _tag("dt", key), _tag("dd", text)) for key, text in texts.items()]
    artifact = _tag("dd", _tag("code", _text(summary.get("artifact"))))
    wide = _tag("div", _tag("dt", "artifact"), artifact, class_="wide")
    return _tag("dl", *facts, wide, class_="card facts")


def _failure(summary: Record) -> Iterator[_Markup]:
    for key in ("error", "traceback"):
        if summary.get(key):
            yield _tag("pre", _text(summary[key]))


def _final_metrics(metrics: Record) -> _Markup:
    """A row a metric; the columns are those of train, validation, test and constant with values."""
    titles = {"train": "train", "validation": "validation", "test": "test"}
    titles["constant"] = "best constant prediction, on test"
    columns = {key: column for key in titles if (column := _mapping(metrics.get(key)))}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(_text(c.get(name)) for c in columns.values())] for name in names]
    return _table(["metric", *(titles[key] for key in columns)], rows) if rows else _Markup()


def _curves(records: list[Record]) -> Iterator[_Markup]:
    epochs = [record["epoch"] + 1 for record in records]
    for name in _metric_names(records):
        curves = [
            _curve(records, name, "train", 0),
            _curve(records, f"val_{name}", "validation", 1),
        ]
        yield _chart(name, epochs, [c for c in curves if _has_values(c)])
    rate = _curve(records, "learning_rate", "train", 4)
    if _has_values(rate):
        yield _chart("learning_rate", epochs, [rate])
    throughput = _curve(records, "rows_per_s", "train", 2)
    if _has_values(throughput):
        yield _chart("rows_per_s", epochs, [throughput], from_zero=True)


def _curve(records: list[Record], key: str, name: str, color: int) -> _Curve:
    values = [_number(record[key]) if key in record else None for record in records]
    return _Curve(name, color, values)


def _has_values(curve: _Curve) -> bool:
    return any(value is not None for value in curve.values)


def _goodput(goodput: Record) -> Iterator[_Markup]:
    """A stacked bar of seconds, and the table that is its legend."""
    seconds = {key: _number(_mapping(part).get("seconds")) for key, part in goodput.items()}
    seconds = {key: value for key, value in seconds.items() if math.isfinite(value)}
    total_s = sum(seconds.values())
    if not total_s > 0:
        return
    bars, rows, start = [], [], 0.0
    for index, (key, value) in enumerate(seconds.items()):
        share, color = value / total_s, index % _COLORS
        text = f"{share:.1%}"
        title = _tag("title", f"{key} {_duration(value)}, {text}")
        place = {"x": f"{1000 * start:.2f}", "width": f"{1000 * share:.2f}", "height": 10}
        bars.append(_tag("rect", title, class_=f"color{color}", **place))
        rows.append([_join([_key(color), key]), f"{value:,.1f}", text])
        start += share
    shape = {"viewBox": "0 0 1000 10", "preserveAspectRatio": "none"}
    yield _tag("svg", *bars, class_="bar", role="img", aria_label="Where the time went", **shape)
    yield _table(["", "seconds", "share"], rows)


def _recoveries(recoveries: Any) -> _Markup:
    records = [_mapping(record) for record in recoveries or []]
    keys = ("kind", "detected_s", "recovered_s", "steps_replayed")
    rows = [[_text(record.get(key)) for key in keys] for record in records]
    return _table(keys, rows) if rows else _Markup()


def _epochs(records: list[Record]) -> _Markup:
    if not records:
        return _tag("p", "No epoch was completed.", class_="card")
    keys = dict.fromkeys(key for record in records for key in record)
    shown = records[-_ROWS_SHOWN:]
    rows = ([str(r["epoch"] + 1), *(_text(r.get(k)) for k in keys if k != "epoch")] for r in shown)
    table = _table(["epoch", *(key for key in keys if key != "epoch")], rows)
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
