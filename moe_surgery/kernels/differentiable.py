"""The operations of a decoder layer with gradients to their inputs, and to the small weights that are given in
float32; large weights stay as stored.

What `moe_surgery.kernels.reference` computes, but a product keeps nothing of its weight for the way back: stored
experts and dense weights are decoded or cast a second time there, piece by piece, so that memory holds activations
and one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_surgery.kernels.q8_0 import Matrix
from moe_surgery.kernels.reference.attention import attention, visible
from moe_surgery.kernels.reference.dense import TorchDense
from moe_surgery.kernels.reference.experts_backward import expert_backward, expert_forward
from moe_surgery.kernels.reference.route import route
from moe_surgery.kernels.reference.stored_products import times, times_transposed
from moe_surgery.kernels.weights import ExpertWeights

__all__ = ["DifferentiableBackend"]

KEPT_SCORE_BYTES = 16 << 20
"""Attention scores that a graph keeps; more of them are computed again on the way back."""


class DifferentiableBackend(TorchDense):
    """See `moe_surgery.kernels.interface.Backend`; `Projection` weights and expert weights get no gradient, biases,
    norms, sinks and the router do."""

    name = "differentiable"
    dtype = torch.float32

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        y: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias.to(x.dtype)

    def multi_linear(self, x: Tensor, layers: Sequence[tuple[Matrix, Tensor | None]]) -> list[Tensor]:
        return [self.linear(x, weight, bias) for weight, bias in layers]

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return route(x, weight, bias, top_k)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        queries: Tensor,
        keys: Tensor,
        window: int | None,
    ) -> Tensor:
        mask = visible(queries, keys, window)
        if torch.is_grad_enabled() and 4 * q.shape[1] * mask.numel() > KEPT_SCORE_BYTES:
            result: Tensor = checkpoint(attention, q, k, v, sinks, mask, use_reentrant=False)
            return result
        return attention(q, k, v, sinks, mask)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
        e = expert_weights
        y = torch.zeros_like(x, dtype=torch.float32)
        stored = ids if e.expert_map is None else e.expert_map[ids]
        for expert in torch.unique(stored).tolist():
            token, slot = torch.where(stored == expert)
            out = _Expert.apply(  # type: ignore[no-untyped-call]
                x.index_select(0, token), e.gate_up_bias[expert], e.down_bias[expert], e, expert
            )
            y = y.index_add(0, token, out.float() * weights[token, slot, None].float())
        return y.to(x.dtype)


class _Linear(torch.autograd.Function):
    """x [..., columns] @ W.T for a stored weight W [rows, columns]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Matrix) -> Tensor:
        ctx.weight = weight
        return times(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return times_transposed(gradients[0], ctx.weight), None


class _Expert(torch.autograd.Function):
    """A stored expert's output for x [tokens, hidden], before its routing weight; the tensors of `e` that get a
    gradient, its biases, are arguments as well."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up_bias: Tensor, down_bias: Tensor, e: ExpertWeights, expert: int
    ) -> Tensor:
        h, out = expert_forward(x, e, expert)
        ctx.save_for_backward(h)
        ctx.e, ctx.expert = e, expert
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (h,) = ctx.saved_tensors
        grad_x, grad_h = expert_backward(gradient, h, ctx.e, ctx.expert)
        return grad_x, grad_h.sum(0), gradient.sum(0), None, None
