"""Calls measured in alternation, so that drift of the machine affects all alike; and summaries."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moe_surgery.errors import UsageError

__all__ = ["MedianRange", "check_numbers", "interleaved", "median_range", "percentile", "rounded"]

T = TypeVar("T")


def rounded(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, but all digits before the point and no exponent; "" for None."""
    if value is None:
        return ""
    return f"{value:.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:.0f}"


@dataclass(frozen=True, slots=True)
class MedianRange:
    """Median, smallest and largest of several values."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{rounded(self.median)} ({rounded(self.low)}-{rounded(self.high)})"


def median_range(values: Sequence[float]) -> MedianRange:
    """Of at least one value."""
    return MedianRange(statistics.median(values), min(values), max(values))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that `share` (0 to 1) of them do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def check_numbers(**options: Sequence[int]) -> None:
    """Raise UsageError for a value below 1, naming its parameter."""
    for name, values in options.items():
        for value in values:
            if value < 1:
                raise UsageError(f"`{name}` {value}: must be at least 1")


def interleaved(calls: Sequence[Callable[[], T]], rounds: int) -> Iterator[tuple[int, int, T]]:
    """Run every call once per round and yield (round, index of the call, result); each round starts with
    another call."""
    for number in range(rounds):
        for turn in range(len(calls)):
            i = (turn + number) % len(calls)
            yield number, i, calls[i]()
