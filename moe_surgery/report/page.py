"""The report page: one self-contained HTML file."""

from __future__ import annotations

import numpy as np

from moe_surgery.errors import InvalidInputError, PlanMismatchError
from moe_surgery.quality.evaluation import Evaluation, load_evaluation
from moe_surgery.report.content import content
from moe_surgery.report.document import document
from moe_surgery.report.figures import check_identity, check_plan, views
from moe_surgery.report.heading import header
from moe_surgery.report.sections import (
    coverage_section,
    evaluation_section,
    experts_section,
    map_section,
    overlap_section,
)
from moe_surgery.selection.arguments import Named, PathLike, load_pairs
from moe_surgery.selection.plan import Plan, load_plan
from moe_surgery.selection.statistics import Statistics, as_statistics

__all__ = ["build_report", "read_inputs"]

SCRIPTS = ("base.js", "chart.js", "map.js", "panels.js", "tables.js", "start.js")


def build_report(
    statistics: Statistics | PathLike,
    plans: Named[Plan] = (),
    evaluations: Named[Evaluation] = (),
    title: str | None = None,
) -> str:
    """The page, as the text of an HTML file that needs no other file and no network.

    Plans and evaluations are (name, object) pairs or paths, which then serve as names; `statistics` may be
    a path too. `title` is the page's heading. Raises PlanMismatchError if a plan or evaluation is not of
    the statistics' checkpoint, InvalidInputError for statistics without domains or figures that are not
    finite.
    """
    statistics, plans, evaluations = read_inputs(statistics, plans, evaluations)
    shown_views = views(statistics)
    data = content(statistics, shown_views, plans, evaluations)
    heading = title or f"Experts of {statistics.model_type}"
    sections = [
        map_section(statistics, shown_views, plans),
        overlap_section(statistics, shown_views),
        coverage_section(statistics, shown_views, plans),
    ]
    if evaluations:
        sections.append(evaluation_section(evaluations))
    sections.append(experts_section())
    return document(
        heading, header(heading, statistics, plans, evaluations), sections, data, ("report.css",), SCRIPTS
    )


def read_inputs(
    statistics: Statistics | PathLike, plans: Named[Plan], evaluations: Named[Evaluation]
) -> tuple[Statistics, list[tuple[str, Plan]], list[tuple[str, Evaluation]]]:
    """The inputs, loaded and checked; raises as `build_report`."""
    statistics = as_statistics(statistics)
    named_plans = load_pairs(plans, Plan, load_plan)
    named_evaluations = load_pairs(evaluations, Evaluation, load_evaluation)
    for name, plan in named_plans:
        check_plan(plan, statistics, name)
    for name, evaluation in named_evaluations:
        check_identity(evaluation.identity, statistics, name)
        ours, expected = (
            (evaluation.model_type, evaluation.num_experts),
            (statistics.model_type, statistics.experts),
        )
        if ours != expected:
            raise PlanMismatchError(
                f"{name}: is of {ours[0]} with {ours[1]} experts, but the statistics are of {expected[0]} with "
                f"{expected[1]}; a report shows one checkpoint"
            )
        for model in evaluation.models:
            # Empty if the routes are not known, for every domain alike.
            counted = statistics.layers if any(q.rerouted for q in model.domains.values()) else 0
            for domain, q in model.domains.items():
                figures = (q.cross_entropy, q.kl, q.agreement, *q.rerouted)
                if len(q.rerouted) != counted or not np.isfinite(figures).all():
                    raise InvalidInputError(
                        f"{name}: figures of {model.name!r} on {domain!r} are damaged: not finite, or not for "
                        f"{statistics.layers} layers; evaluate it again"
                    )
        if missing := [d for m in evaluation.models for d in m.domains if d not in evaluation.domains]:
            raise InvalidInputError(f"{name}: domain {missing[0]!r} has no figures of the full model")
    return statistics, named_plans, named_evaluations
