"""Grouped-query attention with sinks, over whatever the cache holds and the new columns."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention", "visible"]


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys a query sees: bool [batch, queries, keys] from positions [batch, queries], [batch, keys].

    A key must hold a position (>= 0), not lie ahead, and on sliding layers be among the last
    `window` positions, the query's own included.
    """
    distance = queries[:, :, None] - keys[:, None, :]
    seen = (keys[:, None, :] >= 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, seen: Tensor) -> Tensor:
    """Attention with one extra logit per head, `sinks`, whose probability is dropped.

    q [batch, heads, queries, head_dim]; k, v [batch, kv_heads, keys, head_dim]; sinks [heads];
    seen [batch, queries, keys]. Returns [batch, queries, heads * head_dim] in q's dtype. Scores and
    softmax are float32; a query that sees nothing (padding) gives zeros.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    grouped = q.reshape(batch, kv_heads, group * queries, head_dim)
    scores = (grouped @ k.transpose(2, 3)).float() * head_dim**-0.5
    scores = scores.view(batch, kv_heads, group, queries, -1)
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    sink = sinks.float().view(1, kv_heads, group, 1, 1)
    top = torch.maximum(scores.amax(dim=-1, keepdim=True), sink)
    weights = torch.exp(scores - top)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + torch.exp(sink - top))
    mixed = weights.to(v.dtype).view(batch, kv_heads, group * queries, -1) @ v
    mixed = mixed.view(batch, heads, queries, head_dim)
    return mixed.transpose(1, 2).reshape(batch, queries, heads * head_dim)
