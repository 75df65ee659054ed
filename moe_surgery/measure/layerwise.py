"""Texts through a model one layer at a time, so that memory holds one layer and the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_surgery.runtime.attention import attend, visible
from moe_surgery.runtime.linear import linear, rms_norm
from moe_surgery.runtime.model import Layer, Model
from moe_surgery.runtime.rope import rotate

__all__ = ["Mixture", "embed", "run_layer", "unembed"]

# Attention scores held at once: queries x keys x heads, four bytes each.
SCORE_BYTES = 128 << 20

# (layer number, layer, normalised hidden [tokens, hidden]) -> output of the experts [tokens, hidden]
Mixture = Callable[[int, Layer, Tensor], Tensor]


def embed(model: Model, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Hidden states before the first layer, one [tokens, hidden] in the compute dtype per sequence."""
    return [F.embedding(torch.tensor(list(s)), model.embedding).to(model.dtype) for s in sequences]


@torch.inference_mode()
def run_layer(model: Model, number: int, hidden: list[Tensor], mixture: Mixture) -> None:
    """Take every sequence's hidden states through layer `number`, in place.

    Attention runs a sequence at a time; the experts see all tokens at once, so that each weight is
    read once however many sequences there are. `mixture` computes the experts' output.
    """
    layer = model.layers[number]
    for i, x in enumerate(hidden):
        hidden[i] = x + _attention(model, number, layer, x)
    joined = torch.cat(hidden)
    normed = rms_norm(joined, layer.mlp_norm, model.config.eps)
    joined = joined + mixture(number, layer, normed)
    hidden[:] = torch.split(joined, [len(x) for x in hidden])


@torch.inference_mode()
def unembed(model: Model, hidden: Tensor, rows: int = 256) -> Iterator[Tensor]:
    """Logits float32 [at most `rows`, vocabulary] for hidden states [tokens, hidden], piece by piece."""
    for piece in torch.split(hidden, rows):
        yield linear(rms_norm(piece, model.norm, model.config.eps), model.unembedding).float()


def _attention(model: Model, number: int, layer: Layer, x: Tensor) -> Tensor:
    """Causal self-attention of one sequence, [tokens, hidden] -> [tokens, hidden]."""
    c = model.config
    tokens = len(x)
    positions = torch.arange(tokens, device=x.device)[None]
    cos, sin = (a[:, None] for a in model.rope(positions))
    h = rms_norm(x, layer.attention_norm, c.eps)[None]
    q = rotate(layer.q(h).view(1, tokens, c.heads, c.head_dim).transpose(1, 2), cos, sin)
    k = rotate(layer.k(h).view(1, tokens, c.kv_heads, c.head_dim).transpose(1, 2), cos, sin)
    v = layer.v(h).view(1, tokens, c.kv_heads, c.head_dim).transpose(1, 2)
    window = c.windows[number]
    step = max(1, SCORE_BYTES // (tokens * c.heads * 4))
    mixed = []
    for a in range(0, tokens, step):
        b = min(a + step, tokens)
        first = 0 if window is None else max(0, a - window + 1)
        seen = visible(positions[:, a:b], positions[:, first:b], window)
        mixed.append(attend(q[:, :, a:b], k[:, :, first:b], v[:, :, first:b], layer.sinks, seen))
    return layer.o(torch.cat(mixed, dim=1))[0]
