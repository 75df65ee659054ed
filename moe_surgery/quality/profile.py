"""Gathers `Statistics` of a checkpoint over passages, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_surgery.kernels import Backend
from moe_surgery.kernels.interface import MeasuredExperts
from moe_surgery.kernels.weights import ExpertWeights, Layer
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.hidden_states import HiddenStates
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
    `progress` is called with the tokens that went through a layer. Sums are float64, over outputs in
    float32 with the native backend, in the model's compute dtype with others.
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
    experts = layer.router.weight.shape[0]
    parts = [ExpertStatistics.zeros(experts, model.config.hidden_size) for _ in range(domains)]
    sums = torch.zeros(domains, experts, model.config.hidden_size, dtype=torch.float64)
    for where in states.pieces():
        x, ids, weights = choose_experts(model, layer, states, where)
        measured = _run_experts(backend_of(model), x, ids, weights, layer.experts, owner[where], sums)
        _record(parts, owner[where], ids.cpu(), weights.cpu(), measured)
        y = measured.y
        if pruned is not None:  # the next layer gets the output of the kept experts only
            x, ids, weights = choose_experts(model, pruned, states, where)
            y = backend_of(model).experts(x, ids, weights, pruned.experts)
        states[where] = states[where] + y
    for part, output in zip(parts, sums.numpy(), strict=True):
        part.output = output
    return parts


def _run_experts(
    backend: Backend,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    owner: Tensor,
    sums: Tensor,
) -> MeasuredExperts:
    """`Backend.measured_experts`, expert by expert where the backend has no such pass."""
    measured = backend.measured_experts(x, ids, weights, experts, owner, sums)
    if measured is not None:
        return measured
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    norms = torch.zeros(ids.shape, dtype=torch.float64)
    least, largest = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for expert in torch.unique(ids).tolist():
        token, slot = torch.where(ids == expert)
        alone = torch.full((len(token), 1), expert, dtype=torch.int64, device=x.device)
        out = backend.experts(x[token], alone, torch.ones_like(alone, dtype=x.dtype), experts)
        y.index_add_(0, token, out.float() * weights[token, slot][:, None].float())
        token, slot, out = token.cpu(), slot.cpu(), out.cpu().double()
        norms[token, slot] = torch.linalg.vector_norm(out, dim=1)
        least[token, slot], largest[token, slot] = (value.float() for value in out.aminmax(dim=1))
        for domain in torch.unique(owner[token]).tolist():
            sums[domain, expert] += out[owner[token] == domain].sum(dim=0)
    return MeasuredExperts(y.to(x.dtype), norms, least, largest)


def _record(
    parts: Sequence[ExpertStatistics], owner: Tensor, ids: Tensor, weights: Tensor, measured: MeasuredExperts
) -> None:
    """Add what was measured, all but the sums of outputs, to the statistics of the tokens' domains."""
    gates, norms = weights.double(), measured.norms
    peaks = torch.maximum(measured.least.abs(), measured.largest.abs())
    for domain in torch.unique(owner).tolist():
        here, part = owner == domain, parts[domain]
        expert, experts = ids[here].flatten().numpy(), len(part.count)
        part.count += np.bincount(expert, minlength=experts)
        for name, values in (("gate", gates), ("norm", norms), ("weighted_norm", gates * norms)):
            part.of(name)[:] += np.bincount(expert, values[here].flatten().numpy(), experts)
        for name, values in (("peak", measured.largest), ("peak_abs", peaks)):
            np.maximum.at(part.of(name), expert, values[here].flatten().numpy())
