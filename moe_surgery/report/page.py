"""The report page: one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.quality.evaluation import Evaluation, load_evaluation
from moe_surgery.report.content import content, packed
from moe_surgery.report.figures import Subject, check_identity, check_plan
from moe_surgery.report.fit import PAGE_LIMIT, Detail, fit
from moe_surgery.report.heading import header
from moe_surgery.report.markup import Html, embedded_json, tag
from moe_surgery.report.palette import (
    DARK,
    LIGHT,
    SERIES_DARK,
    SERIES_LIGHT,
    ink_on,
    sequential,
)
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

    def frame(detail: Detail) -> tuple[str, str]:
        return _frame(heading, subject, detail, plans, evaluations)

    least = fit(subject, 0, metrics)
    detail = fit(subject, PAGE_LIMIT - sum(map(len, frame(least))), metrics)
    before, after = frame(detail)
    return f"{before}{embedded_json(packed(subject, detail))}{after}"


def _frame(
    heading: str,
    subject: Subject,
    detail: Detail,
    plans: Sequence[tuple[str, Plan]],
    evaluations: Sequence[tuple[str, Evaluation]],
) -> tuple[str, str]:
    """The page before and after its packed data."""
    data = content(subject, detail, plans, evaluations)
    sections = [map_section(subject, detail, plans)]
    if len(subject.views) > 1:
        sections.append(overlap_section(subject, detail))
    if subject.kinds:
        sections.append(coverage_section(subject, detail, plans))
    if evaluations:
        sections.append(evaluation_section(evaluations))
    sections.append(experts_section(detail))
    style = _asset("report.css") + _colours()
    script = '(function(){"use strict";\n' + "\n".join(map(_asset, SCRIPTS)) + "})();\n"
    # Blocks all network access, and any style or script but these.
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    before = [
        Html('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">\n'),
        Html(
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        ),
        tag("title", heading),
        Html(f"\n<style>{style}</style>\n</head>\n<body>\n"),
        header(heading, subject, detail, plans, evaluations),
        Html("\n<main>\n"),
        Html("\n".join(sections)),
        Html("\n</main>\n"),
        Html(f'<script type="application/json" id="data">{embedded_json(data)}</script>\n'),
        Html('<script type="application/json" id="packed">'),
    ]
    return "".join(before), f"</script>\n<script>{script}</script>\n</body>\n</html>\n"


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
            # Empty if the routes are not known, for every domain alike.
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


def _asset(name: str) -> str:
    return (files("moe_surgery.report") / "assets" / name).read_text(encoding="utf-8")


def _digest(inline: str) -> str:
    """The hash of an inline element in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()


def _colours() -> str:
    """Rules for the palette and the lines, on white (and paper) and on a dark screen."""

    def rules(background: str, steps: list[str], series: Sequence[str]) -> str:
        lines = [f":root{{--back:{background}}}"]
        lines += [f".q{i}{{fill:{c};background:{c};color:{ink_on(c)}}}" for i, c in enumerate(steps)]
        lines += [f".s{i}{{stroke:{c}}}.mark.s{i},.band.s{i}{{fill:{c}}}" for i, c in enumerate(series)]
        return "\n".join(lines)

    dark = rules(DARK, sequential(True), SERIES_DARK)
    return (
        f"\n{rules(LIGHT, sequential(False), SERIES_LIGHT)}\n"
        f"@media screen and (prefers-color-scheme: dark){{\n{dark}\n}}\n"
    )
