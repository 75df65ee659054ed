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
    norm_sq: sums, in float64, of (value - decoded value)^2 and value^2 over the blocks of finite values. update_sq: the
    sum of squares of what was added to stored values before encoding, 0 where nothing was.
    """

    blocks: int = 0
    inexact_blocks: int = 0
    error_sq: float = 0.0
    norm_sq: float = 0.0
    update_sq: float = 0.0

    @property
    def relative_error(self) -> float:
        """sqrt(error_sq / norm_sq); 0 if there is no error."""
        return math.sqrt(self.error_sq / self.norm_sq) if self.error_sq else 0.0

    @property
    def update_error(self) -> float:
        """sqrt(error_sq / update_sq): 1 or more means that encoding lost what was added; 0 if there is no error."""
        return math.sqrt(self.error_sq / self.update_sq) if self.error_sq and self.update_sq else 0.0

    @classmethod
    def total(cls, parts: Iterable[EncodeReport]) -> EncodeReport:
        """The sum of all parts, independent of their order."""
        reports = list(parts)
        return cls(
            sum(r.blocks for r in reports),
            sum(r.inexact_blocks for r in reports),
            math.fsum(r.error_sq for r in reports),
            math.fsum(r.norm_sq for r in reports),
            math.fsum(r.update_sq for r in reports),
        )
