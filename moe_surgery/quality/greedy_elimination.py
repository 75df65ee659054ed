"""Our own choice of experts: keep those that rebuild each layer's output best, routing done anew.

A metric scores experts one by one, as if the others stayed. Here experts are dropped one after the
other, each time the one without which the layer's output changes least *given what is left*: tokens
of a dropped expert go to their next best one, and weights are the softmax over the experts then
chosen. The change counts relative to the token's hidden state after the layer, squared:

    cost(S) = sum over tokens t of |y_S(t) - y(t)|^2 / |h(t)|^2

All candidates are compared exactly, without running the model again: with F(t) the outputs of all
experts and c the routing coefficients, |F (c_S - c)|^2 = (c_S - c)' G (c_S - c) for the Gram matrix
G(t) = F(t) F(t)', experts x experts, which is gathered once. One pass gives a whole ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.kernels.weights import Layer
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.hidden_states import HiddenStates, rows_buffer
from moe_surgery.quality.layerwise import apply_attention, apply_experts, embed
from moe_surgery.runtime.model import CausalLM

__all__ = ["LayerOrder", "eliminate", "reconstruct"]

# Tokens whose outputs of all experts are held at once.
PIECE_TOKENS = 256


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """Experts of one layer, the last to drop first. `errors[n - 1]` is the mean over tokens of the
    relative squared error of the layer's output with the first n experts."""

    experts: tuple[int, ...]
    errors: tuple[float, ...]


@torch.inference_mode()
def reconstruct(
    model: CausalLM,
    passages: Sequence[Passage],
    *,
    known: Sequence[LayerOrder] = (),
    finished: Callable[[int, LayerOrder], None] | None = None,
) -> list[LayerOrder]:
    """An order of each layer's experts by what `passages` need, all taken through together.

    Costs a forward pass in which every token goes to every expert: experts / top_k times the experts'
    work of `profile`. Memory: one layer, the hidden states, and 4 bytes x tokens x experts^2.
    `known` are layers that an earlier run has done; `finished` is told each other one.
    """
    states = embed(model, [p.tokens for p in passages])
    orders = list(known)
    for number in range(len(model.layers)):
        layer = model.layers[number]
        apply_attention(model, number, layer, states)
        if number < len(known):
            apply_experts(model, layer, states)
            continue
        shares, gram = _outputs(model, layer, states)
        apply_experts(model, layer, states)
        norms = torch.cat([states[w].float().pow(2).sum(dim=1).cpu() for w in states.pieces()])
        orders.append(eliminate(shares, gram, norms, layer.top_k))
        if finished:
            finished(number, orders[-1])
    return orders


def eliminate(shares: Tensor, gram: Tensor, norms: Tensor, top_k: int) -> LayerOrder:
    """The greedy order. shares float32 [tokens, experts]: softmax of the router over all experts (its
    order and ratios are what matters); gram float32 [tokens, experts, experts]: products of the
    experts' outputs; norms float32 [tokens]: squared norms that errors are relative to.
    """
    tokens, experts = shares.shape
    full = _coefficients(shares, torch.ones(experts, dtype=torch.bool), top_k)
    left = torch.ones(experts, dtype=torch.bool)
    dropped: list[int] = []
    errors = [0.0]
    current = torch.zeros(tokens)
    while int(left.sum()) > 1:
        count = int(left.sum())
        chosen = min(top_k, count)
        places = torch.topk(shares.masked_fill(~left, -1.0), min(top_k + 1, count), dim=1).indices
        harm = torch.zeros(experts, dtype=torch.float64)
        without = torch.empty(tokens, chosen)
        for slot in range(chosen):
            others = torch.cat((places[:, :slot], places[:, slot + 1 :]), dim=1)[:, :top_k]
            without[:, slot] = _error(_weighted(shares, others) - full, gram, norms)
            harm.index_add_(0, places[:, slot], (without[:, slot] - current).double())
        harm[~left] = torch.inf
        worst = int(harm.argmin())
        touched = places[:, :chosen] == worst
        current = torch.where(touched.any(dim=1), (without * touched).sum(dim=1), current)
        left[worst] = False
        dropped.append(worst)
        errors.append(float(current.double().mean()))
    dropped.append(int(left.nonzero()[0, 0]))
    return LayerOrder(tuple(reversed(dropped)), tuple(reversed(errors)))


def _coefficients(shares: Tensor, left: Tensor, top_k: int) -> Tensor:
    """Routing weights [tokens, experts] with the experts `left` (bool [experts])."""
    places = torch.topk(shares.masked_fill(~left, -1.0), min(top_k, int(left.sum())), dim=1).indices
    return _weighted(shares, places)


def _weighted(shares: Tensor, places: Tensor) -> Tensor:
    """Weights [tokens, experts] where the experts `places` [tokens, k] are chosen: softmax over them."""
    mine = shares.gather(1, places)
    return torch.zeros_like(shares).scatter_(1, places, mine / mine.sum(dim=1, keepdim=True))


def _error(change: Tensor, gram: Tensor, norms: Tensor) -> Tensor:
    """change' G change / norms per token; change [tokens, experts]."""
    moved = torch.bmm(gram, change[:, :, None])[:, :, 0]
    return (change * moved).sum(dim=1).clamp(min=0) / norms


def _outputs(model: CausalLM, layer: Layer, states: HiddenStates) -> tuple[Tensor, Tensor]:
    """Router shares [tokens, experts] and Gram matrices [tokens, experts, experts], float32 on the CPU."""
    router = layer.router
    assert router.bias is not None
    experts = router.weight.shape[0]
    shares = torch.empty(states.tokens, experts)
    gram = rows_buffer(states.tokens, experts * experts, torch.float32, torch.device("cpu"))
    for start in range(0, states.tokens, PIECE_TOKENS):
        where = slice(start, min(start + PIECE_TOKENS, states.tokens))
        x = model.backend.rms_norm(states[where], layer.mlp_norm, model.config.rms_norm_eps)
        ids, weights = model.backend.route(x.float(), router.weight, router.bias, experts)
        shares[where] = torch.zeros(len(x), experts).scatter_(1, ids.cpu(), weights.float().cpu())
        outputs = torch.empty(len(x), experts, x.shape[1], device=x.device)
        for expert in range(experts):
            chosen = torch.full((len(x), 1), expert, dtype=torch.int64, device=x.device)
            ones = torch.ones_like(chosen, dtype=x.dtype)
            outputs[:, expert] = model.backend.experts(x, chosen, ones, layer.experts).float()
        gram[where] = torch.bmm(outputs, outputs.transpose(1, 2)).flatten(1).cpu()
    return shares, gram.view(-1, experts, experts)
