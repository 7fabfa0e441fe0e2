"""Line charts as SVG that is drawn here, so that they need no script; a small script adds figures under the pointer.

The curves fill a box of 1000 by 1000 units that the browser stretches; widths of lines do not stretch with it. All text
is HTML beside the box, so it is as large on a phone as on a wide screen.
"""

import html
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mae.output import valid_text

COLORS = 8
"""Number of colours of the page's style; the next line has the first again, and is dashed."""
_POINTS, _DOTS = 240, 32
_TICKS = 5
_ROOM_AT_THE_RIGHT = 1.012  # for half of the last dot
_SPIKE = 1.3
"""A first line of the log that is above this multiple of the rest may be cut off."""
_EDGE = 0.02  # of the height, for half of a dot at 0 or at 100 %

Format = Callable[[float], str]


class Line(NamedTuple):
    """Curve of a chart."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0


class Level(NamedTuple):
    """Horizontal line of a chart."""

    name: str
    y: float


def percent(value: float) -> str:
    """Format a share of 1."""
    return f"{100 * value:.3g} %"


def figure(value: float) -> str:
    """Format a figure with four digits, as a person would write it."""
    if value and not 1e-3 <= abs(value) < 1e7:
        number, _, power = f"{value:.2e}".partition("e")
        return f"{number.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def brief(number: float) -> str:
    """Format a figure with three digits, without a power of ten if it can be: `0.25`, `7.5`, `120`, `1,200`."""
    return f"{number:,.0f}" if 100 <= abs(number) < 1e7 else f"{number:.3g}"


def chart(
    title: str,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    form: Format = figure,
    from_zero: bool = False,
    is_named: bool = False,
) -> str:
    """Return a chart of some curves over the epochs; nothing if there is nothing to draw.

    A single curve has a legend only if `is_named`.
    """
    drawn = [line for line in lines if len(line.xs)]
    if not drawn:
        return ""
    axis = _axis(drawn, levels, from_zero, is_share=form is percent)
    low, high = axis.low, axis.high
    right = _ROOM_AT_THE_RIGHT * max(0.0, *(max(line.xs) for line in drawn)) or 1.0
    curves = [_thinned(line) for line in drawn]
    marks = "".join(_mark(number, curve, right, low, high) for number, curve in enumerate(curves))
    marks += "".join(f'<path class="level" d="M0 {_at(level.y, low, high):.1f}H1000"/>' for level in levels)
    y_ticks = [y for y in _ticks(low, high) if axis.least <= y <= axis.most]
    x_ticks = list(_ticks(0.0, right))
    grid = "".join(f'<path class="grid" d="M0 {_at(y, low, high):.1f}H1000"/>' for y in y_ticks)
    label = f"{title}: " + "; ".join(_in_words(line, form) for line in drawn)
    note = ", the first values are cut off" if axis.is_cut else ""
    return (
        f'<figure class="chart"><figcaption>{_text(title)}<small>over epochs{note}</small></figcaption>'
        f"{_legend(drawn, levels, form) if is_named or levels or len(drawn) > 1 else ''}"
        f'<div class="plot" tabindex="0" role="group" aria-label="{_text(label)}">'
        + "".join(f'<span class="y" style="top:{_at(y, low, high) / 10:.2f}%">{form(y)}</span>' for y in y_ticks)
        + "".join(f'<span class="x" style="left:{100 * x / right:.2f}%">{brief(x)}</span>' for x in x_ticks)
        + f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{grid}{marks}</svg>'
        f'<i class="cross" hidden></i><output class="tip" hidden></output></div>'
        f'<script type="application/json">{_data(curves, right, form)}</script></figure>'
    )


class _Curve(NamedTuple):
    """Curve with few points: the mean of each bucket of neighbours, and the least and greatest value in it."""

    line: Line
    xs: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]


def _thinned(line: Line) -> _Curve:
    xs, ys = np.asarray(line.xs, dtype=float), np.asarray(line.ys, dtype=float)
    parts = np.array_split(np.arange(len(xs)), min(_POINTS, len(xs)))
    columns = ((float(xs[p].mean()), float(ys[p].mean()), float(ys[p].min()), float(ys[p].max())) for p in parts)
    return _Curve(line, *map(list, zip(*columns, strict=True)))


class _Axis(NamedTuple):
    """Range of the values that a chart shows, and of those that are possible."""

    low: float
    high: float
    least: float
    most: float
    is_cut: bool
    """Whether the first values are above the range."""


def _axis(lines: Sequence[Line], levels: Sequence[Level], from_zero: bool, is_share: bool) -> _Axis:
    """Return the range to show: never above 100 % for shares, nor below 0 if all values are positive.

    The first values may be far above the rest, which would then be a flat line: they are cut off.
    """
    known = [value for line in lines for value in line.ys]
    # A run of a few lines has no beginning apart from the rest.
    calm = [value for line in lines for value in line.ys[math.ceil(len(line.ys) / 50) if len(line.ys) >= 20 else 0 :]]
    calm += [level.y for level in levels]
    low, high = min(*known, *calm), max(calm)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    is_cut = max(known) > high + (_SPIKE - 1) * (high - low)
    high = high if is_cut else max(high, *known)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    least = 0.0 if low >= 0 else -math.inf
    most = 1.0 if is_share and high <= 1 else math.inf
    bottom, top = max(low if from_zero else low - room, least), min(high + room, most)
    edge = _EDGE * (top - bottom)
    bottom -= edge if bottom == least and not from_zero else 0.0
    return _Axis(bottom, top + edge if top == most else top, least, most, is_cut)


def _at(y: float, low: float, high: float) -> float:
    return 1000 * (high - y) / (high - low)


def _mark(number: int, curve: _Curve, right: float, low: float, high: float) -> str:
    """Return the curve, a band from least to greatest values if its points stand for several, and dots if few."""
    places = [1000 * x / right for x in curve.xs]
    heights = [_at(y, low, high) for y in curve.means]
    points = [f"{x:.1f} {y:.1f}" for x, y in zip(places, heights, strict=True)]
    marks = ""
    if curve.lows != curve.highs:
        edges = [(x, _at(y, low, high)) for x, y in zip(places, curve.highs, strict=True)]
        edges += [(x, _at(y, low, high)) for x, y in zip(places[::-1], curve.lows[::-1], strict=True)]
        marks += f'<path class="band" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in edges)}Z"/>'
    marks += f'<path class="line" d="M{"L".join(points)}"/>'
    if len(points) <= _DOTS:
        marks += f'<path class="dots" d="{"".join(f"M{point}h0" for point in points)}"/>'
    color = curve.line.color
    kind = f"s{color % COLORS}" + (" dashed" if color >= COLORS else "")
    return f'<g class="{kind}" data-line="{number}">{marks}</g>'


def _legend(lines: Sequence[Line], levels: Sequence[Level], form: Format) -> str:
    """Return what the lines mean; with several, each is a button that hides its line."""
    items = []
    for number, line in enumerate(lines):
        swatch = f'<i class="swatch s{line.color % COLORS}{" dashed" if line.color >= COLORS else ""}"></i>'
        if len(lines) > 1:
            items.append(
                f'<button type="button" aria-pressed="true" data-line="{number}">{swatch}{_text(line.name)}</button>'
            )
        else:
            items.append(f"<span>{swatch}{_text(line.name)}</span>")
    items += [f'<span><i class="swatch level"></i>{_text(level.name)} {form(level.y)}</span>' for level in levels]
    return f'<div class="legend">{"".join(items)}</div>'


def _data(curves: Sequence[_Curve], right: float, form: Format) -> str:
    """Return what the script shows under the pointer, as JSON that cannot end its element."""
    lines = [
        {
            # The page writes other bytes so too, but would not know them within JSON.
            "name": valid_text(curve.line.name),
            "color": curve.line.color % COLORS,
            "x": [round(1000 * x / right, 1) for x in curve.xs],
            "at": [brief(x) for x in curve.xs],
            "y": [form(y) for y in curve.means],
        }
        for curve in curves
    ]
    return json.dumps({"x": "epoch", "lines": lines}, separators=(",", ":")).replace("<", "\\u003c")


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield round numbers from `low` to `high`, about `_TICKS`."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield round(number * step, 12)


def _in_words(line: Line, form: Format) -> str:
    first, last = (
        f"{form(line.ys[0])} at epoch {brief(line.xs[0])}",
        f"{form(line.ys[-1])} at epoch {brief(line.xs[-1])}",
    )
    return f"{line.name} {first}" + (f" to {last}" if len(line.xs) > 1 else "")


def _text(text: str) -> str:
    return html.escape(text)
