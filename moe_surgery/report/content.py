"""The data embedded in the page, as one object of plain lists.

The script only draws; every number is computed here, where tests can check it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality
from moe_surgery.report.curves import MEASURES, Line, lines, ranked_for
from moe_surgery.report.figures import CARRIED, View, coverage, overlap, plan_coverage
from moe_surgery.report.markup import display_name, number
from moe_surgery.selection.metrics import METRICS
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import Statistics

__all__ = ["ALL_TEXTS", "content", "data_of", "line_name", "plan_method", "ranked_on"]

ALL_TEXTS = "all texts"


def content(
    statistics: Statistics,
    shown_views: Sequence[View],
    plans: Sequence[tuple[str, Plan]],
    evaluations: Sequence[tuple[str, Evaluation]],
) -> dict[str, object]:
    """The embedded object. Numbers have five significant digits, counts are exact.

    By index of metric, then of view: `scores` and `ranks` (layer by layer), `overlap` (experts in
    common summed over layers, n from 1, for pairs of views (0, 1), (0, 2), (1, 2), ...). `coverage`
    by kind, metric and view: [mean, worst], n from 1.
    """
    metrics = list(METRICS)
    return {
        "layers": statistics.layers,
        "experts": statistics.experts,
        "topK": statistics.top_k,
        "metrics": metrics,
        "views": [{"name": display_name(v.name), "tokens": v.tokens} for v in shown_views],
        # Counts stay exact.
        "scores": [[_flat(v.scores[m], 15 if m == "frequency" else 5) for v in shown_views] for m in metrics],
        "ranks": [[v.ranks(m).ravel().tolist() for v in shown_views] for m in metrics],
        "peak": [_flat(np.stack([s.peak_abs for s in v.layers])) for v in shown_views],
        "overlap": [
            [
                overlap(a.orders[m], b.orders[m]).tolist()
                for j, b in enumerate(shown_views)
                for a in shown_views[:j]
            ]
            for m in metrics
        ],
        "coverage": {
            kind: [
                [[_flat(c) for c in coverage(v.orders[m], v.carried(kind))] for v in shown_views]
                for m in metrics
            ]
            for kind in CARRIED
        },
        "plans": [_plan(name, plan, shown_views) for name, plan in plans],
        "evaluations": [_evaluation(name, evaluation) for name, evaluation in evaluations],
    }


def plan_method(plan: Plan) -> str:
    """How a plan was made, in a few words."""
    provenance = plan.provenance
    method = provenance.get("method")
    words = [method if isinstance(method, str) else "unknown method"]
    domains = provenance.get("domains")
    if isinstance(domains, list):
        words.append(f"on {', '.join(map(str, domains))}")
    if (seed := provenance.get("seed")) is not None:
        words.append(f"with seed {seed}")
    return " ".join(words)


def ranked_on(domains: Sequence[str], every: Sequence[str]) -> str:
    """The domains that models were ranked on, as text."""
    return "all domains" if len(domains) > 1 and sorted(domains) == sorted(every) else ", ".join(domains)


def data_of(model: ModelResult, every: Sequence[str]) -> str:
    """The domains a model's experts were ranked on, or the seed of a random choice."""
    domains, seed = model.provenance.get("domains"), model.provenance.get("seed")
    if isinstance(domains, list):
        return ranked_on([str(d) for d in domains], every)
    return "" if seed is None else f"seed {seed}"


def line_name(line: Line, every: Sequence[str]) -> str:
    """A line's name in a legend: the method, and the domains it was ranked on if recorded."""
    return line.method if line.domains is None else f"{line.method}, {ranked_on(line.domains, every)}"


def _flat(values: npt.NDArray[np.float64], digits: int = 5) -> list[float | int | None]:
    return [number(float(x), digits) for x in values.ravel()]


def _plan(name: str, plan: Plan, shown_views: Sequence[View]) -> dict[str, object]:
    return {
        "name": display_name(name),
        "kept": [list(kept) for kept in plan.layers],
        "experts": number(sum(map(len, plan.layers)) / plan.num_layers),
        "coverage": {
            kind: [[number(x) for x in plan_coverage(plan, v.carried(kind))] for v in shown_views]
            for kind in CARRIED
        },
    }


def _evaluation(name: str, evaluation: Evaluation) -> dict[str, object]:
    curves = lines(evaluation)
    where: list[str | None] = [*evaluation.domains]
    if len(where) > 1:
        where.insert(0, None)
    sets = list(dict.fromkeys(ranked_on(line.domains, evaluation.domains) for line in curves if line.domains))
    full = evaluation.models[0]
    return {
        "name": display_name(name),
        "experts": evaluation.num_experts,
        "domains": [ALL_TEXTS if d is None else display_name(d) for d in where],
        "sets": [display_name(s) for s in sets],
        # For each domain, the sets that were ranked for it.
        "own": [
            sorted(
                {
                    sets.index(ranked_on(line.domains, evaluation.domains))
                    for line in curves
                    if line.domains and ranked_for(line.domains, d, evaluation.domains)
                }
            )
            for d in where
        ],
        "full": {m: [number(MEASURES[m](_quality(full, d))) for d in where] for m in MEASURES},
        "lines": [
            {
                "name": display_name(line_name(line, evaluation.domains)),
                # null (always shown) if the domains are not recorded.
                "set": sets.index(ranked_on(line.domains, evaluation.domains)) if line.domains else None,
                "points": {m: [_points(line, m, d) for d in where] for m in MEASURES},
            }
            for line in curves
        ],
        "models": [_model(m, where, evaluation.domains) for m in evaluation.models],
    }


def _points(line: Line, measure: str, domain: str | None) -> list[list[float | int | None]]:
    return [
        [number(p.experts), number(p.middle), number(p.low), number(p.high), p.models]
        for p in line.points(measure, domain)
    ]


def _quality(model: ModelResult, domain: str | None) -> Quality:
    return model.overall if domain is None else model.domains[domain]


def _model(model: ModelResult, where: Sequence[str | None], every: Sequence[str]) -> list[object]:
    """[name, kind, experts, top-k, method, ranked on or seed, figures per domain or null]."""
    method = model.provenance.get("method")
    least, most = min(model.experts), max(model.experts)
    figures = [_figures(_quality(model, d)) if d is None or d in model.domains else None for d in where]
    return [
        display_name(model.name),
        display_name(model.kind),
        least if least == most else number(model.mean_experts),
        model.top_k,
        display_name(method) if isinstance(method, str) else "",
        display_name(data_of(model, every)),
        figures,
    ]


def _figures(q: Quality) -> list[float | int | None]:
    rerouted = MEASURES["rerouted"](q)
    return [
        q.tokens,
        *(number(x) for x in (q.cross_entropy, q.perplexity, q.kl, q.agreement, rerouted)),
    ]
