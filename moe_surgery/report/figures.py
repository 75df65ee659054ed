"""The numbers behind the figures, from statistics and plans. The page only draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_surgery.errors import InvalidInputError, PlanMismatchError
from moe_surgery.selection.metrics import METRICS, order, score
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import ExpertStatistics, Statistics

__all__ = ["ALL", "View", "check_plan", "coverage", "overlap", "plan_coverage", "views"]

ALL = "all domains"
CARRIED = ("weight", "routes")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class View:
    """Statistics of one domain, or of all together (`domain` None), with everything ranked.

    `scores[metric]` float64 [layers, experts]; `orders[metric]` int64 [layers, experts], best first.
    """

    domain: str | None
    tokens: int
    layers: Sequence[ExpertStatistics]
    scores: dict[str, Floats]
    orders: dict[str, Ints]

    @property
    def name(self) -> str:
        return ALL if self.domain is None else self.domain

    def ranks(self, metric: str) -> Ints:
        """Rank of every expert in its layer, 1 for the best; [layers, experts]."""
        return np.argsort(self.orders[metric], axis=1) + 1

    def relative(self, metric: str) -> Floats:
        """Scores as shares of the largest of their layer; [layers, experts], 0 where all are."""
        scores = self.scores[metric]
        top = scores.max(axis=1, keepdims=True)
        return np.asarray(np.divide(scores, top, out=np.zeros_like(scores), where=top > 0))

    def carried(self, what: str) -> Floats:
        """Share of its layer's routed weight or routes that each expert has; [layers, experts].

        `what` is "weight" (sum of routing weights) or "routes" (counts). 0 in a layer without any.
        """
        part = np.stack([s.gate if what == "weight" else s.count.astype(np.float64) for s in self.layers])
        total = part.sum(axis=1, keepdims=True)
        return np.asarray(np.divide(part, total, out=np.zeros_like(part), where=total > 0))


def views(statistics: Statistics) -> list[View]:
    """All domains together first, then each; the only domain alone where there is one.

    Raises InvalidInputError for statistics without domains or with numbers that are not finite.
    """
    if not statistics.data or not statistics.layers:
        raise InvalidInputError("the statistics have no domain; there is nothing to show")
    chosen: list[str | None] = [*statistics.domains]
    if len(chosen) > 1:
        chosen.insert(0, None)
    return [_view(statistics, domain) for domain in chosen]


def _view(statistics: Statistics, domain: str | None) -> View:
    # Exactly this domain: `over(["law"])` would add "law:answer".
    layers = statistics.over() if domain is None else statistics.data[domain]
    scores = {metric: np.stack(score(metric, layers)) for metric in METRICS}
    for metric, rows in scores.items():
        if not np.isfinite(rows).all():
            raise InvalidInputError(f"the statistics are damaged: {metric} is not finite everywhere")
    orders = {metric: np.array([order(row) for row in rows]) for metric, rows in scores.items()}
    tokens = sum(statistics.tokens.values()) if domain is None else statistics.tokens[domain]
    return View(domain, tokens, layers, scores, orders)


def overlap(a: Ints, b: Ints) -> Ints:
    """How many of the n best experts two orders have in common, summed over layers; [experts], n from 1.

    `a`, `b`: [layers, experts], best first. Divided by n * layers it is the mean share in common.
    """
    # An expert is among the n best of both for n from the larger of its two ranks on.
    later = np.maximum(np.argsort(a, axis=1), np.argsort(b, axis=1))
    return np.cumsum(np.bincount(later.ravel(), minlength=a.shape[1]))


def coverage(orders: Ints, shares: Floats) -> tuple[Floats, Floats]:
    """Share covered by the n best experts, for n from 1: (mean over layers, worst layer), each [experts].

    `orders` [layers, experts], best first; `shares` as of `View.carried`.
    """
    covered = np.cumsum(np.take_along_axis(shares, orders, axis=1), axis=1)
    return covered.mean(axis=0), covered.min(axis=0)


def plan_coverage(plan: Plan, shares: Floats) -> tuple[float, float]:
    """Share covered by the experts of `plan`: (mean over layers, worst layer)."""
    covered = [float(row[list(kept)].sum()) for row, kept in zip(shares, plan.layers, strict=True)]
    return sum(covered) / len(covered), min(covered)


def check_plan(plan: Plan, statistics: Statistics, name: str) -> None:
    """Raise PlanMismatchError unless `plan` (called `name`) is for the statistics' checkpoint.

    Its model type, layers and experts must agree, and the checkpoint it was ranked on, if
    it was ranked by one of our metrics.
    """
    actual = (plan.model_type, plan.num_layers, plan.num_source_experts)
    expected = (statistics.model_type, statistics.layers, statistics.experts)
    if actual != expected:
        raise PlanMismatchError(
            f"{name}: is for {actual[0]} with {actual[1]} layers of {actual[2]} experts, but the statistics are of "
            f"{expected[0]} with {expected[1]} layers of {expected[2]}; use a plan for this checkpoint"
        )
    ranked_on = plan.provenance.get("checkpoint")
    if plan.provenance.get("method") in METRICS and isinstance(ranked_on, str):
        check_identity(ranked_on, statistics, name)


def check_identity(identity: str, statistics: Statistics, name: str) -> None:
    """Raise PlanMismatchError unless `identity` is the statistics' checkpoint."""
    if identity != statistics.identity:
        raise PlanMismatchError(
            f"{name}: belongs to checkpoint {identity}, but the statistics are of {statistics.identity}; "
            "a report shows one checkpoint"
        )
