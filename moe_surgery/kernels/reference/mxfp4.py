"""MXFP4 decoded by table in plain PyTorch, a byte (two values) at a time."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moe_surgery.formats import mxfp4

__all__ = ["decode"]

_PAIR = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP4 to `dtype`: blocks uint8 [..., groups, 16], scales uint8 [..., groups] -> [..., 32 * groups].

    The bits are those of `moe_surgery.formats.mxfp4`, cast from BF16; float32 and bfloat16 are exact.
    """
    if dtype not in _PAIR:
        return decode(blocks, scales, torch.float32).to(dtype)
    table = _pairs(dtype, str(blocks.device))
    index = (scales.to(torch.int32) << 8).unsqueeze(-1) | blocks
    pairs = table.index_select(0, index.flatten())
    return pairs.view(dtype).view(*blocks.shape[:-2], blocks.shape[-2] * mxfp4.BLOCK_VALUES)


@lru_cache(maxsize=8)
def _pairs(dtype: torch.dtype, device: str) -> Tensor:
    """For each of 256 scales and 256 bytes the two decoded values, as one integer of twice the width."""
    scales = np.repeat(np.arange(256, dtype=np.uint8), 16).reshape(256, 16)
    codes = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(256, axis=0)
    bits = mxfp4.decode(codes, scales, isa="numpy")  # [256, 512]: low and high nibble of each byte
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(dtype)
    return values.contiguous().view(_PAIR[dtype]).flatten().to(device)
