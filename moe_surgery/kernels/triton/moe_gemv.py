"""Experts for few (token, slot) pairs: one program per pair and block of rows, no sorting, two launches.

Each program multiplies its weight rows by one token's vector. Tensor cores do not help at one token, so this
is float32 multiply-add on weights decoded in registers.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.kernels.triton.dequant import dequantize_mxfp4, reduce_split_k, stored_expert, swiglu
from moe_surgery.kernels.triton.launch import Launch, partial_size, workspace
from moe_surgery.kernels.triton.operands import Operand
from moe_surgery.kernels.triton.tuning import Blocks

__all__ = ["down_gemv", "gate_up_gemv"]


@triton.jit
def _gemv_step(
    x, data, scales, rows, rows_ok, step, factor, acc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    MXFP4: tl.constexpr, ANY_E8M0: tl.constexpr,
):  # fmt: skip
    """acc + one step of the reduction, one sum per lane: [M, BLOCK_K/32] for MXFP4, else [BLOCK_K, M].

    `factor` multiplies x; `step` past the end adds nothing.
    """
    if MXFP4:
        GROUPS: tl.constexpr = COLUMNS // 32
        group = step * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        group_ok = group < GROUPS
        mask = rows_ok[:, None] & group_ok[None, :]
        at = rows[:, None] * GROUPS + group[None, :]  # [M, G]
        scale = tl.load(scales + at, mask=mask, other=0)
        codes = tl.load(
            data + at[:, :, None] * 16 + tl.arange(0, 16)[None, None, :], mask=mask[:, :, None], other=0
        )
        values = tl.load(
            x + group[:, None] * 32 + tl.arange(0, 32)[None, :], mask=group_ok[:, None], other=0.0
        )
        pairs = tl.reshape(values.to(tl.float32) * factor, (BLOCK_K // 32, 16, 2))
        x_even, x_odd = tl.split(pairs)  # [G, 16]: value 2j meets the low nibble of byte j
        even, odd = dequantize_mxfp4(codes, scale[:, :, None], ANY_E8M0)
        acc += tl.sum(even * x_even[None, :, :] + odd * x_odd[None, :, :], axis=2)
    else:
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)
        column_ok = column < COLUMNS
        mask = column_ok[:, None] & rows_ok[None, :]
        weight = tl.load(data + column[:, None] * ROWS + rows[None, :], mask=mask, other=0.0)
        values = tl.load(x + column, mask=column_ok, other=0.0).to(tl.float32) * factor
        acc += weight.to(tl.float32) * values[:, None]
    return acc


@triton.jit
def _gate_up_gemv_kernel(
    x, z, ids, expert_map, data, scales, bias, partial, counters,
    data_stride, scales_stride, bias_stride, limit, alpha,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
    MXFP4: tl.constexpr, ANY_E8M0: tl.constexpr, HAS_EXPERT_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """z [pairs, INTERMEDIATE] from x [tokens, HIDDEN]; grid (pairs, blocks of columns, SPLIT_K)."""
    pair = tl.program_id(0).to(tl.int64)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    expert = stored_expert(tl.load(ids + pair), expert_map, HAS_EXPERT_MAP)
    rows = pid_m * (2 * BLOCK_M) + tl.arange(0, 2 * BLOCK_M)
    rows_ok = rows < 2 * INTERMEDIATE
    row_bias = tl.load(bias + expert * bias_stride + rows, mask=rows_ok, other=0.0).to(tl.float32)
    vector = x + (pair // TOP_K) * HIDDEN
    STEPS: tl.constexpr = (HIDDEN + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    acc = (
        tl.zeros((2 * BLOCK_M, BLOCK_K // 32), tl.float32)
        if MXFP4
        else tl.zeros((BLOCK_K, 2 * BLOCK_M), tl.float32)
    )
    for step in range(STEPS):
        acc = _gemv_step(
            vector, data + expert * data_stride, scales + expert * scales_stride, rows, rows_ok,
            step * SPLIT_K + pid_k, 1.0, acc, 2 * INTERMEDIATE, HIDDEN, BLOCK_K, MXFP4, ANY_E8M0,
        )  # fmt: skip
    h = tl.sum(acc, axis=1 if MXFP4 else 0)
    last = True
    if SPLIT_K > 1:
        tile = (pair * tl.num_programs(1) + pid_m).to(tl.int32)
        offsets = tl.arange(0, 2 * BLOCK_M)
        h, last = reduce_split_k(h, offsets, partial, counters, tile, pid_k, 2 * BLOCK_M, SPLIT_K)
    gate, up = tl.split(tl.reshape(h + row_bias, (BLOCK_M, 2)))
    column = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    value = swiglu(gate, up, limit, alpha)
    tl.store(
        z + pair * INTERMEDIATE + column, value.to(z.dtype.element_ty), mask=(column < INTERMEDIATE) & last
    )


@triton.jit
def _down_gemv_kernel(
    z, out, ids, weights, expert_map, data, scales, bias, partial, counters,
    data_stride, scales_stride, bias_stride,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
    MXFP4: tl.constexpr, ANY_E8M0: tl.constexpr, HAS_EXPERT_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out [tokens, HIDDEN], the weighted sum over a token's slots; grid (tokens, blocks of rows, SPLIT_K).

    The slots form a single reduction of TOP_K * INTERMEDIATE, which SPLIT_K divides.
    """
    token = tl.program_id(0).to(tl.int64)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < HIDDEN
    # Program pid_k 0 adds the biases, loaded before the long loop.
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, TOP_K, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        slot_ok = (slot < TOP_K) & (pid_k == 0)
        chosen = tl.load(ids + token * TOP_K + slot, mask=slot_ok, other=0).to(tl.int64)
        if HAS_EXPERT_MAP:
            chosen = tl.load(expert_map + chosen, mask=slot_ok, other=0).to(tl.int64)
        routing_weight = tl.load(weights + token * TOP_K + slot, mask=slot_ok, other=0.0).to(tl.float32)
        mask = rows_ok[:, None] & slot_ok[None, :]
        row_bias = tl.load(bias + chosen[None, :] * bias_stride + rows[:, None], mask=mask, other=0.0)
        total += tl.sum(row_bias.to(tl.float32) * routing_weight[None, :], axis=1)
    STEPS_A_SLOT: tl.constexpr = (INTERMEDIATE + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (TOP_K * STEPS_A_SLOT + SPLIT_K - 1) // SPLIT_K
    acc = (
        tl.zeros((BLOCK_M, BLOCK_K // 32), tl.float32) if MXFP4 else tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    )
    for i in range(STEPS):
        step = pid_k * STEPS + i
        # Steps past the end go past the end of the last slot, where everything is masked.
        slot = tl.minimum(step // STEPS_A_SLOT, TOP_K - 1)
        pair = token * TOP_K + slot
        expert = stored_expert(tl.load(ids + pair), expert_map, HAS_EXPERT_MAP)
        routing_weight = tl.load(weights + pair).to(tl.float32)
        acc = _gemv_step(
            z + pair * INTERMEDIATE, data + expert * data_stride, scales + expert * scales_stride, rows, rows_ok,
            step - slot * STEPS_A_SLOT, routing_weight, acc, HIDDEN, INTERMEDIATE, BLOCK_K, MXFP4, ANY_E8M0,
        )  # fmt: skip
    total += tl.sum(acc, axis=1 if MXFP4 else 0)
    last = True
    if SPLIT_K > 1:
        tile = (token * tl.num_programs(1) + pid_m).to(tl.int32)
        offsets = tl.arange(0, BLOCK_M)
        total, last = reduce_split_k(total, offsets, partial, counters, tile, pid_k, BLOCK_M, SPLIT_K)
    tl.store(out + token * HIDDEN + rows, total.to(out.dtype.element_ty), mask=rows_ok & last)


def gate_up_gemv(
    x: Tensor, ids: Tensor, expert_map: Tensor | None, weight: Operand, z: Tensor, limit: float, alpha: float,
    blocks: Blocks, split_k: int,
) -> Launch:  # fmt: skip
    """z [tokens * top_k, intermediate] of x [tokens, hidden] and ids [tokens, top_k]: gate_up and SwiGLU."""
    pairs, intermediate = z.shape
    num_pid_m = -(-intermediate // blocks.block_m)
    partial, counters = workspace(x.device, partial_size(split_k, pairs * num_pid_m, 2 * blocks.block_m))
    arguments: dict[str, Any] = {
        "x": x, "z": z, "ids": ids, "expert_map": ids if expert_map is None else expert_map,
        "partial": partial, "counters": counters, "limit": limit, "alpha": alpha,
        "TOP_K": ids.shape[1], "HIDDEN": weight.columns, "INTERMEDIATE": intermediate,
        "HAS_EXPERT_MAP": expert_map is not None,
        "BLOCK_M": blocks.block_m, "BLOCK_K": blocks.block_k, "SPLIT_K": split_k,
    }  # fmt: skip
    arguments.update(weight.arguments())
    return Launch(
        _gate_up_gemv_kernel, (pairs, num_pid_m, split_k), arguments, blocks.num_warps, blocks.num_stages
    )


def down_gemv(
    z: Tensor, ids: Tensor, weights: Tensor, expert_map: Tensor | None, weight: Operand, out: Tensor,
    blocks: Blocks, split_k: int,
) -> Launch:  # fmt: skip
    """out [tokens, hidden] of z [tokens * top_k, intermediate], ids and weights [tokens, top_k]."""
    tokens, top_k = ids.shape
    num_pid_m = -(-weight.rows // blocks.block_m)
    partial, counters = workspace(z.device, partial_size(split_k, tokens * num_pid_m, blocks.block_m))
    arguments: dict[str, Any] = {
        "z": z, "out": out, "ids": ids, "weights": weights,
        "expert_map": ids if expert_map is None else expert_map,
        "partial": partial, "counters": counters,
        "TOP_K": top_k, "HIDDEN": weight.rows, "INTERMEDIATE": weight.columns,
        "HAS_EXPERT_MAP": expert_map is not None,
        "BLOCK_M": blocks.block_m, "BLOCK_K": blocks.block_k, "SPLIT_K": split_k,
        "CHUNK": min(16, 1 << (top_k - 1).bit_length()),
    }  # fmt: skip
    arguments.update(weight.arguments())
    return Launch(
        _down_gemv_kernel, (tokens, num_pid_m, split_k), arguments, blocks.num_warps, blocks.num_stages
    )
