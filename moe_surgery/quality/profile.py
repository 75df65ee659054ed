"""Gathers `Statistics` of a checkpoint over passages, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_surgery.kernels.weights import Layer
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.hidden_states import CHUNK_TOKENS, HiddenStates, rows_buffer
from moe_surgery.quality.layerwise import apply_attention, backend_of, choose_experts, embed
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.view import view_layer
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import ExpertStatistics

__all__ = ["part_domains", "profile_passages"]

Progress = Callable[[int], None]


def part_domains(domain: str) -> tuple[str, str]:
    """Names of the prompt and the answer part of a domain of conversations."""
    return f"{domain}:prompt", f"{domain}:answer"


@torch.inference_mode()
def profile_passages(
    model: CausalLM,
    passages: Sequence[Passage],
    *,
    sequential: Plan | None = None,
    progress: Progress | None = None,
) -> dict[str, list[ExpertStatistics]]:
    """Statistics per domain and layer of `passages`.

    Prompt and answer of a conversation are counted separately, under `part_domains`. With `sequential` a
    layer's input comes from earlier layers pruned by the plan, while all of its experts are measured.
    `progress` is called with the tokens that went through a layer. Sums are float64 over outputs
    in the model's compute dtype.
    """
    domains, owner = _owners(passages)
    states = embed(model, [p.tokens for p in passages])
    statistics: dict[str, list[ExpertStatistics]] = {d: [] for d in domains}
    for number in range(len(model.layers)):
        layer = model.layers[number]
        apply_attention(model, number, layer, states)
        pruned = (
            None if sequential is None else view_layer(layer, sequential.layers[number], sequential.top_k)
        )
        parts = _measure(model, layer, states, owner, len(domains), pruned)
        for domain, part in zip(domains, parts, strict=True):
            statistics[domain].append(part)
        if progress:
            progress(states.tokens)
    return statistics


def _owners(passages: Sequence[Passage]) -> tuple[list[str], Tensor]:
    """Domains, and for each token the index of its domain, int64 [tokens]."""
    domains: dict[str, int] = {}
    owner = []
    for passage in passages:
        tokens = len(passage.tokens)
        spans = [(passage.domain, tokens)]
        if passage.answer is not None:
            prompt = min(passage.answer, tokens)
            spans = list(zip(part_domains(passage.domain), (prompt, tokens - prompt), strict=True))
        for domain, count in ((d, n) for d, n in spans if n):
            owner.append(torch.full((count,), domains.setdefault(domain, len(domains))))
    return list(domains), torch.cat(owner)


def _measure(
    model: CausalLM,
    layer: Layer,
    states: HiddenStates,
    owner: Tensor,
    domains: int,
    pruned: Layer | None,
) -> list[ExpertStatistics]:
    """Statistics per domain; adds the output of the experts, or of those of `pruned`, to `states`."""
    routed = [choose_experts(model, layer, states, where)[1:] for where in states.pieces()]
    ids, weights = (torch.cat(parts) for parts in zip(*routed, strict=True))
    experts = layer.router.weight.shape[0]
    parts = [ExpertStatistics.zeros(experts, model.config.hidden_size) for _ in range(domains)]
    y = rows_buffer(states.tokens, model.config.hidden_size, torch.float32, model.device)
    for expert in torch.unique(ids).tolist():
        tokens, slots = torch.where(ids == expert)
        for a in range(0, len(tokens), CHUNK_TOKENS):
            token, slot = tokens[a : a + CHUNK_TOKENS], slots[a : a + CHUNK_TOKENS]
            out = _output(model, layer, states, token, expert)
            gate = weights[token, slot]
            y.index_add_(0, token.to(y.device), (out.float() * gate[:, None].float()).to(y.device))
            _record(parts, expert, owner[token.cpu()], gate, out)
    if pruned is not None:  # the next layer gets the output of the kept experts only
        for where in states.pieces():
            x, ids, weights = choose_experts(model, pruned, states, where)
            y[where] = backend_of(model).experts(x, ids, weights, pruned.experts).float().to(y.device)
    for where in states.pieces():
        states[where] = states[where] + y[where].to(states.device).to(states.dtype)
    return parts


def _output(model: CausalLM, layer: Layer, states: HiddenStates, token: Tensor, expert: int) -> Tensor:
    """The output of one expert for some tokens, before its routing weight, [tokens, hidden]."""
    x = backend_of(model).rms_norm(states[token], layer.mlp_norm, model.config.rms_norm_eps)
    ids = torch.full((len(token), 1), expert, dtype=torch.int64, device=x.device)
    return backend_of(model).experts(x, ids, torch.ones_like(ids, dtype=x.dtype), layer.experts)


def _record(parts: Sequence[ExpertStatistics], expert: int, owner: Tensor, gate: Tensor, out: Tensor) -> None:
    """Add one expert's tokens to the statistics of the domains they belong to."""
    out, weight = out.cpu(), gate.cpu().double()
    norms = torch.linalg.vector_norm(out, dim=1, dtype=torch.float64)
    for domain in torch.unique(owner).tolist():
        here = owner == domain
        rows = out if here.all() else out[here]
        least, largest = (float(value) for value in rows.aminmax())
        part = parts[domain]
        part.count[expert] += len(rows)
        part.of("gate")[expert] += float(weight[here].sum())
        part.of("norm")[expert] += float(norms[here].sum())
        part.of("weighted_norm")[expert] += float((weight[here] * norms[here]).sum())
        part.of("output")[expert] += rows.sum(dim=0, dtype=torch.float64).numpy()
        peaks_abs, peaks = part.of("peak_abs"), part.of("peak")
        peaks_abs[expert] = max(peaks_abs[expert], abs(least), abs(largest))
        peaks[expert] = max(peaks[expert], largest)
