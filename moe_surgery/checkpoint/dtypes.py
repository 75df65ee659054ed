"""Element types of the safetensors format, and the size of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError

__all__ = ["DTYPE_BITS", "MAX_DIMENSION", "tensor_nbytes"]

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "F64": 64,
        "I64": 64,
        "U64": 64,
        "C64": 64,
    }
)
"""Bits per element of every dtype name that safetensors 0.8 reads."""

MAX_DIMENSION = 2**63 - 1
"""The largest dimension: what a signed 64-bit size holds."""

_MAX_BITS = 2**64 - 1


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a dense tensor of `shape`; an empty shape is one element.

    The size in bits has to fit 64 unsigned bits, as it does for readers that count in machine
    words. Zero dimensions are left out of that product: [0, 2**62, 8] is refused as
    [2**62, 8] is, so that the result does not depend on the order of the dimensions.

    Raises InvalidInputError (without a file name, which the caller adds) for an unknown dtype, a
    dimension outside 0 .. MAX_DIMENSION, a size past 64 bits, or sub-byte elements that do not
    fill whole bytes.
    """
    bits_per_element = DTYPE_BITS.get(dtype)
    if bits_per_element is None:
        raise InvalidInputError(f"unknown dtype '{printable(dtype)}', known: {', '.join(DTYPE_BITS)}")
    bits = bits_per_element
    empty = False
    for dimension in shape:
        if not 0 <= dimension <= MAX_DIMENSION:
            raise InvalidInputError(f"dimension {dimension} is outside 0 .. {MAX_DIMENSION}")
        if dimension == 0:
            empty = True
        else:
            bits *= dimension
        if bits > _MAX_BITS:
            raise InvalidInputError(f"shape with dtype {dtype} overflows 64-bit sizes")
    if empty:
        return 0
    if bits % 8:
        raise InvalidInputError(f"{bits} bits of {dtype} do not fill whole bytes")
    return bits // 8
