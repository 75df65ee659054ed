"""Few cases in which every pair of values of any two factors occurs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

__all__ = ["pairwise_cover"]


def pairwise_cover(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows, one value of each factor, that hold every pair; greedy, so not the fewest there could be."""
    places = [range(len(values)) for values in factors]
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(factors)), 2)
        for a in places[i]
        for b in places[j]
    }
    rows = []
    while missing:
        row = max(itertools.product(*places), key=lambda r: len(_pairs(r) & missing))
        missing -= _pairs(row)
        rows.append(tuple(values[k] for values, k in zip(factors, row, strict=True)))
    return rows


def _pairs(row: Sequence[int]) -> set[tuple[int, int, int, int]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}
