"""The numbers behind the trace page: what a plan costs each token, and what two models have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_surgery.quality.routing_trace import ModelTrace, Trace

__all__ = ["BUCKETS", "agreement", "by_weight_lost", "kept_mask", "strongest", "weight_lost"]

Floats = npt.NDArray[np.float64]

# Upper bounds of the share of routing weight that a token loses, and what the table calls them.
BUCKETS = (
    (0.0, "none"),
    (0.1, "up to 10 %"),
    (0.25, "10 to 25 %"),
    (0.5, "25 to 50 %"),
    (1.0, "over 50 %"),
)


def kept_mask(model: ModelTrace, experts: int) -> npt.NDArray[np.bool_]:
    """Which experts the model has, bool [layers, experts]."""
    mask = np.zeros((len(model.kept), experts), bool)
    for row, kept in zip(mask, model.kept, strict=True):
        row[list(kept)] = True
    return mask


def weight_lost(trace: Trace, model: ModelTrace) -> Floats:
    """The share of the full model's routing weight that goes to experts which `model` lacks, [layers, tokens]."""
    full = trace.models[0]
    kept = kept_mask(model, trace.num_experts)
    rows = np.arange(trace.layers)[:, None, None]
    gone = ~kept[rows, full.experts] & (full.experts >= 0)
    lost: Floats = (full.weights.astype(np.float64) * gone).sum(axis=2)
    return lost


def by_weight_lost(lost: Floats, kl: Floats) -> list[tuple[int, float | None]]:
    """For each of `BUCKETS` of a token's mean share of weight lost: tokens, and their mean KL divergence."""
    share = lost.mean(axis=0)
    rows: list[tuple[int, float | None]] = []
    low = -1.0
    for high, _ in BUCKETS:
        inside = (share > low) & (share <= high + 1e-9)
        low = high + 1e-9
        rows.append((int(inside.sum()), float(kl[inside].mean()) if inside.any() else None))
    return rows


def agreement(a: ModelTrace, b: ModelTrace) -> Floats:
    """The share of experts that two models choose in common, [layers, tokens].

    Of the slots of the one that chooses more.
    """
    common = (a.experts[..., :, None] == b.experts[..., None, :]) & (a.experts[..., :, None] >= 0)
    slots = np.maximum((a.experts >= 0).sum(axis=2), (b.experts >= 0).sum(axis=2))
    shares: Floats = common.sum(axis=(2, 3)) / slots
    return shares


def strongest(experts: Sequence[int], most: int) -> list[tuple[int, int]]:
    """The `most` experts that are most often the strongest of a token, with their numbers of tokens."""
    ids, counts = np.unique(np.asarray(experts), return_counts=True)
    order = np.lexsort((ids, -counts))[:most]
    return [(int(ids[i]), int(counts[i])) for i in order]
