"""Texts through a model one layer at a time, so that memory holds one layer and the hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_surgery.kernels import Backend
from moe_surgery.kernels.weights import Layer
from moe_surgery.quality.hidden_states import CHUNK_TOKENS, HiddenStates
from moe_surgery.runtime.decoder_layer import Attend, attention_block, moe_block, route
from moe_surgery.runtime.model import SCORE_BYTES, CausalLM

__all__ = [
    "apply_attention",
    "apply_experts",
    "attend_within",
    "backend_of",
    "choose_experts",
    "embed",
    "logits_of",
]


def backend_of(model: CausalLM) -> Backend:
    """The model's backend as it computes long steps, whatever the lengths of the passages."""
    return model.backend.for_tokens(CHUNK_TOKENS)


@torch.inference_mode()
def embed(model: CausalLM, passages: Sequence[Sequence[int]]) -> HiddenStates:
    """Hidden states before the first layer, of passages of token ids."""
    states = HiddenStates([len(p) for p in passages], model.config.hidden_size, model.dtype, model.device)
    for passage, start in zip(passages, states.starts[:-1], strict=True):
        ids = torch.tensor(list(passage), dtype=torch.int64, device=model.device)
        states[start : start + len(passage)] = model.embed(ids)
    return states


@torch.inference_mode()
def apply_attention(model: CausalLM, number: int, layer: Layer, states: HiddenStates) -> None:
    """Add the self-attention of layer `number` to `states`, each passage attending only to itself."""
    backend, window = backend_of(model), model.config.sliding_windows[number]
    for first, last in states.groups():
        start, stop = states.starts[first], states.starts[last]
        lengths = states.lengths[first:last]
        positions = torch.cat([torch.arange(n, device=states.device) for n in lengths])
        attend = attend_within(backend, lengths, layer.sinks, window)
        cos, sin = model.rope(positions, backend)
        states[start:stop] = attention_block(
            backend, model.config, layer, states[start:stop], cos, sin, attend
        )


@torch.inference_mode()
def choose_experts(
    model: CausalLM, layer: Layer, states: HiddenStates, where: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts' input [tokens, hidden] for the rows `where`, and the router's ids and weights."""
    return route(backend_of(model), model.config, layer, states[where])


@torch.inference_mode()
def apply_experts(model: CausalLM, layer: Layer, states: HiddenStates) -> tuple[Tensor, Tensor]:
    """Add the output of the experts to `states`; the router's choice on the CPU, ids int64 [tokens, top_k]
    and weights [tokens, top_k]."""
    chosen = []
    for where in states.pieces():
        states[where], ids, weights = moe_block(backend_of(model), model.config, layer, states[where])
        chosen.append((ids.cpu(), weights.cpu()))
    ids, weights = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    return ids, weights


@torch.inference_mode()
def logits_of(model: CausalLM, x: Tensor) -> Tensor:
    """Logits float32 [rows, vocabulary] of hidden states after the last layer."""
    return model.lm_head(x, backend_of(model))


def attend_within(
    backend: Backend, lengths: Sequence[int], sinks: Tensor, window: int | None, queries: int | None = None
) -> Attend:
    """Attention of each passage to itself, for passages of `lengths` tokens one after another; at most `queries` at a
    time, which saves scores that are masked, or as many as fit in memory."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qs, ks, vs = (torch.split(y, list(lengths)) for y in (q, k, v))
        passages = zip(qs, ks, vs, strict=True)
        return torch.cat([_attend_passage(backend, *qkv, sinks, window, queries) for qkv in passages])

    return attend


def _attend_passage(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None, queries: int | None
) -> Tensor:
    """One passage: q [tokens, num_heads, head_dim], k and v [tokens, num_kv_heads, head_dim]
    -> [tokens, num_heads * head_dim]. Queries go through in chunks that bound the scores in memory, if any are."""
    tokens, heads, _ = q.shape
    q, k, v = (a.transpose(0, 1)[None] for a in (q, k, v))
    positions = torch.arange(tokens, device=q.device)[None]
    step = queries or tokens
    if backend.stores_scores:
        step = max(1, min(SCORE_BYTES // (tokens * heads * 4), step))
    outputs = []
    for a in range(0, tokens, step):
        b = min(a + step, tokens)
        first = 0 if window is None else max(0, a - window + 1)
        qkv = q[:, :, a:b], k[:, :, first:b], v[:, :, first:b]
        outputs.append(backend.attention(*qkv, sinks, positions[:, a:b], positions[:, first:b], window))
    return torch.cat(outputs, dim=1)[0]
