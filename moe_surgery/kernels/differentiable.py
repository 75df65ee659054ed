"""The operations of a decoder layer with gradients to their inputs, and to the small weights that are given in
float32; large weights stay as stored.

What `moe_surgery.kernels.reference` computes, but a product keeps nothing of its weight for the way back: stored
experts and dense weights are decoded or cast a second time there, piece by piece, so that memory holds activations
and one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_surgery.formats import mxfp4
from moe_surgery.kernels.q8_0 import Matrix, Q8Matrix
from moe_surgery.kernels.reference.attention import attention, visible
from moe_surgery.kernels.reference.dense import TorchDense
from moe_surgery.kernels.reference.experts import swiglu
from moe_surgery.kernels.reference.mxfp4 import decode
from moe_surgery.kernels.reference.route import route
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight, Weight

__all__ = ["DifferentiableBackend"]

PIECE_BYTES = 16 << 20
"""Of a weight in the compute dtype."""
KEPT_SCORE_BYTES = 16 << 20
"""Attention scores that a graph keeps; more of them are computed again on the way back."""

Piece = tuple[slice, Tensor]
"""Rows of a weight [rows, columns], and their values [those rows, columns] in the compute dtype."""


class DifferentiableBackend(TorchDense):
    """See `moe_surgery.kernels.interface.Backend`; `Projection` weights and expert weights get no gradient, biases,
    norms, sinks and the router do."""

    name = "differentiable"
    dtype = torch.float32

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        y = _frozen(x, weight, None)
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
            h = _frozen(x.index_select(0, token), e.gate_up, expert) + e.gate_up_bias[expert].to(x.dtype)
            z = swiglu(h, e.limit, e.alpha)
            out = _frozen(z, e.down, expert) + e.down_bias[expert].to(x.dtype)
            y = y.index_add(0, token, out.float() * weights[token, slot, None].float())
        return y.to(x.dtype)


def _frozen(x: Tensor, weight: Matrix | Weight, expert: int | None) -> Tensor:
    result: Tensor = _Frozen.apply(x, weight, expert)  # type: ignore[no-untyped-call]
    return result


class _Frozen(torch.autograd.Function):
    """x [..., columns] @ W.T for a weight W [rows, columns] as stored: of one expert, or dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Matrix | Weight, expert: int | None) -> Tensor:
        ctx.weight, ctx.expert = weight, expert
        pieces = [x @ values.T for _, values in _pieces(weight, expert, x.dtype)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        total: Tensor | None = None
        for rows, values in _pieces(ctx.weight, ctx.expert, gradient.dtype):
            part = gradient[..., rows] @ values
            total = part if total is None else total.add_(part)
        return total, None, None


def _pieces(weight: Matrix | Weight, expert: int | None, dtype: torch.dtype) -> Iterator[Piece]:
    """The weight in runs of rows whose values take about `PIECE_BYTES`."""
    if isinstance(weight, Tensor | Q8Matrix):
        rows, columns = weight.shape
    else:
        rows, columns = weight.rows, weight.columns
    step = max(1, PIECE_BYTES // (columns * dtype.itemsize))
    for start in range(0, rows, step):
        where = slice(start, min(start + step, rows))
        yield where, _values(weight, expert, where, dtype)


def _values(weight: Matrix | Weight, expert: int | None, where: slice, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[where].to(dtype)
    if isinstance(weight, Q8Matrix):
        return weight.dequantise(where.start, where.stop).to(dtype)
    assert expert is not None
    if isinstance(weight, DenseWeight):
        return weight.values[expert, :, where].to(dtype).T
    return _decoded(weight, expert, where, dtype)


def _decoded(weight: Mxfp4Weight, expert: int, where: slice, dtype: torch.dtype) -> Tensor:
    """By the compiled conversion on the CPU; the bits are the same."""
    blocks, scales = weight.blocks[expert, where], weight.scales[expert, where]
    if blocks.device.type != "cpu":
        return decode(blocks, scales, dtype)
    bits = mxfp4.decode(blocks.numpy(), scales.numpy())
    return torch.from_numpy(bits).view(torch.bfloat16).to(dtype)
