"""Dense values to Q8_0, ggml's 8-bit blocks, compiled where possible and numpy otherwise, with the same bits.

A block is 32 values as 34 bytes: the scale d as F16, then 32 signed bytes q; value i is d * q[i]. The rule is
ggml's (`quantize_row_q8_0_ref` of ggml-quants.c): d = max|x| / 127 and q = x * (1 / d), rounded to the
nearest, ties away from zero, all in float32. Where 1 / d overflows q is 0, since d is 0 in F16.

Calls release the GIL and run on one thread: to use more, call them for disjoint parts from several.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.formats.convert import Words, cast
from moe_surgery.formats.expert_format import BF16, F32, ExpertFormat
from moe_surgery.formats.native import native_module

__all__ = ["BLOCK_BYTES", "BLOCK_VALUES", "encode", "instruction_sets"]

BLOCK_VALUES: Final = 32
BLOCK_BYTES: Final = 34

_BLOCK: Final = np.dtype([("scale", "<u2"), ("codes", "i1", 32)])
_STRIP_BLOCKS: Final = 2048
"""Blocks at a time in numpy, so that temporaries stay in the CPU cache."""


def instruction_sets() -> tuple[str, ...]:
    """The values of `isa` available on this machine, best first; "numpy" is always among them."""
    module = native_module()
    return (*(module.q8_0_instruction_sets() if module else ()), "numpy")


def encode(values: Words, source: ExpertFormat, out: NDArray[np.uint8], *, isa: str | None = None) -> None:
    """Encode bits [N] of the dense format `source`, N a multiple of 32, to out u8 [N / 32 * 34]; both contiguous.

    `isa` is one of `instruction_sets()`, None for the best. Raises InvalidInputError, naming the position, for a
    NaN, an infinity, or a value so large that the scale is no F16; UsageError for sizes or an `isa` that do not fit.
    """
    blocks, rest = divmod(len(values), BLOCK_VALUES)
    if rest or out.shape != (blocks * BLOCK_BYTES,):
        raise UsageError(f"{len(values)} values are not whole blocks of Q8_0 for {out.size} bytes")
    if isa is not None and isa not in (known := instruction_sets()):
        raise UsageError(f"isa {isa!r} is not available here: choose one of {', '.join(known)}")
    if source != BF16:
        values = cast(values, source, F32)
    module = None if isa == "numpy" else native_module()
    bad = _encode(values, out) if module is None else module.encode_q8_0(values, out, isa or "")
    if bad >= 0:
        raise InvalidInputError(f"values from {bad * BLOCK_VALUES}: {_problem(values, bad)}")


def _encode(values: Words, out: NDArray[np.uint8]) -> int:
    """The first block that Q8_0 cannot hold, or -1."""
    target, bad = out.view(_BLOCK), -1
    for first in range(0, len(target), _STRIP_BLOCKS):
        strip = target[first : first + _STRIP_BLOCKS]
        x = _floats(values, first, len(strip))
        with np.errstate(all="ignore"):
            scale = np.abs(x).max(axis=1) / np.float32(127)  # NaN if any value is
            f16 = scale.astype(np.float16)
            inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
            inverse[~np.isfinite(inverse)] = 0
            x *= inverse[:, None]
            magnitude = np.abs(x)
            whole = np.floor(magnitude)
            whole += magnitude - whole >= np.float32(0.5)
            strip["codes"] = np.copysign(whole, x)
        strip["scale"] = f16.view(np.uint16)
        if bad < 0 and not (finite := np.isfinite(f16)).all():
            bad = first + int(np.argmin(finite))
    return bad


def _floats(values: Words, first: int, count: int) -> NDArray[np.float32]:
    """Blocks [first, first + count) as float32 [count, 32], a copy."""
    bits = values[first * BLOCK_VALUES : (first + count) * BLOCK_VALUES].astype(np.uint32)
    if values.dtype == np.uint16:
        bits <<= np.uint32(16)
    return bits.view(np.float32).reshape(count, BLOCK_VALUES)


def _problem(values: Words, block: int) -> str:
    x = _floats(values, block, 1)
    if not np.isfinite(x).all():
        return "a NaN or an infinity"
    return f"{np.abs(x).max():.6g} is too large for the F16 scale of a block"
