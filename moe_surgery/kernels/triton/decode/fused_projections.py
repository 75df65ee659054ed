"""The three dense projections of a decode step, each fused with the operations around it."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.kernels.triton.decode.dense_gemv import dense_blocks_for, gemm, gemv
from moe_surgery.kernels.triton.launch import Launch, next_power_of_two

__all__ = ["KVWrite", "ProjectionInput", "output", "qkv", "unembed"]


@dataclass(frozen=True, slots=True)
class ProjectionInput:
    """The input of a projection: h, or at one token the operands of the norm that produces it.

    h [tokens, columns] is the normed input. With `norm_weight` [columns] the kernel does not read h: it computes
    rmsnorm(x + y) itself, from row row_ids[0] of x if there are `row_ids`, and stores x + y in `total`.
    """

    h: Tensor
    x: Tensor | None = None
    y: Tensor | None = None
    row_ids: Tensor | None = None
    norm_weight: Tensor | None = None
    total: Tensor | None = None
    eps: float = 0.0

    def arguments(self) -> dict[str, Any]:
        fused = self.norm_weight is not None
        x = self.x if fused and self.x is not None else self.h
        return {
            "x": x, "y": x if self.y is None else self.y, "row_ids": x if self.row_ids is None else self.row_ids,
            "norm_weight": x if self.norm_weight is None else self.norm_weight,
            "total": x if self.total is None else self.total,
            "eps": self.eps, "ADD": fused and self.y is not None, "NORM": fused,
            "GATHER": fused and self.row_ids is not None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class KVWrite:
    """Where to store a layer's new keys and values.

    keys, values [batch, kv_heads, slots, head_dim]; positions int64 [batch, slots]; cache_position int64 [1]:
    the number of the new token, which goes to slot cache_position % slots and has position
    cache_position - pads[batch]; cos, sin float32 [positions, head_dim / 2].
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    cache_position: Tensor
    pads: Tensor
    cos: Tensor
    sin: Tensor


@triton.jit
def _row_id(row_ids, GATHER: tl.constexpr):
    row_id = tl.zeros((), tl.int64)
    if GATHER:
        row_id = tl.load(row_ids).to(tl.int64)
    return row_id


@triton.jit
def _qkv_kernel(
    x, y, row_ids, norm_weight, total, eps, weight, bias, q, keys, values, positions, cache_position, pads, cos, sin,
    tokens,
    HIDDEN: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SLOTS: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, GATHER: tl.constexpr, UPCAST_FP32: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_HALF rows of a head's first half and the rows that RoPE pairs them with."""
    HALF: tl.constexpr = HEAD_DIM // 2
    NUM_BLOCKS: tl.constexpr = (HALF + BLOCK_HALF - 1) // BLOCK_HALF
    head = tl.program_id(0) // NUM_BLOCKS
    begin = (tl.program_id(0) % NUM_BLOCKS) * BLOCK_HALF
    pair = tl.arange(0, 2 * BLOCK_HALF)
    rows_ok = begin + pair // 2 < HALF
    rows = head * HEAD_DIM + (pair % 2) * HALF + begin + pair // 2
    row_bias = tl.load(bias + rows, mask=rows_ok, other=0.0).to(tl.float32)
    token = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_ok = token < tokens
    if BLOCK_N == 1:
        result = gemv(
            weight, rows, rows_ok, x, y, _row_id(row_ids, GATHER), norm_weight, total,
            tl.program_id(0) == 0, eps,
            HIDDEN, 2 * BLOCK_HALF, BLOCK_K, ADD, NORM,
        )[:, None]  # fmt: skip
    else:
        result = gemm(
            weight, rows, rows_ok, x, token, token_ok, HIDDEN, 2 * BLOCK_HALF, BLOCK_N, BLOCK_K, UPCAST_FP32
        )
    # Rounded to the activations' dtype before the rotation, as an unfused projection would.
    result = (result + row_bias[:, None]).to(q.dtype.element_ty).to(tl.float32)
    first, second = tl.split(tl.permute(tl.reshape(result, (BLOCK_HALF, 2, BLOCK_N)), (0, 2, 1)))  # [half, N]

    dim = begin + tl.arange(0, BLOCK_HALF)
    mask = (dim < HALF)[:, None] & token_ok[None, :]
    newest = tl.load(cache_position)
    slot = newest % SLOTS
    position = newest - tl.load(pads + token, mask=token_ok, other=0)
    if head < HEADS + KV_HEADS:
        angle = position[None, :] * HALF + dim[:, None]
        c = tl.load(cos + angle, mask=mask, other=0.0)
        s = tl.load(sin + angle, mask=mask, other=0.0)
        first, second = first * c - second * s, second * c + first * s
    if head < HEADS:
        at = q + (token[None, :] * HEADS + head) * HEAD_DIM + dim[:, None]
    else:
        kv = (head - HEADS) % KV_HEADS
        at_kv = ((token[None, :] * KV_HEADS + kv) * SLOTS + slot) * HEAD_DIM + dim[:, None]
        if head < HEADS + KV_HEADS:  # noqa: SIM108 - both arms of Triton's conditional expression are evaluated
            at = keys + at_kv
        else:
            at = values + at_kv
    tl.store(at, first.to(q.dtype.element_ty), mask=mask)
    tl.store(at + HALF, second.to(q.dtype.element_ty), mask=mask)
    # Layers that share `positions` write the same numbers.
    tl.store(positions + token * SLOTS + slot, position, mask=token_ok & (tl.program_id(0) == 0))


@triton.jit
def _output_kernel(
    x, residual, out, weight, bias, tokens,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UPCAST_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < ROWS
    token = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_ok = token < tokens
    mask = token_ok[None, :] & rows_ok[:, None]
    at = token[None, :] * ROWS + rows[:, None]
    row_bias = tl.load(bias + rows, mask=rows_ok, other=0.0).to(tl.float32)
    before = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if BLOCK_N == 1:
        result = gemv(
            weight, rows, rows_ok, x, x, tl.zeros((), tl.int64), x, x, False, 0.0,
            COLUMNS, BLOCK_M, BLOCK_K, False, False,
        )[:, None]  # fmt: skip
    else:
        result = gemm(
            weight, rows, rows_ok, x, token, token_ok, COLUMNS, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST_FP32
        )
    result = (result + row_bias[:, None]).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (before + result).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _unembed_kernel(
    x, y, row_ids, norm_weight, total, eps, weight, logits, cache_position, tokens,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, GATHER: tl.constexpr,
    UPCAST_FP32: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < ROWS
    token = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_ok = token < tokens
    if BLOCK_N == 1:
        result = gemv(
            weight, rows, rows_ok, x, y, _row_id(row_ids, GATHER), norm_weight, total,
            tl.program_id(0) == 0, eps,
            HIDDEN, BLOCK_M, BLOCK_K, ADD, NORM,
        )[:, None]  # fmt: skip
    else:
        result = gemm(
            weight, rows, rows_ok, x, token, token_ok, HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST_FP32
        )
    # Rounded to the activations' dtype, as an unfused model's logits are.
    result = result.to(x.dtype.element_ty).to(tl.float32)
    at = logits + token[None, :] * ROWS + rows[:, None]
    tl.store(at, result, mask=token_ok[None, :] & rows_ok[:, None])
    # The step ends here, and nothing else in this launch reads cache_position.
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(cache_position, tl.load(cache_position) + 1)


def qkv(
    inputs: ProjectionInput, weight: Tensor, bias: Tensor, q: Tensor, kv_write: KVWrite, upcast_fp32: bool
) -> Launch:
    """q [batch, heads * head_dim] and the new keys and values at `kv_write`, rotated, from weight [rows, hidden].

    Rows of weight and bias [rows]: all of q, then k, then v, by heads.
    """
    batch, kv_heads, slots, head_dim = kv_write.keys.shape
    heads, half = q.shape[1] // head_dim, head_dim // 2
    blocks = dense_blocks_for(weight.shape[0], batch, upcast_fp32)
    block_half = min(blocks.block_m // 2, next_power_of_two(half))
    # The tensor cores take at least 16 rows, whatever the head.
    block_half = block_half if batch == 1 else max(block_half, 8)
    grid = ((heads + 2 * kv_heads) * -(-half // block_half), -(-batch // blocks.block_n), 1)
    arguments: dict[str, Any] = {
        **inputs.arguments(), "weight": weight, "bias": bias, "q": q,
        "keys": kv_write.keys, "values": kv_write.values, "positions": kv_write.positions,
        "cache_position": kv_write.cache_position, "pads": kv_write.pads, "cos": kv_write.cos, "sin": kv_write.sin,
        "tokens": batch,
        "HIDDEN": weight.shape[1], "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "SLOTS": slots,
        "UPCAST_FP32": upcast_fp32,
        "BLOCK_HALF": block_half, "BLOCK_N": blocks.block_n, "BLOCK_K": blocks.block_k,
    }  # fmt: skip
    return Launch(_qkv_kernel, grid, arguments, blocks.num_warps, blocks.num_stages)


def output(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, out: Tensor, upcast_fp32: bool
) -> Launch:
    """out [tokens, rows] = residual [tokens, rows] + x [tokens, columns] @ weight [rows, columns].T + bias."""
    tokens, rows = out.shape
    blocks = dense_blocks_for(rows, tokens, upcast_fp32)
    arguments: dict[str, Any] = {
        "x": x, "residual": residual, "out": out, "weight": weight, "bias": bias, "tokens": tokens,
        "ROWS": rows, "COLUMNS": weight.shape[1], "UPCAST_FP32": upcast_fp32,
        "BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n, "BLOCK_K": blocks.block_k,
    }  # fmt: skip
    grid = (-(-rows // blocks.block_m), -(-tokens // blocks.block_n), 1)
    return Launch(_output_kernel, grid, arguments, blocks.num_warps, blocks.num_stages)


def unembed(
    inputs: ProjectionInput, weight: Tensor, logits: Tensor, cache_position: Tensor, upcast_fp32: bool
) -> Launch:
    """logits float32 [tokens, vocab_size] from weight [vocab_size, hidden]; increments cache_position int64 [1]."""
    tokens, rows = logits.shape
    blocks = dense_blocks_for(rows, tokens, upcast_fp32)
    arguments: dict[str, Any] = {
        **inputs.arguments(), "weight": weight, "logits": logits, "cache_position": cache_position, "tokens": tokens,
        "ROWS": rows, "HIDDEN": weight.shape[1], "UPCAST_FP32": upcast_fp32,
        "BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n, "BLOCK_K": blocks.block_k,
    }  # fmt: skip
    grid = (-(-rows // blocks.block_m), -(-tokens // blocks.block_n), 1)
    return Launch(_unembed_kernel, grid, arguments, blocks.num_warps, blocks.num_stages)
