"""The page of a pipeline's run: the candidate beside the champion, and why the run ended so.

Shows what `decision.json` in the run's folder holds, and nothing else, so that it can be written
again at any time.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.charts import Axis
from trainer.page import (
    Markup,
    Record,
    as_number,
    as_text,
    duration,
    html_table,
    join,
    mapping,
    section,
    tag,
    whole_page,
    write_page,
)

_WIDTH, _LEFT, _RIGHT, _TOP = 440, 120, 425, 10
_BAR, _GAP = 11, 10  # height of a bar, and space between two values
_LETTERS = 18  # of a name that have room beside a chart; hovering shows all
_MAX_VALUES = 40  # of a column; a chart of more is a table
_COMPARED = ("worse", "at_most", "allowed")
_CANDIDATE, _CHAMPION = 0, 1  # colours
_CLASS_OF = {"promoted": "done", "kept": "interrupted"}
_RESULT_OF = {True: "passed", False: "failed", None: "not judged"}


def write_retrain_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path.

    The page appears whole or not at all, and replaces an earlier one.

    Raises:
        OSError: `decision.json` cannot be read, or the folder cannot be written.
        ValueError: It is not JSON.
    """
    record = mapping(json.loads((folder / "decision.json").read_text(encoding="utf-8")))
    path = folder / "report.html"
    write_page(path, _page(record))
    return path


def _page(record: Record) -> str:
    name, decision = as_text(record.get("pipeline")), as_text(record.get("decision"))
    trial = mapping(record.get("trial"))
    candidate, champion = mapping(trial.get("candidate")), mapping(trial.get("champion"))
    checks = [mapping(check) for check in record.get("checks") or []]
    pill = tag("span", decision, class_=f"status {_CLASS_OF.get(decision, '')}")
    reasons = [tag("p", as_text(reason)) for reason in record.get("reasons") or []]
    ours, theirs = mapping(candidate.get("metrics")), mapping(champion.get("metrics"))
    return whole_page(
        f"{name} · {as_text(record.get('run_id'))} · {decision}",
        tag("h1", name),
        tag("div", pill, "run ", tag("code", as_text(record.get("run_id"))), class_="head"),
        _facts(record, trial),
        section("Why", *reasons),
        section("Metrics on the frozen rows", _metrics(ours, theirs)),
        section("How sure it is", *_intervals(checks), class_="charts"),
        section("By slice", *_slices(candidate, champion), class_="charts"),
        section("Checks", _checks(checks)),
        tag("footer", "Bars and values: candidate and champion on the same rows."),
    )


def _facts(record: Record, trial: Record) -> Markup:
    model = as_text(record.get("model"))
    numbers = {"candidate": record.get("version"), "champion before": record.get("champion")}
    texts = {key: f"{model}/{n}" if n is not None else as_text(None) for key, n in numbers.items()}
    texts["rows that judged"] = as_text(trial.get("rows"))
    texts["new files"] = as_text(len(record.get("new_files") or []))
    texts["training"] = duration(record.get("wall_s"))
    for key, value in mapping(trial.get("latency_ms")).items():
        texts[key.removesuffix("_ms").replace("_", " ")] = f"{as_number(value):.3g} ms"
    texts["artifact"] = f"{as_number(trial.get('size_bytes')) / 1e6:.3g} MB"
    facts = [tag("div", tag("dt", key), tag("dd", text)) for key, text in texts.items()]
    folder = tag("dd", tag("code", as_text(record.get("run_folder"))))
    wide = tag("div", tag("dt", "training run"), folder, class_="wide")
    return tag("dl", *facts, wide, class_="card facts")


def _metrics(ours: Record, theirs: Record) -> Markup:
    rows = [
        [
            name,
            as_text(ours.get(name)),
            as_text(theirs.get(name)),
            _change(as_number(ours.get(name)), as_number(theirs.get(name))),
        ]
        for name in dict.fromkeys([*ours, *theirs])
    ]
    return html_table(["metric", "candidate", "champion", "change"], rows) if rows else Markup()


def _change(ours: float, theirs: float) -> str:
    if not math.isfinite(ours) or not math.isfinite(theirs) or theirs == 0:
        return as_text(None)
    return f"{100 * (ours - theirs) / abs(theirs):+.2f} %"


def _checks(checks: list[Record]) -> Markup:
    rows = [
        [
            _RESULT_OF.get(check.get("is_passed"), as_text(None)),
            as_text(check.get("kind")).replace("_", " "),
            as_text(check.get("where")) or "all rows",
            as_text(check.get("reason")),
        ]
        for check in checks
    ]
    return html_table(["result", "check", "where", "because"], rows, "words") if rows else Markup()


def _intervals(checks: list[Record]) -> Iterator[str]:
    """Comparisons with their doubt, those of one unit in one chart."""
    charts: dict[str, list[tuple[Record, Record]]] = {}
    for check in checks:
        numbers = mapping(check.get("numbers"))
        if all(math.isfinite(as_number(numbers.get(key))) for key in _COMPARED):
            unit = "parts of its value" if numbers.get("is_relative") else check.get("metric")
            charts.setdefault(as_text(unit), []).append((check, numbers))
    for unit, compared in charts.items():
        yield _interval_chart(f"Worse than the champion, in {unit}", compared)


def _interval_chart(title: str, compared: list[tuple[Record, Record]]) -> Markup:
    """For each comparison: how much worse, up to how much with confidence, and what is allowed."""
    values = [as_number(n[key]) for _, n in compared for key in _COMPARED]
    axis = _axis([*values, 0.0])
    parts, y = [], float(_TOP)
    for check, numbers in compared:
        worse, at_most = as_number(numbers["worse"]), as_number(numbers["at_most"])
        allowed = axis.place(as_number(numbers["allowed"]))
        label = " ".join(filter(None, [as_text(check.get("metric")), check.get("where")]))
        first, last = axis.place(worse), axis.place(at_most)
        middle = y + _BAR / 2
        color = 2 if check.get("is_passed") else 6
        hover = tag("title", as_text(check.get("reason")))
        parts += [
            tag("text", label[:_LETTERS], x=_LEFT - 8, y=middle + 4, class_="end"),
            tag("line", x1=allowed, y1=y - 3, x2=allowed, y2=y + _BAR + 3, class_="axis"),
            tag(
                "path",
                hover,
                d=f"M{first:.1f} {middle:.1f}H{last:.1f}",
                class_=f"curve color{color}",
            ),
            tag(
                "g",
                tag("circle", cx=first, cy=middle, r=4, class_=f"color{color}"),
                class_="dots",
            ),
        ]
        y += _BAR + _GAP
    zero = axis.place(0.0)
    parts.append(tag("line", x1=zero, y1=0, x2=zero, y2=y, class_="grid"))
    note = (
        "How much worse than the champion: the dot is what was measured, the line reaches to what "
        "it is at most with the confidence asked for, the mark is what is allowed."
    )
    return _figure(title, parts, y, axis, note)


def _slices(candidate: Record, champion: Record) -> Iterator[str]:
    ours, theirs = mapping(candidate.get("slices")), mapping(champion.get("slices"))
    for column, values in ours.items():
        judged = {value: mapping(metrics) for value, metrics in mapping(values).items()}
        names = dict.fromkeys(name for metrics in judged.values() for name in metrics)
        for name in names:
            pairs = {
                value: (
                    as_number(metrics.get(name)),
                    as_number(mapping(mapping(theirs.get(column)).get(value)).get(name)),
                )
                for value, metrics in judged.items()
            }
            if len(pairs) <= _MAX_VALUES:
                yield _bars(f"{name} by {column}", pairs)
            else:
                rows = [[key, as_text(a), as_text(b)] for key, (a, b) in pairs.items()]
                table = html_table([column, "candidate", "champion"], rows)
                yield tag("div", tag("h3", f"{name} by {column}"), table, class_="card")


def _bars(title: str, pairs: Mapping[str, tuple[float, float]]) -> Markup:
    """Two bars for each value."""
    finite = [number for pair in pairs.values() for number in pair if math.isfinite(number)]
    axis = _axis([*finite, 0.0])
    zero = axis.place(0.0)
    parts, y = [], float(_TOP)
    for value, pair in pairs.items():
        parts.append(tag("text", value[:_LETTERS], x=_LEFT - 8, y=y + _BAR + 4, class_="end"))
        for color, number in zip((_CANDIDATE, _CHAMPION), pair, strict=True):
            if math.isfinite(number):
                left, right = sorted((zero, axis.place(number)))
                who = "candidate" if color == _CANDIDATE else "champion"
                hover = tag("title", f"{value}: {who} {as_text(number)}")
                shape: dict[str, Any] = {"x": left, "y": y, "width": right - left, "height": _BAR}
                style = f"fill:var(--color{color})"
                parts.append(tag("rect", hover, style=style, **shape))
            y += _BAR
        y += _GAP
    keys = [
        tag("span", tag("span", class_=f"key color{color}"), who, class_="legend")
        for color, who in ((_CANDIDATE, "candidate"), (_CHAMPION, "champion"))
    ]
    return _figure(title, parts, y, axis, "", *keys)


def _figure(
    title: str, parts: list[Markup], height: float, axis: Axis, note: str, *keys: Markup
) -> Markup:
    grid = []
    for value, label in axis.ticks().items():
        at = axis.place(value)
        grid.append(tag("line", x1=at, y1=0, x2=at, y2=height, class_="grid"))
        grid.append(tag("text", label, x=at, y=height + 16, class_="middle"))
    drawing = tag(
        "svg",
        join([*grid, *parts]),
        viewBox=f"0 0 {_WIDTH} {height + 22:.0f}",
        role="img",
        aria_label=title,
    )
    notes = [tag("p", note, class_="note")] if note else []
    return tag("figure", tag("figcaption", tag("h3", title), *keys), drawing, *notes, class_="card")


def _axis(values: list[float]) -> Axis:
    """An axis across, from the least to the greatest value."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.5
    low = low - room if low < 0 else low
    high = high + room if high > 0 else high
    return Axis(low, high if high > low else low + 1.0, float(_LEFT), float(_RIGHT))
