"""MXFP4 blocks in ggml's order of bits.

A ggml block (`block_mxfp4` of ggml-common.h) is the scale byte and then 16 bytes of codes, where byte j
holds value j in the low nibble and value j + 16 in the high one. The checkpoint holds values 2j and
2j + 1 in byte j, and the scales in a separate tensor.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_BYTES", "BLOCK_VALUES", "pack"]

BLOCK_VALUES: Final = 32
BLOCK_BYTES: Final = 17

_BLOCK: Final = np.dtype([("scale", "u1"), ("codes", "V16")])
_LOW: Final = np.uint64(0x0F0F0F0F0F0F0F0F)
_HIGH: Final = np.uint64(0xF0F0F0F0F0F0F0F0)
_NIBBLE: Final = np.uint64(4)
_BYTE: Final = np.uint16(8)
_STRIP_BLOCKS: Final = 16384
"""Blocks at a time, so that temporaries stay in the CPU cache."""


def pack(blocks: NDArray[np.uint8], scales: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Write blocks u8 [R, G, 16] and scales u8 [R, G] as ggml blocks to out u8 [R * G * 17].

    The first axis of `blocks` and `scales` may have any stride, the others must be contiguous.
    """
    rows, groups = scales.shape
    target = out.view(_BLOCK).reshape(rows, groups)
    step = max(1, _STRIP_BLOCKS // groups)
    for first in range(0, rows, step):
        strip = slice(first, first + step)
        target["codes"][strip] = _codes(blocks[strip])
        target["scale"][strip] = scales[strip]


def _codes(blocks: NDArray[np.uint8]) -> NDArray[np.void]:
    """The 16 code bytes of every block in ggml's order: [R, G] of 16 bytes each.

    Bytes i and i + 8 of a block hold values 2i, 2i + 1 and 16 more: together they make ggml's bytes
    2i (their low nibbles) and 2i + 1 (their high nibbles).
    """
    rows, groups, _ = blocks.shape
    halves = blocks.view(np.uint64)
    front, back = halves[..., 0], halves[..., 1]
    even = back & _LOW
    even <<= _NIBBLE
    even |= front & _LOW
    odd = front >> _NIBBLE
    odd &= _LOW
    odd |= back & _HIGH
    pairs = np.empty(even.size * 8, np.uint16)
    np.left_shift(odd.reshape(-1).view(np.uint8), _BYTE, out=pairs, dtype=np.uint16)
    pairs |= even.reshape(-1).view(np.uint8)
    return pairs.view("V16").reshape(rows, groups)
