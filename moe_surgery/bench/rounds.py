"""Jobs measured in turn, so that whatever else the machine does hits all alike; and what to make of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moe_surgery.errors import UsageError

__all__ = ["Spread", "check_numbers", "interleaved", "percentile", "rounded", "spread"]

T = TypeVar("T")


def rounded(value: float | None, digits: int = 3) -> str:
    """So many significant digits, all of those before the point, no exponent above; "" for None."""
    if value is None:
        return ""
    return f"{value:.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:.0f}"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of several figures."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{rounded(self.median)} ({rounded(self.low)}-{rounded(self.high)})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one figure."""
    return Spread(statistics.median(values), min(values), max(values))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that `share` (0 to 1) of them do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def check_numbers(**options: Sequence[int]) -> None:
    """Raise UsageError for a value below 1, naming its parameter."""
    for name, values in options.items():
        for value in values:
            if value < 1:
                raise UsageError(f"`{name}` {value}: must be at least 1")


def interleaved(jobs: Sequence[Callable[[], T]], rounds: int) -> Iterator[tuple[int, int, T]]:
    """Run every job once a round and yield (round, job number, result); each round begins with another."""
    for number in range(rounds):
        for turn in range(len(jobs)):
            job = (turn + number) % len(jobs)
            yield number, job, jobs[job]()
