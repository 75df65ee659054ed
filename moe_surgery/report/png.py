"""The report's figures for papers: PNG at 300 dpi, drawn with matplotlib."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.writer import write_file
from moe_surgery.errors import OutputError, UsageError
from moe_surgery.quality.evaluation import Evaluation
from moe_surgery.report.charts import TITLES, coverage_charts, evaluation_chart
from moe_surgery.report.content import ALL_TEXTS
from moe_surgery.report.curves import FEW, MEASURES, lines, ranked_for_domain
from moe_surgery.report.figures import Subject, View
from moe_surgery.report.markup import display_name
from moe_surgery.report.page import read_inputs
from moe_surgery.report.palette import SERIES_LIGHT, sequential
from moe_surgery.report.sections import first_overlap
from moe_surgery.report.sources import Sources
from moe_surgery.report.svg import Chart, Series, ticks, whole_ticks
from moe_surgery.selection.arguments import Named
from moe_surgery.selection.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["check_plotting", "write_pictures"]

DPI = 300
WIDTH = 7.2  # inches: two columns of most papers
MARKERS = ("o", "s", "^", "D", "x", "+", "v")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
FONT: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    # Names come from files: a dollar sign in them is not a formula.
    "text.parse_math": False,
}

Plans = Sequence[tuple[str, Plan]]
Evaluations = Sequence[tuple[str, Evaluation]]


def check_plotting() -> None:
    """Raise UsageError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise UsageError("figures need the matplotlib package: pip install 'moe-surgery[report]'")


def write_pictures(
    folder: str | os.PathLike[str],
    statistics: Sources,
    plans: Named[Plan] = (),
    evaluations: Named[Evaluation] = (),
) -> Iterator[Path]:
    """Write every figure to `folder` (created if missing); yields the path of each finished file.

    heatmap-METRIC (a panel for each domain; the first plan marked), overlap-METRIC (a panel for a
    quarter and a half of the experts), coverage-DOMAIN, and of each evaluation evaluation-MEASURE (a
    panel for each domain). Takes inputs and raises as `build_report`; UsageError without matplotlib,
    OutputError.
    """
    check_plotting()
    subject, named_plans, named_evaluations = read_inputs(statistics, plans, evaluations)
    from matplotlib import rc_context

    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{printable_path(target)}: cannot create: {error.strerror}") from None
    used: set[str] = set()
    for name, figure in _figures(subject, named_plans, named_evaluations):
        with rc_context(FONT):
            content = BytesIO()
            figure().savefig(content, format="png", dpi=DPI)
        path = target / f"{_unused(name, used)}.png"
        write_file(path, content.getvalue(), FileOps())
        yield path


def _figures(
    subject: Subject, plans: Plans, evaluations: Evaluations
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """File names, and the function that draws each."""
    shown_views = subject.views
    for metric in subject.metrics:
        yield f"heatmap-{metric}", partial(_heat_maps, metric, shown_views, plans)
    if len(shown_views) > 1:
        for metric in subject.metrics:
            yield f"overlap-{metric}", partial(_overlaps, metric, shown_views)
    for i, view in enumerate(shown_views if subject.kinds else []):
        yield f"coverage-{view.name}", partial(_coverage, subject, plans, i)
    for name, evaluation in evaluations:
        prefix = "evaluation" if len(evaluations) == 1 else f"evaluation-{name}"
        for measure in MEASURES:
            yield f"{prefix}-{measure}", partial(_evaluation, evaluation, measure)


def _unused(name: str, used: set[str]) -> str:
    """`name` as a file name of plain letters, numbered if already used."""
    plain = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")[:80] or "figure"
    number, candidate = 1, plain
    while candidate in used:
        number += 1
        candidate = f"{plain}-{number}"
    used.add(candidate)
    return candidate


def _panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels; unlike pyplot this leaves no global state."""
    from matplotlib.figure import Figure

    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in grid[count:]:
        unused.set_visible(False)
    return figure, list(grid[:count])


def _colours() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("moe-surgery", sequential(False))


def _heat_maps(metric: str, shown_views: Sequence[View], plans: Plans) -> Figure:
    layers, experts = shown_views[0].scores[metric].shape
    columns = 1 if len(shown_views) == 1 or experts > 64 else 2
    height = 0.55 + WIDTH / columns * min(max(layers / experts, 0.22), 1.2)
    figure, panels = _panels(len(shown_views), columns, height)
    for axes, view in zip(panels, shown_views, strict=True):
        shares = view.relative(metric)
        image = axes.imshow(shares, cmap=_colours(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        if plans:
            where = [(e, n) for n, kept in enumerate(plans[0][1].layers) for e in kept]
            size = 10 if experts / columns <= 40 else 3
            x, y = [e for e, _ in where], [n for _, n in where]
            axes.scatter(x, y, s=size, c="black", edgecolors="white", linewidths=size / 14)
        axes.set(title=display_name(view.name), xlabel="expert", ylabel="layer")
        axes.spines[:].set_visible(False)
    dots = f" (dots: kept by {display_name(plans[0][0])})" if plans else ""
    bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.4, aspect=30, pad=0.03)
    bar.set_label(f"{metric}, share of the layer's largest{dots}")
    bar.outline.set_visible(False)
    return figure


def _overlaps(metric: str, shown_views: Sequence[View]) -> Figure:
    experts = shown_views[0].scores[metric].shape[1]
    sizes = sorted({max(1, experts // 4), max(1, experts // 2)})
    figure, panels = _panels(len(sizes), len(sizes), 0.9 + WIDTH / len(sizes) * 0.95)
    names = [display_name(v.name) for v in shown_views]
    for axes, n in zip(panels, sizes, strict=True):
        shares = np.array(first_overlap(shown_views, metric, n))
        axes.imshow(shares, cmap=_colours(), vmin=0, vmax=1, interpolation="nearest")
        for (row, column), share in np.ndenumerate(shares):
            ink = "white" if share > 0.55 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=7)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"best {n} of {experts} by {metric}, overlap in percent")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def _coverage(subject: Subject, plans: Plans, i: int) -> Figure:
    return _charts(coverage_charts(subject.views, plans, i, subject.kinds[0], subject.metrics), 2)


def _evaluation(evaluation: Evaluation, measure: str) -> Figure:
    curves = lines(evaluation)
    charts = []
    for domain in [*([None] if len(evaluation.domains) > 1 else []), *evaluation.domains]:
        selected = curves if len(curves) <= FEW else ranked_for_domain(curves, domain, evaluation.domains)
        chart = evaluation_chart(evaluation, selected, measure, domain, log=measure == "kl")
        if selected is not curves:
            # Each panel has the lines of its domains; named by method they share a legend.
            chart = replace(
                chart,
                series=[replace(s, name=line.method) for s, line in zip(chart.series, selected, strict=True)],
            )
        charts.append(replace(chart, title=ALL_TEXTS if domain is None else domain))
    title = TITLES[measure][0] + ("" if len(curves) <= FEW else ", plans ranked on each panel's texts")
    return _charts(charts, 2, title)


def _charts(charts: Sequence[Chart], columns: int, title: str = "") -> Figure:
    figure, panels = _panels(len(charts), min(columns, len(charts)), 3.1)
    if title:
        figure.suptitle(title, fontsize=9.5)
    for axes, chart in zip(panels, charts, strict=True):
        for series in chart.series:
            _line(axes, series)
        if chart.level:
            axes.axhline(chart.level[1], color="0.35", linewidth=0.9, linestyle=":", label=chart.level[0])
        for name, x, y in chart.marks:
            axes.plot([x], [y], "D", color="black", markerfacecolor="white", markersize=5, zorder=5)
            axes.annotate(display_name(name), (x, y), (6, -9), textcoords="offset points", fontsize=7)
        axes.set(title=display_name(chart.title), xlabel=chart.x_label, ylabel=chart.y_label)
        margin = 0.03 * (chart.x[1] - chart.x[0])
        axes.set_xlim(chart.x[0] - margin, chart.x[1] + margin or 1)
        axes.set_xticks(whole_ticks(*chart.x))
        if chart.log:
            axes.set_yscale("log")
            axes.set_yticks(ticks(*chart.y, log=True), minor=False)
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        else:
            axes.set_ylim(chart.y)
        if chart.percent:
            axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
        axes.grid(axis="y", color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
    named: dict[Any, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    if named:
        labels = list(named)
        figure.legend(
            list(named.values()),
            labels,
            loc="outside lower center",
            ncols=min(4, len(labels)),
            handlelength=3.4,
        )
    return figure


def _line(axes: Axes, s: Series) -> None:
    colour = SERIES_LIGHT[s.index % len(SERIES_LIGHT)]
    if s.low is not None and s.high is not None:
        axes.fill_between(s.x, s.low, s.high, color=colour, alpha=0.18, linewidth=0)
    every = max(1, len(s.x) // 8)
    axes.plot(
        s.x,
        s.y,
        color=colour,
        label=display_name(s.name),
        linewidth=1.3,
        linestyle=DASHES[(s.index + s.index // len(SERIES_LIGHT)) % len(DASHES)],
        marker=MARKERS[s.index % len(MARKERS)],
        markersize=3.6,
        markevery=(s.index % every, every),
    )
