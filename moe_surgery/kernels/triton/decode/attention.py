"""Attention of one new token per sequence over its cache, split along the cache and combined in one launch."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.kernels.triton.dequant import dot
from moe_surgery.kernels.triton.launch import COUNTERS, Launch, next_power_of_two, partial_size, workspace

__all__ = ["MAX_KV_SPLITS", "attention", "kv_splits_for"]

# Slots that a program takes per step; not measured.
BLOCK_SLOTS = 64
MAX_KV_SPLITS = 32
# Below any score, yet finite, so that the difference of two of them is not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _attention_kernel(
    q, keys, values, positions, cache_position, pads, sinks, out, partial, counters, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SLOTS: tl.constexpr,
    WINDOW: tl.constexpr, NUM_KV_SPLITS: tl.constexpr, STEPS: tl.constexpr, UPCAST_FP32: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, kv_heads, NUM_KV_SPLITS); a program has all query heads of its key head.

    Keys are the M side of the products, the GROUP query heads the N side, which takes 8. Program `kv_split`
    has the blocks of slots kv_split, kv_split + NUM_KV_SPLITS, ..., as far as the cache is filled.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    kv_split = tl.program_id(2)
    seq_kv = sequence * KV_HEADS + kv
    head = tl.arange(0, BLOCK_G)
    head_ok = head < GROUP
    dim = tl.arange(0, BLOCK_D)
    dim_ok = dim < HEAD_DIM
    at_q = (seq_kv * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
    query = tl.load(q + at_q, mask=head_ok[:, None] & dim_ok[None, :], other=0.0)  # [G, D]
    newest = tl.load(cache_position)
    position = newest - tl.load(pads + sequence)

    m_i = tl.full((BLOCK_G,), LOWEST, tl.float32)
    l_i = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_D, BLOCK_G), tl.float32)
    # A bound at run time: the empty part of a long cache costs nothing. The interpreter needs a constant one.
    if UPCAST_FP32:
        steps = STEPS
    else:
        blocks = (tl.minimum(newest + 1, SLOTS) + BLOCK_S - 1) // BLOCK_S
        steps = ((blocks + NUM_KV_SPLITS - 1 - kv_split) // NUM_KV_SPLITS).to(tl.int32)
    for step in range(steps):
        slot = (step * NUM_KV_SPLITS + kv_split) * BLOCK_S + tl.arange(0, BLOCK_S)
        slot_ok = slot < SLOTS
        key_position = tl.load(positions + sequence * SLOTS + slot, mask=slot_ok, other=-1)
        visible = (key_position >= 0) & (key_position <= position)
        if WINDOW > 0:
            visible = visible & (position - key_position < WINDOW)
        at = (seq_kv * SLOTS + slot)[:, None] * HEAD_DIM + dim[None, :]
        mask = slot_ok[:, None] & dim_ok[None, :]
        key = tl.load(keys + at, mask=mask, other=0.0)  # [S, D]
        value = tl.load(values + at, mask=mask, other=0.0)
        scores = dot(key, tl.trans(query), tl.zeros((BLOCK_S, BLOCK_G), tl.float32), UPCAST_FP32) * scale
        scores = tl.where(visible[:, None], scores, LOWEST)
        m_new = tl.maximum(m_i, tl.max(scores, axis=0))
        # A masked slot has weight 0 even where every slot so far was masked.
        p = tl.where(visible[:, None], tl.exp(scores - m_new[None, :]), 0.0)
        alpha = tl.exp(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, axis=0)
        acc = dot(tl.trans(value), p, acc * alpha[None, :], UPCAST_FP32)
        m_i = m_new

    last = True
    if NUM_KV_SPLITS > 1:
        SIZE: tl.constexpr = BLOCK_G * (BLOCK_D + 2)
        tile = (seq_kv * 1).to(tl.int32)
        base = partial + seq_kv * (NUM_KV_SPLITS * SIZE)
        cell = dim[:, None] * BLOCK_G + head[None, :]
        part = base + kv_split * SIZE
        tl.store(part + head, m_i)
        tl.store(part + BLOCK_G + head, l_i)
        tl.store(part + 2 * BLOCK_G + cell, acc)
        # One thread increments the counter: all threads must have stored first.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        last = arrived == NUM_KV_SPLITS - 1
        if last:
            tl.store(counters + tile, 0)
            m_i = tl.full((BLOCK_G,), LOWEST, tl.float32)
            l_i = tl.zeros((BLOCK_G,), tl.float32)
            acc = tl.zeros((BLOCK_D, BLOCK_G), tl.float32)
            for i in range(NUM_KV_SPLITS):
                other = base + i * SIZE
                m_j = tl.load(other + head, cache_modifier=".cg")
                m_new = tl.maximum(m_i, m_j)
                alpha, beta = tl.exp(m_i - m_new), tl.exp(m_j - m_new)
                l_i = l_i * alpha + tl.load(other + BLOCK_G + head, cache_modifier=".cg") * beta
                acc_j = tl.load(other + 2 * BLOCK_G + cell, cache_modifier=".cg")
                acc = acc * alpha[None, :] + acc_j * beta[None, :]
                m_i = m_new
    sink = tl.load(sinks + kv * GROUP + head, mask=head_ok, other=0.0).to(tl.float32)
    m_new = tl.maximum(m_i, sink)
    alpha = tl.exp(m_i - m_new)
    share = alpha / (l_i * alpha + tl.exp(sink - m_new))
    result = tl.trans(acc * share[None, :]).to(out.dtype.element_ty)
    tl.store(out + at_q, result, mask=head_ok[:, None] & dim_ok[None, :] & last)


def kv_splits_for(rows: int, slots: int, multiprocessors: int) -> int:
    """How many programs share a cache of `slots` where there are `rows` (sequence, key head) pairs."""
    blocks = -(-slots // BLOCK_SLOTS)
    splits = -(-2 * multiprocessors // rows)
    return 1 if rows > COUNTERS else max(1, min(blocks, splits, MAX_KV_SPLITS))


def attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cache_position: Tensor, pads: Tensor, sinks: Tensor,
    window: int | None, out: Tensor, multiprocessors: int, upcast_fp32: bool,
) -> Launch:  # fmt: skip
    """out [batch, heads * head_dim] for q of the same shape, over keys and values [batch, kv_heads, slots, head_dim].

    positions int64 [batch, slots] (-1: empty), cache_position int64 [1] the number of the newest token, which is
    stored already, pads int64 [batch], sinks [heads] one extra logit per head; window None means full attention.
    """
    batch, kv_heads, slots, head_dim = keys.shape
    group = q.shape[1] // head_dim // kv_heads
    kv_splits = kv_splits_for(batch * kv_heads, slots, multiprocessors)
    block_g, block_d = max(8, next_power_of_two(group)), max(16, next_power_of_two(head_dim))
    partial, counters = workspace(
        q.device, partial_size(kv_splits, batch * kv_heads, block_g * (block_d + 2))
    )
    arguments: dict[str, Any] = {
        "q": q, "keys": keys, "values": values, "positions": positions, "cache_position": cache_position, "pads": pads,
        "sinks": sinks, "out": out, "partial": partial, "counters": counters, "scale": head_dim**-0.5,
        "KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "SLOTS": slots, "WINDOW": window or 0,
        "NUM_KV_SPLITS": kv_splits,
        "STEPS": -(-slots // (BLOCK_SLOTS * kv_splits)), "UPCAST_FP32": upcast_fp32,
        "BLOCK_S": BLOCK_SLOTS, "BLOCK_G": block_g, "BLOCK_D": block_d,
    }  # fmt: skip
    return Launch(_attention_kernel, (batch, kv_heads, kv_splits), arguments, 4, 3)
