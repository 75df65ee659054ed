"""How much of the statistics a page carries, so that it stays small for any model and number of domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_surgery.report.figures import Subject
from moe_surgery.report.packing import coded_length, order_bytes, step_bytes

__all__ = ["PAGE_LIMIT", "Detail", "fit", "packed_size"]

PAGE_LIMIT = 2_990_000
"""Bytes that a page should not exceed: below 3 MB."""

LEVELS = (4095, 1023, 255)
# What is left out last, if not every metric fits.
PRIORITY = (
    "frequency",
    "reap",
    "energy",
    "gate",
    "weighted_ean",
    "rms_count",
    "ean_mean",
    "ean_sum",
    "ean_ca",
)


@dataclass(frozen=True, slots=True)
class Detail:
    """What a page carries: `metrics` for every domain, the best `listed` experts of each layer, and scores rounded to
    `levels` levels (None: not rounded)."""

    metrics: tuple[str, ...]
    levels: int | None
    listed: int

    def words(self, subject: Subject) -> str:
        """What is missing for the page's size, and how to change that; empty if nothing is."""
        missing = [m for m in subject.metrics if m not in self.metrics]
        parts = []
        if missing:
            parts.append(f"has {', '.join(self.metrics)}, not {', '.join(missing)}")
        if self.listed < subject.experts:
            parts.append(f"lists the best {self.listed} of {subject.experts} experts in each layer")
        if self.levels and subject.measured:
            parts.append(f"rounds scores to {100 / self.levels:.1g} % of their layer's largest")
        if not parts:
            return ""
        words = ", and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
        choose = " Other metrics, or fewer domains, can be chosen when it is made." if missing else ""
        return f"To stay below 3 MB, this page {words}. Orders are exact.{choose}"


def packed_size(subject: Subject, detail: Detail) -> int:
    """Bytes of the packed orders, scores and coverage in the page."""
    layers, experts, views = subject.layers, subject.experts, len(subject.views)
    block = coded_length(layers * order_bytes(experts, detail.listed))
    if subject.measured:
        block += (
            coded_length(4 * layers) + coded_length(layers * step_bytes(detail.listed, detail.levels))
            if detail.levels
            else coded_length(4 * layers * experts)
        )
    block += len(subject.kinds) * coded_length(4 * experts)
    peak = coded_length(4 * layers * experts) if not detail.levels and subject.has_peaks else 0
    return views * (len(detail.metrics) * (block + 24) + peak)


def fit(subject: Subject, available: int, metrics: Sequence[str] | None = None) -> Detail:
    """The most detailed page whose packed data is at most `available` bytes; else the least detailed.

    `metrics` are the wanted ones, the most important first (default: all).
    """
    detail = Detail(subject.metrics, None, subject.experts)
    for detail in _details(subject, metrics):
        if packed_size(subject, detail) <= available:
            break
    return detail


def _details(subject: Subject, metrics: Sequence[str] | None) -> Iterator[Detail]:
    """From the most detailed to the least."""
    wanted = list(metrics) if metrics else sorted(subject.metrics, key=_importance)

    def chosen(count: int) -> tuple[str, ...]:
        return tuple(m for m in subject.metrics if m in wanted[:count])

    for levels in (None, *LEVELS):
        yield Detail(chosen(len(wanted)), levels, subject.experts)
    for count in range(len(wanted) - 1, 0, -1):
        yield Detail(chosen(count), LEVELS[-1], subject.experts)
    for quarters in (3, 2, 1):
        yield Detail(chosen(1), LEVELS[-1], max(1, quarters * subject.experts // 4))


def _importance(metric: str) -> int:
    return PRIORITY.index(metric) if metric in PRIORITY else len(PRIORITY)
