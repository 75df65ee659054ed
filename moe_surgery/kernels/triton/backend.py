"""The Triton backend: the launches of each operation, with their arguments checked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.kernels.interface import DecoderModel, KVCache
from moe_surgery.kernels.reference.dense import TorchDense
from moe_surgery.kernels.weights import ExpertWeights, Layer

if TYPE_CHECKING:  # triton is imported only once it is known to be installed
    from moe_surgery.kernels.triton.decode.step import DecodeStep
    from moe_surgery.kernels.triton.launch import Launch

__all__ = ["TritonBackend"]

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonBackend(TorchDense):
    """See `moe_surgery.kernels.interface.Backend`.

    For CUDA tensors, or CPU tensors where Triton interprets (TRITON_INTERPRET=1). At one token a layer is
    three launches: route, gate_up, down. The rest runs in PyTorch; the captured decode step has kernels for it
    too (`kernels.triton.decode`). The constructor raises UsageError where `availability` returns a reason,
    operations do for tensors they do not support. Launches on one stream must not overlap.
    """

    name = "triton"
    reads_q8_0 = False  # loading refuses `dense` q8_0

    def __init__(self) -> None:
        from moe_surgery.kernels.triton import availability

        reason = availability()
        if reason is not None:
            raise UsageError(f"`backend` triton: {reason}; choose `backend` reference")

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        ids = torch.empty((len(x), top_k), dtype=torch.int64, device=x.device)
        weights = torch.empty((len(x), top_k), dtype=x.dtype, device=x.device)
        for launch in route_launches(x, weight, bias, top_k, ids, weights):
            launch.run()
        return ids, weights

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for launch in experts_launches(x, ids, weights, expert_weights, out):
            launch.run()
        return out

    def prepare_layer(self, layer: Layer) -> Layer:
        from moe_surgery.kernels.triton.decode.qkv_weights import join_qkv

        return join_qkv(layer)

    def decode_step(self, model: DecoderModel, cache: KVCache) -> DecodeStep | None:
        """A captured CUDA graph of the kernels in `kernels.triton.decode`."""
        from moe_surgery.kernels.triton.decode.step import DecodeStep

        if (reason := DecodeStep.unavailable(model, cache)) is not None:
            log.debug("no captured decode step: %s", reason)
            return None
        return DecodeStep(model, cache)


def route_launches(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, ids: Tensor, weights: Tensor
) -> list[Launch]:
    """The one launch that fills ids int64 and weights [tokens, top_k]; none for no tokens."""
    from moe_surgery.kernels.triton.route import route
    from moe_surgery.kernels.triton.tuning import get_device_props

    _check("x", x, (None, weight.shape[1]), x.device, DTYPES)
    _check("the router's weight", weight, (None, None), x.device, DTYPES)
    _check("the router's bias", bias, (weight.shape[0],), x.device, DTYPES)
    if not len(x):
        return []
    return [
        route(
            x.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            top_k,
            ids,
            weights,
            get_device_props(x.device),
            _needs_fp32(x, weight.dtype),
        )
    ]


def experts_launches(
    x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights, out: Tensor
) -> list[Launch]:
    """The launches that fill out [tokens, hidden]: two at few tokens, else four, or five beyond 1024 pairs."""
    from moe_surgery.kernels.triton import moe_gemv, moe_grouped_gemm, routing_metadata
    from moe_surgery.kernels.triton.operands import operand
    from moe_surgery.kernels.triton.tuning import (
        block_n_for,
        blocks_for,
        get_device_props,
        split_k_for,
        use_gemv,
    )

    gate_up = operand(expert_weights.gate_up, expert_weights.gate_up_bias, "gate_up")
    down = operand(expert_weights.down, expert_weights.down_bias, "down")
    expert_map = expert_weights.expert_map
    tokens, hidden = x.shape
    top_k = ids.shape[1]
    pairs = tokens * top_k
    intermediate = down.columns
    if (gate_up.rows, gate_up.columns, down.rows) != (2 * intermediate, hidden, hidden):
        raise UsageError(
            f"triton backend: x has {hidden} columns, gate_up is {gate_up.columns} -> {gate_up.rows}, "
            f"down {intermediate} -> {down.rows}"
        )
    _check("x", x, (None, hidden), x.device, DTYPES)
    _check("ids", ids, (tokens, top_k), x.device, (torch.int64, torch.int32))
    _check("weights", weights, (tokens, top_k), x.device, DTYPES)
    for tensor in (gate_up.data, gate_up.bias, down.data, down.bias):
        _check("an expert weight", tensor, (None,) * tensor.dim(), x.device)
    if expert_map is not None:
        _check("expert_map", expert_map, (None,), x.device, (torch.int64, torch.int32))
        expert_map = expert_map.contiguous()
    if not pairs:
        out.zero_()
        return []
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    experts = gate_up.data.shape[0] if expert_map is None else len(expert_map)
    device_props = get_device_props(x.device)
    arch, multiprocessors = device_props.arch, device_props.multiprocessors
    z = torch.empty((pairs, intermediate), dtype=x.dtype, device=x.device)
    limit, alpha = expert_weights.limit, expert_weights.alpha

    if use_gemv(tokens, top_k, experts):
        up_blocks = blocks_for(arch, "gate_up", gate_up.mxfp4)
        down_blocks = blocks_for(arch, "down", down.mxfp4)
        up_split_k = split_k_for(
            pairs * -(-intermediate // up_blocks.block_m), -(-hidden // up_blocks.block_k), multiprocessors
        )
        down_split_k = split_k_for(
            tokens * -(-hidden // down_blocks.block_m),
            top_k * -(-intermediate // down_blocks.block_k),
            multiprocessors,
        )
        return [
            moe_gemv.gate_up_gemv(x, ids, expert_map, gate_up, z, limit, alpha, up_blocks, up_split_k),
            moe_gemv.down_gemv(z, ids, weights, expert_map, down, out, down_blocks, down_split_k),
        ]

    block_n = block_n_for(pairs, experts)
    routing = routing_metadata.empty_routing(pairs, experts, block_n, x.device)
    parts = torch.empty((pairs, hidden), dtype=torch.float32, device=x.device)
    up_fp32, down_fp32 = _needs_fp32(x, gate_up.data.dtype), _needs_fp32(x, down.data.dtype)
    up_blocks = blocks_for(arch, "gate_up", gate_up.mxfp4, block_n, up_fp32)
    down_blocks = blocks_for(arch, "down", down.mxfp4, block_n, down_fp32)
    up_split_k = split_k_for(
        routing.max_tiles * -(-intermediate // up_blocks.block_m),
        -(-hidden // up_blocks.block_k),
        multiprocessors,
    )
    down_split_k = split_k_for(
        routing.max_tiles * -(-hidden // down_blocks.block_m),
        -(-intermediate // down_blocks.block_k),
        multiprocessors,
    )
    return [
        *routing_metadata.routing_launches(ids, experts, routing),
        moe_grouped_gemm.gate_up_grouped_gemm(
            x, top_k, routing, expert_map, gate_up, z, limit, alpha, up_blocks, up_split_k, up_fp32
        ),
        moe_grouped_gemm.down_grouped_gemm(
            z, weights, routing, expert_map, down, parts, down_blocks, down_split_k, down_fp32
        ),
        moe_grouped_gemm.combine(parts, out, top_k),
    ]


def _needs_fp32(x: Tensor, weight: torch.dtype) -> bool:
    """Whether products need float32: BF16 tensor cores are exact only for BF16 and MXFP4 operands."""
    from moe_surgery.kernels.triton.launch import interpreting

    return interpreting() or x.dtype != torch.bfloat16 or weight not in (torch.bfloat16, torch.uint8)


def _check(
    what: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Raise UsageError unless `tensor` has `shape` (None is any length), `device` and one of `dtypes`."""
    from moe_surgery.kernels.triton.launch import interpreting

    matches = [wanted in (None, length) for wanted, length in zip(shape, tensor.shape, strict=False)]
    if tensor.dim() != len(shape) or not all(matches):
        raise UsageError(f"triton backend: {what} has shape {tuple(tensor.shape)}, needed {shape}")
    if tensor.device != device:
        raise UsageError(f"triton backend: {what} is on {tensor.device}, x on {device}")
    if tensor.device.type not in ("cuda", "meta") and not interpreting():
        raise UsageError(f"triton backend: {what} is on {tensor.device}, not on a CUDA device")
    if dtypes is not None and tensor.dtype not in dtypes:
        raise UsageError(
            f"triton backend: {what} is {tensor.dtype}, needed one of {', '.join(map(str, dtypes))}"
        )
