"""Plans for the embedded checkpoint, with experts drawn at random."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_surgery.selection.plan import Plan  # noqa: E402

TINY = "example:tiny"
F32 = torch.float32
Kept = tuple[tuple[int, ...], ...]


def drawn(seed: int, *counts: int) -> Kept:
    """Experts of each of 4 layers, in any order."""
    rng = np.random.default_rng(seed)
    sizes = counts if len(counts) == 4 else counts * 4
    return tuple(tuple(int(e) for e in rng.permutation(32)[:n]) for n in sizes)


PLANS = {
    "eight": Plan("gpt_oss", 32, drawn(5, 8)),
    "top-2 of eight": Plan("gpt_oss", 32, drawn(5, 8), top_k=2),
    "different counts": Plan("gpt_oss", 32, drawn(1, 2, 30, 5, 1)),
    "top-6 of twenty": Plan("gpt_oss", 32, drawn(2, 20), top_k=6),
    "all": Plan("gpt_oss", 32, drawn(3, 32)),
}
