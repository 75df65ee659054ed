"""The decode step's kernels at the shapes of gpt-oss-20b, as launches on no device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_surgery.kernels.triton.decode.attention import attention
from moe_surgery.kernels.triton.decode.fused_projections import KVWrite, ProjectionInput, output, qkv, unembed
from moe_surgery.kernels.triton.decode.norm import residual_norm
from moe_surgery.kernels.triton.launch import Launch

__all__ = ["BATCHES", "decode_entries"]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2880, 64, 8, 64, 201088
RING, WINDOW, CONTEXT = 144, 128, 1024
# One of each width that `dense_blocks_for` gives.
BATCHES = (1, 8, 16, 32, 64)


def decode_entries(multiprocessors: int, batches: tuple[int, ...] = BATCHES) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of all kernels for a card of so many multiprocessors; the tensors are meta."""
    for batch in batches:
        yield from _step(batch, multiprocessors, torch.bfloat16)
    yield from ((f"{name} float32", launch) for name, launch in _step(8, multiprocessors, torch.float32))


def _step(batch: int, multiprocessors: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    upcast_fp32 = dtype != torch.bfloat16
    h, y, total, norm_weight = (_empty(n, HIDDEN, dtype=dtype) for n in (batch, batch, batch, 1))
    ids, cache_position, pads = _whole(batch), _whole(1), _whole(batch)
    embedding = _empty(VOCABULARY, HIDDEN)
    if batch == 1:
        first = ProjectionInput(h, embedding, None, ids, norm_weight, total, 1e-5)
        later = ProjectionInput(h, h, y, None, norm_weight, total, 1e-5)
    else:
        first = later = ProjectionInput(h)
        yield f"norm gathered {batch}", residual_norm(embedding, None, norm_weight, h, 1e-5, total, ids)
        yield f"norm added {batch}", residual_norm(h, y, norm_weight, h, 1e-5, total)
    yield f"norm {batch}", residual_norm(total, None, norm_weight, h, 1e-5)
    q = _empty(batch, HEADS * HEAD_DIM, dtype=dtype)
    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    weight, bias = _empty(rows, HIDDEN), _empty(rows)
    cos, sin = (_empty(CONTEXT, HEAD_DIM // 2, dtype=torch.float32) for _ in range(2))
    for slots, window in ((CONTEXT, None), (RING, WINDOW)):
        keys, values = (_empty(batch, KV_HEADS, slots, HEAD_DIM, dtype=dtype) for _ in range(2))
        positions = _whole(batch, slots)
        kv_write = KVWrite(keys, values, positions, cache_position, pads, cos, sin)
        kind = "full" if window is None else "ring"
        yield f"qkv {kind} {batch}", qkv(later, weight, bias, q, kv_write, upcast_fp32)
        if batch == 1 and window is None:
            yield f"qkv gathered {batch}", qkv(first, weight, bias, q, kv_write, upcast_fp32)
        yield (
            f"attention {kind} {batch}",
            attention(
                q,
                keys,
                values,
                positions,
                cache_position,
                pads,
                _empty(HEADS),
                window,
                q,
                multiprocessors,
                upcast_fp32,
            ),
        )
    yield f"output {batch}", output(q, total, _empty(HIDDEN, q.shape[1]), _empty(HIDDEN), h, upcast_fp32)
    logits = _empty(batch, VOCABULARY, dtype=torch.float32)
    yield f"unembed {batch}", unembed(later, embedding, logits, cache_position, upcast_fp32)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _whole(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int64)
