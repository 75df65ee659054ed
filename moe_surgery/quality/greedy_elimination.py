"""Greedy elimination: keep the experts that together reproduce each layer's output best.

A metric scores experts one by one, as if the others stayed. Here experts are dropped one at a time,
always the one whose loss changes the layer's output least *given those that remain*: tokens of a
dropped expert go to their next best one, with the weights that the router gives then.
The change is squared and relative to the token's hidden state after the layer:

    cost(S) = sum over tokens t of |y_S(t) - y(t)|^2 / |h(t)|^2

All candidates are compared exactly, without running the model again: with F(t) the outputs of all
experts and c the routing coefficients, |F (c_S - c)|^2 = (c_S - c)' G (c_S - c) for the Gram matrix
G(t) = F(t) F(t)', experts x experts, computed once. One pass gives a full ranking.

Two exceptions. A router that chooses from groups of experts keeps the groups equal: only experts of the fullest
ones are candidates, down to the fewest experts it can choose from, and those are ordered by their total weight. And
where dropping an expert can move tokens that do not go to it (such a router, or a bias on a softmax), candidates are
compared by the tokens that do; what was dropped is then counted exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.errors import InvalidInputError
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.hidden_states import rows_buffer
from moe_surgery.quality.layers import LayerModel, MoeLayer
from moe_surgery.quality.own_layers import as_layers
from moe_surgery.quality.routing import Routing
from moe_surgery.runtime.model import CausalLM

__all__ = ["LayerOrder", "eliminate", "greedy_elimination"]

# Tokens per batch of all experts' outputs.
BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """Experts of one layer, best (dropped last) first. `errors[n - 1]` is the mean over tokens of the
    relative squared error of the layer's output with the first n experts, None where the router cannot choose from so
    few."""

    experts: tuple[int, ...]
    errors: tuple[float | None, ...]


@torch.inference_mode()
def greedy_elimination(
    model: LayerModel | CausalLM,
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
    model = as_layers(model)
    states = model.embed([p.tokens for p in passages])
    orders = list(resumed)
    for number in range(model.depth):
        layer = model.enter(number, states)
        if layer is None:
            continue
        if layer.row < len(resumed):
            layer.apply()
            continue
        if layer.weighted_input or layer.tail:
            kind = "weights the input of experts" if layer.weighted_input else "has experts without weights"
            raise InvalidInputError(
                f"layer {number}: its router {kind}, which search does not support; rank by statistics instead "
                "(profile, then rank)"
            )
        routing = layer.routing()
        gram, mixture = _outputs(layer)
        if mixture is None:
            layer.apply()
        else:
            layer.finish(mixture)
        norms = torch.cat([states[w].float().pow(2).sum(dim=1).cpu() for w in states.pieces()])
        orders.append(eliminate(routing, gram, norms))
        if on_layer:
            on_layer(orders[-1])
    return orders


def eliminate(routing: Routing, gram: Tensor, norms: Tensor) -> LayerOrder:
    """The greedy order. gram float32 [tokens, experts, experts]: products of the experts' outputs; norms float32
    [tokens]: squared norms that errors are relative to.
    """
    tokens, experts = routing.scores.shape
    remaining = torch.ones(experts, dtype=torch.bool)
    full = routing.weights(routing.choose(remaining), remaining)
    dropped: list[int] = []
    errors: list[float | None] = [0.0]
    current = torch.zeros(tokens)
    while int(remaining.sum()) > routing.fewest:
        ids, without = _without_each(routing, remaining, full, gram, norms)
        cost = torch.zeros(experts, dtype=torch.float64)
        for slot in range(ids.shape[1]):
            cost.index_add_(0, ids[:, slot], (without[:, slot] - current).double())
        if routing.fixed_order and not routing.local:
            cost += _growth(routing, remaining, ids, full, gram, norms, current)
        cost[~routing.droppable(remaining)] = torch.inf
        cheapest = int(cost.argmin())
        remaining[cheapest] = False
        if routing.local:
            touched = ids == cheapest
            current = torch.where(touched.any(dim=1), (without * touched).sum(dim=1), current)
        else:
            chosen = routing.weights(routing.choose(remaining), remaining)
            current = _error(chosen - full, gram, norms)
        dropped.append(cheapest)
        errors.append(float(current.double().mean()))
    left = remaining.nonzero()[:, 0].tolist()
    totals = full.double().sum(dim=0)
    left.sort(key=lambda expert: -float(totals[expert]))
    errors += [None] * (experts - len(errors))
    return LayerOrder((*left, *reversed(dropped)), tuple(reversed(errors)))


def _without_each(
    routing: Routing, remaining: Tensor, full: Tensor, gram: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """The experts of each token among `remaining`, int64 [tokens, k], and its error without each of them, float32
    [tokens, k]."""
    k = min(routing.top_k, int(remaining.sum()))
    ids = routing.choose(remaining, k + 1 if routing.fixed_order else k)
    without = torch.empty(len(ids), k)
    for slot in range(k):
        others = remaining.repeat(len(ids), 1)
        others.scatter_(1, ids[:, slot : slot + 1], False)
        if routing.fixed_order:
            chosen = torch.cat((ids[:, :slot], ids[:, slot + 1 :]), dim=1)[:, : routing.top_k]
        else:
            chosen = routing.choose(others)
        without[:, slot] = _error(routing.weights(chosen, others) - full, gram, norms)
    return ids[:, :k], without


def _growth(
    routing: Routing,
    remaining: Tensor,
    ids: Tensor,
    full: Tensor,
    gram: Tensor,
    norms: Tensor,
    current: Tensor,
) -> Tensor:
    """What dropping each expert changes for the tokens that do not go to it, float64 [experts].

    Their weights, shares of all remaining scores, grow by a factor r: |F (r c - full)|^2 = r^2 c'Gc - 2 r c'G full
    + full'G full.
    """
    c = routing.weights(ids, remaining)
    gc, gf = (torch.bmm(gram, v[:, :, None])[:, :, 0] for v in (c, full))
    a, b, d = ((x * y).sum(dim=1, keepdim=True) for x, y in ((c, gc), (c, gf), (full, gf)))
    total = (routing.scores * remaining).sum(dim=1, keepdim=True)
    r = total / (total - routing.scores)
    error = (r * r * a - 2 * r * b + d).clamp(min=0) / norms[:, None]
    change = (error - current[:, None]).scatter(1, ids, 0.0)
    return change.masked_fill(~remaining, 0.0).double().sum(dim=0)


def _error(change: Tensor, gram: Tensor, norms: Tensor) -> Tensor:
    """change' G change / norms per token; change [tokens, experts]."""
    product = torch.bmm(gram, change[:, :, None])[:, :, 0]
    return (change * product).sum(dim=1).clamp(min=0) / norms


def _outputs(layer: MoeLayer) -> tuple[Tensor, Tensor | None]:
    """The products of all experts' outputs, float32 [tokens, experts, experts] on the CPU, and the chosen ones'
    weighted sum, float32 [tokens, hidden]; None for that where the model computes in a dtype that rounds outputs."""
    tokens, experts, states = layer.states.tokens, layer.experts, layer.states
    gram = rows_buffer(tokens, experts * experts, torch.float32, torch.device("cpu"))
    whole = states.dtype == torch.float32
    mixture = rows_buffer(tokens, layer.hidden, torch.float32, states.device) if whole else None
    for start in range(0, tokens, BATCH_TOKENS):
        where = torch.arange(start, min(start + BATCH_TOKENS, tokens), device=states.device)
        outputs = torch.empty(experts, len(where), layer.hidden, device=states.device)
        for number in range(experts):
            outputs[number] = layer.expert(number)(where, torch.zeros_like(where)).float()
        gram[start : start + len(where)] = (
            torch.bmm(outputs.transpose(0, 1), outputs.permute(1, 2, 0)).flatten(1).cpu()
        )
        if mixture is not None:
            ids, weights = layer.ids[where], layer.weights[where].float()
            rows = torch.arange(len(where), device=states.device)
            for slot in range(ids.shape[1]):
                share = weights[:, slot, None] * outputs[ids[:, slot], rows]
                mixture[start : start + len(where)] += share.to(mixture.device)
    return gram.view(-1, experts, experts), mixture
