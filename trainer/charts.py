"""Curves over epochs, drawn as inline SVG."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from trainer.page import Markup, Record, as_text, join, tag

_BUCKETS = 100  # a chart of more than twice as many epochs keeps the extremes of each bucket
_DOTS = 30  # up to as many epochs, each value is marked by a dot
_WIDTH, _HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 430, 10, 200  # the plot area inside a chart


@dataclass(frozen=True)
class Curve:
    """One value an epoch: None where none was written, NaN or infinite where the line breaks."""

    name: str
    color: int
    values: list[float | None]


@dataclass(frozen=True)
class Axis:
    """Places values between two pixels, on a linear or a logarithmic scale."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value."""
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


def _value_axis(curves: list[Curve], from_zero: bool) -> Axis:
    finite = [v for curve in curves for v in curve.values if v is not None and math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if low > 0 and high / low >= 100 and not from_zero:
        return Axis(low / 1.3, high * 1.3, _BOTTOM, _TOP, is_log=True)
    size = max(abs(low), abs(high)) or 1.0
    # A curve that is flat up to rounding must not fill the chart with its noise.
    span = max(high - low, 2e-3 * size) if high > low else size
    middle, reach = (low + high) / 2, 0.56 * span
    bottom = 0.0 if from_zero else max(middle - reach, 0.0) if low >= 0 else middle - reach
    return Axis(bottom, middle + reach, _BOTTOM, _TOP)


def _sampled(epochs: list[int], curves: list[Curve]) -> tuple[list[int], list[Curve]]:
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
    sampled = [Curve(c.name, c.color, [c.values[at] for at in order]) for c in curves]
    return [epochs[at] for at in order], sampled


def chart(title: str, records: list[Record], curves: list[Curve], from_zero: bool = False) -> str:
    """A figure: the last values as legend, axes, curves, tooltips, and a note on what is not drawn.

    Returns nothing if no curve has a value.
    """
    curves = [c for c in curves if any(value is not None for value in c.values)]
    if not curves:
        return ""
    epochs = [record["epoch"] + 1 for record in records]
    margin = 0.5 if len(epochs) == 1 else 0.0
    x = Axis(epochs[0] - margin, epochs[-1] + margin, _LEFT + 8, _RIGHT - 8)
    y = _value_axis(curves, from_zero)
    drawn, sampled = _sampled(epochs, curves)
    drawing = tag(
        "svg",
        _grid(x, y),
        *(tag("path", class_=f"curve color{c.color}", d=_path(c, drawn, x, y)) for c in sampled),
        tag("g", *_points(drawn, sampled, x, y), class_="dots" if len(drawn) <= _DOTS else ""),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title} by epoch",
    )
    heading = tag("h3", f"{title} (log scale)" if y.is_log else title)
    caption = tag("figcaption", heading, *map(_legend, curves))
    notes = (tag("p", note, class_="note") for c in curves if (note := _breaks(epochs, c)))
    return tag("figure", caption, drawing, *notes, class_="card")


def _legend(curve: Curve) -> Markup:
    last = next(value for value in reversed(curve.values) if value is not None)
    key = tag("span", class_=f"key color{curve.color}")
    return tag("span", key, f"{curve.name} {as_text(last)}", class_="legend")


def _breaks(epochs: list[int], curve: Curve) -> str:
    pairs = zip(epochs, curve.values, strict=True)
    at = [str(epoch) for epoch, v in pairs if v is not None and not math.isfinite(v)]
    more = f" and {len(at) - 5:,} more" if len(at) > 5 else ""
    return f"Not finite, not drawn: {curve.name}, epoch {', '.join(at[:5])}{more}." if at else ""


def _grid(x: Axis, y: Axis) -> Markup:
    """Axes with ticks, and a line across at each tick of the value axis."""
    parts = []
    for value, label in y.ticks().items():
        at = y.place(value)
        parts.append(tag("line", x1=_LEFT, y1=at, x2=_RIGHT, y2=at, class_="grid"))
        parts.append(tag("text", label, x=_LEFT - 6, y=at + 4, class_="end"))
    for value, label in x.ticks(is_whole=True).items():
        at = x.place(value)
        parts.append(tag("line", x1=at, y1=_BOTTOM, x2=at, y2=_BOTTOM + 4, class_="axis"))
        parts.append(tag("text", label, x=at, y=_BOTTOM + 18, class_="middle"))
    parts.append(tag("line", x1=_LEFT, y1=_BOTTOM, x2=_RIGHT, y2=_BOTTOM, class_="axis"))
    middle = (_LEFT + _RIGHT) / 2
    return join([*parts, tag("text", "epoch", x=middle, y=_HEIGHT - 4, class_="middle")])


def _path(curve: Curve, epochs: list[int], x: Axis, y: Axis) -> str:
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


def _points(epochs: list[int], curves: list[Curve], x: Axis, y: Axis) -> Iterator[Markup]:
    """For each epoch a transparent band to hover over, its dots, and its values as the tooltip."""
    at = [x.place(epoch) for epoch in epochs]
    edges = [_LEFT, *((left + right) / 2 for left, right in pairwise(at)), _RIGHT]
    for index, epoch in enumerate(epochs):
        values = [(c, v) for c in curves if (v := c.values[index]) is not None]
        texts = [f"epoch {epoch:,}", *(f"{curve.name} {as_text(value)}" for curve, value in values)]
        left, right = edges[index], edges[index + 1]
        band = {"x": left, "y": _TOP, "width": right - left, "height": _BOTTOM - _TOP}
        dots = (
            tag("circle", class_=f"color{c.color}", cx=at[index], cy=y.place(v), r=3)
            for c, v in values
            if math.isfinite(v)
        )
        title = tag("title", "\n".join(texts))
        yield tag("g", title, tag("rect", class_="band", **band), *dots, class_="point")
