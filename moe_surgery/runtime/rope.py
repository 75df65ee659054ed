"""The angles of rotary position embedding with YaRN (arXiv 2309.00071)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_surgery.families.model_config import RopeConfig
from moe_surgery.kernels import Backend

__all__ = ["Rope"]


class Rope:
    """cos and sin for positions, scaled by the attention factor."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config, head_dim).to(device)
        self._scale = config.attention_factor

    def __call__(self, positions: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """positions int64 [...] -> cos, sin float32 [..., head_dim / 2]."""
        return backend.rope_cos_sin(positions, self._frequencies, self._scale)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: theta^(-2i/d), low frequencies divided by the factor, a ramp between.

    The ramp runs over the dimensions whose wavelength makes between `beta_fast` and `beta_slow`
    turns in the original length (section 3.2 of the YaRN paper).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / config.theta**exponents
    if config.factor == 1.0:
        return plain

    def turning(turns: float) -> float:
        length = config.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(config.theta))

    low, high = turning(config.beta_fast), turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    stretched = 1.0 / (config.factor * config.theta**exponents)
    return stretched * ramp + plain * (1 - ramp)
