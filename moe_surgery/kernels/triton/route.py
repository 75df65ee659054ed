"""Routing in one launch: logits, the k best, and their weights, the softmax over the chosen k."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.kernels.triton.blocks import Chip
from moe_surgery.kernels.triton.launch import COUNTERS, Launch, next_power_of_two, workspace
from moe_surgery.kernels.triton.parts import product

__all__ = ["MOST_EXPERTS", "route"]

MOST_EXPERTS = 1024

# tl.constexpr: kernels may read no other global.
_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def _sort_key(logits, expert):
    """int64 keys, all distinct, whose descending order is torch.sort's stable one: NaN (of any sign) before
    infinity, +0 and -0 equal, equal logits in index order."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(logits != logits, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - expert).to(tl.int64)


@triton.jit
def _logit_of(key):
    """The logit in a key; any NaN comes back as one NaN."""
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _expert_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _logits(
    x, weight, token, token_ok, expert, expert_ok, part,
    HIDDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, BLOCK_E] over the steps part, part + PARTS, ... of the reduction, float32."""
    STEPS: tl.constexpr = (HIDDEN + BLOCK_K * PARTS - 1) // (BLOCK_K * PARTS)
    sums = (
        tl.zeros((BLOCK_E, BLOCK_K), tl.float32) if BLOCK_T == 1 else tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    )
    for i in range(STEPS):
        column = (i * PARTS + part) * BLOCK_K + tl.arange(0, BLOCK_K)
        column_ok = column < HIDDEN
        mask = expert_ok[:, None] & column_ok[None, :]
        w = tl.load(weight + expert[:, None].to(tl.int64) * HIDDEN + column[None, :], mask=mask, other=0.0)
        mask = token_ok[:, None] & column_ok[None, :]
        v = tl.load(x + token[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0)  # [T, K]
        if BLOCK_T == 1:
            sums += w.to(tl.float32) * v.to(tl.float32)
        else:
            sums = product(w, tl.trans(v), sums, WIDE)
    if BLOCK_T == 1:
        return tl.expand_dims(tl.sum(sums, axis=1), 0)
    else:
        return tl.trans(sums)


@triton.jit(do_not_specialize=["tokens"])
def _route_kernel(
    x, weight, bias, ids, weights, partial, counters, tokens,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ALL_E: tl.constexpr,
    TOP: tl.constexpr, PARTS: tl.constexpr, SORT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ids int64 and weights [tokens, TOP_K]; grid (blocks of tokens, pieces of experts * PARTS)."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = token < tokens
    number = tl.program_id(1)
    PIECES: tl.constexpr = ALL_E // BLOCK_E
    expert = (number % PIECES) * BLOCK_E + tl.arange(0, BLOCK_E)
    logits = _logits(
        x, weight, token, token_ok, expert, expert < EXPERTS, number // PIECES,
        HIDDEN, BLOCK_T, BLOCK_E, BLOCK_K, PARTS, WIDE,
    )  # fmt: skip
    if PIECES * PARTS > 1:
        logits, last = _join(
            logits, expert, number // PIECES, partial, counters, BLOCK_T, ALL_E, PIECES, PARTS
        )
        if last == 0:
            return
    expert = tl.arange(0, ALL_E)
    expert_ok = expert < EXPERTS
    logits += tl.load(bias + expert, mask=expert_ok, other=0.0).to(tl.float32)[None, :]
    keys = tl.where(expert_ok[None, :], _sort_key(logits, expert[None, :]), _LOWEST)

    # The k best in the first lanes of `best`; other lanes hold _LOWEST or what comes after the k.
    lane = tl.arange(0, TOP)
    if SORT:
        best = tl.sort(keys, dim=1, descending=True)  # TOP is ALL_E
    else:
        best = tl.full((BLOCK_T, TOP), _LOWEST, tl.int64)
        rest = keys
        for k in range(TOP_K):
            largest = tl.max(rest, axis=1)[:, None]
            best = tl.where(lane[None, :] == k, largest, best)
            rest = tl.where(rest == largest, _LOWEST, rest)
    chosen_ok = (lane < TOP_K)[None, :] & (best != _LOWEST)
    chosen = _expert_of(best)
    value = tl.where(chosen_ok, _logit_of(best), float("-inf"))
    # Lane 0 has the largest, so a NaN or an infinity there makes all weights NaN, as in torch.
    top = tl.sum(tl.where(lane[None, :] == 0, value, 0.0), axis=1)[:, None]
    share = tl.where(chosen_ok, tl.exp(value - top), 0.0)
    share = share / tl.sum(share, axis=1)[:, None]
    at = token[:, None] * TOP_K + lane[None, :]
    mask = token_ok[:, None] & (lane < TOP_K)[None, :]
    tl.store(ids + at, chosen.to(tl.int64), mask=mask)
    tl.store(weights + at, share.to(weights.dtype.element_ty), mask=mask)


@triton.jit
def _join(
    logits, expert, part, partial, counters,
    BLOCK_T: tl.constexpr, ALL_E: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All logits of this block of tokens, in the program that arrives last: ([BLOCK_T, ALL_E], is it this one).

    As `parts.join_splits`, where programs also have different experts.
    """
    SIZE: tl.constexpr = BLOCK_T * ALL_E
    base = partial + tl.program_id(0).to(tl.int64) * (PARTS * SIZE)
    line = tl.arange(0, BLOCK_T)[:, None] * ALL_E
    tl.store(base + part * SIZE + line + expert[None, :], logits)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    last = arrived == PIECES * PARTS - 1
    total = tl.zeros((BLOCK_T, ALL_E), tl.float32)
    if last:
        tl.store(counters + tl.program_id(0), 0)
        for other in range(PARTS):
            total += tl.load(base + other * SIZE + line + tl.arange(0, ALL_E)[None, :], cache_modifier=".cg")
    return total, last


def route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, ids: Tensor, weights: Tensor, chip: Chip, wide: bool
) -> Launch:
    """ids int64 and weights [tokens, top_k] of x [tokens, hidden], weight [experts, hidden], bias [experts].

    Raises UsageError for more experts than MOST_EXPERTS and for top_k outside 1..experts.
    """
    tokens, hidden = x.shape
    experts = weight.shape[0]
    if not 1 <= experts <= MOST_EXPERTS:
        raise UsageError(f"triton backend: {experts} experts; 1 to {MOST_EXPERTS} are supported")
    if not 1 <= top_k <= experts:
        raise UsageError(f"triton backend: top-k {top_k} of {experts} experts; give 1 to {experts}")
    block_t, block_e, block_k, all_e, parts = _shape(tokens, experts, hidden, chip)
    blocks = -(-tokens // block_t)
    if blocks > COUNTERS:
        raise UsageError(f"triton backend: {tokens} tokens at once; route at most {COUNTERS * block_t}")
    alone = parts == 1 and block_e == all_e
    partial, counters = workspace(x.device, 0 if alone else blocks * parts * block_t * all_e)
    # Beyond a few choices a sort costs less than looking for the largest that often.
    sort = top_k > 16
    arguments: dict[str, Any] = {
        "x": x, "weight": weight, "bias": bias, "ids": ids, "weights": weights,
        "partial": partial, "counters": counters, "tokens": tokens,
        "HIDDEN": hidden, "EXPERTS": experts, "TOP_K": top_k,
        "BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": block_k, "ALL_E": all_e,
        "TOP": all_e if sort else next_power_of_two(top_k), "PARTS": parts, "SORT": sort, "WIDE": wide,
    }  # fmt: skip
    grid = (blocks, (all_e // block_e) * parts, 1)
    return Launch(
        _route_kernel, grid, arguments, 4 if all_e <= 64 or (block_t > 1 and all_e <= 128) else 8, 2
    )


def _shape(tokens: int, experts: int, hidden: int, chip: Chip) -> tuple[int, int, int, int, int]:
    """(tokens, experts and reduction values of a program, experts padded, parts of the reduction).

    Unmeasured on a GPU. One multiprocessor alone would read a router's weights too slowly, so few tokens
    are cut along experts and reduction until there are some dozens of programs; joining them costs one
    round through the second-level cache.
    """
    all_e = max(16, next_power_of_two(experts))
    if tokens <= 4:
        block_t, block_e, block_k = 1, min(all_e, 32), 128
    else:
        # Keys are 64 bits: a program's tokens x experts must fit its registers.
        block_t, block_e, block_k = 16 if all_e <= 256 else 8, min(all_e, 64), 64
    blocks = -(-tokens // block_t)
    programs = blocks * (all_e // block_e)
    parts = 1
    while programs * parts * 2 <= min(chip.multiprocessors, 32 * blocks) and parts * 2 * block_k <= hidden:
        parts *= 2
    return block_t, block_e, block_k, all_e, parts
