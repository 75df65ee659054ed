"""Critical values of the chi-square distribution."""

from __future__ import annotations

import math


def critical(freedom: int) -> float:
    """The chi-square that one in 30 000 exceeds (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4 * math.sqrt(spread)) ** 3
