"""What pages of reports are made of: markup, style, and the words for values.

Text becomes HTML in `tag` alone, which escapes it. A page is one file that opens without a network:
charts are inline SVG, and the browser itself is told to refuse whatever is not in the file.
"""

import html
import json
import math
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

COLORS = 8
"""`.color0` to `.color7` in the style sheet."""

ABSENT = "–"
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in {*range(32), 127} - {9, 10}}

# The policy makes the browser itself refuse whatever is not in the file.
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""

STYLE = """
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
""" + "".join(f".color{index}{{--color:var(--color{index})}}" for index in range(COLORS))


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all, in place of an earlier one.

    Raises OSError where the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            # JSON may carry half of a surrogate pair, which UTF-8 cannot.
            file.write(page.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def whole_page(title: str, *content: str) -> str:
    """A page with its style."""
    named = tag("title", title)
    style = tag("style", Markup(STYLE))
    return HEAD + named + style + "</head><body>" + tag("main", *content) + "</body></html>\n"


def mapping(value: Any) -> Record:
    """A mapping as it is; of anything else nothing."""
    return value if isinstance(value, dict) else {}


def as_number(value: Any) -> float:
    """As a float: NaN for what is no number, infinite or 0 beyond what the axes can place."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    if abs(number) > 1e300:
        return math.copysign(math.inf, number)
    return 0.0 if abs(number) < 1e-300 else number


class Markup(str):
    """Text that is HTML already; any other `str` is escaped."""


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; `aria_label` gives the attribute `aria-label`, `class_` gives `class`.

    Floats are positions in a drawing, where one decimal is enough.
    """
    texts = {k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in attributes.items()}
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(text)}"' for key, text in texts.items()
    )
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """Parts one after the other; text becomes HTML."""
    return Markup("".join(part if isinstance(part, Markup) else _escape(part) for part in parts))


def _escape(text: str) -> str:
    return html.escape(text.translate(_CONTROLS))


def as_text(value: Any) -> str:
    """A value of a JSON file as a person reads it."""
    if value is None:
        return ABSENT
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:,.{0 if size >= 1e4 else 1}f}" if 1e3 <= size < 1e15 else f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value)


def duration(value: Any) -> str:
    """Seconds as a person reads them."""
    seconds = as_number(value)
    if not math.isfinite(seconds):
        return ABSENT
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s" if minutes else f"{seconds:.1f} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def html_table(heads: Sequence[str], rows: Iterable[Iterable[str]], class_: str = "") -> Markup:
    """A table that scrolls by itself where it is wide."""
    head = tag("tr", *(tag("th", text) for text in heads))
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    table = tag("table", tag("thead", head), tag("tbody", *body), class_=class_)
    return tag("div", table, class_="scroll")


def section(title: str, *content: str, class_: str = "card") -> Markup:
    """A titled part of the page, or nothing if it would be empty."""
    if not any(content):
        return Markup()
    return tag("section", tag("h2", title), tag("div", *content, class_=class_))


def folded(title: str, content: str) -> Markup:
    """A part of the page that is shown on demand."""
    return tag("details", tag("summary", title), content)
