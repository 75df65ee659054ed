"""The numbers behind the figures, from statistics, rankings and plans. The page only draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.selection.metrics import METRICS, metrics_from, score
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import Statistics

__all__ = [
    "ALL",
    "CARRIED",
    "MOST_DOMAINS",
    "Subject",
    "View",
    "check_identity",
    "check_number_of_domains",
    "check_plan",
    "common",
    "coverage",
    "in_order",
    "plan_coverage",
    "share_of",
    "subject_of",
]

ALL = "all domains"
CARRIED = ("weight", "routes")
MOST_DOMAINS = 40
"""More do not fit a small, fast page."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class View:
    """One domain, or all together (`domain` None), with everything ranked.

    `scores[metric]` float64 [layers, experts]; `orders[metric]` int64 [layers, experts], best first.
    `shares[kind]`, for the kinds of `CARRIED` that are known: each expert's share of its layer's routing weight or
    routes, float64 [layers, experts], 0 in a layer without any. `peaks`: the largest |f_i|, if known.
    """

    domain: str | None
    tokens: int | None
    scores: dict[str, Floats]
    orders: dict[str, Ints]
    shares: dict[str, Floats] = field(default_factory=dict)
    peaks: Floats | None = None

    @property
    def name(self) -> str:
        return ALL if self.domain is None else self.domain

    def ranks(self, metric: str) -> Ints:
        """Rank of every expert in its layer, 1 for the best; [layers, experts]."""
        return np.argsort(self.orders[metric], axis=1) + 1

    def relative(self, metric: str) -> Floats:
        """Scores as shares of the largest of their layer; [layers, experts], 0 where all are."""
        return share_of(self.scores[metric], self.scores[metric].max(axis=1, keepdims=True))


@dataclass(frozen=True, slots=True)
class Subject:
    """What a page shows: statistics of `profile`, statistics from elsewhere, or rankings.

    `model_type`, `identity`, `top_k` and a domain's tokens are None if the source does not have them. `metrics` are
    those that every view has; `measured` is False for rankings, whose scores are places in the order alone.
    `about` describes each metric where the usual description does not hold.
    """

    model_type: str | None
    identity: str | None
    layers: int
    experts: int
    top_k: int | None
    views: Sequence[View]
    metrics: tuple[str, ...] = tuple(METRICS)
    measured: bool = True
    texts: Mapping[str, Sequence[object]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None

    @property
    def domains(self) -> list[str]:
        return [v.domain for v in self.views if v.domain is not None]

    @property
    def tokens(self) -> dict[str, int | None]:
        return {v.domain: v.tokens for v in self.views if v.domain is not None}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of `CARRIED` that every view has."""
        return tuple(kind for kind in CARRIED if all(kind in v.shares for v in self.views))

    @property
    def has_peaks(self) -> bool:
        return all(v.peaks is not None for v in self.views)


def share_of(part: Floats, whole: Floats) -> Floats:
    """part / whole, 0 where whole is not positive."""
    return np.asarray(np.divide(part, whole, out=np.zeros_like(part), where=whole > 0))


def in_order(scores: Floats) -> Ints:
    """Experts of each row by descending score, ties by number, as `selection.metrics.order`; [layers, experts]."""
    return np.argsort(-scores, axis=1, kind="stable")


def check_number_of_domains(count: int, remedy: str) -> None:
    """Raise UsageError for more than `MOST_DOMAINS`."""
    if count > MOST_DOMAINS:
        raise UsageError(f"{count} domains: a report shows at most {MOST_DOMAINS}; {remedy}")


def subject_of(statistics: Statistics, domains: Sequence[str] | None = None) -> Subject:
    """Statistics of `profile`: all domains together first, then each; the only domain alone where there is one.

    `domains` (default: all) are named as in `Statistics.named`. Raises InvalidInputError for statistics without
    domains, an unknown domain, or numbers that are not finite; UsageError for too many domains.
    """
    if not statistics.data or not statistics.layers:
        raise InvalidInputError("the statistics have no domain; there is nothing to show")
    shown = sorted(statistics.named(domains))
    check_number_of_domains(len(shown), "choose with `domains`")
    chosen: list[str | None] = [None, *shown] if len(shown) > 1 else [*shown]
    return Subject(
        statistics.model_type,
        statistics.identity,
        statistics.layers,
        statistics.experts,
        statistics.top_k,
        [_view(statistics, domain, shown) for domain in chosen],
        metrics_from(statistics.known),
        texts=statistics.texts,
        settings=statistics.settings,
    )


def _view(statistics: Statistics, domain: str | None, shown: Sequence[str]) -> View:
    # Exactly this domain: `over(["law"])` would add "law:answer".
    layers = statistics.over(shown) if domain is None else statistics.data[domain]
    scores = {metric: np.stack(score(metric, layers)) for metric in metrics_from(statistics.known)}
    for metric, rows in scores.items():
        if not np.isfinite(rows.astype(np.float32)).all():
            raise InvalidInputError(f"the statistics are damaged: {metric} is not finite everywhere")
    orders = {metric: in_order(rows) for metric, rows in scores.items()}
    tokens = sum(statistics.tokens[d] for d in shown) if domain is None else statistics.tokens[domain]
    parts = {"routes": scores["frequency"]}
    if "gate" in scores:
        parts = {"weight": scores["gate"], **parts}
    shares = {kind: share_of(part, part.sum(axis=1, keepdims=True)) for kind, part in parts.items()}
    peaks = np.stack([s.of("peak_abs") for s in layers]) if "peak_abs" in statistics.known else None
    return View(domain, tokens, scores, orders, shares, peaks)


def common(views: Sequence[View], metric: str, n: int) -> Ints:
    """How many of the n best experts two views have in common, summed over layers; [views, views].

    Divided by n * layers it is the mean share in common.
    """
    best = np.zeros((len(views), views[0].orders[metric].size), bool)
    for row, view in zip(best, views, strict=True):
        rows = view.orders[metric]
        np.put_along_axis(row.reshape(rows.shape), rows[:, :n], True, axis=1)
    return np.array([np.count_nonzero(best & row, axis=1) for row in best])


def coverage(orders: Ints, shares: Floats) -> tuple[Floats, Floats]:
    """Share covered by the n best experts, for n from 1: (mean over layers, worst layer), each [experts].

    `orders` [layers, experts], best first; `shares` as of `View.shares`.
    """
    covered = np.cumsum(np.take_along_axis(shares, orders, axis=1), axis=1)
    return covered.mean(axis=0), covered.min(axis=0)


def plan_coverage(plan: Plan, shares: Floats) -> tuple[float, float]:
    """Share covered by the experts of `plan`: (mean over layers, worst layer)."""
    covered = [float(row[list(kept)].sum()) for row, kept in zip(shares, plan.layers, strict=True)]
    return sum(covered) / len(covered), min(covered)


def check_plan(plan: Plan, subject: Subject, name: str) -> None:
    """Raise PlanMismatchError unless `plan` (called `name`) is for the statistics' checkpoint.

    Its model type (if the statistics have one), layers and experts must agree, and the checkpoint it was ranked
    on, if it was ranked by one of our metrics.
    """
    actual = (plan.model_type, plan.num_layers, plan.num_source_experts)
    expected = (subject.model_type or plan.model_type, subject.layers, subject.experts)
    if actual != expected:
        raise PlanMismatchError(
            f"{name}: is for {actual[0]} with {actual[1]} layers of {actual[2]} experts, but the statistics are of "
            f"{expected[0]} with {expected[1]} layers of {expected[2]}; use a plan for this checkpoint"
        )
    ranked_on = plan.provenance.get("checkpoint")
    if plan.provenance.get("method") in METRICS and isinstance(ranked_on, str):
        check_identity(ranked_on, subject, name)


def check_identity(identity: str, subject: Subject, name: str) -> None:
    """Raise PlanMismatchError unless `identity` is the statistics' checkpoint, or that is not known."""
    if subject.identity is not None and identity != subject.identity:
        raise PlanMismatchError(
            f"{name}: belongs to checkpoint {identity}, but the statistics are of {subject.identity}; "
            "a report shows one checkpoint"
        )
