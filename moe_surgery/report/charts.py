"""Charts of the page's initial view, and of the figures for papers."""

from __future__ import annotations

from collections.abc import Sequence

from moe_surgery.quality.evaluation import Evaluation
from moe_surgery.report.content import line_name
from moe_surgery.report.curves import FEW, MEASURES, Line, lines, ranked_for_domain
from moe_surgery.report.figures import View, coverage, plan_coverage
from moe_surgery.report.svg import Chart, Series
from moe_surgery.selection.metrics import METRICS
from moe_surgery.selection.plan import Plan

__all__ = ["KINDS", "TITLES", "coverage_charts", "evaluation_chart", "evaluation_charts"]

# Title and axis of each measure.
TITLES = {
    "kl": ("KL divergence from the full model", "nats per token"),
    "cross_entropy": ("Cross-entropy", "nats per token"),
    "agreement": ("Same most likely token", "share of tokens"),
    "rerouted": ("Rerouted to another expert", "mean over layers"),
}
KEPT = "experts kept in each layer"
KINDS = {"weight": "routing weight", "routes": "routes"}
PERCENT = frozenset({"agreement", "rerouted"})


def coverage_charts(
    views: Sequence[View],
    plans: Sequence[tuple[str, Plan]],
    i: int = 0,
    kind: str = "weight",
    metrics: Sequence[str] = tuple(METRICS),
) -> list[Chart]:
    """The share of the n best experts in view `i`, by each metric: mean over layers, worst layer."""
    view = views[i]
    shares = view.shares[kind]
    both = [coverage(view.orders[metric], shares) for metric in metrics]
    n = list(range(1, shares.shape[1] + 1))
    marks = [(name, sum(map(len, p.layers)) / p.num_layers, plan_coverage(p, shares)) for name, p in plans]
    return [
        Chart(
            title,
            KEPT,
            f"share of {KINDS[kind]}",
            (1, n[-1]),
            (0, 1),
            [Series(m, s, n, [float(y) for y in both[s][which]]) for s, m in enumerate(metrics)],
            percent=True,
            marks=[(name, x, y[which]) for name, x, y in marks],
        )
        for which, title in enumerate(("Mean over layers", "Worst layer"))
    ]


def evaluation_charts(evaluation: Evaluation) -> list[Chart]:
    """A chart per measure over all texts; if there are many lines, only those ranked on them."""
    domain = evaluation.domains[0] if len(evaluation.domains) == 1 else None
    curves = lines(evaluation)
    if len(curves) > FEW:
        curves = ranked_for_domain(curves, domain, evaluation.domains)
    return [evaluation_chart(evaluation, curves, measure, domain) for measure in MEASURES]


def evaluation_chart(
    evaluation: Evaluation, curves: Sequence[Line], measure: str, domain: str | None, *, log: bool = False
) -> Chart:
    """A measure against experts kept, on one domain's texts (None: on all).

    `log` is ignored unless every figure is positive.
    """
    series = []
    for i, line in enumerate(curves):
        points = line.points(measure, domain)
        banded = any(p.models > 1 for p in points)
        series.append(
            Series(
                line_name(line, evaluation.domains),
                i,
                [p.experts for p in points],
                [p.middle for p in points],
                [p.low for p in points] if banded else None,
                [p.high for p in points] if banded else None,
            )
        )
    full = evaluation.models[0]
    level = MEASURES[measure](full.overall if domain is None else full.domains[domain])
    values = [y for s in series for y in (*s.y, *(s.low or ()), *(s.high or ()))]
    log = log and bool(values) and 0 < min(values) < max(values)
    least, most = _range([*values, level], measure)
    title, y_label = TITLES[measure]
    return Chart(
        title,
        KEPT,
        y_label,
        (min([x for s in series for x in s.x], default=0), evaluation.num_experts),
        (min(values), max(values)) if log else (least, most),
        series,
        ("full model", level) if measure == "cross_entropy" else None,
        log,
        measure in PERCENT,
    )


def _range(values: Sequence[float], measure: str) -> tuple[float, float]:
    """Agreement from 0 to 1, cross-entropy from a little below the least, the others from 0."""
    if measure == "agreement":
        return 0.0, 1.0
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05
    return (low - margin if measure == "cross_entropy" else 0.0), high + margin
