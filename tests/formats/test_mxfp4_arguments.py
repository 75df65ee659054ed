from __future__ import annotations

import numpy as np
import pytest

from moe_surgery.errors import UsageError
from moe_surgery.formats import mxfp4
from moe_surgery.formats.native import native_module

BLOCKS = np.zeros((6, 4, 16), np.uint8)
SCALES = np.zeros((6, 4), np.uint8)
VALUES = np.zeros((64, 6), np.uint16)
READ_ONLY = np.zeros((128, 6), np.uint16)
READ_ONLY.flags.writeable = False
BETWEEN = np.lib.stride_tricks.as_strided(np.zeros(999, np.uint16), (128, 6), (13, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((6, 4, 8), np.uint8), SCALES), r"blocks \[6, 4, 8\] and scales \[6, 4\] are not"),
        ((BLOCKS[:5], SCALES), r"blocks \[5, 4, 16\] and scales \[6, 4\] are not"),
        ((BLOCKS, SCALES.astype(np.int8)), "scales is int8 with 2 axes, expected uint8 with 2"),
        ((BLOCKS[0], SCALES), "blocks is uint8 with 2 axes, expected uint8 with 3"),
        ((BLOCKS.tolist(), SCALES), "blocks is a list"),
        ((BLOCKS[:, ::2], SCALES[:, :2]), "blocks must be contiguous in all axes but the first"),
        ((BLOCKS[:, :2], SCALES[:, ::2]), "scales must be contiguous in all axes but the first"),
        ((BLOCKS, SCALES, np.zeros((6, 128), np.uint16)), r"out has shape \[6, 128\], expected \[128, 6\]"),
        ((BLOCKS, SCALES, READ_ONLY), "out is read-only"),
        ((BLOCKS, SCALES, np.zeros((128, 6), np.float16)), "out is float16"),
        ((BLOCKS, SCALES, np.zeros((6, 128), np.uint16).T), "out must be contiguous"),
        ((BLOCKS, SCALES, BETWEEN), "out must be contiguous"),
    ],
)
def test_decode_refuses(isa: str, arguments: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mxfp4.decode_transposed(*arguments, isa=isa)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VALUES[:63],), "values has 63 rows, which is not a multiple of 32"),
        ((VALUES.astype(np.float32),), "values is float32"),
        ((VALUES, BLOCKS), r"blocks has shape \[6, 4, 16\], expected \[6, 2, 16\]"),
        ((VALUES, BLOCKS[:, :2], SCALES), r"scales has shape \[6, 4\], expected \[6, 2\]"),
    ],
)
def test_encode_refuses(isa: str, arguments: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mxfp4.encode_transposed(*arguments, isa=isa)


def test_an_unknown_isa_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown isa 'sse9': expected one of avx512, .*numpy"):
        mxfp4.decode(BLOCKS, SCALES, isa="sse9")


def test_an_unavailable_isa_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SURGERY_NATIVE", "0")
    with pytest.raises(
        UsageError, match=r"isa 'scalar' is not available here: .*disabled by MOE_SURGERY_NATIVE=0"
    ):
        mxfp4.decode(BLOCKS, SCALES, isa="scalar")


def test_the_extension_checks_its_own_arguments() -> None:
    """Even called directly, it never accesses memory out of bounds."""
    native = native_module()
    if native is None:
        pytest.skip("no native extension")
    out = np.zeros((128, 6), np.uint16)
    with pytest.raises(ValueError, match=r"out \[128, 6\] is not \[6, 128\]"):
        native.decode(BLOCKS, SCALES, out)
    with pytest.raises(ValueError, match=r"are not \[rows, groups, 16\]"):
        native.decode_transposed(BLOCKS, SCALES[:5], out)
    with pytest.raises(ValueError, match="contiguous"):
        native.decode_transposed(BLOCKS[:, :, ::-1], SCALES, out)
    with pytest.raises(ValueError, match=r"values \[63, 6\] is not \[64, 6\]"):
        native.encode_transposed(VALUES[:63], BLOCKS[:, :2].copy(), SCALES[:, :2].copy())
    with pytest.raises(ValueError, match=r"'sse9' is not available here; available: .*scalar"):
        native.decode_transposed(BLOCKS, SCALES, out, "sse9")
    with pytest.raises(TypeError):
        native.decode_transposed(BLOCKS, SCALES, READ_ONLY)
    with pytest.raises(TypeError):
        native.decode_transposed(BLOCKS, SCALES, out.astype(np.int16))
