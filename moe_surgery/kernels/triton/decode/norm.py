"""Residual and RMSNorm in one launch; in the first layer the residual is a row of the embedding."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.kernels.triton.launch import Launch, next_power_of_two

__all__ = ["residual_norm"]


@triton.jit
def _residual_norm_kernel(
    x, y, row_ids, weight, total, h, eps,
    HIDDEN: tl.constexpr, ADD: tl.constexpr, GATHER: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total = x + y in x's dtype, h = rmsnorm(total); one program per token."""
    token = tl.program_id(0).to(tl.int64)
    row = token
    if GATHER:
        row = tl.load(row_ids + token).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    value = tl.load(x + row * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(y + token * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
        # The residual stream has x's dtype: the norm's input is the stored value.
        value = value.to(x.dtype.element_ty).to(tl.float32)
    if KEEP:
        tl.store(total + token * HIDDEN + column, value.to(total.dtype.element_ty), mask=mask)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / HIDDEN + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + token * HIDDEN + column, (value * scale * w).to(h.dtype.element_ty), mask=mask)


def residual_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, h: Tensor, eps: float,
    total: Tensor | None = None, row_ids: Tensor | None = None,
) -> Launch:  # fmt: skip
    """h [tokens, hidden] = rmsnorm(x + y) * weight in float32, in h's dtype; stores x + y in `total`.

    x [tokens, hidden], or [any, hidden] with row row_ids[token] (int64 [tokens]) for each token; y [tokens, hidden]
    or None; weight [hidden]. `total` may be x itself unless there are `row_ids`.
    """
    tokens, hidden = h.shape
    block = next_power_of_two(hidden)
    arguments: dict[str, Any] = {
        "x": x, "y": x if y is None else y, "row_ids": x if row_ids is None else row_ids, "weight": weight,
        "total": h if total is None else total, "h": h, "eps": eps,
        "HIDDEN": hidden, "ADD": y is not None, "GATHER": row_ids is not None, "KEEP": total is not None,
        "BLOCK": block,
    }  # fmt: skip
    # Eight values a thread: at sixteen the compiler for sm_100 spills.
    return Launch(_residual_norm_kernel, (tokens, 1, 1), arguments, min(16, max(1, block // 256)), 1)
