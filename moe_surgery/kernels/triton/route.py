"""Routing in one launch: logits, the k best, and their weights, the softmax over the chosen k."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.kernels.triton.dequant import dot
from moe_surgery.kernels.triton.launch import COUNTERS, Launch, next_power_of_two, workspace
from moe_surgery.kernels.triton.tuning import DeviceProps

__all__ = ["MAX_EXPERTS", "route"]

MAX_EXPERTS = 1024

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
    x, weight, token, token_ok, expert, expert_ok, pid_k,
    HIDDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, UPCAST_FP32: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, BLOCK_E] over the steps pid_k, pid_k + SPLIT_K, ... of the reduction, float32."""
    STEPS: tl.constexpr = (HIDDEN + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    sums = (
        tl.zeros((BLOCK_E, BLOCK_K), tl.float32) if BLOCK_T == 1 else tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    )
    for i in range(STEPS):
        column = (i * SPLIT_K + pid_k) * BLOCK_K + tl.arange(0, BLOCK_K)
        column_ok = column < HIDDEN
        mask = expert_ok[:, None] & column_ok[None, :]
        w = tl.load(weight + expert[:, None].to(tl.int64) * HIDDEN + column[None, :], mask=mask, other=0.0)
        mask = token_ok[:, None] & column_ok[None, :]
        v = tl.load(x + token[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0)  # [T, K]
        if BLOCK_T == 1:
            sums += w.to(tl.float32) * v.to(tl.float32)
        else:
            sums = dot(w, tl.trans(v), sums, UPCAST_FP32)
    if BLOCK_T == 1:
        return tl.expand_dims(tl.sum(sums, axis=1), 0)
    else:
        return tl.trans(sums)


@triton.jit(do_not_specialize=["tokens"])
def _route_kernel(
    x, weight, bias, ids, weights, partial, counters, tokens,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ALL_E: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr, SPLIT_K: tl.constexpr, SORT: tl.constexpr, UPCAST_FP32: tl.constexpr,
):  # fmt: skip
    """ids int64 and weights [tokens, TOP_K]; grid (blocks of tokens, blocks of experts * SPLIT_K)."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = token < tokens
    number = tl.program_id(1)
    NUM_BLOCKS_E: tl.constexpr = ALL_E // BLOCK_E
    expert = (number % NUM_BLOCKS_E) * BLOCK_E + tl.arange(0, BLOCK_E)
    logits = _logits(
        x, weight, token, token_ok, expert, expert < EXPERTS, number // NUM_BLOCKS_E,
        HIDDEN, BLOCK_T, BLOCK_E, BLOCK_K, SPLIT_K, UPCAST_FP32,
    )  # fmt: skip
    if NUM_BLOCKS_E * SPLIT_K > 1:
        logits, last = _join(
            logits, expert, number // NUM_BLOCKS_E, partial, counters, BLOCK_T, ALL_E, NUM_BLOCKS_E, SPLIT_K
        )
        if last == 0:
            return
    expert = tl.arange(0, ALL_E)
    expert_ok = expert < EXPERTS
    logits += tl.load(bias + expert, mask=expert_ok, other=0.0).to(tl.float32)[None, :]
    keys = tl.where(expert_ok[None, :], _sort_key(logits, expert[None, :]), _LOWEST)

    # The k best in the first lanes of `best`; other lanes hold _LOWEST or what comes after the k.
    lane = tl.arange(0, BLOCK_TOP_K)
    if SORT:
        best = tl.sort(keys, dim=1, descending=True)  # BLOCK_TOP_K is ALL_E
    else:
        best = tl.full((BLOCK_T, BLOCK_TOP_K), _LOWEST, tl.int64)
        rest = keys
        for k in range(TOP_K):
            largest = tl.max(rest, axis=1)[:, None]
            best = tl.where(lane[None, :] == k, largest, best)
            rest = tl.where(rest == largest, _LOWEST, rest)
    chosen_ok = (lane < TOP_K)[None, :] & (best != _LOWEST)
    chosen = _expert_of(best)
    value = tl.where(chosen_ok, _logit_of(best), float("-inf"))
    # Lane 0 has the largest, so a NaN or an infinity there makes all weights NaN, as in torch.
    max_logit = tl.sum(tl.where(lane[None, :] == 0, value, 0.0), axis=1)[:, None]
    prob = tl.where(chosen_ok, tl.exp(value - max_logit), 0.0)
    prob = prob / tl.sum(prob, axis=1)[:, None]
    at = token[:, None] * TOP_K + lane[None, :]
    mask = token_ok[:, None] & (lane < TOP_K)[None, :]
    tl.store(ids + at, chosen.to(tl.int64), mask=mask)
    tl.store(weights + at, prob.to(weights.dtype.element_ty), mask=mask)


@triton.jit
def _join(
    logits, expert, pid_k, partial, counters,
    BLOCK_T: tl.constexpr, ALL_E: tl.constexpr, NUM_BLOCKS_E: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """All logits of this block of tokens, in the program that arrives last: ([BLOCK_T, ALL_E], whether this is it).

    As `dequant.reduce_split_k`, where programs also have different experts.
    """
    SIZE: tl.constexpr = BLOCK_T * ALL_E
    base = partial + tl.program_id(0).to(tl.int64) * (SPLIT_K * SIZE)
    row = tl.arange(0, BLOCK_T)[:, None] * ALL_E
    tl.store(base + pid_k * SIZE + row + expert[None, :], logits)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    last = arrived == NUM_BLOCKS_E * SPLIT_K - 1
    total = tl.zeros((BLOCK_T, ALL_E), tl.float32)
    if last:
        tl.store(counters + tl.program_id(0), 0)
        for other in range(SPLIT_K):
            total += tl.load(base + other * SIZE + row + tl.arange(0, ALL_E)[None, :], cache_modifier=".cg")
    return total, last


def route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, ids: Tensor, weights: Tensor,
    device_props: DeviceProps, upcast_fp32: bool,
) -> Launch:  # fmt: skip
    """ids int64 and weights [tokens, top_k] of x [tokens, hidden], weight [experts, hidden], bias [experts].

    Raises UsageError for more experts than MAX_EXPERTS and for top_k outside 1..experts.
    """
    tokens, hidden = x.shape
    experts = weight.shape[0]
    if not 1 <= experts <= MAX_EXPERTS:
        raise UsageError(f"triton backend: {experts} experts; 1 to {MAX_EXPERTS} are supported")
    if not 1 <= top_k <= experts:
        raise UsageError(f"triton backend: top-k {top_k} of {experts} experts; give 1 to {experts}")
    block_t, block_e, block_k, all_e, split_k = _shape(tokens, experts, hidden, device_props)
    blocks = -(-tokens // block_t)
    if blocks > COUNTERS:
        raise UsageError(f"triton backend: {tokens} tokens at once; route at most {COUNTERS * block_t}")
    unsplit = split_k == 1 and block_e == all_e
    partial, counters = workspace(x.device, 0 if unsplit else blocks * split_k * block_t * all_e)
    # Beyond a few experts per token one sort costs less than repeated maxima.
    sort = top_k > 16
    arguments: dict[str, Any] = {
        "x": x, "weight": weight, "bias": bias, "ids": ids, "weights": weights,
        "partial": partial, "counters": counters, "tokens": tokens,
        "HIDDEN": hidden, "EXPERTS": experts, "TOP_K": top_k,
        "BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": block_k, "ALL_E": all_e,
        "BLOCK_TOP_K": all_e if sort else next_power_of_two(top_k), "SPLIT_K": split_k, "SORT": sort,
        "UPCAST_FP32": upcast_fp32,
    }  # fmt: skip
    grid = (blocks, (all_e // block_e) * split_k, 1)
    return Launch(
        _route_kernel, grid, arguments, 4 if all_e <= 64 or (block_t > 1 and all_e <= 128) else 8, 2
    )


def _shape(
    tokens: int, experts: int, hidden: int, device_props: DeviceProps
) -> tuple[int, int, int, int, int]:
    """(tokens, experts and reduction values of a program, experts padded, programs a reduction).

    Unmeasured on a GPU. One multiprocessor alone would read a router's weights too slowly, so few tokens
    are cut along experts and reduction until there are some dozens of programs; joining them costs one
    round trip through the L2 cache.
    """
    all_e = max(16, next_power_of_two(experts))
    if tokens <= 4:
        block_t, block_e, block_k = 1, min(all_e, 32), 128
    else:
        # Keys are 64 bits: a program's tokens x experts must fit its registers.
        block_t, block_e, block_k = 16 if all_e <= 256 else 8, min(all_e, 64), 64
    blocks = -(-tokens // block_t)
    programs = blocks * (all_e // block_e)
    split_k = 1
    while (
        programs * split_k * 2 <= min(device_props.multiprocessors, 32 * blocks)
        and split_k * 2 * block_k <= hidden
    ):
        split_k *= 2
    return block_t, block_e, block_k, all_e, split_k
