"""The dense product of a decode step: weight rows times one to some dozens of tokens, bound by weight bytes."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from dataclasses import dataclass

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from moe_surgery.kernels.triton.launch import next_power_of_two
from moe_surgery.kernels.triton.parts import product

__all__ = ["RowBlocks", "blocks_for", "rows_times_tokens", "rows_times_vector"]

# Beyond this many tokens programs come in several columns of the grid, and weights are read as often.
MOST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """Sizes of one program's piece: weight rows, values of the reduction, tokens; warps and stages."""

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int


def blocks_for(rows: int, tokens: int, wide: bool) -> RowBlocks:
    """The piece for a weight of `rows` rows. **Not measured on a GPU**; chosen by counting.

    At one token 16 rows (8 below 4096, where there would be few programs) keep several programs on every
    multiprocessor. With tokens the activations are read again by each program: rows grow with them so
    that weights stay the greater part. `wide` operands (float32) take half the reduction step.
    """
    if tokens == 1:
        return RowBlocks(8 if rows < 4096 else 16, 512 if not wide else 256, 1, 4, 3)
    width = min(max(8, next_power_of_two(tokens)), MOST_TOKENS)
    height = 16 if width <= 8 and rows < 65536 else 32 if width <= 32 else 64
    return RowBlocks(height, 128 if not wide else 64, width, 4, 4 if height < 64 else 3)


@triton.jit
def rows_times_vector(
    weight, rows, rows_ok, x, y, line, gain, total, keep, eps,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R] = weight [.., COLUMNS] rows times one vector, float32.

    With NORM the vector is rmsnorm(x[line] + y): its scale is the same for all columns, so it multiplies
    the finished sums, and the squares are added up on the way. `keep` says which program stores x + y.
    """
    STEPS: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(STEPS):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)
        column_ok = column < COLUMNS
        w = tl.load(
            weight + rows[:, None].to(tl.int64) * COLUMNS + column[None, :],
            mask=rows_ok[:, None] & column_ok[None, :], other=0.0,
        )  # fmt: skip
        value = tl.load(x + line * COLUMNS + column, mask=column_ok, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(y + column, mask=column_ok, other=0.0).to(tl.float32)
            value = value.to(x.dtype.element_ty).to(tl.float32)
        if NORM:
            tl.store(total + column, value.to(total.dtype.element_ty), mask=column_ok & keep)
            squares += value * value
            value *= tl.load(gain + column, mask=column_ok, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * value[None, :]
    found = tl.sum(sums, axis=1)
    if NORM:
        found *= tl.rsqrt(tl.sum(squares, axis=0) / COLUMNS + eps)
    return found


@triton.jit
def rows_times_tokens(
    weight, rows, rows_ok, x, token, token_ok,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_T] = weight rows times x [tokens, COLUMNS], on tensor cores, float32 sums."""
    STEPS: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    sums = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
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
        sums = product(w, tl.trans(values), sums, WIDE)
    return sums
