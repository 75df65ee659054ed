"""Grouped-query attention with sinks, over the cache and the new tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention", "visible"]


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys a query attends to: bool [batch, queries, keys] from positions [batch, queries], [batch, keys].

    A key needs a position (>= 0) at or before the query's and, with a sliding window, among the last `window`
    positions including the query's.
    """
    distance = queries[:, :, None] - keys[:, None, :]
    in_order = (keys[:, None, :] >= 0) & (distance >= 0)
    return in_order if window is None else in_order & (distance < window)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    """Attention with one extra logit per head, `sinks`, whose probability is dropped.

    q [batch, heads, queries, head_dim]; k, v [batch, kv_heads, keys, head_dim]; sinks [heads];
    mask bool [batch, queries, keys], True where visible. Returns [batch, queries, heads * head_dim] in
    q's dtype, with scores and softmax in float32; zeros for a query with no visible key (padding).
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    grouped = q.reshape(batch, kv_heads, group * queries, head_dim)
    scores = (grouped @ k.transpose(2, 3)).float() * head_dim**-0.5
    scores = scores.view(batch, kv_heads, group, queries, -1)
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    sink = sinks.float().view(1, kv_heads, group, 1, 1)
    max_score = torch.maximum(scores.amax(dim=-1, keepdim=True), sink)
    weights = torch.exp(scores - max_score)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + torch.exp(sink - max_score))
    out = weights.to(v.dtype).view(batch, kv_heads, group * queries, -1) @ v
    out = out.view(batch, heads, queries, head_dim)
    return out.transpose(1, 2).reshape(batch, queries, heads * head_dim)
