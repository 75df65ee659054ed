"""Orders, scores and curves as base64: small enough for a page that shows a large model.

An order of n experts takes about log2(n) - 1 bits per expert and is exact. Scores are either float32, or follow the
order of each layer downwards in even steps, which takes little more than a bit per expert.
"""

from __future__ import annotations

import base64

import numpy as np
import numpy.typing as npt

__all__ = ["bits", "coded_length", "floats", "order_bytes", "orders", "shares", "step_bytes", "steps"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_CODES = 65535


def coded_length(count: int) -> int:
    """Length of `count` bytes in base64."""
    return 4 * -(-count // 3)


def _widths(experts: int, listed: int) -> list[int]:
    """Bits of each digit: the position among the experts that are not listed yet."""
    return [(experts - 1 - i).bit_length() for i in range(listed)]


def order_bytes(experts: int, listed: int) -> int:
    """Bytes that `orders` uses for a row."""
    return -(-sum(_widths(experts, listed)) // 8)


def orders(rows: Ints, listed: int) -> str:
    """`rows` [rows, experts], each an order: its first `listed` experts.

    Each expert is its position among those not listed yet, ascending, in just enough bits, the highest first;
    a row ends on a whole byte.
    """
    rows = rows.astype(np.int32)
    digits = rows[:, :listed].copy()
    for i in range(1, listed):
        digits[:, i] -= np.count_nonzero(rows[:, :i] < rows[:, i : i + 1], axis=1)
    parts = [
        (digits[:, i, None] >> np.arange(width - 1, -1, -1, dtype=np.int32)) & 1
        for i, width in enumerate(_widths(rows.shape[1], listed))
    ]
    return _coded(np.packbits(np.concatenate(parts, axis=1).astype(np.uint8), axis=1))


def floats(values: Floats) -> str:
    """`values` as float32, little-endian."""
    return _coded(values.astype("<f4"))


def bits(flags: npt.NDArray[np.bool_]) -> str:
    """A bit per flag, the highest first."""
    return _coded(np.packbits(flags.ravel()))


def shares(values: Floats) -> str:
    """Numbers from 0 to 1 as 16 bits, little-endian."""
    return _coded(np.rint(np.clip(values, 0, 1) * _CODES).astype("<u2"))


def step_bytes(listed: int, levels: int) -> int:
    """Bytes that `steps` uses for a row, without its largest score."""
    return -(-(listed + levels) // 8)


def steps(ranked: Floats, levels: int) -> list[str]:
    """`ranked` [rows, listed], each row descending and not negative: [the largest of each row, the way down].

    Each score is its largest times (level / `levels`)^2, so it is off by 1 / `levels` of the largest at most. The way
    down starts at the highest level; a bit is 0 for a level down, or 1 for the next expert. A row ends on a whole
    byte.
    """
    top = ranked[:, 0]
    share = np.divide(ranked, top[:, None], out=np.zeros_like(ranked), where=top[:, None] > 0)
    down = levels - np.rint(np.sqrt(share) * levels).astype(np.int64)
    way = np.zeros((len(ranked), ranked.shape[1] + levels), np.uint8)
    np.put_along_axis(way, down + np.arange(ranked.shape[1]), 1, axis=1)
    return [floats(top), _coded(np.packbits(way, axis=1))]


def _coded(values: npt.NDArray[np.generic]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
