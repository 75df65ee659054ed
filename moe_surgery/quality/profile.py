"""Gathers `Statistics` of a checkpoint over passages, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_surgery.kernels.interface import MeasuredExperts
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.layers import LayerModel, MoeLayer
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
    `progress` is called with the tokens that went through a layer. Sums are float64, over outputs in
    float32 with the native backend, in the model's compute dtype with others.
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
    parts = [ExpertStatistics.zeros(layer.experts, layer.hidden) for _ in range(domains)]
    sums = torch.zeros(domains, layer.experts, layer.hidden, dtype=torch.float64)
    measured = layer.measured(owner, sums)
    _record(parts, owner, layer, measured)
    for part, output in zip(parts, sums.numpy(), strict=True):
        part.output = output
    # With `pruned`, the next layer gets the output of the kept experts only.
    layer.finish(measured.y if pruned is None else pruned.mixture())
    return parts


def _record(
    parts: Sequence[ExpertStatistics], owner: Tensor, layer: MoeLayer, measured: MeasuredExperts
) -> None:
    """Add what was measured, all but the sums of outputs, to the statistics of the tokens' domains."""
    ids, gates = layer.ids.cpu(), layer.weights.cpu().double()
    weighted = measured.norms if layer.weighted_input else gates * measured.norms
    peaks = torch.maximum(measured.least.abs(), measured.largest.abs())
    sums = {"gate": gates, "norm": measured.norms, "weighted_norm": weighted}
    for domain in torch.unique(owner).tolist():
        here, part = (owner == domain)[:, None] & (ids < layer.experts), parts[domain]
        expert = ids[here].numpy()
        part.count += np.bincount(expert, minlength=layer.experts)
        for name, values in sums.items():
            part.of(name)[:] += np.bincount(expert, values[here].numpy(), layer.experts)
        for name, values in (("peak", measured.largest), ("peak_abs", peaks)):
            np.maximum.at(part.of(name), expert, values[here].numpy())
