"""How often each expert is used, with ageing: which of them are worth their memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import Statistics

__all__ = ["HALF_LIFE", "Usage", "expected_use"]

HALF_LIFE = 256
"""Tokens after which a use counts half."""

Floats = npt.NDArray[np.float64]


class Usage:
    """Per expert an estimate of the probability that a token uses it: uses, of which older ones count less.

    `scores` [layers, experts] is proportional to it.
    """

    def __init__(self, expected: Floats, half_life: int = HALF_LIFE) -> None:
        """`expected` [layers, experts]: the probability that a token uses each, as far as it is known before."""
        self._decay = 0.5 ** (1 / half_life)
        self.scores = expected / (1 - self._decay)
        self._new = np.zeros_like(self.scores)

    def count(self, layer: int, experts: Sequence[int], uses: Sequence[int]) -> None:
        """Count the uses of distinct experts in the present step; `scores` change when it ends."""
        self._new[layer, experts] += uses

    def end_step(self, tokens: int) -> None:
        """Age by a step of `tokens` and add what was counted: within a step no layer is favoured over a later one."""
        self.scores *= self._decay**tokens
        self.scores += self._new
        self._new[:] = 0


def expected_use(start: Plan | Statistics | None, layers: int, experts: int, top_k: int) -> Floats:
    """The probability that a token uses each expert, [layers, experts], as far as `start` tells: 0 if it is None.

    Statistics have counted it, over all their domains. A plan says which experts to hold: they are taken to be
    used evenly, the others not at all.
    """
    expected = np.zeros((layers, experts))
    if isinstance(start, Plan):
        for layer, kept in enumerate(start.layers):
            expected[layer, list(kept)] = min(1, top_k / len(kept))
    elif start is not None:
        expected += [statistics.count for statistics in start.over()]
        expected /= np.maximum(expected.sum(axis=1, keepdims=True), 1) / top_k
    return expected
