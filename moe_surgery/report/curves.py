"""Lines of an evaluation's charts: one per method, random choices taken together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality

__all__ = ["FEW", "MEASURES", "Line", "Point", "lines", "method_of", "ranked_for", "ranked_for_domain"]

RANDOM = "random"
# More lines are hard to tell apart; the initial view then shows only those ranked on its texts.
FEW = 8

# NaN if unknown: a checkpoint that does not record which experts it kept.
MEASURES: Mapping[str, Callable[[Quality], float]] = MappingProxyType(
    {
        "kl": lambda q: q.kl,
        "cross_entropy": lambda q: q.cross_entropy,
        "agreement": lambda q: q.agreement,
        "rerouted": lambda q: float(np.mean(q.rerouted)) if q.rerouted else math.nan,
    }
)


@dataclass(frozen=True, slots=True)
class Point:
    """Models of one line with the same number of experts: median, smallest and largest of a measure."""

    experts: float
    models: int
    middle: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """Models chosen the same way. `domains` is what they were ranked on, None if not recorded."""

    method: str
    domains: tuple[str, ...] | None
    models: tuple[ModelResult, ...]

    def points(self, measure: str, domain: str | None) -> list[Point]:
        """Points by experts kept, for one domain's texts or (None) all."""
        by_size: dict[float, list[float]] = {}
        for model in self.models:
            quality = model.overall if domain is None else model.domains.get(domain)
            value = math.nan if quality is None else MEASURES[measure](quality)
            if not math.isnan(value):
                by_size.setdefault(model.mean_experts, []).append(value)
        return [Point(n, len(y), float(np.median(y)), min(y), max(y)) for n, y in sorted(by_size.items())]


def method_of(model: ModelResult) -> str:
    """How the model's experts were chosen, from its provenance; else its kind."""
    method = model.provenance.get("method")
    name = method if isinstance(method, str) and method else model.kind
    return f"{name} + super experts" if model.provenance.get("protect_super_experts") is True else name


def lines(evaluation: Evaluation) -> list[Line]:
    """The evaluation's models but the full one, by method and domains, in the order they appear."""
    groups: dict[tuple[str, tuple[str, ...] | None], list[ModelResult]] = {}
    for model in evaluation.models:
        if model.kind != "full":
            method = method_of(model)
            domains = None if method == RANDOM else _domains(model)
            groups.setdefault((method, domains), []).append(model)
    return [Line(method, domains, tuple(models)) for (method, domains), models in groups.items()]


def ranked_for_domain(curves: Sequence[Line], domain: str | None, every: Sequence[str]) -> list[Line]:
    """Lines ranked for `domain` and lines without domains; all lines if none is for it."""
    meant = [line for line in curves if line.domains is None or ranked_for(line.domains, domain, every)]
    return meant if any(line.domains for line in meant) else list(curves)


def ranked_for(domains: Sequence[str], domain: str | None, every: Sequence[str]) -> bool:
    """Whether `domains` is `domain` alone, or its prompts or answers; for None, whether it includes all of `every`."""
    whole = {_whole(d) for d in domains}
    return whole >= {_whole(d) for d in every} if domain is None else whole == {_whole(domain)}


def _whole(domain: str) -> str:
    name, _, part = domain.rpartition(":")
    return name if name and part in ("prompt", "answer") else domain


def _domains(model: ModelResult) -> tuple[str, ...] | None:
    domains = model.provenance.get("domains")
    if not isinstance(domains, list) or not domains:
        return None
    return tuple(sorted(str(d) for d in domains))
