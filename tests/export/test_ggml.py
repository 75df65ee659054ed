"""ggml's order of MXFP4 codes: against a loop over nibbles, and against the gguf package's decoder."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.export import ggml
from moe_surgery.formats import mxfp4
from tests.export.reading import gguf

Blocks = tuple[np.ndarray, np.ndarray]


@st.composite
def packed(draw: st.DrawFn) -> Blocks:
    """Blocks u8 [R, G, 16] and scales u8 [R, G], perhaps every second row of larger arrays."""
    rows, groups, step = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    first = draw(st.integers(0, step - 1))
    blocks = rng.integers(0, 256, (rows * step, groups, 16), np.uint8)[first::step]
    scales = rng.integers(0, 256, (rows * step, groups), np.uint8)[first::step]
    return blocks, scales


def reordered(block: np.ndarray) -> list[int]:
    """ggml's 16 code bytes of one block, one nibble after another."""
    values = [code for byte in block.tolist() for code in (byte & 15, byte >> 4)]
    return [values[j] | values[j + 16] << 4 for j in range(16)]


@given(packed())
def test_every_nibble_goes_where_ggml_has_it(arrays: Blocks) -> None:
    blocks, scales = arrays
    out = np.full(scales.size * 17 + 2, 0xAA, np.uint8)
    ggml.pack(blocks, scales, out[1:-1])  # unaligned
    got = out[1:-1].reshape(*scales.shape, 17)
    for index in np.ndindex(scales.shape):
        assert got[index].tolist() == [scales[index], *reordered(blocks[index])]
    assert out[0] == out[-1] == 0xAA


@given(packed())
def test_the_codes_are_a_permutation_that_keeps_every_block(arrays: Blocks) -> None:
    blocks, scales = arrays
    out = np.empty(scales.size * 17, np.uint8)
    ggml.pack(blocks, scales, out)
    got = out.reshape(*scales.shape, 17)[..., 1:]
    for codes in (blocks, got):
        assert np.sort(np.stack([codes & 15, codes >> 4], -1).reshape(*scales.shape, 32)).tolist() == (
            np.sort(np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)).tolist()
        )


@pytest.mark.parametrize("strip", [1, 3, 1 << 20])
def test_strips_make_no_difference(monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (50, 3, 16), np.uint8)
    scales = rng.integers(0, 256, (50, 3), np.uint8)
    expected, got = np.empty((2, 50 * 3 * 17), np.uint8)
    ggml.pack(blocks, scales, expected)
    monkeypatch.setattr(ggml, "_STRIP_BLOCKS", strip)
    ggml.pack(blocks, scales, got)
    assert got.tobytes() == expected.tobytes()


def test_every_code_at_every_scale_means_the_same_value_to_ggml() -> None:
    """256 scales, 16 codes at 32 places each; the gguf package's decoder against ours."""
    codes = (np.arange(32)[None, :] + np.arange(16)[:, None]) % 16
    blocks = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    blocks = np.broadcast_to(blocks, (256, 16, 16)).copy()
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)
    out = np.empty(256 * 16 * 17, np.uint8)
    ggml.pack(blocks, scales, out)
    with np.errstate(over="ignore"):
        got = gguf.quants.dequantize(out.reshape(256, 16 * 17), gguf.GGMLQuantizationType.MXFP4)
    expected = (mxfp4.decode(blocks, scales).astype(np.uint32) << 16).view(np.float32)
    assert len(np.unique(got)) > 700
    np.testing.assert_array_equal(got, expected)
