"""The gradients of the experts: the way back through `Backend.experts`, in plain PyTorch.

Nothing is kept from the way forward but its inputs: an expert's activations are computed again, and packed weights
are decoded again, piece by piece. So memory is that of one expert's tokens and one piece of its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_surgery.formats import mxfp4
from moe_surgery.kernels.reference.mxfp4 import decode
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight, Weight

__all__ = ["ExpertGradients", "experts_backward", "swiglu_backward"]

PIECE_BYTES = 16 << 20
"""Of a packed weight in the compute dtype."""


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
        h = _times(rows, e.gate_up, expert) + e.gate_up_bias[expert].to(x.dtype)
        z, local = _swiglu_and_slopes(h, e.limit, e.alpha)
        out = _times(z, e.down, expert) + e.down_bias[expert].to(x.dtype)
        grad_weights[token, slot] = (out.to(wide) * outer.to(wide)).sum(-1)
        grad_out = outer * routing
        grad_h = _interleaved(_times_transposed(grad_out, e.down, expert), local)
        grad_biases[0][expert] = grad_h.to(wide).sum(0)
        grad_biases[1][expert] = grad_out.to(wide).sum(0)
        if grad_gate_up is not None:
            grad_gate_up[expert] = (rows.T @ grad_h).to(grad_gate_up.dtype)
        if grad_down is not None:
            grad_down[expert] = (z.T @ grad_out).to(grad_down.dtype)
        grad_x.index_add_(0, token, _times_transposed(grad_h, e.gate_up, expert).to(wide))
    return ExpertGradients(
        grad_x.to(x.dtype),
        grad_weights.to(weights.dtype),
        grad_gate_up,
        grad_biases[0].to(e.gate_up_bias.dtype),
        grad_down,
        grad_biases[1].to(e.down_bias.dtype),
    )


def swiglu_backward(gradient: Tensor, h: Tensor, limit: float, alpha: float) -> Tensor:
    """The gradient of h [..., 2 * intermediate] for that of `swiglu`'s result [..., intermediate].

    Values at or within the limits pass a gradient, as torch.clamp has it.
    """
    return _interleaved(gradient, _swiglu_and_slopes(h, limit, alpha)[1])


def _swiglu_and_slopes(h: Tensor, limit: float, alpha: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`swiglu` of h, and its derivatives by the gate rows and by the up rows."""
    gate, up = h[..., ::2], h[..., 1::2]
    inside_gate, inside_up = gate <= limit, (up >= -limit) & (up <= limit)
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    sigmoid = torch.sigmoid(alpha * gate)
    glu = gate * sigmoid
    by_gate = (up + 1) * (sigmoid + alpha * glu * (1 - sigmoid)) * inside_gate
    return (up + 1) * glu, (by_gate, glu * inside_up)


def _interleaved(gradient: Tensor, slopes: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack([gradient * slope for slope in slopes], dim=-1).flatten(-2)


def _times(x: Tensor, weight: Weight, expert: int) -> Tensor:
    """x [tokens, columns] times one expert's weight: [tokens, rows]."""
    if isinstance(weight, DenseWeight):
        return x @ weight.values[expert].to(x.dtype)
    pieces = [x @ values.T for _, values in _pieces(weight, expert, x.dtype)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _times_transposed(gradient: Tensor, weight: Weight, expert: int) -> Tensor:
    """gradient [tokens, rows] times the transposed weight: [tokens, columns]."""
    if isinstance(weight, DenseWeight):
        return gradient @ weight.values[expert].to(gradient.dtype).T
    total = gradient.new_zeros((len(gradient), weight.columns))
    for rows, values in _pieces(weight, expert, gradient.dtype):
        total += gradient[:, rows] @ values
    return total


def _pieces(weight: Mxfp4Weight, expert: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows, and their values [rows, columns] in `dtype`, of about `PIECE_BYTES`."""
    step = max(1, PIECE_BYTES // (weight.columns * dtype.itemsize))
    for start in range(0, weight.rows, step):
        rows = slice(start, min(start + step, weight.rows))
        yield rows, _decoded(weight.blocks[expert, rows], weight.scales[expert, rows], dtype)


def _decoded(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """By the compiled conversion on the CPU; the bits are the same."""
    if blocks.device.type != "cpu":
        return decode(blocks, scales, dtype)
    bits = mxfp4.decode(blocks.numpy(), scales.numpy())
    return torch.from_numpy(bits).view(torch.bfloat16).to(dtype)
