"""The share of the routing weight that the kept experts receive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.selection.metrics import order
from moe_surgery.selection.statistics import ExpertStatistics

__all__ = ["COVERAGE_OVER", "coverage", "smallest_count"]

COVERAGE_OVER = ("worst", "mean")


def coverage(
    layers: Sequence[ExpertStatistics], orders: Sequence[Sequence[int]] | None = None, of: str = "gate"
) -> npt.NDArray[np.float64]:
    """Share of the routing weight (sum of g) of the first n experts: [layers, experts], n = column + 1.

    `orders` ranks each layer's experts; by default they are ordered by that weight. `of` "count" is the share of
    routed tokens instead. Raises
    InvalidInputError where a layer has no routed tokens, or the routing weights are not known.
    """
    shares = []
    for number, layer in enumerate(layers):
        if of not in layer.known:
            raise InvalidInputError(
                "these statistics have no routing weights, only counts of tokens; files of `profile` have both"
            )
        weight = layer.of(of).astype(np.float64)
        ranked = order(weight) if orders is None else orders[number]
        carried = np.cumsum(weight[list(ranked)])
        if not carried[-1] > 0:
            raise InvalidInputError(f"the statistics have no routed tokens in layer {number}")
        shares.append(carried / carried[-1])  # exactly 1 from the last expert with any weight on
    return np.stack(shares)


def smallest_count(shares: npt.NDArray[np.float64], coverage: float, coverage_over: str = "worst") -> int:
    """The fewest experts that receive the share `coverage` (0 to 1) in every layer, or in the mean over layers.

    Raises UsageError for a share out of range.
    """
    if not 0 < coverage <= 1:
        raise UsageError(f"`coverage` {coverage:g}: must be above 0 and at most 1, such as 0.95")
    if coverage_over not in COVERAGE_OVER:
        raise UsageError(f"`coverage_over` {coverage_over}: choose one of {', '.join(COVERAGE_OVER)}")
    carried = shares.min(axis=0) if coverage_over == "worst" else shares.mean(axis=0)
    return next((n for n, share in enumerate(carried, 1) if share >= coverage), len(carried))
