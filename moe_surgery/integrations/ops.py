"""The MoE operations as torch.library operators, opaque to torch.compile.

Importing this module defines `moe_surgery::route`, `moe_surgery::experts` (dense weights) and
`moe_surgery::experts_mxfp4` (packed ones). They have gradients to everything but expert ids and packed weights, first
order only; without gradients to compute nothing is kept and nothing is slower. The way back is plain PyTorch
(`kernels/reference/experts_backward.py`), also operators: `moe_surgery::experts_backward` and
`moe_surgery::experts_mxfp4_backward`. With float64 inputs the way forward is plain PyTorch too, in float64.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_surgery.kernels import Backend, select_backend
from moe_surgery.kernels.reference import ReferenceBackend
from moe_surgery.kernels.reference.experts_backward import experts_backward as _experts_backward
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight

__all__ = ["backend_of", "experts", "experts_backward", "experts_mxfp4", "experts_mxfp4_backward", "route"]

log = logging.getLogger("moe_surgery")
Gradients = tuple[Tensor | None, ...]


@lru_cache(maxsize=8)
def backend_of(device_type: str) -> Backend:
    """The backend for tensors on `device_type`: triton on CUDA and native on the CPU if they work, else
    reference.

    The first call logs the choice to `moe_surgery` (`select_backend` logs why it is reference).
    """
    chosen = select_backend(torch.device(device_type))
    log.info("experts on %s: %s backend", device_type, chosen.name)
    return chosen


def _backend_for(x: Tensor) -> Backend:
    """The fast backends compute in float32."""
    return ReferenceBackend() if x.dtype == torch.float64 else backend_of(x.device.type)


@torch.library.custom_op("moe_surgery::route", mutates_args=())
def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`Backend.route`: ids int64 [tokens, top_k] and weights [tokens, top_k] in x's dtype.

    x [tokens, hidden], weight [experts, hidden], bias [experts].
    """
    ids, weights = _backend_for(x).route(x, weight, bias, top_k)
    # May be views of a longer sort; an operator must return new memory.
    return ids.contiguous(), weights.contiguous()


@route.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape)


def _keep_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _ = inputs
    ids, weights = output
    ctx.mark_non_differentiable(ids)
    ctx.save_for_backward(x, weight, ids, weights)
    ctx.bias_dtype = bias.dtype


def _route_backward(ctx: Any, _: Tensor | None, gradient: Tensor) -> Gradients:
    """Softmax over the chosen logits; the others have no gradient."""
    x, weight, ids, weights = ctx.saved_tensors
    wide = torch.promote_types(x.dtype, torch.float32)
    weights, gradient = weights.to(wide), gradient.to(wide)
    chosen = weights * (gradient - (gradient * weights).sum(-1, keepdim=True))
    logits = chosen.new_zeros((x.shape[0], weight.shape[0])).scatter(1, ids, chosen)
    return (
        (logits @ weight.to(wide)).to(x.dtype),
        (logits.T @ x.to(wide)).to(weight.dtype),
        logits.sum(0).to(ctx.bias_dtype),
        None,
    )


route.register_autograd(_route_backward, setup_context=_keep_route)


@torch.library.custom_op("moe_surgery::experts", mutates_args=())
def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    limit: float,
    alpha: float,
) -> Tensor:
    """`Backend.experts` over dense weights: [tokens, hidden] in x's dtype.

    x [tokens, hidden], ids int64 and weights [tokens, top_k], gate_up [experts, hidden, 2 * intermediate]
    with gate and up alternating, down [experts, intermediate, hidden], biases [experts, ..].
    """
    expert_weights = ExpertWeights(
        DenseWeight(gate_up), gate_up_bias, DenseWeight(down), down_bias, None, limit, alpha
    )
    return _backend_for(x).experts(x, ids, weights, expert_weights)


@experts.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    limit: float,
    alpha: float,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("moe_surgery::experts_mxfp4", mutates_args=())
def experts_mxfp4(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    limit: float,
    alpha: float,
) -> Tensor:
    """`Backend.experts` over MXFP4 weights: [tokens, hidden] in x's dtype.

    As `experts`, with blocks uint8 [experts, rows, columns / 32, 16], scales uint8 [experts, rows,
    columns / 32]; rows are 2 * intermediate of gate_up and hidden of down.
    """
    expert_weights = ExpertWeights(
        Mxfp4Weight(gate_up_blocks, gate_up_scales),
        gate_up_bias,
        Mxfp4Weight(down_blocks, down_scales),
        down_bias,
        None,
        limit,
        alpha,
    )
    return _backend_for(x).experts(x, ids, weights, expert_weights)


@experts_mxfp4.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    limit: float,
    alpha: float,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("moe_surgery::experts_backward", mutates_args=())
def experts_backward(
    gradient: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    limit: float,
    alpha: float,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up, its bias, down and its bias, for `gradient` [tokens, hidden] of the result.

    Other arguments as `experts`. Without `dense` those of gate_up and down are empty tensors.
    """
    expert_weights = ExpertWeights(
        DenseWeight(gate_up), gate_up_bias, DenseWeight(down), down_bias, None, limit, alpha
    )
    g = _experts_backward(gradient, x, ids, weights, expert_weights, dense=dense)
    by_gate_up, by_down = (
        like.new_empty(0) if value is None else value
        for like, value in ((gate_up, g.gate_up), (down, g.down))
    )
    return g.x, g.weights, by_gate_up, g.gate_up_bias, by_down, g.down_bias


@experts_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    limit: float,
    alpha: float,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    by_gate_up, by_down = (torch.empty_like(t) if dense else t.new_empty(0) for t in (gate_up, down))
    by_bias, by_down_bias = torch.empty_like(gate_up_bias), torch.empty_like(down_bias)
    return torch.empty_like(x), torch.empty_like(weights), by_gate_up, by_bias, by_down, by_down_bias


@torch.library.custom_op("moe_surgery::experts_mxfp4_backward", mutates_args=())
def experts_mxfp4_backward(
    gradient: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    limit: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights and the two biases, for `gradient` [tokens, hidden] of the result of `experts_mxfp4`."""
    expert_weights = ExpertWeights(
        Mxfp4Weight(gate_up_blocks, gate_up_scales),
        gate_up_bias,
        Mxfp4Weight(down_blocks, down_scales),
        down_bias,
        None,
        limit,
        alpha,
    )
    g = _experts_backward(gradient, x, ids, weights, expert_weights)
    return g.x, g.weights, g.gate_up_bias, g.down_bias


@experts_mxfp4_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    limit: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t) for t in (x, weights, gate_up_bias, down_bias))  # type: ignore[return-value]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.limit, ctx.alpha = inputs
    ctx.save_for_backward(*tensors)


def _dense_gradients(ctx: Any, gradient: Tensor) -> Gradients:
    dense = ctx.needs_input_grad[3] or ctx.needs_input_grad[5]
    x, weights, gate_up, gate_up_bias, down, down_bias = experts_backward(
        gradient, *ctx.saved_tensors, ctx.limit, ctx.alpha, dense
    )
    weight_gradients = (gate_up, down) if dense else (None, None)
    return x, None, weights, weight_gradients[0], gate_up_bias, weight_gradients[1], down_bias, None, None


def _packed_gradients(ctx: Any, gradient: Tensor) -> Gradients:
    x, weights, gate_up_bias, down_bias = experts_mxfp4_backward(
        gradient, *ctx.saved_tensors, ctx.limit, ctx.alpha
    )
    return x, None, weights, None, None, gate_up_bias, None, None, down_bias, None, None


experts.register_autograd(_dense_gradients, setup_context=_keep_inputs)
experts_mxfp4.register_autograd(_packed_gradients, setup_context=_keep_inputs)
