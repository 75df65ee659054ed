"""The correctness gate: no speed-up is reported for what does not compute the right numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "Verdict", "judge", "speed_up"]

# Of the largest exact value; BF16 rounds activations between the two products to 1 part in 256.
TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a result is right, and by how much it is off, as a share of the largest exact value."""

    green: bool
    error: float

    def __str__(self) -> str:
        return f"{'green' if self.green else 'RED'} ({self.error:.1e})"


def judge(found: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> Verdict:
    """Hold `found` against `exact` of the same shape; NaN anywhere is red."""
    if found.shape != exact.shape:
        return Verdict(False, float("inf"))
    error = float((found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30))
    return Verdict(error <= tolerance and bool(torch.isfinite(found).all()), error)


def speed_up(ours: float, others: float | None, *verdicts: Verdict) -> str:
    """How many times faster `ours` seconds are than `others`; withheld while a verdict is red."""
    if not all(v.green for v in verdicts):
        return "withheld: the correctness gate is red"
    return "nothing to compare with" if others is None else f"{others / ours:.2f} x"
