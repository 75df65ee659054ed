"""Experts for few (token, slot) pairs: a program per pair and piece of rows, no sorting, two launches.

Each program multiplies its weight rows by one token's vector. The tensor cores would have nothing to do
at one token, so this is float32 multiply-add on weights decoded in registers.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.kernels.triton.blocks import Blocks
from moe_surgery.kernels.triton.launch import Launch, joined, workspace
from moe_surgery.kernels.triton.operands import Operand
from moe_surgery.kernels.triton.parts import decode, join_splits, stored_place, swiglu

__all__ = ["down_slots", "gate_up_slots"]


@triton.jit
def _rows_times_vector(
    x, data, scales, rows, rows_ok, step, factor, acc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    MXFP4: tl.constexpr, GENERAL: tl.constexpr,
):  # fmt: skip
    """acc + one step of the reduction, kept apart by lane: [R, BLOCK_K/32] for MXFP4, else [BLOCK_K, R].

    `factor` multiplies x; `step` past the end adds nothing.
    """
    if MXFP4:
        GROUPS: tl.constexpr = COLUMNS // 32
        group = step * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        group_ok = group < GROUPS
        mask = rows_ok[:, None] & group_ok[None, :]
        at = rows[:, None] * GROUPS + group[None, :]  # [R, G]
        scale = tl.load(scales + at, mask=mask, other=0)
        codes = tl.load(
            data + at[:, :, None] * 16 + tl.arange(0, 16)[None, None, :], mask=mask[:, :, None], other=0
        )
        values = tl.load(
            x + group[:, None] * 32 + tl.arange(0, 32)[None, :], mask=group_ok[:, None], other=0.0
        )
        pairs = tl.reshape(values.to(tl.float32) * factor, (BLOCK_K // 32, 16, 2))
        x_even, x_odd = tl.split(pairs)  # [G, 16]: value 2j meets the low nibble of byte j
        even, odd = decode(codes, scale[:, :, None], GENERAL)
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
def _gate_up_kernel(
    x, z, ids, index, data, scales, bias, partial, counters,
    data_stride, scales_stride, bias_stride, limit, alpha,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr,
    MXFP4: tl.constexpr, GENERAL: tl.constexpr, INDEXED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """z [pairs, UNITS] from x [tokens, HIDDEN]; grid (pairs, pieces of units, SPLIT)."""
    pair = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    split = tl.program_id(2)
    place = stored_place(tl.load(ids + pair), index, INDEXED)
    rows = piece * (2 * BLOCK_R) + tl.arange(0, 2 * BLOCK_R)
    rows_ok = rows < 2 * UNITS
    shift = tl.load(bias + place * bias_stride + rows, mask=rows_ok, other=0.0).to(tl.float32)
    vector = x + (pair // TOP_K) * HIDDEN
    STEPS: tl.constexpr = (HIDDEN + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    acc = (
        tl.zeros((2 * BLOCK_R, BLOCK_K // 32), tl.float32)
        if MXFP4
        else tl.zeros((BLOCK_K, 2 * BLOCK_R), tl.float32)
    )
    for step in range(STEPS):
        acc = _rows_times_vector(
            vector, data + place * data_stride, scales + place * scales_stride, rows, rows_ok,
            step * SPLIT + split, 1.0, acc, 2 * UNITS, HIDDEN, BLOCK_K, MXFP4, GENERAL,
        )  # fmt: skip
    h = tl.sum(acc, axis=1 if MXFP4 else 0)
    last = True
    if SPLIT > 1:
        tile = (pair * tl.num_programs(1) + piece).to(tl.int32)
        offsets = tl.arange(0, 2 * BLOCK_R)
        h, last = join_splits(h, offsets, partial, counters, tile, split, 2 * BLOCK_R, SPLIT)
    gate, up = tl.split(tl.reshape(h + shift, (BLOCK_R, 2)))
    unit = piece * BLOCK_R + tl.arange(0, BLOCK_R)
    value = swiglu(gate, up, limit, alpha)
    tl.store(z + pair * UNITS + unit, value.to(z.dtype.element_ty), mask=(unit < UNITS) & last)


@triton.jit
def _down_kernel(
    z, out, ids, weights, index, data, scales, bias, partial, counters,
    data_stride, scales_stride, bias_stride,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr,
    MXFP4: tl.constexpr, GENERAL: tl.constexpr, INDEXED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out [tokens, HIDDEN], the weighted sum over a token's slots; grid (tokens, pieces of rows, SPLIT).

    The slots lie one after the other in a single reduction of TOP_K * UNITS, which SPLIT cuts.
    """
    token = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    split = tl.program_id(2)
    rows = piece * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_ok = rows < HIDDEN
    # The biases are a part of split 0, loaded before the long loop.
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, TOP_K, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        slot_ok = (slot < TOP_K) & (split == 0)
        chosen = tl.load(ids + token * TOP_K + slot, mask=slot_ok, other=0).to(tl.int64)
        if INDEXED:
            chosen = tl.load(index + chosen, mask=slot_ok, other=0).to(tl.int64)
        share = tl.load(weights + token * TOP_K + slot, mask=slot_ok, other=0.0).to(tl.float32)
        mask = rows_ok[:, None] & slot_ok[None, :]
        shift = tl.load(bias + chosen[None, :] * bias_stride + rows[:, None], mask=mask, other=0.0)
        total += tl.sum(shift.to(tl.float32) * share[None, :], axis=1)
    STEPS_A_SLOT: tl.constexpr = (UNITS + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (TOP_K * STEPS_A_SLOT + SPLIT - 1) // SPLIT
    acc = (
        tl.zeros((BLOCK_R, BLOCK_K // 32), tl.float32) if MXFP4 else tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    )
    for i in range(STEPS):
        step = split * STEPS + i
        # Steps past the end are sent past the end of the last slot, where everything is masked.
        slot = tl.minimum(step // STEPS_A_SLOT, TOP_K - 1)
        pair = token * TOP_K + slot
        place = stored_place(tl.load(ids + pair), index, INDEXED)
        share = tl.load(weights + pair).to(tl.float32)
        acc = _rows_times_vector(
            z + pair * UNITS, data + place * data_stride, scales + place * scales_stride, rows, rows_ok,
            step - slot * STEPS_A_SLOT, share, acc, HIDDEN, UNITS, BLOCK_K, MXFP4, GENERAL,
        )  # fmt: skip
    total += tl.sum(acc, axis=1 if MXFP4 else 0)
    last = True
    if SPLIT > 1:
        tile = (token * tl.num_programs(1) + piece).to(tl.int32)
        offsets = tl.arange(0, BLOCK_R)
        total, last = join_splits(total, offsets, partial, counters, tile, split, BLOCK_R, SPLIT)
    tl.store(out + token * HIDDEN + rows, total.to(out.dtype.element_ty), mask=rows_ok & last)


def gate_up_slots(
    x: Tensor, ids: Tensor, index: Tensor | None, weight: Operand, z: Tensor, limit: float, alpha: float,
    blocks: Blocks, split: int,
) -> Launch:  # fmt: skip
    """z [tokens * top_k, intermediate] of x [tokens, hidden] and ids [tokens, top_k]: gate_up and SwiGLU."""
    pairs, units = z.shape
    pieces = -(-units // blocks.rows)
    partial, counters = workspace(x.device, joined(split, pairs * pieces, 2 * blocks.rows))
    arguments: dict[str, Any] = {
        "x": x, "z": z, "ids": ids, "index": ids if index is None else index,
        "partial": partial, "counters": counters, "limit": limit, "alpha": alpha,
        "TOP_K": ids.shape[1], "HIDDEN": weight.columns, "UNITS": units, "INDEXED": index is not None,
        "BLOCK_R": blocks.rows, "BLOCK_K": blocks.columns, "SPLIT": split,
    }  # fmt: skip
    arguments.update(weight.arguments())
    return Launch(_gate_up_kernel, (pairs, pieces, split), arguments, blocks.warps, blocks.stages)


def down_slots(
    z: Tensor, ids: Tensor, weights: Tensor, index: Tensor | None, weight: Operand, out: Tensor,
    blocks: Blocks, split: int,
) -> Launch:  # fmt: skip
    """out [tokens, hidden] of z [tokens * top_k, intermediate], ids and weights [tokens, top_k]."""
    tokens, top_k = ids.shape
    pieces = -(-weight.rows // blocks.rows)
    partial, counters = workspace(z.device, joined(split, tokens * pieces, blocks.rows))
    arguments: dict[str, Any] = {
        "z": z, "out": out, "ids": ids, "weights": weights, "index": ids if index is None else index,
        "partial": partial, "counters": counters,
        "TOP_K": top_k, "HIDDEN": weight.rows, "UNITS": weight.columns, "INDEXED": index is not None,
        "BLOCK_R": blocks.rows, "BLOCK_K": blocks.columns, "SPLIT": split,
        "CHUNK": min(16, 1 << (top_k - 1).bit_length()),
    }  # fmt: skip
    arguments.update(weight.arguments())
    return Launch(_down_kernel, (tokens, pieces, split), arguments, blocks.warps, blocks.stages)
