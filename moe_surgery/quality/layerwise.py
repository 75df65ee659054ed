"""Texts through a model one layer at a time, so that memory holds one layer and the hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_surgery.kernels import Backend
from moe_surgery.kernels.weights import Layer
from moe_surgery.quality.hidden_states import HiddenStates
from moe_surgery.runtime.model import SCORE_BYTES, Model

__all__ = ["apply_attention", "apply_experts", "choose_experts", "embed", "logits_of"]


@torch.inference_mode()
def embed(model: Model, passages: Sequence[Sequence[int]]) -> HiddenStates:
    """Hidden states before the first layer, of passages of token ids."""
    states = HiddenStates([len(p) for p in passages], model.config.hidden, model.dtype, model.device)
    for passage, start in zip(passages, states.starts[:-1], strict=True):
        ids = torch.tensor(list(passage), dtype=torch.int64, device=model.device)
        states[start : start + len(passage)] = F.embedding(ids, model.embedding).to(model.dtype)
    return states


@torch.inference_mode()
def apply_attention(model: Model, number: int, layer: Layer, states: HiddenStates) -> None:
    """Add the self-attention of layer `number`, a passage seeing itself only, to `states`."""
    c = model.config
    for first, last in states.groups():
        start, stop = states.starts[first], states.starts[last]
        x = states[start:stop]
        lengths = states.lengths[first:last]
        positions = torch.cat([torch.arange(n, device=x.device) for n in lengths])
        backend, window = model.backend, c.windows[number]
        cos, sin = (a[:, None] for a in model.rope(positions, backend))  # [tokens, 1, head_dim / 2]
        h = backend.rms_norm(x, layer.attention_norm, c.eps)
        q, k, v = (
            y.view(len(x), -1, c.head_dim)
            for y in backend.multi_linear(h, [layer.q.pair, layer.k.pair, layer.v.pair])
        )
        q, k = (backend.apply_rope(a, cos, sin) for a in (q, k))
        split = (torch.split(a, lengths) for a in (q, k, v))
        mixed = [
            _attended(backend, q1, k1, v1, layer.sinks, window) for q1, k1, v1 in zip(*split, strict=True)
        ]
        states[start:stop] = x + backend.linear(torch.cat(mixed), *layer.o.pair)


@torch.inference_mode()
def choose_experts(
    model: Model, layer: Layer, states: HiddenStates, where: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts' input [tokens, hidden] for the rows `where`, and the router's ids and weights."""
    x = model.backend.rms_norm(states[where], layer.mlp_norm, model.config.eps)
    return (x, *_routed(model.backend, layer, x))


@torch.inference_mode()
def apply_experts(model: Model, layer: Layer, states: HiddenStates) -> Tensor:
    """Add the output of the experts to `states`; the ids chosen, int64 [tokens, top_k] on the CPU."""
    chosen = []
    for where in states.pieces():
        x, ids, weights = choose_experts(model, layer, states, where)
        states[where] = states[where] + model.backend.experts(x, ids, weights, layer.experts)
        chosen.append(ids.cpu())
    return torch.cat(chosen)


@torch.inference_mode()
def logits_of(model: Model, x: Tensor) -> Tensor:
    """Logits float32 [rows, vocabulary] of hidden states after the last layer."""
    x = model.backend.rms_norm(x, model.norm, model.config.eps)
    return model.backend.linear(x, model.unembedding).float()


def _routed(backend: Backend, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    assert layer.router.bias is not None
    return backend.route(x, layer.router.weight, layer.router.bias, layer.top_k)


def _attended(backend: Backend, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """One passage: q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> [tokens, width]."""
    tokens, heads, _ = q.shape
    q, k, v = (a.transpose(0, 1)[None] for a in (q, k, v))
    positions = torch.arange(tokens, device=q.device)[None]
    step = max(1, SCORE_BYTES // (tokens * heads * 4))
    mixed = []
    for a in range(0, tokens, step):
        b = min(a + step, tokens)
        first = 0 if window is None else max(0, a - window + 1)
        given = q[:, :, a:b], k[:, :, first:b], v[:, :, first:b], sinks
        mixed.append(backend.attention(*given, positions[:, a:b], positions[:, first:b], window))
    return torch.cat(mixed, dim=1)[0]
