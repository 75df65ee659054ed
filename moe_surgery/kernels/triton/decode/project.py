"""The three dense projections of a decode step, each with everything that can be done to its rows at once."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.kernels.triton.decode.rows import blocks_for, rows_times_tokens, rows_times_vector
from moe_surgery.kernels.triton.launch import Launch, next_power_of_two

__all__ = ["Place", "Stream", "output", "qkv", "unembed"]


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream before a projection: h, or at one token what h is to be made of.

    h [tokens, columns] is the normed input. Where `gain` [columns] is given, h is not read: the kernel takes
    rmsnorm(x + y) itself, row lines[0] of x if there are `lines`, and puts x + y into `total`.
    """

    h: Tensor
    x: Tensor | None = None
    y: Tensor | None = None
    lines: Tensor | None = None
    gain: Tensor | None = None
    total: Tensor | None = None
    eps: float = 0.0

    def arguments(self) -> dict[str, Any]:
        fused = self.gain is not None
        x = self.x if fused and self.x is not None else self.h
        return {
            "x": x, "y": x if self.y is None else self.y, "lines": x if self.lines is None else self.lines,
            "gain": x if self.gain is None else self.gain, "total": x if self.total is None else self.total,
            "eps": self.eps, "ADD": fused and self.y is not None, "NORM": fused,
            "GATHER": fused and self.lines is not None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's new keys and values go.

    keys, values [batch, kv_heads, slots, head_dim]; positions int64 [batch, slots], those of all slots;
    column int64 [1], the new column, which goes to slot column % slots at position column - pads[batch];
    cos, sin float32 [positions, head_dim / 2].
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    column: Tensor
    pads: Tensor
    cos: Tensor
    sin: Tensor


@triton.jit
def _line(lines, GATHER: tl.constexpr):
    line = tl.zeros((), tl.int64)
    if GATHER:
        line = tl.load(lines).to(tl.int64)
    return line


@triton.jit
def _qkv_kernel(
    x, y, lines, gain, total, eps, weight, bias, q, keys, values, positions, column, pads, cos, sin, tokens,
    HIDDEN: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SLOTS: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_U rows of a head's first half and those that RoPE pairs them with."""
    HALF: tl.constexpr = HEAD_DIM // 2
    PIECES: tl.constexpr = (HALF + BLOCK_U - 1) // BLOCK_U
    head = tl.program_id(0) // PIECES
    begin = (tl.program_id(0) % PIECES) * BLOCK_U
    pair = tl.arange(0, 2 * BLOCK_U)
    rows_ok = begin + pair // 2 < HALF
    rows = head * HEAD_DIM + (pair % 2) * HALF + begin + pair // 2
    shift = tl.load(bias + rows, mask=rows_ok, other=0.0).to(tl.float32)
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = token < tokens
    if BLOCK_T == 1:
        found = rows_times_vector(
            weight, rows, rows_ok, x, y, _line(lines, GATHER), gain, total, tl.program_id(0) == 0, eps,
            HIDDEN, 2 * BLOCK_U, BLOCK_K, ADD, NORM,
        )[:, None]  # fmt: skip
    else:
        found = rows_times_tokens(
            weight, rows, rows_ok, x, token, token_ok, HIDDEN, 2 * BLOCK_U, BLOCK_T, BLOCK_K, WIDE
        )
    # Rounded to the activations' dtype before the rotation, as an unfused projection would.
    found = (found + shift[:, None]).to(q.dtype.element_ty).to(tl.float32)
    first, second = tl.split(tl.permute(tl.reshape(found, (BLOCK_U, 2, BLOCK_T)), (0, 2, 1)))  # [U, T]

    unit = begin + tl.arange(0, BLOCK_U)
    mask = (unit < HALF)[:, None] & token_ok[None, :]
    here = tl.load(column)
    slot = here % SLOTS
    position = here - tl.load(pads + token, mask=token_ok, other=0)
    if head < HEADS + KV_HEADS:
        angle = position[None, :] * HALF + unit[:, None]
        c = tl.load(cos + angle, mask=mask, other=0.0)
        s = tl.load(sin + angle, mask=mask, other=0.0)
        first, second = first * c - second * s, second * c + first * s
    if head < HEADS:
        at = q + (token[None, :] * HEADS + head) * HEAD_DIM + unit[:, None]
    else:
        kv = (head - HEADS) % KV_HEADS
        line = ((token[None, :] * KV_HEADS + kv) * SLOTS + slot) * HEAD_DIM + unit[:, None]
        if head < HEADS + KV_HEADS:  # noqa: SIM108 - both arms of Triton's conditional expression are evaluated
            at = keys + line
        else:
            at = values + line
    tl.store(at, first.to(q.dtype.element_ty), mask=mask)
    tl.store(at + HALF, second.to(q.dtype.element_ty), mask=mask)
    # Layers that share `positions` write the same numbers.
    tl.store(positions + token * SLOTS + slot, position, mask=token_ok & (tl.program_id(0) == 0))


@triton.jit
def _output_kernel(
    x, residual, out, weight, bias, tokens,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_ok = rows < ROWS
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = token < tokens
    mask = token_ok[None, :] & rows_ok[:, None]
    at = token[None, :] * ROWS + rows[:, None]
    shift = tl.load(bias + rows, mask=rows_ok, other=0.0).to(tl.float32)
    before = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if BLOCK_T == 1:
        found = rows_times_vector(
            weight, rows, rows_ok, x, x, tl.zeros((), tl.int64), x, x, False, 0.0,
            COLUMNS, BLOCK_R, BLOCK_K, False, False,
        )[:, None]  # fmt: skip
    else:
        found = rows_times_tokens(
            weight, rows, rows_ok, x, token, token_ok, COLUMNS, BLOCK_R, BLOCK_T, BLOCK_K, WIDE
        )
    found = (found + shift[:, None]).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (before + found).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _unembed_kernel(
    x, y, lines, gain, total, eps, weight, logits, column, tokens,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, GATHER: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_ok = rows < ROWS
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = token < tokens
    if BLOCK_T == 1:
        found = rows_times_vector(
            weight, rows, rows_ok, x, y, _line(lines, GATHER), gain, total, tl.program_id(0) == 0, eps,
            HIDDEN, BLOCK_R, BLOCK_K, ADD, NORM,
        )[:, None]  # fmt: skip
    else:
        found = rows_times_tokens(
            weight, rows, rows_ok, x, token, token_ok, HIDDEN, BLOCK_R, BLOCK_T, BLOCK_K, WIDE
        )
    # Rounded as the activations are: logits of an unfused model are.
    found = found.to(x.dtype.element_ty).to(tl.float32)
    at = logits + token[None, :] * ROWS + rows[:, None]
    tl.store(at, found, mask=token_ok[None, :] & rows_ok[:, None])
    # The step ends here, and nothing in this launch reads the column.
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(column, tl.load(column) + 1)


def qkv(stream: Stream, weight: Tensor, bias: Tensor, q: Tensor, place: Place, wide: bool) -> Launch:
    """q [batch, heads * head_dim] and the new column of `place`, rotated, from weight [rows, hidden].

    Rows of weight and bias [rows]: all of q, then k, then v, by heads.
    """
    batch, kv_heads, slots, head_dim = place.keys.shape
    heads, half = q.shape[1] // head_dim, head_dim // 2
    blocks = blocks_for(weight.shape[0], batch, wide)
    units = min(blocks.rows // 2, next_power_of_two(half))
    # The tensor cores take no fewer than 16 rows, whatever the head.
    units = units if batch == 1 else max(units, 8)
    grid = ((heads + 2 * kv_heads) * -(-half // units), -(-batch // blocks.tokens), 1)
    arguments: dict[str, Any] = {
        **stream.arguments(), "weight": weight, "bias": bias, "q": q,
        "keys": place.keys, "values": place.values, "positions": place.positions, "column": place.column,
        "pads": place.pads, "cos": place.cos, "sin": place.sin, "tokens": batch,
        "HIDDEN": weight.shape[1], "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "SLOTS": slots,
        "WIDE": wide, "BLOCK_U": units, "BLOCK_T": blocks.tokens, "BLOCK_K": blocks.columns,
    }  # fmt: skip
    return Launch(_qkv_kernel, grid, arguments, blocks.warps, blocks.stages)


def output(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, out: Tensor, wide: bool) -> Launch:
    """out [tokens, rows] = residual [tokens, rows] + x [tokens, columns] @ weight [rows, columns].T + bias."""
    tokens, rows = out.shape
    blocks = blocks_for(rows, tokens, wide)
    arguments: dict[str, Any] = {
        "x": x, "residual": residual, "out": out, "weight": weight, "bias": bias, "tokens": tokens,
        "ROWS": rows, "COLUMNS": weight.shape[1], "WIDE": wide,
        "BLOCK_R": blocks.rows, "BLOCK_T": blocks.tokens, "BLOCK_K": blocks.columns,
    }  # fmt: skip
    grid = (-(-rows // blocks.rows), -(-tokens // blocks.tokens), 1)
    return Launch(_output_kernel, grid, arguments, blocks.warps, blocks.stages)


def unembed(stream: Stream, weight: Tensor, logits: Tensor, column: Tensor, wide: bool) -> Launch:
    """logits float32 [tokens, vocabulary] from weight [vocabulary, hidden]; column int64 [1] goes up by one."""
    tokens, rows = logits.shape
    blocks = blocks_for(rows, tokens, wide)
    arguments: dict[str, Any] = {
        **stream.arguments(), "weight": weight, "logits": logits, "column": column, "tokens": tokens,
        "ROWS": rows, "HIDDEN": weight.shape[1], "WIDE": wide,
        "BLOCK_R": blocks.rows, "BLOCK_T": blocks.tokens, "BLOCK_K": blocks.columns,
    }  # fmt: skip
    grid = (-(-rows // blocks.rows), -(-tokens // blocks.tokens), 1)
    return Launch(_unembed_kernel, grid, arguments, blocks.warps, blocks.stages)
