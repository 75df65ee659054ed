"""Gathers `Statistics` of a checkpoint over passages, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_surgery.kernels.weights import Layer
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.hidden_states import TOGETHER, HiddenStates, rows_buffer
from moe_surgery.quality.layerwise import apply_attention, choose_experts, embed
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.view import view_layer
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import ExpertStatistics

__all__ = ["part_domains", "profile_passages"]

Progress = Callable[[int], None]


def part_domains(domain: str) -> tuple[str, str]:
    """Names under which the prompt and the answer of a domain's conversations are counted."""
    return f"{domain}:prompt", f"{domain}:answer"


@torch.inference_mode()
def profile_passages(
    model: CausalLM,
    passages: Sequence[Passage],
    *,
    sequential: Plan | None = None,
    progress: Progress | None = None,
) -> dict[str, list[ExpertStatistics]]:
    """Statistics per domain and layer of `passages`, all taken through a layer together.

    The tokens of a conversation are counted apart, under `part_domains`. With `sequential` a layer's
    inputs come from earlier layers that only have the plan's experts, while all of its own experts are
    measured. `progress` is told the tokens that are through a layer. Sums are float64 over outputs
    in the model's compute dtype.
    """
    domains, owner = _owners(passages)
    states = embed(model, [p.tokens for p in passages])
    found: dict[str, list[ExpertStatistics]] = {d: [] for d in domains}
    for number in range(len(model.layers)):
        layer = model.layers[number]
        apply_attention(model, number, layer, states)
        seen = None if sequential is None else view_layer(layer, sequential.layers[number], sequential.top_k)
        parts = _measure(model, layer, states, owner, len(domains), seen)
        for domain, part in zip(domains, parts, strict=True):
            found[domain].append(part)
        if progress:
            progress(states.tokens)
    return found


def _owners(passages: Sequence[Passage]) -> tuple[list[str], Tensor]:
    """Domains, and for each token the place of its domain in them, int64 [tokens]."""
    domains: dict[str, int] = {}
    owner = []
    for passage in passages:
        tokens = len(passage.tokens)
        spans = [(passage.domain, tokens)]
        if passage.answer is not None:
            asked = min(passage.answer, tokens)
            spans = list(zip(part_domains(passage.domain), (asked, tokens - asked), strict=True))
        for domain, count in ((d, n) for d, n in spans if n):
            owner.append(torch.full((count,), domains.setdefault(domain, len(domains))))
    return list(domains), torch.cat(owner)


def _measure(
    model: CausalLM,
    layer: Layer,
    states: HiddenStates,
    owner: Tensor,
    domains: int,
    seen: Layer | None,
) -> list[ExpertStatistics]:
    """Add the output of the experts, or those of the layer `seen`, to `states`; what each expert did, per
    domain."""
    routed = [choose_experts(model, layer, states, where)[1:] for where in states.pieces()]
    ids, weights = (torch.cat(parts) for parts in zip(*routed, strict=True))
    experts = layer.router.weight.shape[0]
    parts = [ExpertStatistics.zeros(experts, model.config.hidden_size) for _ in range(domains)]
    y = rows_buffer(states.tokens, model.config.hidden_size, torch.float32, model.device)
    for expert in torch.unique(ids).tolist():
        tokens, slots = torch.where(ids == expert)
        for a in range(0, len(tokens), TOGETHER):
            token, slot = tokens[a : a + TOGETHER], slots[a : a + TOGETHER]
            out = _output(model, layer, states, token, expert)
            gate = weights[token, slot]
            y.index_add_(0, token.to(y.device), (out.float() * gate[:, None].float()).to(y.device))
            _record(parts, expert, owner[token.cpu()], gate, out)
    if seen is not None:  # what the next layer sees comes from the kept experts alone
        for where in states.pieces():
            x, ids, weights = choose_experts(model, seen, states, where)
            y[where] = model.backend.experts(x, ids, weights, seen.experts).float().to(y.device)
    for where in states.pieces():
        states[where] = states[where] + y[where].to(states.device).to(states.dtype)
    return parts


def _output(model: CausalLM, layer: Layer, states: HiddenStates, token: Tensor, expert: int) -> Tensor:
    """The output of one expert for some tokens, before its routing weight, [tokens, hidden]."""
    x = model.backend.rms_norm(states[token], layer.mlp_norm, model.config.rms_norm_eps)
    ids = torch.full((len(token), 1), expert, dtype=torch.int64, device=x.device)
    return model.backend.experts(x, ids, torch.ones_like(ids, dtype=x.dtype), layer.experts)


def _record(parts: Sequence[ExpertStatistics], expert: int, owner: Tensor, gate: Tensor, out: Tensor) -> None:
    """Add one expert's tokens to the statistics of the domains they belong to."""
    wide = out.cpu().to(torch.float64).numpy()
    weight = gate.cpu().to(torch.float64).numpy()
    norms = np.linalg.norm(wide, axis=1)
    where = owner.numpy()
    for domain in np.unique(where):
        mine = where == domain
        part = parts[domain]
        part.count[expert] += int(mine.sum())
        part.gate[expert] += weight[mine].sum()
        part.norm[expert] += norms[mine].sum()
        part.weighted_norm[expert] += (weight[mine] * norms[mine]).sum()
        part.output[expert] += wide[mine].sum(axis=0)
        part.peak_abs[expert] = max(part.peak_abs[expert], np.abs(wide[mine]).max())
        part.peak[expert] = max(part.peak[expert], wide[mine].max())
