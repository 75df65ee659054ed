"""The router: the specification of `Backend.route`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["route"]


def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `Backend.route`. Logits, order and softmax in float32, regardless of x's dtype (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(wide), weight.to(wide), bias.to(wide))  # [tokens, experts]
    # A stable descending sort keeps equal logits in index order, which torch.topk does not guarantee.
    ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    ids = ids[:, :top_k]
    return ids, torch.softmax(ordered[:, :top_k], dim=-1).to(x.dtype)
