"""What a backend offers: the two operations of a mixture-of-experts layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moe_surgery.kernels.weights import ExpertWeights

__all__ = ["Backend"]


class Backend(Protocol):
    """One implementation of the MoE operations. The runtime calls nothing else of it."""

    name: str

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Choose experts: ids int64 [tokens, top_k] and weights [tokens, top_k] in x's dtype.

        x [tokens, hidden], weight [experts, hidden], bias [experts]. The k largest logits, largest
        first, ties to the lowest index; weights are the softmax over those k alone.
        """
        ...

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
        """The weighted sum of the chosen experts' outputs: [tokens, hidden] in x's dtype."""
        ...
