"""Figures of evaluations for the variants of a sweep."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from moe_surgery.checkpoint.kinds import EVALUATION, kind_of
from moe_surgery.errors import MoeSurgeryError, PlanMismatchError
from moe_surgery.pipeline.sweep.make import manifest_of
from moe_surgery.pipeline.sweep.state import Entry, State
from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality, load_evaluation
from moe_surgery.selection.arguments import PathLike

__all__ = ["add_figures"]

Figures = Mapping[str, Mapping[str, float | None]]


def add_figures(state: State, folder: Path, files: Iterable[PathLike]) -> None:
    """Give the variants of `state` the figures in evaluations: `files`, and those that lie in `folder`.

    A later file replaces figures of an earlier one, those in `files` come last. Raises PlanMismatchError for one of
    `files` that is of another model, and as `load_evaluation`.
    """
    named = [Path(file) for file in files]
    beside = [path for path in sorted(folder.glob("*.json")) if kind_of(path) is EVALUATION]
    provenances: dict[str, object] = {}
    for path in [*beside, *named]:
        evaluation = load_evaluation(path)
        if evaluation.identity != state.identity:
            if path in named:
                raise PlanMismatchError(
                    f"{path}: is an evaluation of {evaluation.checkpoint!r} (identity {evaluation.identity}), not of "
                    f"{state.model} (identity {state.identity})"
                )
            continue
        if not provenances:
            provenances = {name: _provenance(folder / name) for name in state.variants}
        state.full = _figures(evaluation.models[0])
        for name, entry in state.variants.items():
            found = _result_for(evaluation, entry, provenances, state)
            if found is not None:
                state.variants[name] = replace(entry, figures=_figures(found))


def _result_for(
    evaluation: Evaluation, entry: Entry, provenances: Mapping[str, object], state: State
) -> ModelResult | None:
    """The model of `evaluation` that is the variant: of its size and its plan's provenance.

    Where there are several, or where another variant has the same, that of its name.
    """
    own = provenances[entry.name]
    matches = [
        m
        for m in evaluation.models
        if m.kind != "full"
        and (set(m.experts), m.top_k) == ({entry.experts}, entry.top_k)
        and _plain(m.provenance) == own
    ]
    alike = sum(provenances[e.name] == own and e.experts == entry.experts for e in state.variants.values())
    if len(matches) > 1 or alike > 1:
        matches = [m for m in matches if Path(m.name).name.removesuffix(".json") == entry.name]
    return matches[0] if matches else None


def _provenance(folder: Path) -> object:
    try:
        return _plain(manifest_of(folder).provenance)
    except MoeSurgeryError:  # of an earlier sweep, and damaged or changed since
        return None


def _figures(model: ModelResult) -> Figures:
    return {"": _of(model.overall), **{domain: _of(q) for domain, q in sorted(model.domains.items())}}


def _of(quality: Quality) -> dict[str, float | None]:
    return {
        "tokens": quality.tokens,
        "cross_entropy": quality.cross_entropy,
        "perplexity": quality.perplexity if math.isfinite(quality.perplexity) else None,
        "kl": quality.kl,
        "agreement": quality.agreement,
    }


def _plain(provenance: Mapping[str, object]) -> object:
    """As read back from a file: lists for tuples."""
    return json.loads(json.dumps(provenance))
