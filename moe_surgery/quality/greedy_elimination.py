"""Greedy elimination: keep the experts that together reproduce each layer's output best.

A metric scores experts one by one, as if the others stayed. Here experts are dropped one at a time,
always the one whose loss changes the layer's output least *given those that remain*: tokens of a
dropped expert go to their next best one, and weights are the softmax over the experts then chosen.
The change is squared and relative to the token's hidden state after the layer:

    cost(S) = sum over tokens t of |y_S(t) - y(t)|^2 / |h(t)|^2

All candidates are compared exactly, without running the model again: with F(t) the outputs of all
experts and c the routing coefficients, |F (c_S - c)|^2 = (c_S - c)' G (c_S - c) for the Gram matrix
G(t) = F(t) F(t)', experts x experts, computed once. One pass gives a full ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.kernels.weights import Layer
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.hidden_states import HiddenStates, rows_buffer
from moe_surgery.quality.layerwise import (
    apply_attention,
    apply_experts,
    backend_of,
    choose_experts,
    embed,
)
from moe_surgery.runtime.model import CausalLM

__all__ = ["LayerOrder", "eliminate", "greedy_elimination"]

# Tokens per batch of all experts' outputs.
BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """Experts of one layer, best (dropped last) first. `errors[n - 1]` is the mean over tokens of the
    relative squared error of the layer's output with the first n experts."""

    experts: tuple[int, ...]
    errors: tuple[float, ...]


@torch.inference_mode()
def greedy_elimination(
    model: CausalLM,
    passages: Sequence[Passage],
    *,
    resumed: Sequence[LayerOrder] = (),
    on_layer: Callable[[LayerOrder], None] | None = None,
) -> list[LayerOrder]:
    """An order of each layer's experts for `passages`.

    Costs a forward pass in which every token goes to every expert: experts / top_k times the expert
    work of `profile`. Memory: one layer, the hidden states, 4 bytes x tokens x experts^2, and the outputs of all
    experts for 512 tokens.
    `resumed` are layers finished by an earlier run; `on_layer` is called with each new one.
    """
    states = embed(model, [p.tokens for p in passages])
    orders = list(resumed)
    for number in range(len(model.layers)):
        layer = model.layers[number]
        apply_attention(model, number, layer, states)
        if number < len(resumed):
            apply_experts(model, layer, states)
            continue
        probs, gram = _outputs(model, layer, states)
        if model.dtype != torch.float32:  # else the outputs have been added
            apply_experts(model, layer, states)
        norms = torch.cat([states[w].float().pow(2).sum(dim=1).cpu() for w in states.pieces()])
        orders.append(eliminate(probs, gram, norms, layer.top_k))
        if on_layer:
            on_layer(orders[-1])
    return orders


def eliminate(probs: Tensor, gram: Tensor, norms: Tensor, top_k: int) -> LayerOrder:
    """The greedy order. probs float32 [tokens, experts]: softmax of the router over all experts (only
    order and ratios matter); gram float32 [tokens, experts, experts]: products of the
    experts' outputs; norms float32 [tokens]: squared norms that errors are relative to.
    """
    tokens, experts = probs.shape
    full = _coefficients(probs, torch.ones(experts, dtype=torch.bool), top_k)
    remaining = torch.ones(experts, dtype=torch.bool)
    dropped: list[int] = []
    errors = [0.0]
    current = torch.zeros(tokens)
    while int(remaining.sum()) > 1:
        count = int(remaining.sum())
        chosen = min(top_k, count)
        expert_ids = torch.topk(probs.masked_fill(~remaining, -1.0), min(top_k + 1, count), dim=1).indices
        cost = torch.zeros(experts, dtype=torch.float64)
        without = torch.empty(tokens, chosen)
        for slot in range(chosen):
            others = torch.cat((expert_ids[:, :slot], expert_ids[:, slot + 1 :]), dim=1)[:, :top_k]
            without[:, slot] = _error(_weighted(probs, others) - full, gram, norms)
            cost.index_add_(0, expert_ids[:, slot], (without[:, slot] - current).double())
        cost[~remaining] = torch.inf
        cheapest = int(cost.argmin())
        touched = expert_ids[:, :chosen] == cheapest
        current = torch.where(touched.any(dim=1), (without * touched).sum(dim=1), current)
        remaining[cheapest] = False
        dropped.append(cheapest)
        errors.append(float(current.double().mean()))
    dropped.append(int(remaining.nonzero()[0, 0]))
    return LayerOrder(tuple(reversed(dropped)), tuple(reversed(errors)))


def _coefficients(probs: Tensor, remaining: Tensor, top_k: int) -> Tensor:
    """Routing weights [tokens, experts] over the experts `remaining` (bool [experts])."""
    expert_ids = torch.topk(
        probs.masked_fill(~remaining, -1.0), min(top_k, int(remaining.sum())), dim=1
    ).indices
    return _weighted(probs, expert_ids)


def _weighted(probs: Tensor, expert_ids: Tensor) -> Tensor:
    """Weights [tokens, experts] of the chosen `expert_ids` [tokens, k]: softmax over them."""
    chosen = probs.gather(1, expert_ids)
    return torch.zeros_like(probs).scatter_(1, expert_ids, chosen / chosen.sum(dim=1, keepdim=True))


def _error(change: Tensor, gram: Tensor, norms: Tensor) -> Tensor:
    """change' G change / norms per token; change [tokens, experts]."""
    product = torch.bmm(gram, change[:, :, None])[:, :, 0]
    return (change * product).sum(dim=1).clamp(min=0) / norms


def _outputs(model: CausalLM, layer: Layer, states: HiddenStates) -> tuple[Tensor, Tensor]:
    """Router probabilities [tokens, experts] and Gram matrices [tokens, experts, experts], float32 on the CPU.

    In float32 the outputs of the chosen experts are added to `states`, in order of the choice, as `Backend.experts`
    does. Those of other dtypes are rounded already.
    """
    backend, router = backend_of(model), layer.router
    assert router.bias is not None
    experts = router.weight.shape[0]
    probs = torch.empty(states.tokens, experts)
    gram = rows_buffer(states.tokens, experts * experts, torch.float32, torch.device("cpu"))
    for start in range(0, states.tokens, BATCH_TOKENS):
        where = slice(start, min(start + BATCH_TOKENS, states.tokens))
        x, chosen, shares = choose_experts(model, layer, states, where)
        ids, weights = backend.route(x.float(), router.weight, router.bias, experts)
        probs[where] = torch.zeros(len(x), experts).scatter_(1, ids.cpu(), weights.float().cpu())
        outputs = torch.empty(experts, *x.shape, device=x.device)
        for expert in range(experts):
            alone = torch.full((len(x), 1), expert, dtype=torch.int64, device=x.device)
            ones = torch.ones_like(alone, dtype=x.dtype)
            outputs[expert] = backend.experts(x, alone, ones, layer.experts).float()
        gram[where] = torch.bmm(outputs.transpose(0, 1), outputs.permute(1, 2, 0)).flatten(1).cpu()
        if model.dtype == torch.float32:
            rows = torch.arange(len(x), device=x.device)
            y = shares[:, :1] * outputs[chosen[:, 0], rows]
            for slot in range(1, chosen.shape[1]):
                y += shares[:, slot : slot + 1] * outputs[chosen[:, slot], rows]
            states[where] = states[where] + y
    return probs, gram.view(-1, experts, experts)
