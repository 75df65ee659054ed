"""Attention of one new token a sequence over its cache, split along the cache and joined in one launch."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.kernels.triton.launch import COUNTERS, Launch, joined, next_power_of_two, workspace
from moe_surgery.kernels.triton.parts import product

__all__ = ["MOST_SPLITS", "attention", "splits_for"]

# Slots of one step of a program; unmeasured.
BLOCK_SLOTS = 64
MOST_SPLITS = 32
# Below any score, yet finite, so that differences of two of them are no NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _attention_kernel(
    q, keys, values, positions, column, pads, sinks, out, partial, counters, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SLOTS: tl.constexpr,
    WINDOW: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, kv_heads, SPLIT); a program has all query heads of its key head.

    Keys lie on the M side of the products, the GROUP query heads on the N side: it takes 8. Program `split`
    has the blocks of slots split, split + SPLIT, ..., as far as the cache is filled.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    line = sequence * KV_HEADS + kv
    head = tl.arange(0, BLOCK_G)
    head_ok = head < GROUP
    dim = tl.arange(0, BLOCK_D)
    dim_ok = dim < HEAD_DIM
    at_q = (line * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
    query = tl.load(q + at_q, mask=head_ok[:, None] & dim_ok[None, :], other=0.0)  # [G, D]
    here = tl.load(column)
    position = here - tl.load(pads + sequence)

    top = tl.full((BLOCK_G,), LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_G,), tl.float32)
    mixed = tl.zeros((BLOCK_D, BLOCK_G), tl.float32)
    # A run-time bound: an empty stretch of a long cache costs nothing. The interpreter wants a constant one.
    if WIDE:
        steps = STEPS
    else:
        blocks = (tl.minimum(here + 1, SLOTS) + BLOCK_S - 1) // BLOCK_S
        steps = ((blocks + SPLIT - 1 - split) // SPLIT).to(tl.int32)
    for step in range(steps):
        slot = (step * SPLIT + split) * BLOCK_S + tl.arange(0, BLOCK_S)
        slot_ok = slot < SLOTS
        held = tl.load(positions + sequence * SLOTS + slot, mask=slot_ok, other=-1)
        seen = (held >= 0) & (held <= position)
        if WINDOW > 0:
            seen = seen & (position - held < WINDOW)
        at = (line * SLOTS + slot)[:, None] * HEAD_DIM + dim[None, :]
        mask = slot_ok[:, None] & dim_ok[None, :]
        key = tl.load(keys + at, mask=mask, other=0.0)  # [S, D]
        value = tl.load(values + at, mask=mask, other=0.0)
        scores = product(key, tl.trans(query), tl.zeros((BLOCK_S, BLOCK_G), tl.float32), WIDE) * scale
        scores = tl.where(seen[:, None], scores, LOWEST)
        higher = tl.maximum(top, tl.max(scores, axis=0))
        # A masked slot weighs nothing even where every slot so far was masked.
        weight = tl.where(seen[:, None], tl.exp(scores - higher[None, :]), 0.0)
        faded = tl.exp(top - higher)
        mass = mass * faded + tl.sum(weight, axis=0)
        mixed = product(tl.trans(value), weight, mixed * faded[None, :], WIDE)
        top = higher

    last = True
    if SPLIT > 1:
        SIZE: tl.constexpr = BLOCK_G * (BLOCK_D + 2)
        tile = (line * 1).to(tl.int32)
        base = partial + line * (SPLIT * SIZE)
        cell = dim[:, None] * BLOCK_G + head[None, :]
        mine = base + split * SIZE
        tl.store(mine + head, top)
        tl.store(mine + BLOCK_G + head, mass)
        tl.store(mine + 2 * BLOCK_G + cell, mixed)
        # The counter is raised by one thread: the others must have stored before.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        last = arrived == SPLIT - 1
        if last:
            tl.store(counters + tile, 0)
            top = tl.full((BLOCK_G,), LOWEST, tl.float32)
            mass = tl.zeros((BLOCK_G,), tl.float32)
            mixed = tl.zeros((BLOCK_D, BLOCK_G), tl.float32)
            for part in range(SPLIT):
                other = base + part * SIZE
                its_top = tl.load(other + head, cache_modifier=".cg")
                higher = tl.maximum(top, its_top)
                kept, added = tl.exp(top - higher), tl.exp(its_top - higher)
                mass = mass * kept + tl.load(other + BLOCK_G + head, cache_modifier=".cg") * added
                its = tl.load(other + 2 * BLOCK_G + cell, cache_modifier=".cg")
                mixed = mixed * kept[None, :] + its * added[None, :]
                top = higher
    sink = tl.load(sinks + kv * GROUP + head, mask=head_ok, other=0.0).to(tl.float32)
    higher = tl.maximum(top, sink)
    faded = tl.exp(top - higher)
    share = faded / (mass * faded + tl.exp(sink - higher))
    result = tl.trans(mixed * share[None, :]).to(out.dtype.element_ty)
    tl.store(out + at_q, result, mask=head_ok[:, None] & dim_ok[None, :] & last)


def splits_for(lines: int, slots: int, multiprocessors: int) -> int:
    """Into how many programs a cache of `slots` is cut where there are `lines` (sequence, key head) pairs."""
    blocks = -(-slots // BLOCK_SLOTS)
    wanted = -(-2 * multiprocessors // lines)
    return 1 if lines > COUNTERS else max(1, min(blocks, wanted, MOST_SPLITS))


def attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, column: Tensor, pads: Tensor, sinks: Tensor,
    window: int | None, out: Tensor, multiprocessors: int, wide: bool,
) -> Launch:  # fmt: skip
    """out [batch, heads * head_dim] of q likewise, over keys and values [batch, kv_heads, slots, head_dim].

    positions int64 [batch, slots] (-1: empty), column int64 [1] the slot column just written, pads int64
    [batch], sinks [heads] the logit a head may attend to besides; window None means all positions.
    """
    batch, kv_heads, slots, head_dim = keys.shape
    group = q.shape[1] // head_dim // kv_heads
    split = splits_for(batch * kv_heads, slots, multiprocessors)
    wide_g, wide_d = max(8, next_power_of_two(group)), max(16, next_power_of_two(head_dim))
    partial, counters = workspace(q.device, joined(split, batch * kv_heads, wide_g * (wide_d + 2)))
    arguments: dict[str, Any] = {
        "q": q, "keys": keys, "values": values, "positions": positions, "column": column, "pads": pads,
        "sinks": sinks, "out": out, "partial": partial, "counters": counters, "scale": head_dim**-0.5,
        "KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "SLOTS": slots, "WINDOW": window or 0,
        "SPLIT": split, "STEPS": -(-slots // (BLOCK_SLOTS * split)), "WIDE": wide,
        "BLOCK_S": BLOCK_SLOTS, "BLOCK_G": wide_g, "BLOCK_D": wide_d,
    }  # fmt: skip
    return Launch(_attention_kernel, (batch, kv_heads, split), arguments, 4, 3)
