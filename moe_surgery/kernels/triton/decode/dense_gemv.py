"""The dense product of a decode step: weight rows times one to dozens of tokens, bound by weight bytes."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from dataclasses import dataclass

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from moe_surgery.kernels.triton.dequant import dot
from moe_surgery.kernels.triton.launch import next_power_of_two

__all__ = ["DenseBlocks", "dense_blocks_for", "gemm", "gemv"]

# Beyond this many tokens the grid has several columns, and each reads the weights.
MAX_BLOCK_N = 64


@dataclass(frozen=True, slots=True)
class DenseBlocks:
    """The block of one program: weight rows, values of the reduction, tokens; warps and stages."""

    block_m: int
    block_k: int
    block_n: int
    num_warps: int
    num_stages: int


def dense_blocks_for(rows: int, tokens: int, upcast_fp32: bool) -> DenseBlocks:
    """The block for a weight of `rows` rows. **Not measured on a GPU**; derived by counting.

    At one token 16 rows (8 below 4096, where there would be few programs) keep several programs on every
    multiprocessor. With tokens the activations are read again by each program: rows grow with them so
    that weights stay the greater part. `upcast_fp32` operands (float32) take half the reduction step.
    """
    if tokens == 1:
        return DenseBlocks(8 if rows < 4096 else 16, 512 if not upcast_fp32 else 256, 1, 4, 3)
    width = min(max(8, next_power_of_two(tokens)), MAX_BLOCK_N)
    height = 16 if width <= 8 and rows < 65536 else 32 if width <= 32 else 64
    return DenseBlocks(height, 128 if not upcast_fp32 else 64, width, 4, 4 if height < 64 else 3)


@triton.jit
def gemv(
    weight, rows, rows_ok, x, y, row_id, norm_weight, total, keep, eps,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M] = weight [.., COLUMNS] rows times one vector, float32.

    With NORM the vector is rmsnorm(x[row_id] + y): its scale is the same for all columns, so it multiplies
    the finished sums, and the squares are added up on the way. `keep` says which program stores x + y.
    """
    STEPS: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(STEPS):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)
        column_ok = column < COLUMNS
        w = tl.load(
            weight + rows[:, None].to(tl.int64) * COLUMNS + column[None, :],
            mask=rows_ok[:, None] & column_ok[None, :], other=0.0,
        )  # fmt: skip
        value = tl.load(x + row_id * COLUMNS + column, mask=column_ok, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(y + column, mask=column_ok, other=0.0).to(tl.float32)
            value = value.to(x.dtype.element_ty).to(tl.float32)
        if NORM:
            tl.store(total + column, value.to(total.dtype.element_ty), mask=column_ok & keep)
            squares += value * value
            value *= tl.load(norm_weight + column, mask=column_ok, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * value[None, :]
    result = tl.sum(sums, axis=1)
    if NORM:
        result *= tl.rsqrt(tl.sum(squares, axis=0) / COLUMNS + eps)
    return result


@triton.jit
def gemm(
    weight, rows, rows_ok, x, token, token_ok,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST_FP32: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] = weight rows times x [tokens, COLUMNS], on tensor cores, float32 sums."""
    STEPS: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STEPS):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)
        column_ok = column < COLUMNS
        w = tl.load(
            weight + rows[:, None].to(tl.int64) * COLUMNS + column[None, :],
            mask=rows_ok[:, None] & column_ok[None, :], other=0.0,
        )  # fmt: skip
        values = tl.load(
            x + token[:, None] * COLUMNS + column[None, :],
            mask=token_ok[:, None] & column_ok[None, :], other=0.0,
        )  # fmt: skip
        sums = dot(w, tl.trans(values), sums, UPCAST_FP32)
    return sums
