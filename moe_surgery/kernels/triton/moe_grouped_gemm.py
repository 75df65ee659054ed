"""Experts for many (token, slot) pairs: pairs sorted by expert, in tiles of one expert's weights and tokens.

Weights are the M side of every product and tokens the N side, because tokens are few: the tensor
cores' granularity is 8 on N and 16 or more on M.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.kernels.triton.dequant import dequantize_mxfp4, dot, reduce_split_k, stored_expert, swiglu
from moe_surgery.kernels.triton.launch import Launch, next_power_of_two, partial_size, workspace
from moe_surgery.kernels.triton.operands import Operand
from moe_surgery.kernels.triton.routing_metadata import RoutingMetadata
from moe_surgery.kernels.triton.tuning import Blocks

__all__ = ["combine", "down_grouped_gemm", "gate_up_grouped_gemm"]


@triton.jit
def _gemm_step(
    x, row_ids, row_ids_ok, data, scales, rows, rows_ok, step, acc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, MXFP4: tl.constexpr, ANY_E8M0: tl.constexpr, UPCAST_FP32: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + one step of the reduction; `row_ids` int64 [BLOCK_N] are rows of x."""
    column = step * BLOCK_K + tl.arange(0, BLOCK_K)
    column_ok = column < COLUMNS
    at = row_ids[:, None] * COLUMNS + column[None, :]
    tokens = tl.load(x + at, mask=row_ids_ok[:, None] & column_ok[None, :], other=0.0)  # [N, K]
    if MXFP4:
        GROUPS: tl.constexpr = COLUMNS // 32
        group = step * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        mask = rows_ok[:, None] & (group < GROUPS)[None, :]
        block = rows[:, None] * GROUPS + group[None, :]  # [M, G]
        scale = tl.load(scales + block, mask=mask, other=0)
        codes = tl.load(
            data + block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :], mask=mask[:, :, None], other=0
        )
        even, odd = dequantize_mxfp4(codes, scale[:, :, None], ANY_E8M0)
        # Two products over half the reduction: interleaving the nibbles would only cost register moves.
        pairs = tl.reshape(tokens, (BLOCK_N, BLOCK_K // 2, 2))
        tokens_even, tokens_odd = tl.split(pairs)
        acc = dot(tl.reshape(even, (BLOCK_M, BLOCK_K // 2)), tl.trans(tokens_even), acc, UPCAST_FP32)
        acc = dot(tl.reshape(odd, (BLOCK_M, BLOCK_K // 2)), tl.trans(tokens_odd), acc, UPCAST_FP32)
    else:
        mask = column_ok[:, None] & rows_ok[None, :]
        weight = tl.load(data + column[:, None] * ROWS + rows[None, :], mask=mask, other=0.0)  # [K, M]
        acc = dot(tl.trans(weight), tl.trans(tokens), acc, UPCAST_FP32)
    return acc


@triton.jit
def _gate_up_grouped_gemm_kernel(
    x, z, sorted_token_ids, tiles, num_tiles, expert_map, data, scales, bias, partial, counters,
    data_stride, scales_stride, bias_stride, limit, alpha,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
    MXFP4: tl.constexpr, ANY_E8M0: tl.constexpr, HAS_EXPERT_MAP: tl.constexpr, UPCAST_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """z [assignments, INTERMEDIATE], sorted by expert, of x [tokens, HIDDEN]; grid (tiles, blocks of rows, SPLIT_K)."""
    tile = tl.program_id(0)
    if tile >= tl.load(num_tiles):
        return
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    expert = stored_expert(tl.load(tiles + tile * 3), expert_map, HAS_EXPERT_MAP)
    position = tl.load(tiles + tile * 3 + 1).to(tl.int64) + tl.arange(0, BLOCK_N)
    row_ids_ok = tl.arange(0, BLOCK_N) < tl.load(tiles + tile * 3 + 2)
    row_ids = tl.load(sorted_token_ids + position, mask=row_ids_ok, other=0).to(tl.int64) // TOP_K
    rows = pid_m * (2 * BLOCK_M) + tl.arange(0, 2 * BLOCK_M)
    rows_ok = rows < 2 * INTERMEDIATE
    row_bias = tl.load(bias + expert * bias_stride + rows, mask=rows_ok, other=0.0).to(tl.float32)
    acc = tl.zeros((2 * BLOCK_M, BLOCK_N), tl.float32)
    STEPS: tl.constexpr = (HIDDEN + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    for step in range(STEPS):
        acc = _gemm_step(
            x, row_ids, row_ids_ok, data + expert * data_stride, scales + expert * scales_stride,
            rows, rows_ok, step * SPLIT_K + pid_k, acc, 2 * INTERMEDIATE, HIDDEN, 2 * BLOCK_M, BLOCK_N, BLOCK_K,
            MXFP4, ANY_E8M0, UPCAST_FP32,
        )  # fmt: skip
    last = True
    if SPLIT_K > 1:
        number = tile * tl.num_programs(1) + pid_m
        offsets = tl.arange(0, 2 * BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        acc, last = reduce_split_k(
            acc, offsets, partial, counters, number, pid_k, 2 * BLOCK_M * BLOCK_N, SPLIT_K
        )
    acc += row_bias[:, None]
    gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    value = tl.trans(swiglu(gate, up, limit, alpha))  # [N, M], z's layout
    column = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = row_ids_ok[:, None] & (column < INTERMEDIATE)[None, :] & last
    tl.store(z + position[:, None] * INTERMEDIATE + column[None, :], value.to(z.dtype.element_ty), mask=mask)


@triton.jit
def _down_grouped_gemm_kernel(
    z, out, weights, sorted_token_ids, tiles, num_tiles, expert_map, data, scales, bias, partial, counters,
    data_stride, scales_stride, bias_stride,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
    MXFP4: tl.constexpr, ANY_E8M0: tl.constexpr, HAS_EXPERT_MAP: tl.constexpr, UPCAST_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """out [assignments, HIDDEN] float32 with bias and routing weight; grid (tiles, blocks of rows, SPLIT_K)."""
    tile = tl.program_id(0)
    if tile >= tl.load(num_tiles):
        return
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    expert = stored_expert(tl.load(tiles + tile * 3), expert_map, HAS_EXPERT_MAP)
    position = tl.load(tiles + tile * 3 + 1).to(tl.int64) + tl.arange(0, BLOCK_N)
    row_ids_ok = tl.arange(0, BLOCK_N) < tl.load(tiles + tile * 3 + 2)
    assignment = tl.load(sorted_token_ids + position, mask=row_ids_ok, other=0).to(tl.int64)
    routing_weight = tl.load(weights + assignment, mask=row_ids_ok, other=0.0).to(tl.float32)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < HIDDEN
    row_bias = tl.load(bias + expert * bias_stride + rows, mask=rows_ok, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    STEPS: tl.constexpr = (INTERMEDIATE + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    for step in range(STEPS):
        acc = _gemm_step(
            z, position, row_ids_ok, data + expert * data_stride, scales + expert * scales_stride,
            rows, rows_ok, step * SPLIT_K + pid_k, acc, HIDDEN, INTERMEDIATE, BLOCK_M, BLOCK_N, BLOCK_K,
            MXFP4, ANY_E8M0, UPCAST_FP32,
        )  # fmt: skip
    last = True
    if SPLIT_K > 1:
        number = tile * tl.num_programs(1) + pid_m
        offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        acc, last = reduce_split_k(acc, offsets, partial, counters, number, pid_k, BLOCK_M * BLOCK_N, SPLIT_K)
    value = tl.trans((acc + row_bias[:, None]) * routing_weight[None, :])  # [N, M]
    mask = row_ids_ok[:, None] & rows_ok[None, :] & last
    tl.store(out + assignment[:, None] * HIDDEN + rows[None, :], value, mask=mask)


@triton.jit
def _combine_kernel(parts, out, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """out [tokens, HIDDEN]: the sum of parts [tokens, TOP_K, HIDDEN] in slot order; grid (tokens, columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < HIDDEN
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(TOP_K):
        total += tl.load(parts + (token * TOP_K + slot) * HIDDEN + column, mask=mask, other=0.0)
    tl.store(out + token * HIDDEN + column, total.to(out.dtype.element_ty), mask=mask)


def gate_up_grouped_gemm(
    x: Tensor, top_k: int, routing: RoutingMetadata, expert_map: Tensor | None, weight: Operand, z: Tensor,
    limit: float, alpha: float, blocks: Blocks, split_k: int, upcast_fp32: bool,
) -> Launch:  # fmt: skip
    """z [assignments, intermediate], in the routing's order, of x [tokens, hidden]."""
    intermediate = z.shape[1]
    grid = (routing.max_tiles, -(-intermediate // blocks.block_m), split_k)
    partial, counters = workspace(
        x.device, partial_size(split_k, grid[0] * grid[1], 2 * blocks.block_m * routing.block_n)
    )
    arguments = _arguments(routing, expert_map, weight, blocks, split_k, upcast_fp32)
    arguments.update(
        x=x, z=z, partial=partial, counters=counters, limit=limit, alpha=alpha,
        TOP_K=top_k, HIDDEN=weight.columns, INTERMEDIATE=intermediate,
    )  # fmt: skip
    return Launch(_gate_up_grouped_gemm_kernel, grid, arguments, blocks.num_warps, blocks.num_stages)


def down_grouped_gemm(
    z: Tensor, weights: Tensor, routing: RoutingMetadata, expert_map: Tensor | None, weight: Operand, out: Tensor,
    blocks: Blocks, split_k: int, upcast_fp32: bool,
) -> Launch:  # fmt: skip
    """out float32 [assignments, hidden], in the order of ids, of z in the routing's order."""
    grid = (routing.max_tiles, -(-weight.rows // blocks.block_m), split_k)
    partial, counters = workspace(
        z.device, partial_size(split_k, grid[0] * grid[1], blocks.block_m * routing.block_n)
    )
    arguments = _arguments(routing, expert_map, weight, blocks, split_k, upcast_fp32)
    arguments.update(
        z=z, out=out, weights=weights, partial=partial, counters=counters,
        HIDDEN=weight.rows, INTERMEDIATE=weight.columns,
    )  # fmt: skip
    return Launch(_down_grouped_gemm_kernel, grid, arguments, blocks.num_warps, blocks.num_stages)


def combine(parts: Tensor, out: Tensor, top_k: int) -> Launch:
    """out [tokens, hidden]: each token's sum over parts float32 [tokens * top_k, hidden]."""
    tokens, hidden = out.shape
    block = min(1024, next_power_of_two(hidden))
    arguments = {"parts": parts, "out": out, "TOP_K": top_k, "HIDDEN": hidden, "BLOCK": block}
    return Launch(_combine_kernel, (tokens, -(-hidden // block), 1), arguments, 4, 2)


def _arguments(
    routing: RoutingMetadata,
    expert_map: Tensor | None,
    weight: Operand,
    blocks: Blocks,
    split_k: int,
    upcast_fp32: bool,
) -> dict[str, Any]:
    return {
        "sorted_token_ids": routing.sorted_token_ids, "tiles": routing.tiles, "num_tiles": routing.num_tiles,
        "expert_map": routing.sorted_token_ids if expert_map is None else expert_map,
        "HAS_EXPERT_MAP": expert_map is not None, "UPCAST_FP32": upcast_fp32,
        "BLOCK_M": blocks.block_m, "BLOCK_N": routing.block_n, "BLOCK_K": blocks.block_k, "SPLIT_K": split_k,
        **weight.arguments(),
    }  # fmt: skip
