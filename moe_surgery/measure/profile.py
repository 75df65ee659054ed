"""Gathers `Statistics` of a checkpoint over texts, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_surgery.kernels.reference.experts import expert_output
from moe_surgery.measure.layerwise import embed, run_layer
from moe_surgery.runtime.model import Layer, Model
from moe_surgery.selection.statistics import ExpertStatistics

__all__ = ["profile_sequences"]

Progress = Callable[[int], None]


@torch.inference_mode()
def profile_sequences(
    model: Model,
    sequences: Mapping[str, Sequence[Sequence[int]]],
    *,
    release: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, list[ExpertStatistics]]:
    """Statistics per domain and layer of token sequences by domain, all taken through together.

    `release` is told a layer's number when its weights are no longer needed, `progress` as well.
    Expert outputs are measured in float64 sums of the model's compute dtype.
    """
    domains = list(sequences)
    flat = [s for d in domains for s in sequences[d]]
    owner = torch.cat([torch.full((len(s),), i) for i, d in enumerate(domains) for s in sequences[d]])
    hidden = embed(model, flat)
    found: dict[str, list[ExpertStatistics]] = {d: [] for d in domains}

    def mixture(number: int, layer: Layer, x: Tensor) -> Tensor:
        y, parts = _measured(model, layer, x, owner, len(domains))
        for domain, part in zip(domains, parts, strict=True):
            found[domain].append(part)
        return y

    for number in range(len(model.layers)):
        run_layer(model, number, hidden, mixture)
        if release:
            release(number)
        if progress:
            progress(number)
    return found


def _measured(
    model: Model, layer: Layer, x: Tensor, owner: Tensor, domains: int
) -> tuple[Tensor, list[ExpertStatistics]]:
    """The experts' output for all tokens, and what each expert did per domain."""
    router = layer.router
    assert router.bias is not None
    ids, weights = model.backend.route(x, router.weight, router.bias, layer.top_k)
    experts = router.weight.shape[0]
    parts = [ExpertStatistics.zeros(experts, x.shape[1]) for _ in range(domains)]
    y = torch.zeros_like(x, dtype=torch.float32)
    index = layer.experts.index
    for expert in torch.unique(ids).tolist():
        token, slot = torch.where(ids == expert)
        place = expert if index is None else int(index[expert])
        out = expert_output(x[token], layer.experts, place)
        gate = weights[token, slot]
        y.index_add_(0, token, out.float() * gate[:, None].float())
        _record(parts, expert, owner[token], gate, out)
    return y.to(x.dtype), parts


def _record(parts: Sequence[ExpertStatistics], expert: int, owner: Tensor, gate: Tensor, out: Tensor) -> None:
    """Add one expert's tokens to the statistics of the domains they belong to."""
    wide = out.cpu().to(torch.float64).numpy()
    weight = gate.cpu().to(torch.float64).numpy()
    norms = np.linalg.norm(wide, axis=1)
    where = owner.cpu().numpy()
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
