"""What an evaluation says of one checkpoint, after a check that it speaks of this one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe_surgery.card.facts import Facts
from moe_surgery.card.text import code, counted, table
from moe_surgery.errors import PlanMismatchError

if TYPE_CHECKING:
    from moe_surgery.quality.evaluation import Evaluated, Evaluation, Quality

__all__ = ["belonging", "quality_section"]


def belonging(evaluation: Evaluation, facts: Facts) -> Evaluated:
    """The entry of `evaluation` that is about this checkpoint.

    Its full model must be the one that was cut, and the entry have the same number of experts, the
    same top-k and the plan's provenance. Raises PlanMismatchError where there is no such entry, or
    several with different figures.
    """
    identity = facts.said("identity")
    if identity is None:
        raise PlanMismatchError(
            "surgery.json does not say which model was cut, so no evaluation can be shown to belong here; prune "
            "again with this version of moe-surgery"
        )
    if (evaluation.identity, evaluation.num_experts) != (identity, facts.source.experts):
        raise PlanMismatchError(
            f"the evaluation is of {evaluation.checkpoint!r} ({evaluation.num_experts} experts, identity "
            f"{evaluation.identity}), but this checkpoint was cut from one of {facts.source.experts} experts, "
            f"identity {identity}; evaluate against that one"
        )
    experts = (facts.kept,) * facts.layers
    provenance = _plain(facts.plan.provenance)
    found = [
        m
        for m in evaluation.models
        if m.kind != "full"
        and (m.experts, m.top_k) == (experts, facts.this.top_k)
        and _plain(m.provenance) == provenance
    ]
    if not found:
        names = ", ".join(m.name for m in evaluation.models if m.kind != "full") or "the full model only"
        raise PlanMismatchError(
            f"the evaluation has no model of {facts.kept} experts and top-{facts.this.top_k} with this checkpoint's "
            f"plan (it has {names}); evaluate this checkpoint"
        )
    if any(m.domains != found[0].domains for m in found):
        raise PlanMismatchError(
            f"the evaluation has {len(found)} different models that could be this one "
            f"({', '.join(m.name for m in found)}); evaluate this checkpoint alone"
        )
    return found[0]


def quality_section(evaluation: Evaluation | None, facts: Facts) -> str:
    """The table, or the plain word that there is none. Raises as `belonging`."""
    if evaluation is None:
        return (
            "**Not evaluated.** Nobody has measured what this cut costs. Before relying on it, compare it with the "
            "source on texts of your own kind."
            if not facts.whole
            else "Not evaluated."
        )
    mine, full = belonging(evaluation, facts), evaluation.models[0]
    rows = [
        _row(code(d), full.domains[d], mine.domains[d]) for d in sorted(mine.domains) if d in full.domains
    ]
    if len(rows) > 1:
        rows.append(_row("all", full.overall, mine.overall))
    columns = ["texts", "tokens", "perplexity, source", "perplexity, this", "KL, nats", "same top token"]
    settings = [
        f"{code(key)} {code(value)}"
        for key, value in sorted(evaluation.settings.items())
        if isinstance(value, (str, int, float))
    ]
    parts = [
        "Against the source, on the same texts:",
        table([*columns, "routes redirected"], rows),
        "KL is the mean divergence of this model's next token from the source's; a route is redirected where "
        "the router has to choose another expert than the source's would.",
    ]
    if settings:
        parts.append("Settings: " + ", ".join(settings) + ".")
    if names := [e for entries in evaluation.texts.values() for e in entries if isinstance(e, Mapping)]:
        shown = ", ".join(code(e.get("name")) for e in names[:10]) + (", ..." if len(names) > 10 else "")
        parts.append(f"Measured on {counted(len(names), 'text')}: {shown}.")
    return "\n\n".join(parts)


def _row(name: str, full: Quality, mine: Quality) -> list[str]:
    redirected = sum(mine.redirected) / len(mine.redirected) if mine.redirected else math.nan
    return [
        name,
        f"{mine.tokens:,}",
        _figure(full.perplexity),
        _figure(mine.perplexity),
        f"{mine.kl:.4f}",
        _share(mine.agreement),
        _share(redirected),
    ]


def _figure(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}" if math.isfinite(value) else "over 1e308"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else ""


def _plain(provenance: Mapping[str, object]) -> object:
    """As it comes out of a file: lists for tuples."""
    return json.loads(json.dumps(provenance))
