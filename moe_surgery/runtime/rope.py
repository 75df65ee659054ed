"""The angles of rotary position embedding with YaRN (arXiv 2309.00071)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_surgery.families.model_config import RopeParameters
from moe_surgery.kernels import Backend

__all__ = ["Rope"]


class Rope:
    """cos and sin for positions, scaled by the attention factor."""

    def __init__(self, rope: RopeParameters, head_dim: int, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._scale = rope.attention_factor

    def __call__(self, positions: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """positions int64 [...] -> cos, sin float32 [..., head_dim / 2]."""
        return backend.rope_cos_sin(positions, self._frequencies, self._scale)


def inverse_frequencies(rope: RopeParameters, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: theta^(-2i/d), low frequencies divided by the factor, a ramp between.

    The ramp covers the dimensions that make between `beta_fast` and `beta_slow` rotations over the original
    context (section 3.2 of the YaRN paper).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.rope_theta**exponents
    if rope.factor == 1.0:
        return plain

    def dimension(rotations: float) -> float:
        radian = rope.original_max_position_embeddings / (rotations * 2 * math.pi)  # in positions
        return head_dim * math.log(radian) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    stretched = 1.0 / (rope.factor * rope.rope_theta**exponents)
    return stretched * ramp + plain * (1 - ramp)
