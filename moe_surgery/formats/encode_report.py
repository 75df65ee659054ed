"""What encoding to MXFP4 lost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["EncodeReport"]


@dataclass(frozen=True)
class EncodeReport:
    """What encoding to MXFP4 lost; reports of parts add up with `total`.

    blocks: blocks encoded. inexact_blocks: those that do not decode to the same bits. error_sq and
    norm_sq: sums, in float64, of (value - decoded value)^2 and value^2 over the blocks of finite values.
    """

    blocks: int = 0
    inexact_blocks: int = 0
    error_sq: float = 0.0
    norm_sq: float = 0.0

    @property
    def relative_error(self) -> float:
        """sqrt(error_sq / norm_sq); 0 if there is no error."""
        return math.sqrt(self.error_sq / self.norm_sq) if self.error_sq else 0.0

    @classmethod
    def total(cls, parts: Iterable[EncodeReport]) -> EncodeReport:
        """The sum of all parts, independent of their order."""
        reports = list(parts)
        return cls(
            sum(r.blocks for r in reports),
            sum(r.inexact_blocks for r in reports),
            math.fsum(r.error_sq for r in reports),
            math.fsum(r.norm_sq for r in reports),
        )
