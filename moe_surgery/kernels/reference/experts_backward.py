"""The gradients of the experts: the way back through `Backend.experts`, in plain PyTorch.

Nothing is kept from the way forward but its inputs: an expert's activations are computed again, and packed weights
are decoded again, piece by piece. So memory is that of one expert's tokens and one piece of its weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_surgery.kernels.reference.experts import swiglu
from moe_surgery.kernels.reference.stored_products import times, times_transposed
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights

__all__ = ["ExpertGradients", "expert_backward", "expert_forward", "experts_backward", "swiglu_backward"]


class ExpertGradients(NamedTuple):
    """Gradients of a sum of outputs, each in the shape and dtype of what it is for.

    gate_up and down are those of dense weights; None where they are packed or not asked for.
    """

    x: Tensor
    weights: Tensor
    gate_up: Tensor | None
    gate_up_bias: Tensor
    down: Tensor | None
    down_bias: Tensor


def experts_backward(
    gradient: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    expert_weights: ExpertWeights,
    *,
    dense: bool = True,
) -> ExpertGradients:
    """The gradients of `Backend.experts` for `gradient` [tokens, hidden] of its result; other arguments as there.

    `dense`: also those of dense expert weights. Products are in x's dtype, sums over experts in float32 (float64
    for float64).
    """
    e = expert_weights
    wide = torch.promote_types(x.dtype, torch.float32)
    stored = ids if e.expert_map is None else e.expert_map[ids]
    grad_x = torch.zeros_like(x, dtype=wide)
    grad_weights = torch.zeros_like(weights, dtype=wide)
    grad_biases = [torch.zeros_like(b, dtype=wide) for b in (e.gate_up_bias, e.down_bias)]
    grad_gate_up, grad_down = (
        torch.zeros_like(w.values) if dense and isinstance(w, DenseWeight) else None
        for w in (e.gate_up, e.down)
    )
    for expert in torch.unique(stored).tolist():
        token, slot = torch.where(stored == expert)
        rows, routing = x[token], weights[token, slot, None].to(x.dtype)
        outer = gradient[token].to(x.dtype)
        h, out = expert_forward(rows, e, expert)
        grad_weights[token, slot] = (out.to(wide) * outer.to(wide)).sum(-1)
        grad_out = outer * routing
        grad_rows, grad_h = expert_backward(grad_out, h, e, expert)
        grad_biases[0][expert] = grad_h.to(wide).sum(0)
        grad_biases[1][expert] = grad_out.to(wide).sum(0)
        if grad_gate_up is not None:
            grad_gate_up[expert] = (rows.T @ grad_h).to(grad_gate_up.dtype)
        if grad_down is not None:
            grad_down[expert] = (swiglu(h, e.limit, e.alpha).T @ grad_out).to(grad_down.dtype)
        grad_x.index_add_(0, token, grad_rows.to(wide))
    return ExpertGradients(
        grad_x.to(x.dtype),
        grad_weights.to(weights.dtype),
        grad_gate_up,
        grad_biases[0].to(e.gate_up_bias.dtype),
        grad_down,
        grad_biases[1].to(e.down_bias.dtype),
    )


def expert_forward(x: Tensor, e: ExpertWeights, expert: int) -> tuple[Tensor, Tensor]:
    """What the way back needs, h [tokens, 2 * intermediate], and the output [tokens, hidden] of a stored expert, biases
    included, before its routing weight. x [tokens, hidden]."""
    h = times(x, e.gate_up, expert) + e.gate_up_bias[expert].to(x.dtype)
    z = swiglu(h, e.limit, e.alpha)
    return h, times(z, e.down, expert) + e.down_bias[expert].to(x.dtype)


def expert_backward(gradient: Tensor, h: Tensor, e: ExpertWeights, expert: int) -> tuple[Tensor, Tensor]:
    """The gradients of x and h of `expert_forward` for `gradient` [tokens, hidden] of its output."""
    grad_h = swiglu_backward(times_transposed(gradient, e.down, expert), h, e.limit, e.alpha)
    return times_transposed(grad_h, e.gate_up, expert), grad_h


def swiglu_backward(gradient: Tensor, h: Tensor, limit: float, alpha: float) -> Tensor:
    """The gradient of h [..., 2 * intermediate] for that of `swiglu`'s result [..., intermediate].

    Values at or within the limits pass a gradient, as torch.clamp has it.
    """
    gate, up = h[..., ::2], h[..., 1::2]
    inside_gate, inside_up = gate <= limit, (up >= -limit) & (up <= limit)
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    sigmoid = torch.sigmoid(alpha * gate)
    glu = gate * sigmoid
    by_gate = (up + 1) * (sigmoid + alpha * glu * (1 - sigmoid)) * inside_gate
    by_up = glu * inside_up
    return torch.stack([gradient * by_gate, gradient * by_up], dim=-1).flatten(-2)
