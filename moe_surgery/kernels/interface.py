"""What a backend offers: the operations of a decoder layer that read weights or the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe_surgery.kernels.weights import ExpertWeights

__all__ = ["Backend"]


class Backend(Protocol):
    """One implementation of these operations. The runtime calls nothing else of it.

    Weights stay as stored, usually BF16 or packed; results have x's dtype.
    """

    name: str
    dtype: torch.dtype  # what a model computes in unless told otherwise

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Choose experts: ids int64 [tokens, top_k] and weights [tokens, top_k] in x's dtype.

        x [tokens, hidden], weight [experts, hidden], bias [experts]. The k largest logits, largest
        first, ties to the lowest index; weights are the softmax over those k alone.
        """
        ...

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
        """The weighted sum of the chosen experts' outputs: [tokens, hidden] in x's dtype."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., columns] @ weight [rows, columns].T + bias [rows]."""
        ...

    def linears(self, x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """`linear` of one x with each (weight, bias)."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 inside."""
        ...

    def turns(self, positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [...] times frequencies float32 [n], times scale: float32 [..., n]."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        queries: Tensor,
        keys: Tensor,
        window: int | None,
    ) -> Tensor:
        """Attention with one extra logit per head, `sinks`, whose probability is dropped.

        q [batch, heads, queries, head_dim]; k, v [batch, kv_heads, keys, head_dim]; sinks [heads];
        positions `queries` int64 [batch, queries] and `keys` [batch, keys], negative for none: a query
        sees the keys at its own position and before, at most `window` of them. Returns
        [batch, queries, heads * head_dim]; a query that sees nothing gives zeros.
        """
        ...
