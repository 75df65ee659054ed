"""MXFP4 <-> BF16 in numpy: the specification that the compiled kernels follow bit for bit.

A block is 32 values: 16 bytes, value 2j in the low nibble and 2j+1 in the high nibble of byte j, and
one scale byte s. A nibble is a code: bit 3 the sign, bits 0..2 one of 0, 0.5, 1, 1.5, 2, 3, 4, 6. The
value is that times 2^(s-127). It is exact in BF16, subnormals included; what is too large for BF16
(possible for s >= 253) becomes an infinity. The sign survives in every case, also that of zero.
BF16 values are handled as uint16 arrays that hold their bits.

Functions here do not check their arguments; `moe_surgery.formats.mxfp4` does.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Encoded", "bf16_bits", "bf16_to_float64", "decode", "decode_transposed", "encode_transposed"]

MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIGN: Final = 0x8000
MAGNITUDE: Final = 0x7FFF
INFINITY: Final = 0x7F80
# Of the scales that overflow (253, 254, 255) the one whose finite values include the others'.
OVERFLOW_SCALE: Final = 253
# The largest scale under which every code is finite.
LARGEST_SCALE: Final = 252


class Encoded(NamedTuple):
    """What an encoding lost; `bad` is the (row, block) of the first block MXFP4 cannot hold."""

    inexact_blocks: int
    error_sq: float
    norm_sq: float
    bad: tuple[int, int] | None


def bf16_bits(value: float) -> int:
    """Return the BF16 bits of a value >= 0 that BF16 holds exactly, or infinity if it is too large.

    Computed on integers, so that subnormals are right even in a thread that flushes them to zero.
    """
    fraction, exponent = math.frexp(value)  # value = fraction * 2^exponent, 0.5 <= fraction < 1
    biased = exponent + 126
    if value == 0.0:
        return 0
    if biased >= 255:
        return INFINITY
    if biased >= 1:
        return (biased << 7) | (int(fraction * 256) & 127)
    return int(fraction * 256) >> (1 - biased)


@cache
def float64_table() -> NDArray[np.float64]:
    """The value of every BF16 bit pattern: float64 [65536]; also in a thread that flushes subnormals to zero."""
    bits = np.arange(1 << 16)
    exponent, fraction = (bits >> 7) & 255, bits & 127
    significand = np.where(exponent > 0, fraction + 128, fraction).astype(np.float64)
    magnitude = np.ldexp(significand, np.maximum(exponent, 1) - 134)
    magnitude = np.where(exponent < 255, magnitude, np.where(fraction > 0, np.nan, np.inf))
    return np.where(bits & SIGN, -magnitude, magnitude)


def bf16_to_float64(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Return the values of BF16 bits, exactly, in an array of the same shape."""
    return float64_table()[bits]


@cache
def decode_table() -> NDArray[np.uint16]:
    """BF16 bits of every code under every scale: uint16 [256 scales, 16 codes]."""
    rows = [[bf16_bits(value * 2.0 ** (scale - 127)) for value in MAGNITUDES] for scale in range(256)]
    positive = np.array(rows, dtype=np.uint16)
    return np.concatenate([positive, positive | SIGN], axis=1)


@cache
def pair_table() -> NDArray[np.uint32]:
    """Both values of every byte under every scale, as uint32 [256 * 256] in memory order."""
    table = decode_table()
    byte = np.arange(256)
    pairs = np.stack([table[:, byte & 15], table[:, byte >> 4]], axis=-1)
    return np.ascontiguousarray(pairs).view(np.uint32).reshape(-1)


@cache
def rounding_table() -> NDArray[np.uint16]:
    """Least magnitude that rounds to code i + 1 or above: uint16 [256 scales, 7].

    Midpoints between neighbouring values are BF16 numbers. A tie goes to the even code, so from a
    midpoint above an even code one must be exceeded, which is one more in the bits.
    """
    table = np.empty((256, 7), dtype=np.uint16)
    for scale in range(256):
        for code in range(7):
            midpoint = (MAGNITUDES[code] + MAGNITUDES[code + 1]) / 2
            table[scale, code] = bf16_bits(midpoint * 2.0 ** (scale - 127)) + (code % 2 == 0)
    return table


def decode(blocks: NDArray[np.uint8], scales: NDArray[np.uint8], out: NDArray[np.uint16]) -> None:
    """Decode blocks u8 [R, G, 16] and scales u8 [R, G] into out u16 [R, 32 G]."""
    out[...] = _decode_blocks(blocks, scales)


def decode_transposed(blocks: NDArray[np.uint8], scales: NDArray[np.uint8], out: NDArray[np.uint16]) -> None:
    """Decode blocks u8 [R, G, 16] and scales u8 [R, G] into out u16 [32 G, R]."""
    for group in range(blocks.shape[1]):
        values = _decode_blocks(blocks[:, group : group + 1], scales[:, group : group + 1])
        out[32 * group : 32 * (group + 1)] = values.T


def _decode_blocks(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.uint16]:
    index = (scales.astype(np.uint16) << 8)[:, :, None] | blocks
    rows, groups = scales.shape
    pairs: NDArray[np.uint32] = pair_table()[index]
    return pairs.view(np.uint16).reshape(rows, 32 * groups)


def encode_transposed(
    values: NDArray[np.uint16], blocks: NDArray[np.uint8], scales: NDArray[np.uint8]
) -> Encoded:
    """Encode values u16 [32 G, R] into blocks u8 [R, G, 16] and scales u8 [R, G].

    Block g of row r holds values[32 g : 32 g + 32, r].
    """
    inexact_blocks, error_sq, norm_sq = 0, 0.0, 0.0
    bad: list[tuple[int, int]] = []
    for group in range(blocks.shape[1]):
        part = values[32 * group : 32 * (group + 1)]
        scale = choose_scales(part)
        codes = nearest_codes(part, scale)
        decoded = decode_table()[scale, codes]
        blocks[:, group] = (codes[0::2] | (codes[1::2] << 4)).T
        scales[:, group] = scale

        exact = (decoded == part).all(axis=0)
        finite = ((part & MAGNITUDE) < INFINITY).all(axis=0)
        bad += [(int(row), group) for row in np.flatnonzero(~finite & ~exact)[:1]]
        inexact_blocks += int(np.count_nonzero(~exact))
        original = bf16_to_float64(part[:, finite])
        error = original - bf16_to_float64(decoded[:, finite])
        error_sq += float(np.sum(error * error))
        norm_sq += float(np.sum(original * original))
    return Encoded(inexact_blocks, error_sq, norm_sq, min(bad, default=None))


def choose_scales(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Return the scale bytes u8 [R] of R blocks, given as values u16 [32, R].

    Of `first_scales` and the scales one below and one above, where these exist and are at most
    `LARGEST_SCALE`, the one under which the nearest codes have the least sum of squared errors; among
    equals the one with the least error of the largest value, then the first scale, then the lower one.
    A block that is exact under its first scale keeps it, and so does one with an infinity or a NaN.
    """
    scale = first_scales(values)
    exact = decode_table()[scale, nearest_codes(values, scale)] == values
    finite = (values & MAGNITUDE) < INFINITY
    inexact = np.flatnonzero(finite.all(axis=0) & ~exact.all(axis=0))
    scale[inexact] = _least_error(values[:, inexact], scale[inexact])
    return scale


def first_scales(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Return the scale bytes u8 [R] that fit the largest value of each block of values u16 [32, R].

    The largest magnitude gets the binade of the largest code (6 = 1.5 * 2^2): its exponent field less
    2, and not below 0. A block of zeros therefore gets 0. A block with an infinity gets
    `OVERFLOW_SCALE`: if any scale can represent the block, that one can.
    """
    largest = (values & MAGNITUDE).max(axis=0)
    exponent = (largest >> 7).astype(np.int64)
    scale = np.where(largest >= INFINITY, OVERFLOW_SCALE, np.maximum(exponent - 2, 0))
    return scale.astype(np.uint8)


def _least_error(values: NDArray[np.uint16], first: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The best of the scales `first`, `first` - 1 and `first` + 1 for finite values u16 [32, R].

    A value x with the code's value q adds (x - q)^2 - x^2 = q (q - 2x) to an error that is the same for
    all scales. That is 0 where q is 0, and x is at least a quarter of the scale where it is not; so with
    BF16's 8 bits (and up to float32's 24) float64 holds every term and every sum exactly.
    """
    x = np.abs(bf16_to_float64(values)) * np.ldexp(1.0, 127 - first.astype(np.int64))
    columns = np.arange(values.shape[1])
    largest = x.argmax(axis=0)

    def errors(scale: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        codes = nearest_codes(values, scale.astype(np.uint8)) & 7
        q = np.array(MAGNITUDES)[codes] * np.ldexp(1.0, scale - first)
        return np.sum(q * (q - 2 * x), axis=0), np.abs(x - q)[largest, columns]

    best = first.astype(np.int64)
    error, error_of_largest = errors(best)
    for step in (-1, 1):
        scale = np.clip(first.astype(np.int64) + step, 0, LARGEST_SCALE)
        total, of_largest = errors(scale)
        better = (total < error) | ((total == error) & (of_largest < error_of_largest))
        best = np.where(better, scale, best)
        error, error_of_largest = (
            np.where(better, new, old) for new, old in ((total, error), (of_largest, error_of_largest))
        )
    return best.astype(np.uint8)


def nearest_codes(values: NDArray[np.uint16], scale: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return codes u8 [32, R] of values u16 [32, R] under the scales u8 [R].

    To the nearest value, ties to the even code, at most 6; the sign is kept. An infinity gets the
    lowest code that overflows.
    """
    magnitude = values & MAGNITUDE
    codes = ((values >> 12) & 8).astype(np.uint8)
    for least in rounding_table()[scale].T:  # seven times u16 [R]
        codes += magnitude >= least
    return codes
