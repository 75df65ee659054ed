"""Saliency metrics: one score per expert from its statistics. The highest scores are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from moe_surgery.errors import UsageError
from moe_surgery.selection.statistics import ExpertStatistics

__all__ = ["METRICS", "order", "score", "super_experts"]

Floats = npt.NDArray[np.float64]


def _mean(total: Floats, count: npt.NDArray[np.int64]) -> Floats:
    """total / count, 0 where no token chose the expert."""
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def _norm_of_mean(s: ExpertStatistics) -> Floats:
    return np.asarray(np.linalg.norm(_mean(s.output.T, s.count).T, axis=1))


# With T_j the tokens that chose expert j, g their routing weight, f its output:
METRICS: Mapping[str, Callable[[ExpertStatistics], Floats]] = MappingProxyType(
    {
        "frequency": lambda s: s.count.astype(np.float64),  # |T_j|
        "gate": lambda s: s.gate,  # sum of g ("weighted expert frequency" in Cerebras REAP's code)
        "ean_sum": lambda s: s.norm,  # sum of |f| (expert activation norm, REAP's code)
        "ean_mean": lambda s: _mean(s.norm, s.count),  # mean of |f|
        "weighted_ean": lambda s: s.weighted_norm,  # sum of g |f|
        "reap": lambda s: _mean(s.weighted_norm, s.count),  # mean of g |f| (arXiv 2510.13999)
        "ean_ca": _norm_of_mean,  # |mean of f|
    }
)


def score(metric: str, layers: Sequence[ExpertStatistics]) -> list[Floats]:
    """Scores float64 [experts] per layer. An expert that no token chose scores 0. Raises UsageError."""
    if metric not in METRICS:
        raise UsageError(f"`metric` {metric}: unknown; known: {', '.join(METRICS)}")
    return [METRICS[metric](layer) for layer in layers]


def order(scores: Floats) -> tuple[int, ...]:
    """Experts by descending score, ties by number."""
    return tuple(int(e) for e in np.argsort(-scores, kind="stable"))


def super_experts(layers: Sequence[ExpertStatistics]) -> list[set[int]]:
    """Experts per layer whose peak activation is an outlier, by REAP's rule (arXiv 2510.13999).

    With A the peaks of all layers and experts: those above max(quantile 0.995 of A, max(A) / 10), in
    the first three quarters of the layers. They must not be dropped, regardless of their score.
    """
    peaks = np.stack([layer.peak for layer in layers])
    threshold = max(float(np.quantile(peaks, 0.995)), float(peaks.max()) / 10)
    last = int(len(layers) * 0.75)
    return [
        {int(e) for e in np.flatnonzero(row > threshold)} if number < last else set()
        for number, row in enumerate(peaks)
    ]
