"""Random experts of any shape, made on the device: for speed and memory, not quality."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.kernels.weights import ExpertWeights, Mxfp4Weight
from moe_surgery.runtime.cache import Cache

__all__ = ["fill_cache", "normal", "random_experts"]

# Scale bytes that give weights of about 1 / sqrt(2880).
SCALES = (119, 122)


def normal(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    """BF16 normal numbers."""
    return (torch.randn(shape, dtype=torch.bfloat16, device=device) * scale).contiguous()


def random_experts(experts: int, hidden: int, device: torch.device) -> ExpertWeights:
    """Packed experts whose inner size is `hidden`; biases are BF16."""

    def packed(rows: int) -> Mxfp4Weight:
        shape = (experts, rows, hidden // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device=device)
        return Mxfp4Weight(blocks, torch.randint(*SCALES, shape, dtype=torch.uint8, device=device))

    up, down = packed(2 * hidden), packed(hidden)
    return ExpertWeights(up, normal(device, experts, 2 * hidden), down, normal(device, experts, hidden))


def fill_cache(cache: Cache, columns: int, seed: int = 0) -> None:
    """Random keys and values for `columns` columns of an empty cache, as if a prompt had been read."""
    generator = torch.Generator(cache.keys[0].device).manual_seed(seed)
    for kept in (*cache.keys, *cache.values):
        # Through BF16, so that caches of any dtype hold the same numbers.
        kept.copy_(torch.randn(kept.shape, generator=generator, device=kept.device).bfloat16())
    for slots, held in cache.positions.items():
        for column in range(max(0, columns - slots), columns):
            held[:, column % slots] = column
    cache.advance(columns)
