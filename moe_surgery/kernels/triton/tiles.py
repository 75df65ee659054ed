"""Experts for many (token, slot) pairs: pairs sorted by expert, tiles of one expert's weights and tokens.

Weights are the M side of every product and tokens the N side: the tensor cores' granularity is 8 on N and
16 or more on M, and it is tokens that are few.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.kernels.triton.blocks import Blocks
from moe_surgery.kernels.triton.dispatch import Schedule
from moe_surgery.kernels.triton.launch import Launch, joined, next_power_of_two, workspace
from moe_surgery.kernels.triton.operands import Operand
from moe_surgery.kernels.triton.parts import decode, join_splits, product, stored_place, swiglu

__all__ = ["combine", "down_tiles", "gate_up_tiles"]


@triton.jit
def _rows_times_tokens(
    x, lines, lines_ok, data, scales, rows, rows_ok, step, acc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, MXFP4: tl.constexpr, GENERAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_R, BLOCK_N] + one step of the reduction; `lines` int64 [BLOCK_N] are rows of x."""
    column = step * BLOCK_K + tl.arange(0, BLOCK_K)
    column_ok = column < COLUMNS
    at = lines[:, None] * COLUMNS + column[None, :]
    tokens = tl.load(x + at, mask=lines_ok[:, None] & column_ok[None, :], other=0.0)  # [N, K]
    if MXFP4:
        GROUPS: tl.constexpr = COLUMNS // 32
        group = step * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        mask = rows_ok[:, None] & (group < GROUPS)[None, :]
        block = rows[:, None] * GROUPS + group[None, :]  # [R, G]
        scale = tl.load(scales + block, mask=mask, other=0)
        codes = tl.load(
            data + block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :], mask=mask[:, :, None], other=0
        )
        even, odd = decode(codes, scale[:, :, None], GENERAL)
        # Two products over half the reduction: interleaving the nibbles would only move registers about.
        pairs = tl.reshape(tokens, (BLOCK_N, BLOCK_K // 2, 2))
        tokens_even, tokens_odd = tl.split(pairs)
        acc = product(tl.reshape(even, (BLOCK_R, BLOCK_K // 2)), tl.trans(tokens_even), acc, WIDE)
        acc = product(tl.reshape(odd, (BLOCK_R, BLOCK_K // 2)), tl.trans(tokens_odd), acc, WIDE)
    else:
        mask = column_ok[:, None] & rows_ok[None, :]
        weight = tl.load(data + column[:, None] * ROWS + rows[None, :], mask=mask, other=0.0)  # [K, R]
        acc = product(tl.trans(weight), tl.trans(tokens), acc, WIDE)
    return acc


@triton.jit
def _gate_up_kernel(
    x, z, order, tiles, used, index, data, scales, bias, partial, counters,
    data_stride, scales_stride, bias_stride, limit, alpha,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr,
    MXFP4: tl.constexpr, GENERAL: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """z [assignments, UNITS], sorted by expert, of x [tokens, HIDDEN]; grid (tiles, pieces, SPLIT)."""
    tile = tl.program_id(0)
    if tile >= tl.load(used):
        return
    piece = tl.program_id(1)
    split = tl.program_id(2)
    place = stored_place(tl.load(tiles + tile * 3), index, INDEXED)
    position = tl.load(tiles + tile * 3 + 1).to(tl.int64) + tl.arange(0, BLOCK_N)
    lines_ok = tl.arange(0, BLOCK_N) < tl.load(tiles + tile * 3 + 2)
    lines = tl.load(order + position, mask=lines_ok, other=0).to(tl.int64) // TOP_K
    rows = piece * (2 * BLOCK_R) + tl.arange(0, 2 * BLOCK_R)
    rows_ok = rows < 2 * UNITS
    shift = tl.load(bias + place * bias_stride + rows, mask=rows_ok, other=0.0).to(tl.float32)
    acc = tl.zeros((2 * BLOCK_R, BLOCK_N), tl.float32)
    STEPS: tl.constexpr = (HIDDEN + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    for step in range(STEPS):
        acc = _rows_times_tokens(
            x, lines, lines_ok, data + place * data_stride, scales + place * scales_stride, rows, rows_ok,
            step * SPLIT + split, acc, 2 * UNITS, HIDDEN, 2 * BLOCK_R, BLOCK_N, BLOCK_K, MXFP4, GENERAL, WIDE,
        )  # fmt: skip
    last = True
    if SPLIT > 1:
        number = tile * tl.num_programs(1) + piece
        offsets = tl.arange(0, 2 * BLOCK_R)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        acc, last = join_splits(acc, offsets, partial, counters, number, split, 2 * BLOCK_R * BLOCK_N, SPLIT)
    acc += shift[:, None]
    gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_R, 2, BLOCK_N)), (0, 2, 1)))
    value = tl.trans(swiglu(gate, up, limit, alpha))  # [N, R], as z lies
    unit = piece * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = lines_ok[:, None] & (unit < UNITS)[None, :] & last
    tl.store(z + position[:, None] * UNITS + unit[None, :], value.to(z.dtype.element_ty), mask=mask)


@triton.jit
def _down_kernel(
    z, out, weights, order, tiles, used, index, data, scales, bias, partial, counters,
    data_stride, scales_stride, bias_stride,
    HIDDEN: tl.constexpr, UNITS: tl.constexpr,
    MXFP4: tl.constexpr, GENERAL: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out [assignments, HIDDEN] float32 with bias and routing weight; grid (tiles, pieces, SPLIT)."""
    tile = tl.program_id(0)
    if tile >= tl.load(used):
        return
    piece = tl.program_id(1)
    split = tl.program_id(2)
    place = stored_place(tl.load(tiles + tile * 3), index, INDEXED)
    position = tl.load(tiles + tile * 3 + 1).to(tl.int64) + tl.arange(0, BLOCK_N)
    lines_ok = tl.arange(0, BLOCK_N) < tl.load(tiles + tile * 3 + 2)
    assignment = tl.load(order + position, mask=lines_ok, other=0).to(tl.int64)
    share = tl.load(weights + assignment, mask=lines_ok, other=0.0).to(tl.float32)
    rows = piece * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_ok = rows < HIDDEN
    shift = tl.load(bias + place * bias_stride + rows, mask=rows_ok, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    STEPS: tl.constexpr = (UNITS + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    for step in range(STEPS):
        acc = _rows_times_tokens(
            z, position, lines_ok, data + place * data_stride, scales + place * scales_stride, rows, rows_ok,
            step * SPLIT + split, acc, HIDDEN, UNITS, BLOCK_R, BLOCK_N, BLOCK_K, MXFP4, GENERAL, WIDE,
        )  # fmt: skip
    last = True
    if SPLIT > 1:
        number = tile * tl.num_programs(1) + piece
        offsets = tl.arange(0, BLOCK_R)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        acc, last = join_splits(acc, offsets, partial, counters, number, split, BLOCK_R * BLOCK_N, SPLIT)
    value = tl.trans((acc + shift[:, None]) * share[None, :])  # [N, R]
    mask = lines_ok[:, None] & rows_ok[None, :] & last
    tl.store(out + assignment[:, None] * HIDDEN + rows[None, :], value, mask=mask)


@triton.jit
def _combine_kernel(parts, out, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """out [tokens, HIDDEN]: the sum of parts [tokens, TOP_K, HIDDEN] in slot order; grid (tokens, pieces)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < HIDDEN
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(TOP_K):
        total += tl.load(parts + (token * TOP_K + slot) * HIDDEN + column, mask=mask, other=0.0)
    tl.store(out + token * HIDDEN + column, total.to(out.dtype.element_ty), mask=mask)


def gate_up_tiles(
    x: Tensor, top_k: int, schedule: Schedule, index: Tensor | None, weight: Operand, z: Tensor,
    limit: float, alpha: float, blocks: Blocks, split: int, wide: bool,
) -> Launch:  # fmt: skip
    """z [assignments, intermediate], in the schedule's order, of x [tokens, hidden]."""
    units = z.shape[1]
    grid = (schedule.most_tiles, -(-units // blocks.rows), split)
    partial, counters = workspace(
        x.device, joined(split, grid[0] * grid[1], 2 * blocks.rows * schedule.tile_tokens)
    )
    arguments = _arguments(schedule, index, weight, blocks, split, wide)
    arguments.update(
        x=x, z=z, partial=partial, counters=counters, limit=limit, alpha=alpha,
        TOP_K=top_k, HIDDEN=weight.columns, UNITS=units,
    )  # fmt: skip
    return Launch(_gate_up_kernel, grid, arguments, blocks.warps, blocks.stages)


def down_tiles(
    z: Tensor, weights: Tensor, schedule: Schedule, index: Tensor | None, weight: Operand, out: Tensor,
    blocks: Blocks, split: int, wide: bool,
) -> Launch:  # fmt: skip
    """out float32 [assignments, hidden], in the order of ids, of z in the schedule's order."""
    grid = (schedule.most_tiles, -(-weight.rows // blocks.rows), split)
    partial, counters = workspace(
        z.device, joined(split, grid[0] * grid[1], blocks.rows * schedule.tile_tokens)
    )
    arguments = _arguments(schedule, index, weight, blocks, split, wide)
    arguments.update(
        z=z, out=out, weights=weights, partial=partial, counters=counters,
        HIDDEN=weight.rows, UNITS=weight.columns,
    )  # fmt: skip
    return Launch(_down_kernel, grid, arguments, blocks.warps, blocks.stages)


def combine(parts: Tensor, out: Tensor, top_k: int) -> Launch:
    """out [tokens, hidden]: each token's sum over parts float32 [tokens * top_k, hidden]."""
    tokens, hidden = out.shape
    block = min(1024, next_power_of_two(hidden))
    arguments = {"parts": parts, "out": out, "TOP_K": top_k, "HIDDEN": hidden, "BLOCK": block}
    return Launch(_combine_kernel, (tokens, -(-hidden // block), 1), arguments, 4, 2)


def _arguments(
    schedule: Schedule, index: Tensor | None, weight: Operand, blocks: Blocks, split: int, wide: bool
) -> dict[str, Any]:
    return {
        "order": schedule.order, "tiles": schedule.tiles, "used": schedule.used,
        "index": schedule.order if index is None else index, "INDEXED": index is not None, "WIDE": wide,
        "BLOCK_R": blocks.rows, "BLOCK_N": schedule.tile_tokens, "BLOCK_K": blocks.columns, "SPLIT": split,
        **weight.arguments(),
    }  # fmt: skip
