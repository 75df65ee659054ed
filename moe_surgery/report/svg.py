"""Figures as SVG: the page's initial view, also without its script, which draws the same.

Colours are classes (`q0`... for the palette's steps, `s0`... for lines), so that the style sheet
gives a dark screen and a printed page different colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_surgery.report.markup import Html, tag
from moe_surgery.report.palette import DASHES, MARKERS, SERIES_LIGHT, STEPS, step

__all__ = [
    "Chart",
    "Series",
    "heat_map",
    "legend",
    "line_chart",
    "marker",
    "scale_bar",
    "ticks",
    "whole_ticks",
]

LEFT, TOP = 44, 34
CHART = (520, 300)
MARGIN = (12, 16, 44, 56)  # top, right, bottom, left
MARKS = {
    "circle": "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0z",
    "square": "M-3.2 -3.2h6.4v6.4h-6.4z",
    "triangle": "M0 -4.2L4 3H-4z",
    "diamond": "M0 -4.6L4.2 0L0 4.6L-4.2 0z",
    "cross": "M-3 -3L3 3M3 -3L-3 3",
    "plus": "M0 -4V4M-4 0H4",
    "down": "M0 4.2L4 -3H-4z",
}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Series:
    """One line; `index` chooses its colour, marker and dash. `low`, `high` bound a band, if any."""

    name: str
    index: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """A line chart. `level` is a named horizontal line (the full model); `percent` labels y as such."""

    title: str
    x_label: str
    y_label: str
    x: tuple[float, float]
    y: tuple[float, float]
    series: Sequence[Series]
    level: tuple[str, float] | None = None
    log: bool = False
    percent: bool = False
    marks: Sequence[tuple[str, float, float]] = field(default_factory=tuple)


def cell_size(experts: int) -> tuple[int, int]:
    """Width and height of a heat map's cell in px: the map of any model fits a desktop screen."""
    width = min(max(960 // experts, 8), 28)
    return width, min(max(width, 15), 22)


def heat_map(shares: Floats, kept: Sequence[Sequence[int]] | None, label: str) -> Html:
    """`shares` [layers, experts], 0..1 of the scale; a dot on every expert in `kept`."""
    layers, experts = shares.shape
    w, h = cell_size(experts)
    every = 1 if w >= 18 else 4 if w >= 12 else 8
    parts = [
        tag("text", "layer", x=LEFT - 7, y=TOP - 6, text_anchor="end"),
        tag("text", "expert", x=LEFT, y=11),
    ]
    parts += [
        tag("text", e, x=f"{LEFT + (e + 0.5) * w:g}", y=TOP - 6, text_anchor="middle")
        for e in range(0, experts, every)
    ]
    for layer in range(layers):
        y = TOP + layer * h
        parts.append(tag("text", layer, x=LEFT - 7, y=f"{y + h / 2 + 4:g}", text_anchor="end"))
        # Not with `tag`: there are thousands.
        cells = "".join(
            f'<rect class="q{step(s)}" x="{LEFT + e * w}" y="{y}" width="{w - 1}" height="{h - 1}"/>'
            for e, s in enumerate(shares[layer])
        )
        parts.append(tag("g", Html(cells)))
    dots = "".join(
        f"M{LEFT + e * w + (w - 1) / 2:g} {TOP + layer * h + (h - 1) / 2:g}h0"
        for layer, row in enumerate(kept or [])
        for e in row
    )
    large = 2 if w >= 14 else 1
    parts += [
        tag("path", d=Html(dots), class_=f"rim rim{large}"),
        tag("path", d=Html(dots), class_=f"dot dot{large}"),
        tag("rect", class_="cursor", width=w + 1, height=h + 1, visibility="hidden"),
    ]
    width, height = LEFT + experts * w + 4, TOP + layers * h + 4
    return tag(
        "svg", *parts, id="map", class_="map", role="img", aria_label=label, width=width, height=height,
        viewBox=f"0 0 {width} {height}",
    )  # fmt: skip


def scale_bar() -> Html:
    """The palette from least to most."""
    steps = [tag("rect", class_=f"q{i}", x=i * 6, y=0, width=6, height=12) for i in range(STEPS)]
    return tag(
        "svg", *steps, class_="scale", width=6 * STEPS, height=12, viewBox=f"0 0 {6 * STEPS} 12",
        aria_hidden="true",
    )  # fmt: skip


def style_of(index: int) -> tuple[str, str, str]:
    """Class of the colour, dash pattern and marker of line number `index`."""
    return (
        f"s{index % len(SERIES_LIGHT)}",
        DASHES[(index + index // len(SERIES_LIGHT)) % len(DASHES)],
        MARKERS[index % len(MARKERS)],
    )


def marker(index: int, x: float, y: float, title: str | None = None) -> Html:
    """The marker of line `index` at (x, y)."""
    colour, _, shape = style_of(index)
    children = [tag("title", title)] if title else []
    return tag(
        "path", *children, class_=f"mark {colour}", d=MARKS[shape], transform=f"translate({x:.1f} {y:.1f})"
    )


def legend(names: Sequence[tuple[int, str]]) -> Html:
    """Lines by name, each with its colour, dash and marker."""
    items = []
    for index, name in names:
        colour, dash, _ = style_of(index)
        line = tag("path", class_=f"line {colour}", d="M1 8H33", stroke_dasharray=dash or None)
        sample = tag(
            "svg", line, marker(index, 17, 8), width=34, height=16, viewBox="0 0 34 16", aria_hidden="true"
        )
        items.append(tag("li", sample, " ", name))
    return tag("ul", *items, class_="legend")


def line_chart(chart: Chart) -> Html:
    """The chart in a frame of `CHART` px."""
    width, height = CHART
    top, right, bottom, left = MARGIN
    x0, x1 = chart.x
    y0, y1 = chart.y

    def at_x(x: float) -> float:
        return left + (width - left - right) * (x - x0) / ((x1 - x0) or 1)

    def at_y(y: float) -> float:
        if chart.log:
            share = (math.log(max(y, y0)) - math.log(y0)) / (math.log(y1) - math.log(y0))
        else:
            share = (y - y0) / ((y1 - y0) or 1)
        return height - bottom - (height - top - bottom) * min(max(share, 0.0), 1.0)

    parts: list[Html] = []
    for y in ticks(y0, y1, chart.log):
        parts.append(tag("path", class_="grid", d=f"M{left} {at_y(y):.1f}H{width - right}"))
        shown_y = f"{100 * y:g} %" if chart.percent else f"{y:g}"
        parts.append(tag("text", shown_y, x=left - 8, y=f"{at_y(y) + 4:.1f}", text_anchor="end"))
    for n in whole_ticks(x0, x1):
        parts.append(tag("text", n, x=f"{at_x(n):.1f}", y=height - bottom + 18, text_anchor="middle"))
    middle = (left + width - right) / 2
    parts.append(tag("text", chart.x_label, class_="axis", x=middle, y=height - 6, text_anchor="middle"))
    if chart.level:
        y = at_y(chart.level[1])
        parts.append(tag("path", class_="level", d=f"M{left} {y:.1f}H{width - right}"))
        parts.append(tag("text", chart.level[0], x=width - right, y=f"{y - 5:.1f}", text_anchor="end"))
    for s in chart.series:
        colour, dash, _ = style_of(s.index)
        if s.low is not None and s.high is not None:
            forth = [f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in zip(s.x, s.high, strict=True)]
            back = [f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in zip(s.x, s.low, strict=True)]
            parts.append(tag("path", class_=f"band {colour}", d=Html(f"M{'L'.join([*forth, *back[::-1]])}z")))
        # Not more points than the eye can see.
        every = max(1, len(s.x) // 128)
        points = [f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in [*zip(s.x, s.y, strict=True)][::every]]
        if len(points) > 1:
            parts.append(
                tag(
                    "path",
                    class_=f"line {colour}",
                    d=Html(f"M{'L'.join(points)}"),
                    stroke_dasharray=dash or None,
                )
            )
        parts += [marker(s.index, at_x(x), at_y(y)) for x, y in _marked(s)]
    above = 0.0  # keeps the names of nearby plans apart
    for name, kept, share in sorted(chart.marks, key=lambda mark: -mark[2]):
        x, y = at_x(kept), at_y(share)
        above = max(y + 16, above + 14)
        parts.append(tag("path", class_="plan", d=f"M{x:.1f} {y:.1f}m0 -6l6 6l-6 6l-6 -6z"))
        parts.append(tag("text", name, class_="halo", x=f"{x + 10:.1f}", y=f"{above:.1f}"))
    return tag(
        "svg", *parts, class_="chart", role="img", aria_label=chart.title, width=width, height=height,
        viewBox=f"0 0 {width} {height}",
    )  # fmt: skip


def _marked(s: Series) -> list[tuple[float, float]]:
    """The points that get a marker: all if few, else some, different ones for each line."""
    every = max(1, len(s.x) // 8)
    return [(x, y) for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)) if i % every == s.index % every]


def whole_ticks(low: float, high: float) -> list[int]:
    """About eight numbers of experts from `low` to `high`, all multiples of one power of two."""
    size = 1
    while (high - low) / size > 9:
        size *= 2
    return list(range(math.ceil(low / size) * size, math.floor(high) + 1, size))


def ticks(low: float, high: float, log: bool) -> list[float]:
    """About five round numbers from `low` to `high`; on a log scale 1, 2 and 5 of each decade."""
    if not high > low:
        return [low]
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(decades) <= 4 else (1,)
        return [t for d in decades for s in steps if low <= (t := s * 10.0**d) <= high * 1.0001]
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    spacing = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= raw * 0.999)
    return [
        float(f"{i * spacing:.10g}")
        for i in range(math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9) + 1)
    ]
