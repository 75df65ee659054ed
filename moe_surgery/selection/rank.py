"""Statistics -> ranking, by a metric."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moe_surgery.errors import PlanMismatchError, UsageError
from moe_surgery.selection.metrics import order, score, super_experts
from moe_surgery.selection.published import rank_published, statistics_files
from moe_surgery.selection.ranking import Ranking
from moe_surgery.selection.statistics import Statistics, load_statistics, merge

__all__ = ["rank", "rank_sources"]


def rank(
    statistics: Statistics,
    metric: str,
    *,
    domains: Sequence[str] | None = None,
    protect_super_experts: bool = False,
) -> Ranking:
    """Order each layer's experts by `metric` over `domains` (default: all), best first.

    `protect_super_experts` puts the outliers of REAP's rule first whatever their score. Raises
    UsageError for an unknown metric, InvalidInputError for an unknown domain.
    """
    layers = statistics.over(domains)
    scores = score(metric, layers)
    orders = [order(row) for row in scores]
    if protect_super_experts:
        guarded = super_experts(layers)
        orders = [
            tuple(sorted(row, key=lambda e: e not in keep)) for row, keep in zip(orders, guarded, strict=True)
        ]
    chosen = sorted(statistics.domains if domains is None else domains)
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
        },
    )


def rank_sources(
    sources: Sequence[str | os.PathLike[str]],
    metric: str,
    *,
    domains: Sequence[str] | None = None,
    protect_super_experts: bool = False,
    model_type: str | None = None,
    experts: int | None = None,
) -> Ranking:
    """Rank from statistics files of ours, or from folders of the published statistics tree.

    Several sources of one kind are taken together. The published tree knows frequencies only.
    Raises UsageError for a mixture, or a metric that the sources do not hold.
    """
    paths = [Path(s) for s in sources]
    if not paths:
        raise UsageError("name at least one statistics file or folder")
    folders = [p for p in paths if p.is_dir()]
    if folders and len(folders) != len(paths):
        raise UsageError(
            f"{folders[0]} is a folder of published statistics and cannot be mixed with files of ours"
        )
    if not folders:
        statistics = merge(load_statistics(p) for p in paths)
        if model_type and model_type != statistics.model_type:
            raise PlanMismatchError(f"the statistics are of {statistics.model_type}, not {model_type}")
        return rank(statistics, metric, domains=domains, protect_super_experts=protect_super_experts)
    if metric != "frequency" or domains or protect_super_experts:
        raise UsageError(
            "published statistics hold frequencies only: use --metric frequency without other choices"
        )
    files = [f for folder in folders for f in statistics_files(folder)]
    found = rank_published(files, experts)
    return Ranking(found.num_experts, found.layers, model_type, found.scores, found.provenance)
