"""Products with a weight as stored, and with its transpose: cast or decoded piece by piece, and nothing kept of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_surgery.formats import mxfp4
from moe_surgery.kernels.q8_0 import Matrix, Q8Matrix
from moe_surgery.kernels.reference.mxfp4 import decode
from moe_surgery.kernels.weights import DenseWeight, Mxfp4Weight, Weight

__all__ = ["times", "times_transposed"]

PIECE_BYTES = 16 << 20
"""Of a weight in the compute dtype."""


def times(x: Tensor, weight: Matrix | Weight, expert: int = 0) -> Tensor:
    """x [..., columns] @ W.T in x's dtype, for W [rows, columns] itself or that of a stored expert."""
    pieces = [x @ values.T for _, values in _pieces(weight, expert, x.dtype)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def times_transposed(y: Tensor, weight: Matrix | Weight, expert: int = 0) -> Tensor:
    """y [..., rows] @ W: the gradient of x for the gradient y of `times`."""
    total: Tensor | None = None
    for rows, values in _pieces(weight, expert, y.dtype):
        part = y[..., rows] @ values
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _pieces(weight: Matrix | Weight, expert: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows, and their values [rows, columns] in `dtype`, of about `PIECE_BYTES`."""
    if isinstance(weight, DenseWeight):
        weight = weight.values[expert].T
    rows, columns = (weight.rows, weight.columns) if isinstance(weight, Mxfp4Weight) else weight.shape
    whole = isinstance(weight, Tensor) and weight.dtype == dtype
    step = rows if whole else max(1, PIECE_BYTES // (columns * dtype.itemsize))
    for start in range(0, rows, step):
        where = slice(start, min(start + step, rows))
        if isinstance(weight, Tensor):
            yield where, weight[where].to(dtype)
        elif isinstance(weight, Q8Matrix):
            yield where, weight.dequantise(where.start, where.stop).to(dtype)
        else:
            yield where, _decoded(weight, expert, where, dtype)


def _decoded(weight: Mxfp4Weight, expert: int, where: slice, dtype: torch.dtype) -> Tensor:
    """By the compiled conversion on the CPU; the bits are the same."""
    blocks, scales = weight.blocks[expert, where], weight.scales[expert, where]
    if blocks.device.type != "cpu":
        return decode(blocks, scales, dtype)
    bits = mxfp4.decode(blocks.numpy(), scales.numpy())
    return torch.from_numpy(bits).view(torch.bfloat16).to(dtype)
