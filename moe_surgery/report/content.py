"""The data embedded in the page, as one object of plain lists.

The script draws, and computes only what follows from the orders alone: ranks, and which experts domains share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality
from moe_surgery.report.curves import MEASURES, Line, lines, ranked_for
from moe_surgery.report.figures import Subject, View, coverage, plan_coverage
from moe_surgery.report.fit import Detail
from moe_surgery.report.markup import display_name, number
from moe_surgery.report.packing import bits, floats, orders, shares, steps
from moe_surgery.report.palette import sequential
from moe_surgery.selection.plan import Plan

__all__ = ["ALL_TEXTS", "content", "data_of", "line_name", "packed", "plan_method", "ranked_on"]

ALL_TEXTS = "all texts"


def content(
    subject: Subject,
    detail: Detail,
    plans: Sequence[tuple[str, Plan]],
    evaluations: Sequence[tuple[str, Evaluation]],
) -> dict[str, object]:
    """The embedded object without `packed`. Numbers have five significant digits."""
    return {
        "layers": subject.layers,
        "experts": subject.experts,
        "topK": subject.top_k,
        "metrics": list(detail.metrics),
        "kinds": list(subject.kinds),
        "measured": subject.measured,
        # Whether frequencies are numbers of tokens.
        "counts": subject.source is None,
        # How many of each layer's experts the orders list.
        "listed": detail.listed,
        "levels": detail.levels,
        "views": [
            {"name": display_name(v.name), "tokens": v.tokens, "all": v.domain is None} for v in subject.views
        ],
        # For print, where the page may be dark on the screen.
        "palette": sequential(False),
        "plans": [_plan(name, plan, subject) for name, plan in plans],
        "evaluations": [_evaluation(name, evaluation) for name, evaluation in evaluations],
    }


def packed(subject: Subject, detail: Detail) -> dict[str, object]:
    """Orders, scores and coverage, packed as of `packing`, by index of metric, then of view.

    `orders` and `scores` layer by layer; `scores` by expert as float32, or as of `steps`. `coverage` by kind too: mean
    over layers, then the worst layer, n from 1. `peak` by view, where scores are not rounded.
    """
    views, metrics = subject.views, detail.metrics

    def scores(view: View, metric: str) -> object:
        rows = view.scores[metric]
        if not detail.levels:
            return floats(rows)
        return steps(np.take_along_axis(rows, view.orders[metric][:, : detail.listed], axis=1), detail.levels)

    return {
        "orders": [[orders(v.orders[m], detail.listed) for v in views] for m in metrics],
        "scores": [[scores(v, m) for v in views] for m in metrics] if subject.measured else None,
        "peak": [floats(v.peaks) for v in views if v.peaks is not None]
        if not detail.levels and subject.has_peaks
        else None,
        "coverage": {
            kind: [[shares(np.stack(coverage(v.orders[m], v.shares[kind]))) for v in views] for m in metrics]
            for kind in subject.kinds
        },
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


def _plan(name: str, plan: Plan, subject: Subject) -> dict[str, object]:
    kept = np.zeros((subject.layers, subject.experts), bool)
    for row, experts in zip(kept, plan.layers, strict=True):
        row[list(experts)] = True
    return {
        "name": display_name(name),
        "kept": bits(kept),
        "experts": number(sum(map(len, plan.layers)) / plan.num_layers),
        "coverage": {
            kind: [[number(x) for x in plan_coverage(plan, v.shares[kind])] for v in subject.views]
            for kind in subject.kinds
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
