"""The experts of a layer, from a pool or the slots of a device: each is computed when it is there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_surgery.kernels import Backend
from moe_surgery.kernels.weights import ExpertWeights
from moe_surgery.runtime.residency.device_slots import DeviceSlots
from moe_surgery.runtime.residency.pool import ExpertPool
from moe_surgery.runtime.residency.slots import one_expert
from moe_surgery.runtime.residency.usage import Usage

__all__ = ["stored_experts", "weighted_experts"]


def stored_experts(ids: Tensor, experts: ExpertWeights) -> Tensor:
    """The stored experts that `ids` of a router mean."""
    return ids if experts.expert_map is None else experts.expert_map[ids]


def weighted_experts(
    backend: Backend,
    source: ExpertPool | DeviceSlots,
    usage: Usage,
    layer: int,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    meanwhile: Callable[[], None],
) -> Tensor:
    """`Backend.experts` with weights from `source`: [tokens, hidden] in x's dtype.

    Each expert is computed for all its tokens by itself. A token's outputs are added in the order of `ids`, as the
    native backend does, so results are the same bit for bit with it; others may add in another order. Of `experts`
    the biases and constants are used. `meanwhile` is called once what is missing is being read.
    """
    tokens, top_k = ids.shape
    chosen = stored_experts(ids, experts).flatten()
    pairs = _pairs_by_expert(chosen)
    usage.count(layer, list(pairs), [len(which) for which in pairs.values()])
    rows = x.to(torch.promote_types(x.dtype, backend.dtype))
    outputs = torch.empty((tokens * top_k, x.shape[1]), dtype=torch.float32, device=x.device)
    zeros = torch.zeros((tokens, 1), dtype=torch.int64, device=x.device)
    ones = rows.new_ones((tokens, 1))
    taken = source.take(layer, list(pairs))
    meanwhile()
    for expert, one in taken:
        which = pairs[expert]
        read = rows if tokens == 1 else rows[which // top_k]
        n = len(read)
        outputs[which] = backend.experts(read, zeros[:n], ones[:n], one_expert(one, experts, expert)).float()
    by_choice = outputs.view(tokens, top_k, -1) * weights.float()[..., None]
    y = by_choice[:, 0].clone()
    for choice in range(1, top_k):
        y += by_choice[:, choice]
    return y.to(x.dtype)


def _pairs_by_expert(chosen: Tensor) -> dict[int, Tensor]:
    """Where each expert is in `chosen` int64 [pairs]."""
    order = chosen.argsort(stable=True)
    distinct, counts = torch.unique_consecutive(chosen[order], return_counts=True)
    return dict(zip(distinct.tolist(), torch.split(order, counts.tolist()), strict=True))
