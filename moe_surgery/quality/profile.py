"""Gathers `Statistics` of a checkpoint over passages, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.hidden_states import CHUNK_TOKENS, rows_buffer
from moe_surgery.quality.layers import LayerModel, MoeLayer, routes_by_expert
from moe_surgery.quality.own_layers import as_layers
from moe_surgery.runtime.model import CausalLM
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import ExpertStatistics

__all__ = ["count_tokens", "part_domains", "profile_passages"]

Progress = Callable[[int], None]


def part_domains(domain: str) -> tuple[str, str]:
    """Names of the prompt and the answer part of a domain of conversations."""
    return f"{domain}:prompt", f"{domain}:answer"


@torch.inference_mode()
def profile_passages(
    model: LayerModel | CausalLM,
    passages: Sequence[Passage],
    *,
    sequential: Plan | None = None,
    progress: Progress | None = None,
) -> dict[str, list[ExpertStatistics]]:
    """Statistics per domain and MoE layer of `passages`.

    Prompt and answer of a conversation are counted separately, under `part_domains`. With `sequential` a
    layer's input comes from earlier layers pruned by the plan, while all of its experts are measured.
    `progress` is called with the tokens that went through a layer. Sums are float64 over outputs
    in the model's compute dtype.
    """
    domains, owner = _owners(passages)
    model = as_layers(model)
    states = model.embed([p.tokens for p in passages])
    statistics: dict[str, list[ExpertStatistics]] = {d: [] for d in domains}
    for number in range(model.depth):
        layer = model.enter(number, states)
        if layer is not None:
            pruned = None
            if sequential is not None:
                pruned = layer.restricted(sequential.layers[layer.row], sequential.top_k)
            parts = _measure(layer, owner, len(domains), pruned)
            for domain, part in zip(domains, parts, strict=True):
                statistics[domain].append(part)
        if progress:
            progress(states.tokens)
    return statistics


def count_tokens(passages: Sequence[Passage]) -> dict[str, int]:
    """Tokens of each domain, prompts and answers apart as in `profile_passages`."""
    domains, owner = _owners(passages)
    return dict(zip(domains, torch.bincount(owner, minlength=len(domains)).tolist(), strict=True))


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


def _measure(layer: MoeLayer, owner: Tensor, domains: int, pruned: MoeLayer | None) -> list[ExpertStatistics]:
    """Statistics per domain; completes the layer with the output of its experts, or of those of `pruned`."""
    weights = layer.weights
    parts = [ExpertStatistics.zeros(layer.experts, layer.hidden) for _ in range(domains)]
    y = rows_buffer(layer.states.tokens, layer.hidden, torch.float32, layer.states.device)
    for number, tokens, slots in routes_by_expert(layer.ids):
        expert = layer.expert(number)
        for a in range(0, len(tokens), CHUNK_TOKENS):
            token, slot = tokens[a : a + CHUNK_TOKENS], slots[a : a + CHUNK_TOKENS]
            out = expert(token, slot)
            y.index_add_(0, token.to(y.device), layer.share(out, token, slot).to(y.device))
            if number < layer.experts:
                gate = weights[token, slot]
                factor = torch.ones_like(gate) if layer.weighted_input else gate
                _record(parts, number, owner[token.cpu()], gate, factor, out)
    if pruned is not None:  # the next layer gets the output of the kept experts only
        y = pruned.mixture()
    layer.finish(y)
    return parts


def _record(
    parts: Sequence[ExpertStatistics], expert: int, owner: Tensor, gate: Tensor, factor: Tensor, out: Tensor
) -> None:
    """Add one expert's tokens to the statistics of the domains they belong to; `factor` weights its output."""
    out64 = out.cpu().to(torch.float64).numpy()
    weight, factor64 = (g.cpu().to(torch.float64).numpy() for g in (gate, factor))
    norms = np.linalg.norm(out64, axis=1)
    where = owner.numpy()
    for domain in np.unique(where):
        in_domain = where == domain
        part = parts[domain]
        part.count[expert] += int(in_domain.sum())
        part.of("gate")[expert] += weight[in_domain].sum()
        part.of("norm")[expert] += norms[in_domain].sum()
        part.of("weighted_norm")[expert] += (factor64[in_domain] * norms[in_domain]).sum()
        part.of("output")[expert] += out64[in_domain].sum(axis=0)
        peaks_abs, peaks = part.of("peak_abs"), part.of("peak")
        peaks_abs[expert] = max(peaks_abs[expert], np.abs(out64[in_domain]).max())
        peaks[expert] = max(peaks[expert], out64[in_domain].max())
