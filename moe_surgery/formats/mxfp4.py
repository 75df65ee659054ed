"""MXFP4 <-> BF16 conversion of expert weights, compiled where possible and numpy otherwise.

Both give the same bits; `moe_surgery.formats.mxfp4_numpy` is the specification. BF16 arrays are uint16
arrays of their bits. "Transposed" is the layout of BF16 checkpoints, [inputs, rows], against MXFP4's
[rows, inputs]. The first axis of every array may have any stride (a slice such as `blocks[:, a:b]`,
a range of columns of the output), the other axes must be contiguous; pointers may be unaligned.

Calls release the GIL and run on one thread: to use more, call them for disjoint parts from several.

`isa` names the implementation: None for the best one here, "numpy" for the reference, or one of
`instruction_sets()`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.formats import mxfp4_numpy
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.formats.native import native_module, native_status

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_VALUES",
    "decode",
    "decode_transposed",
    "encode_transposed",
    "instruction_sets",
]

BLOCK_VALUES: Final = 32
BLOCK_BYTES: Final = 16

_NATIVE_NAMES: Final = ("avx512", "avx2", "neon", "scalar")


def instruction_sets() -> tuple[str, ...]:
    """Return the values of `isa` available on this machine, best first; "numpy" is always among them."""
    module = native_module()
    return (*(module.instruction_sets() if module else ()), "numpy")


def decode(
    blocks: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    out: NDArray[np.uint16] | None = None,
    *,
    isa: str | None = None,
) -> NDArray[np.uint16]:
    """Decode to rows: blocks u8 [R, G, 16] and scales u8 [R, G] to u16 [R, 32 G].

    Writes into `out` if given, and returns it. Raises UsageError for a shape, dtype, layout or `isa`
    that does not fit.
    """
    rows, groups = _check_packed(blocks, scales)
    out = _check_or_make("out", out, np.uint16, (rows, BLOCK_VALUES * groups))
    _implementation(isa).decode(blocks, scales, out)
    return out


def decode_transposed(
    blocks: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    out: NDArray[np.uint16] | None = None,
    *,
    isa: str | None = None,
) -> NDArray[np.uint16]:
    """Decode and transpose: blocks u8 [R, G, 16] and scales u8 [R, G] to u16 [32 G, R].

    Row 32 b + j of the result is value j of block b of every row. Writes into `out` if given, and
    returns it. Raises UsageError for a shape, dtype, layout or `isa` that does not fit.
    """
    rows, groups = _check_packed(blocks, scales)
    out = _check_or_make("out", out, np.uint16, (BLOCK_VALUES * groups, rows))
    _implementation(isa).decode_transposed(blocks, scales, out)
    return out


def encode_transposed(
    values: NDArray[np.uint16],
    blocks: NDArray[np.uint8] | None = None,
    scales: NDArray[np.uint8] | None = None,
    *,
    isa: str | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], EncodeReport]:
    """Encode the transposed layout: values u16 [K, C], K a multiple of 32, to MXFP4 rows.

    Returns blocks u8 [C, K/32, 16], scales u8 [C, K/32] and a report; writes into `blocks` and
    `scales` if given. A block's scale is the one with the least squared error of three around its
    largest value (`mxfp4_numpy.choose_scales`); values go to the nearest code. What
    `decode_transposed` wrote comes back without loss, infinities included (codes and scale may differ
    from the original ones, the decoded bits do not).

    Raises InvalidInputError, naming the position, for a NaN, or an infinity that no MXFP4 block decodes to,
    and UsageError for a shape, dtype, layout or `isa` that does not fit.
    """
    _check_array("values", values, np.uint16, 2)
    inputs, rows = values.shape
    if inputs % BLOCK_VALUES:
        raise UsageError(f"values has {inputs} rows, which is not a multiple of {BLOCK_VALUES}")
    groups = inputs // BLOCK_VALUES
    blocks = _check_or_make("blocks", blocks, np.uint8, (rows, groups, BLOCK_BYTES))
    scales = _check_or_make("scales", scales, np.uint8, (rows, groups))
    result = mxfp4_numpy.Encoded(*_implementation(isa).encode_transposed(values, blocks, scales))
    if result.bad is not None:
        raise InvalidInputError(_describe_bad_block(values, *result.bad))
    report = EncodeReport(rows * groups, result.inexact_blocks, result.error_sq, result.norm_sq)
    return blocks, scales, report


class _Native:
    """The extension's functions with the instruction set filled in."""

    def __init__(self, module: Any, isa: str) -> None:
        self._module = module
        self._isa = isa

    def decode(self, *arrays: NDArray[Any]) -> None:
        self._module.decode(*arrays, self._isa)

    def decode_transposed(self, *arrays: NDArray[Any]) -> None:
        self._module.decode_transposed(*arrays, self._isa)

    def encode_transposed(self, *arrays: NDArray[Any]) -> Any:
        return self._module.encode_transposed(*arrays, self._isa)


def _implementation(isa: str | None) -> Any:
    module = native_module()
    if isa == "numpy" or (isa is None and module is None):
        return mxfp4_numpy
    if isa is None:
        return _Native(module, "")
    if isa not in _NATIVE_NAMES:
        raise UsageError(f"unknown isa {isa!r}: expected one of {', '.join((*_NATIVE_NAMES, 'numpy'))}")
    if isa not in instruction_sets():
        raise UsageError(f"isa {isa!r} is not available here: native extension {native_status()}")
    return _Native(module, isa)


def _check_packed(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> tuple[int, int]:
    _check_array("blocks", blocks, np.uint8, 3)
    _check_array("scales", scales, np.uint8, 2)
    if blocks.shape != (*scales.shape, BLOCK_BYTES):
        raise UsageError(
            f"blocks {list(blocks.shape)} and scales {list(scales.shape)} are not [R, G, 16] and [R, G]"
        )
    rows, groups = scales.shape
    return rows, groups


def _check_or_make(
    name: str, array: NDArray[Any] | None, dtype: type, shape: tuple[int, ...]
) -> NDArray[Any]:
    if array is None:
        return np.empty(shape, dtype=dtype)
    _check_array(name, array, dtype, len(shape))
    if array.shape != shape:
        raise UsageError(f"{name} has shape {list(array.shape)}, expected {list(shape)}")
    if not array.flags.writeable:
        raise UsageError(f"{name} is read-only")
    return array


def _check_array(name: str, array: NDArray[Any], dtype: type, dimensions: int) -> None:
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{name} is a {type(array).__name__}, expected a numpy array")
    if array.dtype != dtype or array.ndim != dimensions:
        raise UsageError(
            f"{name} is {array.dtype} with {array.ndim} axes, expected {dtype.__name__} with {dimensions}"
        )
    # The strides of an axis of one element, and of an empty array, do not matter.
    contiguous = array.size == 0 or array.shape[0] == 0 or array[0].flags.c_contiguous
    whole = array.shape[0] <= 1 or array.strides[0] % array.itemsize == 0
    if not (contiguous and whole):
        raise UsageError(f"{name} must be contiguous in all axes but the first (strides {array.strides})")


def _describe_bad_block(values: NDArray[np.uint16], row: int, block: int) -> str:
    magnitudes = values[BLOCK_VALUES * block : BLOCK_VALUES * (block + 1), row] & mxfp4_numpy.MAGNITUDE
    has_nan = bool((magnitudes > mxfp4_numpy.INFINITY).any())
    reason = "a NaN" if has_nan else "an infinity that no MXFP4 block decodes to"
    return f"row {row}, block {block} of {BLOCK_VALUES} values holds {reason}: MXFP4 cannot represent it"
