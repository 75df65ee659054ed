"""Statistics -> ranking, by a metric."""

from __future__ import annotations

from collections.abc import Sequence

from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.metrics import order, score, super_experts
from moe_surgery.selection.ranking import Ranking
from moe_surgery.selection.statistics import Statistics, as_statistics

__all__ = ["rank"]


def rank(
    statistics: Statistics | PathLike,
    metric: str,
    *,
    domains: Sequence[str] | None = None,
    protect_super_experts: bool = False,
) -> Ranking:
    """Order each layer's experts by `metric` over `domains` (default: all), best first.

    `statistics` may be the path of a statistics file.
    `protect_super_experts` puts the outliers by REAP's rule first, regardless of their score. Raises
    UsageError for an unknown metric or one that the statistics do not allow, InvalidInputError for an unknown domain.
    """
    statistics = as_statistics(statistics)
    layers = statistics.over(domains)
    scores = score(metric, layers)
    orders = [order(row) for row in scores]
    if protect_super_experts:
        guarded = super_experts(layers)
        orders = [
            tuple(sorted(row, key=lambda e: e not in keep)) for row, keep in zip(orders, guarded, strict=True)
        ]
    chosen = sorted(statistics.named(domains))
    return Ranking(
        statistics.experts,
        tuple(orders),
        statistics.model_type,
        tuple(tuple(float(x) for x in row) for row in scores),
        {
            "method": metric,
            "domains": chosen,
            "tokens": sum(statistics.tokens[d] for d in chosen),
            "checkpoint": statistics.identity,
            "texts": {d: statistics.texts[d] for d in chosen},
            "protect_super_experts": protect_super_experts,
            "settings": statistics.settings,
        },
        statistics.layer_numbers,
    )
