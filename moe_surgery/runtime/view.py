"""A pruned model without pruning: the full model's weights, with routers restricted to the kept experts."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch

from moe_surgery.errors import PlanMismatchError, UsageError
from moe_surgery.kernels.weights import Layer, Projection
from moe_surgery.runtime.model import CausalLM
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.plan import Plan, as_plan

__all__ = ["view", "view_layer"]


def view_layer(layer: Layer, kept: tuple[int, ...], top_k: int | None = None) -> Layer:
    """`layer` with the experts `kept`, in that order; all weights but the router's are shared.

    The router's rows are gathered into new tensors, so that logits are those of the pruned checkpoint bit for
    bit. `top_k` None means the layer's; at most the number of kept experts.
    """
    router = layer.router
    assert router.bias is not None
    rows = torch.tensor(kept, dtype=torch.int64, device=router.weight.device)
    expert_map = rows if layer.experts.expert_map is None else layer.experts.expert_map[rows]
    return replace(
        layer,
        router=Projection(router.weight[rows], router.bias[rows]),
        experts=replace(layer.experts, expert_map=expert_map),
        top_k=min(top_k or layer.top_k, len(kept)),
    )


def view(
    model: CausalLM, plan: Plan | PathLike | None = None, top_k: int | None = None, *, name: str = "the model"
) -> CausalLM:
    """`model` as `plan` would prune it, with at most `top_k` experts per token (default: the plan's, else the
    model's).

    Weights are shared with `model`, which does not change; only the router's rows in plan order and an expert
    map are new, a few kilobytes per layer. `plan` may be the path of a plan file; without one all experts stay.
    `top_k` may exceed the model's; a layer with fewer experts uses all of them. Error messages call the
    model `name`.

    Raises PlanMismatchError for a plan of another model, or one that keeps an expert which `model`, itself a
    view, leaves out; UsageError for a top-k below 1.
    """
    if top_k is not None and top_k < 1:
        raise UsageError(f"top-k {top_k}: must be at least 1")
    c = model.config
    if plan is not None:
        plan = as_plan(plan)
        plan.check_fits(c.model_type, c.num_local_experts, c.num_hidden_layers, name)
    viewed = copy(model)
    if plan is None:
        viewed.layers = [
            replace(layer, top_k=min(top_k or layer.top_k, len(layer.router.weight)))
            for layer in model.layers
        ]
    else:
        viewed.layers = [
            view_layer(layer, _rows(layer, kept, number), top_k or plan.top_k)
            for number, (layer, kept) in enumerate(zip(model.layers, plan.layers, strict=True))
        ]
    return viewed


def _rows(layer: Layer, kept: tuple[int, ...], number: int) -> tuple[int, ...]:
    """The router rows of `layer` for the source experts `kept`."""
    if layer.experts.expert_map is None:
        return kept
    rows = {expert: row for row, expert in enumerate(layer.experts.expert_map.tolist())}
    if missing := [expert for expert in kept if expert not in rows]:
        raise PlanMismatchError(
            f"layer {number}: the plan keeps expert {missing[0]}, which the model's own plan leaves out; "
            "load the model without a plan, or keep only experts of that plan"
        )
    return tuple(rows[expert] for expert in kept)
