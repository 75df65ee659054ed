"""A pruned model without pruning: the full one's weights, and routers that know the kept experts only."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_surgery.runtime.model import Layer, Projection

__all__ = ["view_layer"]


def view_layer(layer: Layer, kept: tuple[int, ...], top_k: int | None = None) -> Layer:
    """`layer` with the experts `kept`, in that order; all weights but the router's are shared.

    The router's rows are gathered into tensors of their own, so that logits are those of the pruned
    checkpoint bit for bit. `top_k` None means the layer's; it is min(top_k, kept) in any case.
    """
    router = layer.router
    assert router.bias is not None
    rows = torch.tensor(kept, dtype=torch.int64, device=router.weight.device)
    index = rows if layer.experts.index is None else layer.experts.index[rows]
    return replace(
        layer,
        router=Projection(router.weight[rows], router.bias[rows]),
        experts=replace(layer.experts, index=index),
        top_k=min(top_k or layer.top_k, len(kept)),
    )
