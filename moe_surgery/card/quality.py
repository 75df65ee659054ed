"""Card section with the figures of an evaluation, after checking that it is of this checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe_surgery.card.facts import Facts
from moe_surgery.card.text import code, counted, table
from moe_surgery.errors import PlanMismatchError
from moe_surgery.surgery.manifest import provenance_of

if TYPE_CHECKING:
    from moe_surgery.quality.accuracy import Accuracy
    from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality

__all__ = ["matching_result", "quality_section"]


def matching_result(evaluation: Evaluation, facts: Facts) -> ModelResult:
    """The result in `evaluation` for this checkpoint.

    Its full model must be the source, and the result have the same number of experts, the same top-k
    and the plan's provenance. Raises PlanMismatchError if there is no such result, or several with
    different figures.
    """
    identity = facts.recorded("identity")
    if identity is None:
        raise PlanMismatchError(
            "surgery.json does not record which model was pruned, so an evaluation cannot be matched to it; prune "
            "again with this version of moe-surgery"
        )
    if (evaluation.identity, evaluation.num_experts) != (identity, facts.source.experts):
        raise PlanMismatchError(
            f"the evaluation is of {evaluation.checkpoint!r} ({evaluation.num_experts} experts, identity "
            f"{evaluation.identity}), but this checkpoint was pruned from one of {facts.source.experts} experts, "
            f"identity {identity}; evaluate against that one"
        )
    experts = (facts.kept,) * facts.layers
    provenance = _plain(provenance_of(facts.plan, facts.repair))
    matches = [
        m
        for m in evaluation.models
        if m.kind != "full"
        and (m.experts, m.top_k) == (experts, facts.this.top_k)
        and _plain(m.provenance) == provenance
    ]
    if not matches:
        names = ", ".join(m.name for m in evaluation.models if m.kind != "full") or "the full model only"
        raise PlanMismatchError(
            f"the evaluation has no model with {facts.kept} experts and top-{facts.this.top_k} with this checkpoint's "
            f"plan (it has {names}); evaluate this checkpoint"
        )
    if any(m.domains != matches[0].domains for m in matches):
        raise PlanMismatchError(
            f"the evaluation has {len(matches)} different models that could be this one "
            f"({', '.join(m.name for m in matches)}); evaluate this checkpoint alone"
        )
    return matches[0]


def quality_section(evaluation: Evaluation | None, facts: Facts) -> str:
    """The figures, or a sentence that there are none. Raises as `matching_result`."""
    if evaluation is None:
        return (
            "**Not evaluated.** The loss in quality has not been measured. Before relying on this model, compare it "
            "with the source on your own kind of texts."
            if not facts.whole
            else "Not evaluated."
        )
    result, full = matching_result(evaluation, facts), evaluation.models[0]
    rows = [
        _row(code(d), full.domains[d], result.domains[d]) for d in sorted(result.domains) if d in full.domains
    ]
    if len(rows) > 1:
        rows.append(_row("all", full.overall, result.overall))
    columns = ["texts", "tokens", "perplexity, source", "perplexity, this", "KL, nats", "same top token"]
    settings = [
        f"{code(key)} {code(value)}"
        for key, value in sorted(evaluation.settings.items())
        if isinstance(value, (str, int, float))
    ]
    replies = bool(evaluation.questions) and evaluation.texts == evaluation.questions
    parts = [
        f"Compared with the source on {'questions and its replies to them' if replies else 'the same texts'}:",
        table([*columns, "rerouted"], rows),
        "KL is the mean divergence of this model's next-token distribution from the source's; rerouted is the share of "
        "token-expert assignments that differ from the source's.",
    ]
    if result.accuracy:
        parts += _answers(full, result)
    if settings:
        parts.append("Settings: " + ", ".join(settings) + ".")
    if names := [e for entries in evaluation.texts.values() for e in entries if isinstance(e, Mapping)]:
        shown = ", ".join(code(e.get("name")) for e in names[:10]) + (", ..." if len(names) > 10 else "")
        parts.append(f"Measured on {counted(len(names), 'text')}: {shown}.")
    return "\n\n".join(parts)


def _answers(full: ModelResult, result: ModelResult) -> list[str]:
    """The share of questions answered right, domain by domain."""
    pairs = [(code(d), full.accuracy[d], a) for d, a in sorted(result.accuracy.items()) if d in full.accuracy]
    if len(pairs) > 1:
        pairs.append(("all", full.overall_accuracy, result.overall_accuracy))
    columns = ["questions of", "asked", "right, source", "right, this", "lost", "gained", "p"]
    rows = [
        [
            name,
            f"{this.questions:,}",
            _share(source),
            _share(this),
            f"{len(this.lost):,}",
            f"{len(this.gained):,}",
            f"{this.p_value:.2g}",
        ]
        for name, source, this in pairs
    ]
    return [
        "Questions answered right, with the 95 % interval (Wilson):",
        table(columns, rows),
        "Lost are those that only the source answers right, gained those that only this model does; p is how often "
        "models that are equally good differ as much (McNemar's exact test).",
    ]


def _share(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{_percent(accuracy.share)} ({100 * low:.1f} to {100 * high:.1f})"


def _row(name: str, full: Quality, pruned: Quality) -> list[str]:
    rerouted = sum(pruned.rerouted) / len(pruned.rerouted) if pruned.rerouted else math.nan
    return [
        name,
        f"{pruned.tokens:,}",
        _figure(full.perplexity),
        _figure(pruned.perplexity),
        f"{pruned.kl:.4f}",
        _percent(pruned.agreement),
        _percent(rerouted),
    ]


def _figure(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}" if math.isfinite(value) else "over 1e308"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else ""


def _plain(provenance: Mapping[str, object]) -> object:
    """As read back from a file: lists for tuples."""
    return json.loads(json.dumps(provenance))
