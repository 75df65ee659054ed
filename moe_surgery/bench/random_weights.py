"""Random experts of any shape, made on the device: for speed and memory, not quality."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.kernels.weights import ExpertWeights, Mxfp4Weight

__all__ = ["normal", "random_experts"]

# Scale bytes that give weights of about 1 / sqrt(2880).
SCALES = (119, 122)


def normal(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    """BF16 normal numbers."""
    return (torch.randn(shape, dtype=torch.bfloat16, device=device) * scale).contiguous()


def random_experts(experts: int, hidden: int, device: torch.device) -> ExpertWeights:
    """Packed experts whose intermediate size is `hidden`; biases are BF16."""

    def packed(rows: int) -> Mxfp4Weight:
        shape = (experts, rows, hidden // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device=device)
        return Mxfp4Weight(blocks, torch.randint(*SCALES, shape, dtype=torch.uint8, device=device))

    up, down = packed(2 * hidden), packed(hidden)
    return ExpertWeights(up, normal(device, experts, 2 * hidden), down, normal(device, experts, hidden))
