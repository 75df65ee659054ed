"""The MoE operations as torch.library operators, opaque to torch.compile.

Importing this module defines `moe_surgery::route`, `moe_surgery::experts` (dense weights) and
`moe_surgery::experts_mxfp4` (packed ones). They are for inference and have no backward pass.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from moe_surgery.kernels import Backend, select_backend
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight

__all__ = ["backend_of", "experts", "experts_mxfp4", "route"]

log = logging.getLogger("moe_surgery")


@lru_cache(maxsize=8)
def backend_of(device_type: str) -> Backend:
    """The backend for tensors on `device_type`: triton on CUDA and native on the CPU if they work, else
    reference.

    The first call logs the choice to `moe_surgery` (`select_backend` logs why it is reference).
    """
    chosen = select_backend(torch.device(device_type))
    log.info("experts on %s: %s backend", device_type, chosen.name)
    return chosen


@torch.library.custom_op("moe_surgery::route", mutates_args=())
def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`Backend.route`: ids int64 [tokens, top_k] and weights [tokens, top_k] in x's dtype.

    x [tokens, hidden], weight [experts, hidden], bias [experts].
    """
    ids, weights = backend_of(x.device.type).route(x, weight, bias, top_k)
    # May be views of a longer sort; an operator must return new memory.
    return ids.contiguous(), weights.contiguous()


@route.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape)


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
    return backend_of(x.device.type).experts(x, ids, weights, expert_weights)


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
    return backend_of(x.device.type).experts(x, ids, weights, expert_weights)


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
