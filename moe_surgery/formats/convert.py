"""Dense values from one float format to another, and to MXFP4: numpy, and the native MXFP4 encoder.

Bits are handled as unsigned integers, so that threads that flush subnormal floats to zero change
nothing. Narrowing rounds once, to the nearest value, ties to even; a finite value beyond the target's
largest is refused, not turned into an infinity.

To MXFP4 from F16 or F32: every value is cut to BF16 with the cut bits folded into the last bit that
stays (rounding to odd: it is set if any cut bit was). MXFP4's values and the midpoints between them
have far fewer bits than BF16, so the nearest code of the cut value, ties to even, is that of the value
itself: rounded once. The scale is chosen by BF16's rule (`moe_surgery.formats.mxfp4_numpy`) on the cut
values: it differs from the scale that the values themselves would choose only in near ties. Errors are
measured against the values themselves. Values that BF16 represents exactly give BF16's bytes.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moe_surgery.errors import InvalidInputError
from moe_surgery.formats import mxfp4
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.formats.expert_format import BF16, F16, F32, ExpertFormat

__all__ = ["STRIP_ROWS", "Words", "cast", "encode_transposed", "round_to_odd", "words_of"]

STRIP_ROWS: Final = 64
"""Rows encoded at a time, which bounds temporary memory."""

STRIP_VALUES: Final = 1 << 16
"""Values cast at a time: they stay in the CPU cache."""

Words = NDArray[np.unsignedinteger[Any]]

_F32_INFINITY: Final = 0x7F800000
# F32 bits that round to 2^16, or to 2^128 in BF16, or above: half a step beyond the largest value.
_OVERFLOW: Final = {F16: 0x477FF000, BF16: 0x7F7F8000}


def words_of(raw: NDArray[np.uint8], expert_format: ExpertFormat) -> Words:
    """Bytes of a dense format as an array of its values' bits, one axis; no copy."""
    return raw.view(np.uint32) if expert_format.block_bytes == 4 else raw.view(np.uint16)


def cast(values: Words, source: ExpertFormat, target: ExpertFormat) -> Words:
    """`values`, bits of the dense format `source`, as bits of the dense format `target`; any shape.

    Infinities and NaN are preserved. Raises InvalidInputError for a finite value that `target`
    cannot hold.
    """
    if source == target:
        return values
    flat, out = values.reshape(-1), np.empty(values.size, np.uint32 if target == F32 else np.uint16)
    too_large, largest = 0, 0.0
    for first in range(0, flat.size, STRIP_VALUES):
        strip = slice(first, first + STRIP_VALUES)
        f32 = _f32_bits(flat[strip], source)
        if target == F32:
            out[strip] = f32
            continue
        magnitude = f32 & np.uint32(0x7FFFFFFF)
        if magnitude.max(initial=0) >= _OVERFLOW[target]:
            over = (magnitude >= _OVERFLOW[target]) & (magnitude < _F32_INFINITY)
            too_large += np.count_nonzero(over)
            largest = max(largest, float(magnitude[over].max(initial=0).view(np.float32)))
        out[strip] = _to_bf16(f32, magnitude) if target == BF16 else _to_f16(f32)
    if too_large:
        raise InvalidInputError(
            f"{too_large:,} values, up to {largest:.6g}, are too large for {target.label}"
        )
    return out.reshape(values.shape)


def round_to_odd(values: Words, source: ExpertFormat) -> NDArray[np.uint16]:
    """Bits of F16 or F32 as BF16 bits: cut, the last bit set where a cut bit was."""
    return _cut(_f32_bits(values, source))


def encode_transposed(
    values: Words, source: ExpertFormat, blocks: NDArray[np.uint8], scales: NDArray[np.uint8]
) -> EncodeReport:
    """Encode bits [K, R] of the dense format `source` to MXFP4: blocks u8 [R, K/32, 16], scales u8 [R, K/32].

    K is a multiple of 32; the last axis of `values` is contiguous. Raises InvalidInputError, naming the
    position, for a NaN, or an infinity that no MXFP4 block decodes to.
    """
    if source == BF16:
        return mxfp4.encode_transposed(values, blocks, scales)[2]
    reports = []
    for first in range(0, values.shape[1], STRIP_ROWS):
        strip = slice(first, first + STRIP_ROWS)
        f32 = _f32_bits(values[:, strip], source)
        try:
            report = mxfp4.encode_transposed(_cut(f32), blocks[strip], scales[strip])[2]
        except InvalidInputError:
            mxfp4.encode_transposed(round_to_odd(values, source))  # names the row of the whole matrix
            raise
        reports.append(_measured(f32, blocks[strip], scales[strip], report))
    return EncodeReport.total(reports)


def _measured(
    f32: NDArray[np.uint32], blocks: NDArray[np.uint8], scales: NDArray[np.uint8], report: EncodeReport
) -> EncodeReport:
    """`report` with errors against F32 bits [K, R], over the blocks of finite values; sums in float64."""
    original = f32.view(np.float32).astype(np.float64)
    decoded = _f32_bits(mxfp4.decode_transposed(blocks, scales), BF16).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        error = original - decoded
    if (f32 & np.uint32(0x7FFFFFFF)).max() >= _F32_INFINITY:
        grouped = f32.reshape(scales.shape[1], mxfp4.BLOCK_VALUES, scales.shape[0])
        finite = ((grouped & np.uint32(_F32_INFINITY)) != _F32_INFINITY).all(axis=1, keepdims=True)
        for values in (original, error):
            values.reshape(grouped.shape)[~np.broadcast_to(finite, grouped.shape)] = 0.0
    error_sq, norm_sq = (float(np.einsum("kr,kr->", v, v)) for v in (error, original))
    return EncodeReport(report.blocks, report.inexact_blocks, error_sq, norm_sq)


def _cut(f32: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """F32 bits as BF16 bits, rounded to odd. Little endian: the halves of a word are read in place."""
    halves = f32.view(np.uint16).reshape(*f32.shape, 2)
    odd: NDArray[np.uint16] = halves[..., 1] | (halves[..., 0] != 0)
    return odd


def _f32_bits(values: Words, source: ExpertFormat) -> NDArray[np.uint32]:
    """F32 bits of the same values, exactly; contiguous."""
    if source == F32:
        return np.ascontiguousarray(values, np.uint32)
    if source == F16:
        # numpy converts subnormal values by their bits, even if the thread flushes them to zero.
        return np.ascontiguousarray(values).view(np.float16).astype(np.float32).view(np.uint32)
    f32 = values.astype(np.uint32, order="C")
    f32 <<= np.uint32(16)
    return f32


def _to_bf16(f32: NDArray[np.uint32], magnitude: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """F32 bits rounded to BF16; those beyond its largest value are infinities and NaN alone."""
    rounded = f32 >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += f32
    rounded >>= np.uint32(16)
    if magnitude.max(initial=0) > _F32_INFINITY:
        nan = magnitude > _F32_INFINITY
        quiet = np.uint32(0x40)  # set, so that no NaN becomes an infinity
        rounded[nan] = (f32[nan] >> np.uint32(16)) | quiet
    bits: NDArray[np.uint16] = rounded.astype(np.uint16)
    return bits


def _to_f16(f32: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """F32 bits rounded to F16, subnormal results included."""
    with np.errstate(invalid="ignore", over="ignore"):
        return f32.view(np.float32).astype(np.float16).view(np.uint16)
