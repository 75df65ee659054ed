"""What tests of pruned GGUF files share: which experts to keep, and how far two runs are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_surgery import plan_keeping, prune
from moe_surgery.selection.plan import HasExperts, Plan
from tests.support.gguf_architectures import ARCHITECTURES, moe_blocks

__all__ = ["Kept", "distance", "draw", "exchanged", "plan_of", "prune_to"]

Kept = Mapping[int, Sequence[int]]
"""Block -> experts, in the order of the output."""


def exchanged(architecture: str) -> Kept:
    """All 8 experts, neighbours, pairs or both exchanged: orders in which a vector's sum is the same to the bit."""
    blocks = moe_blocks(ARCHITECTURES[architecture])[0]
    return {block: [expert ^ (1 + block % 3) for expert in range(8)] for block in blocks}


def draw(architecture: str, count: int, seed: int, *, experts: int = 8) -> Kept:
    """`count` experts for each block of the trunk, drawn anew, as many of every group if they divide, ascending."""
    row = ARCHITECTURES[architecture]
    groups = row.groups or 1
    size = experts // groups
    kept = {}
    for block in moe_blocks(row)[0]:
        generator = np.random.default_rng([seed, block])
        shares = [count // groups + (group < count % groups) for group in range(groups)]
        rows = [group * size + generator.permutation(size)[:share] for group, share in enumerate(shares)]
        kept[block] = np.sort(np.concatenate(rows)).tolist()
    return kept


def plan_of(kept: Kept, model: HasExperts, mtp: Sequence[Sequence[int]] | None = None) -> Plan:
    layers = tuple(tuple(kept[block]) for block in sorted(kept))
    return replace(
        plan_keeping(None, model), layers=layers, mtp_layers=None if mtp is None else tuple(map(tuple, mtp))
    )


def prune_to(source: Path, out: Path, kept: Kept, **options: object) -> Path:
    prune(source, out, lambda model: plan_of(kept, model), **options)  # type: ignore[arg-type]
    return out


def distance(left: np.ndarray, right: np.ndarray) -> float:
    """Root mean square of the difference, in float64."""
    return float(np.sqrt(np.mean(np.square(left.astype(np.float64) - right.astype(np.float64)))))
