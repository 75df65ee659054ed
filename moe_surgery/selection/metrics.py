"""Saliency metrics: one score per expert from its statistics. The highest scores are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from moe_surgery.errors import UsageError
from moe_surgery.selection.statistics import PROFILED, ExpertStatistics

__all__ = [
    "METRICS",
    "NEEDS",
    "PROFILED_METRICS",
    "check_metric",
    "metrics_from",
    "order",
    "score",
    "super_experts",
]

Floats = npt.NDArray[np.float64]


def _mean(total: Floats, count: npt.NDArray[np.int64]) -> Floats:
    """total / count, 0 where no token chose the expert."""
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def _norm_of_mean(s: ExpertStatistics) -> Floats:
    return np.asarray(np.linalg.norm(_mean(s.of("output").T, s.count).T, axis=1))


# With T_j the tokens that chose expert j, g their routing weight, f its output, x the input of its down projection:
METRICS: Mapping[str, Callable[[ExpertStatistics], Floats]] = MappingProxyType(
    {
        "frequency": lambda s: s.count.astype(np.float64),  # |T_j|
        "gate": lambda s: s.of("gate"),  # sum of g ("weighted expert frequency" in Cerebras REAP's code)
        "ean_sum": lambda s: s.of("norm"),  # sum of |f| (expert activation norm, REAP's code)
        "ean_mean": lambda s: _mean(s.of("norm"), s.count),  # mean of |f|
        "weighted_ean": lambda s: s.of("weighted_norm"),  # sum of g |f|
        "reap": lambda s: _mean(s.of("weighted_norm"), s.count),  # mean of g |f| (arXiv 2510.13999)
        "ean_ca": _norm_of_mean,  # |mean of f|
        "rms_count": lambda s: np.sqrt(s.of("down_input") * s.count),  # |T_j| times the RMS of |x|
        "energy": lambda s: s.of("energy"),  # sum of |f|^2, if channels are uncorrelated
    }
)

NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "frequency": "count",
        "gate": "gate",
        "ean_sum": "norm",
        "ean_mean": "norm",
        "weighted_ean": "weighted_norm",
        "reap": "weighted_norm",
        "ean_ca": "output",
        "rms_count": "down_input",
        "energy": "energy",
    }
)
"""The statistic that each metric needs, besides the counts."""


def metrics_from(known: Sequence[str]) -> tuple[str, ...]:
    """The metrics that the statistics `known` allow."""
    return tuple(metric for metric in METRICS if NEEDS[metric] in known)


PROFILED_METRICS = metrics_from(PROFILED)
"""Those that statistics of `profile` allow."""


def check_metric(metric: str, known: Sequence[str]) -> None:
    """Raise UsageError for an unknown metric, and for one that the statistics `known` do not allow."""
    if metric not in METRICS:
        raise UsageError(f"`metric` {metric}: unknown; known: {', '.join(METRICS)}")
    if NEEDS[metric] not in known:
        raise UsageError(
            f"`metric` {metric}: needs {_WORDS[NEEDS[metric]]}, which these statistics do not have; choose one of "
            f"{', '.join(metrics_from(known))}"
        )


_WORDS = {
    "gate": "routing weights",
    "norm": "norms of the experts' outputs",
    "weighted_norm": "norms of the experts' outputs and routing weights",
    "output": "the experts' outputs",
    "down_input": "inputs of the down projections (of an importance matrix)",
    "energy": "energies (an importance matrix and the model's weights)",
}


def score(metric: str, layers: Sequence[ExpertStatistics]) -> list[Floats]:
    """Scores float64 [experts] per layer. An expert that no token chose scores 0.

    Raises UsageError for an unknown metric, and one that the statistics do not allow.
    """
    check_metric(metric, layers[0].known if layers else tuple(NEEDS.values()))
    return [METRICS[metric](layer) for layer in layers]


def order(scores: Floats) -> tuple[int, ...]:
    """Experts by descending score, ties by number."""
    return tuple(int(e) for e in np.argsort(-scores, kind="stable"))


def super_experts(layers: Sequence[ExpertStatistics]) -> list[set[int]]:
    """Experts per layer whose peak activation is an outlier, by REAP's rule (arXiv 2510.13999).

    With A the peaks of all layers and experts: those above max(quantile 0.995 of A, max(A) / 10), in
    the first three quarters of the layers. They must not be dropped, regardless of their score.
    Raises UsageError for statistics without peaks.
    """
    if any(layer.peak is None for layer in layers):
        raise UsageError(
            "`protect_super_experts` needs peaks of the experts' outputs; only `profile` measures them"
        )
    peaks = np.stack([layer.of("peak") for layer in layers])
    threshold = max(float(np.quantile(peaks, 0.995)), float(peaks.max()) / 10)
    last = int(len(layers) * 0.75)
    return [
        {int(e) for e in np.flatnonzero(row > threshold)} if number < last else set()
        for number, row in enumerate(peaks)
    ]
