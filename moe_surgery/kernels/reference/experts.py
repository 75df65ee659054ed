"""The experts: the specification of `Backend.experts`, in two variants.

*Grouped* visits every chosen expert once, with all its tokens. *Gathered* takes one expert per (token, slot):
it needs no host synchronisation and has static shapes, as small steps on a device need, but reads an expert
twice if two tokens chose it. Both decode packed weights in bounded pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.kernels.reference.mxfp4 import decode
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Weight

__all__ = ["expert_output", "experts", "experts_gathered", "experts_grouped", "swiglu"]

# Decoded at a time; a piece of this size stays in the processor's cache until it is multiplied.
PIECE_BYTES = 4 << 20
# Up to this many (token, slot) pairs use the gathered variant on devices where a host sync is expensive.
MAX_GATHERED_PAIRS = 16


def experts(x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
    """See `Backend.experts`."""
    if x.device.type != "cpu" and ids.numel() <= MAX_GATHERED_PAIRS:
        return experts_gathered(x, ids, weights, expert_weights)
    return experts_grouped(x, ids, weights, expert_weights)


def experts_grouped(x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
    """One pass over the distinct experts in `ids`, in index order."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros_like(x, dtype=wide)
    stored = ids if expert_weights.expert_map is None else expert_weights.expert_map[ids]
    for expert in torch.unique(ids).tolist():
        token, slot = torch.where(ids == expert)
        stored_expert = int(stored[token[0], slot[0]])
        out = expert_output(x[token], expert_weights, stored_expert)
        y.index_add_(0, token, out.to(wide) * weights[token, slot, None].to(wide))
    return y.to(x.dtype)


def expert_output(x: Tensor, expert_weights: ExpertWeights, stored_expert: int) -> Tensor:
    """The output of one stored expert, biases included, before its routing weight: [tokens, hidden]."""
    h = _linear(x, expert_weights.gate_up, stored_expert) + expert_weights.gate_up_bias[stored_expert].to(
        x.dtype
    )
    z = swiglu(h, expert_weights.limit, expert_weights.alpha)
    return _linear(z, expert_weights.down, stored_expert) + expert_weights.down_bias[stored_expert].to(
        x.dtype
    )


def experts_gathered(x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
    """One expert per (token, slot): batched products over gathered weights, no host synchronisation."""
    tokens, top_k = ids.shape
    stored = ids if expert_weights.expert_map is None else expert_weights.expert_map[ids]
    stored_experts = stored.flatten()  # [tokens * top_k]
    rows = x.repeat_interleave(top_k, dim=0)
    h = _batched(rows, expert_weights.gate_up, stored_experts)
    h = h + expert_weights.gate_up_bias[stored_experts].to(x.dtype)
    z = swiglu(h, expert_weights.limit, expert_weights.alpha)
    out = _batched(z, expert_weights.down, stored_experts)
    out = out + expert_weights.down_bias[stored_experts].to(x.dtype)
    summed = (out.float() * weights.flatten()[:, None].float()).view(tokens, top_k, -1).sum(dim=1)
    return summed.to(x.dtype)


def swiglu(h: Tensor, limit: float, alpha: float) -> Tensor:
    """gpt-oss's clamped SwiGLU: h [..., 2 * intermediate], gate at even and up at odd positions.

    (up + 1) * gate * sigmoid(alpha * gate), gate at most `limit`, up within +-`limit`.
    """
    gate, up = h[..., ::2], h[..., 1::2]
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def _linear(x: Tensor, weight: Weight, stored_expert: int) -> Tensor:
    """x [tokens, columns] times one stored expert: [tokens, rows]."""
    if isinstance(weight, DenseWeight):
        return x @ weight.values[stored_expert].to(x.dtype)
    pieces = [
        x @ decode(weight.blocks[stored_expert, a:b], weight.scales[stored_expert, a:b], x.dtype).T
        for a, b in _row_pieces(weight, x.dtype, 1)
    ]
    return torch.cat(pieces, dim=-1)


def _batched(x: Tensor, weight: Weight, stored_experts: Tensor) -> Tensor:
    """Row i of x [n, columns] times stored expert stored_experts[i]: [n, rows]."""
    if isinstance(weight, DenseWeight):
        return torch.bmm(x[:, None], weight.values[stored_experts].to(x.dtype))[:, 0]
    pieces = []
    for a, b in _row_pieces(weight, x.dtype, len(x)):
        decoded = decode(
            weight.blocks[:, a:b][stored_experts], weight.scales[:, a:b][stored_experts], x.dtype
        )
        pieces.append(torch.bmm(decoded, x[:, :, None])[..., 0])
    return torch.cat(pieces, dim=-1)


def _row_pieces(weight: Weight, dtype: torch.dtype, experts: int) -> list[tuple[int, int]]:
    """Rows in runs whose decoded values take about `PIECE_BYTES`."""
    step = max(1, PIECE_BYTES // (weight.columns * dtype.itemsize * experts))
    return [(a, min(a + step, weight.rows)) for a in range(0, weight.rows, step)]
