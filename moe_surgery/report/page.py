"""The report page: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.quality.evaluation import Evaluation, load_evaluation
from moe_surgery.report.content import content, packed
from moe_surgery.report.document import document
from moe_surgery.report.figures import Subject, check_identity, check_plan
from moe_surgery.report.fit import PAGE_LIMIT, Detail, fit
from moe_surgery.report.heading import header
from moe_surgery.report.markup import Html, embedded_json
from moe_surgery.report.sections import (
    coverage_section,
    evaluation_section,
    experts_section,
    map_section,
    overlap_section,
)
from moe_surgery.report.sources import Sources, read_subject
from moe_surgery.selection.arguments import Named, load_pairs
from moe_surgery.selection.plan import Plan, load_plan

__all__ = ["build_report", "read_inputs"]

SCRIPTS = (
    "base.js",
    "packed.js",
    "chart.js",
    "surfaces.js",
    "map.js",
    "overlap.js",
    "panels.js",
    "tables.js",
    "start.js",
)


def build_report(
    statistics: Sources,
    plans: Named[Plan] = (),
    evaluations: Named[Evaluation] = (),
    title: str | None = None,
    *,
    metrics: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
) -> str:
    """The page, as the text of an HTML file that needs no other file and no network.

    `statistics` are statistics of `profile`; or paths of the published statistics, or of rankings (`read_subject`).
    Plans and evaluations are (name, object) pairs or paths, which then serve as names. `title` is the page's heading.
    `metrics` and `domains` select what is shown; for large models and many domains the page leaves out metrics,
    the last of `metrics` first, until it is smaller than `PAGE_LIMIT`, and says so. Raises PlanMismatchError if a
    plan or evaluation is not of the statistics' checkpoint, InvalidInputError for statistics without domains or
    figures that are not finite, UsageError for metrics or domains that are not there.
    """
    subject, plans, evaluations = read_inputs(statistics, plans, evaluations, domains)
    if metrics and (unknown := [m for m in metrics if m not in subject.metrics]):
        raise UsageError(f"`metrics` {unknown[0]}: the source has {', '.join(subject.metrics)}")
    heading = title or (
        f"Experts of {subject.model_type}" if subject.model_type else f"Experts in {subject.source}"
    )

    def page(detail: Detail, data: Html) -> str:
        return _page(heading, subject, detail, data, plans, evaluations)

    least = fit(subject, 0, metrics)
    detail = fit(subject, PAGE_LIMIT - len(page(least, Html(""))), metrics)
    return page(detail, Html(embedded_json(packed(subject, detail))))


def _page(
    heading: str,
    subject: Subject,
    detail: Detail,
    packed_data: Html,
    plans: Sequence[tuple[str, Plan]],
    evaluations: Sequence[tuple[str, Evaluation]],
) -> str:
    """The page with its packed data."""
    data = content(subject, detail, plans, evaluations)
    sections = [map_section(subject, detail, plans)]
    if len(subject.views) > 1:
        sections.append(overlap_section(subject, detail))
    if subject.kinds:
        sections.append(coverage_section(subject, detail, plans))
    if evaluations:
        sections.append(evaluation_section(evaluations))
    sections.append(experts_section(detail))
    head = header(heading, subject, detail, plans, evaluations)
    return document(heading, head, sections, data, ("report.css",), SCRIPTS, packed=packed_data)


def read_inputs(
    statistics: Sources,
    plans: Named[Plan],
    evaluations: Named[Evaluation],
    domains: Sequence[str] | None = None,
) -> tuple[Subject, list[tuple[str, Plan]], list[tuple[str, Evaluation]]]:
    """The inputs, loaded and checked; raises as `build_report`."""
    subject = read_subject(statistics, domains)
    named_plans = load_pairs(plans, Plan, load_plan)
    named_evaluations = load_pairs(evaluations, Evaluation, load_evaluation)
    for name, plan in named_plans:
        check_plan(plan, subject, name)
    for name, evaluation in named_evaluations:
        check_identity(evaluation.identity, subject, name)
        ours, expected = (
            (evaluation.model_type, evaluation.num_experts),
            (subject.model_type or evaluation.model_type, subject.experts),
        )
        if ours != expected:
            raise PlanMismatchError(
                f"{name}: is of {ours[0]} with {ours[1]} experts, but the statistics are of {expected[0]} with "
                f"{expected[1]}; a report shows one checkpoint"
            )
        for model in evaluation.models:
            # Empty if the routes are not known, then for all domains.
            counted = subject.layers if any(q.rerouted for q in model.domains.values()) else 0
            for domain, q in model.domains.items():
                figures = (q.cross_entropy, q.kl, q.agreement, *q.rerouted)
                if len(q.rerouted) != counted or not np.isfinite(figures).all():
                    raise InvalidInputError(
                        f"{name}: figures of {model.name!r} on {domain!r} are damaged: not finite, or not for "
                        f"{subject.layers} layers; evaluate it again"
                    )
        if missing := [d for m in evaluation.models for d in m.domains if d not in evaluation.domains]:
            raise InvalidInputError(f"{name}: domain {missing[0]!r} has no figures of the full model")
    return subject, named_plans, named_evaluations
