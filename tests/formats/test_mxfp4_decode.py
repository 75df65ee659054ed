from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mxfp4_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_surgery.formats import mxfp4

EVERY_CODE = np.tile(np.arange(16, dtype=np.uint8), 2)
SENTINEL = 0xA5A5

SHAPES = [
    (1, 1),  # a single block
    (15, 3),  # below every tile
    (16, 1),  # one tile of 16
    (33, 2),  # a tile of 32 and one row
    (64, 4),  # one tile of 64, one cache line of blocks
    (65, 5),  # one row and one block beyond
    (130, 11),
]
SCALE_RANGES = {"usual": (2, 252), "subnormal": (0, 4), "overflowing": (250, 255), "any": (0, 255)}


def every_scale_and_code() -> tuple[np.ndarray, np.ndarray]:
    """One row per scale, each with every code."""
    blocks = np.broadcast_to(oracle.blocks_of(EVERY_CODE), (256, 1, 16))
    return np.ascontiguousarray(blocks), np.arange(256, dtype=np.uint8)[:, None]


def test_every_scale_and_code_decodes_like_transformers(isa: str) -> None:
    torch = pytest.importorskip("torch")
    transformers_mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = every_scale_and_code()
    reference = transformers_mxfp4.convert_moe_packed_tensors(
        torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None]
    )
    bits = reference[0].view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(mxfp4.decode_transposed(blocks, scales, isa=isa), bits)
    np.testing.assert_array_equal(mxfp4.decode(blocks, scales, isa=isa), bits.T)


def test_every_scale_and_code_decodes_by_the_definition(isa: str) -> None:
    blocks, scales = every_scale_and_code()
    expected = oracle.decoded(blocks, scales)
    np.testing.assert_array_equal(mxfp4.decode(blocks, scales, isa=isa), expected)
    # Rows in which the scale is the same throughout, so that no rare scale slows the others' tile.
    for scale in range(256):
        rows, same = np.repeat(blocks[:1], 64, axis=0), np.full((64, 1), scale, np.uint8)
        transposed = mxfp4.decode_transposed(rows, same, isa=isa)
        np.testing.assert_array_equal(transposed, np.repeat(expected[scale][:, None], 64, axis=1))


@pytest.mark.parametrize("scales", SCALE_RANGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(isa: str, shape: tuple[int, int], scales: str) -> None:
    blocks, scale = oracle.random_packed(np.random.default_rng(0), *shape, *SCALE_RANGES[scales])
    expected = oracle.decoded(blocks, scale)
    out = np.full(expected.shape, SENTINEL, np.uint16)
    assert mxfp4.decode(blocks, scale, out, isa=isa) is out
    np.testing.assert_array_equal(out, expected)
    out = np.full(expected.T.shape, SENTINEL, np.uint16)
    assert mxfp4.decode_transposed(blocks, scale, out, isa=isa) is out
    np.testing.assert_array_equal(out, expected.T)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 140), st.integers(1, 9), st.sampled_from(sorted(SCALE_RANGES)), st.integers(0, 2**32))
def test_every_implementation_agrees(rows: int, groups: int, kind: str, seed: int) -> None:
    blocks, scales = oracle.random_packed(np.random.default_rng(seed), rows, groups, *SCALE_RANGES[kind])
    expected = oracle.decoded(blocks, scales)
    for isa in mxfp4.instruction_sets():
        np.testing.assert_array_equal(mxfp4.decode(blocks, scales, isa=isa), expected)
        np.testing.assert_array_equal(mxfp4.decode_transposed(blocks, scales, isa=isa), expected.T)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_window_of_blocks_decodes_into_a_window_of_rows(isa: str, start: int) -> None:
    blocks, scales = oracle.random_packed(np.random.default_rng(1), 70, 9, 100, 130)
    expected = oracle.decoded(blocks, scales).T[32 * start : 32 * (start + 5), 3:68]
    whole = np.full((160, 71), SENTINEL, np.uint16)
    window = np.s_[3:68, start : start + 5]
    mxfp4.decode_transposed(blocks[window], scales[window], whole[:, 3:68], isa=isa)
    np.testing.assert_array_equal(whole[:, 3:68], expected)
    assert (whole[:, :3] == SENTINEL).all()
    assert (whole[:, 68:] == SENTINEL).all()


def test_rows_in_reverse(isa: str) -> None:
    blocks, scales = oracle.random_packed(np.random.default_rng(2), 70, 3)
    expected = oracle.decoded(blocks, scales)[::-1]
    np.testing.assert_array_equal(mxfp4.decode(blocks[::-1], scales[::-1], isa=isa), expected)
    np.testing.assert_array_equal(mxfp4.decode_transposed(blocks[::-1], scales[::-1], isa=isa), expected.T)


def test_unaligned_pointers(isa: str) -> None:
    blocks, scales = oracle.random_packed(np.random.default_rng(3), 65, 3)
    memory = np.zeros(1 + blocks.nbytes, np.uint8)
    shifted = memory[1:].reshape(blocks.shape)
    shifted[...] = blocks
    out = np.frombuffer(bytearray(1 + 64 * scales.size), np.uint16, offset=1, count=32 * scales.size)
    mxfp4.decode_transposed(shifted, scales, out.reshape(96, 65), isa=isa)
    np.testing.assert_array_equal(out.reshape(96, 65), oracle.decoded(blocks, scales).T)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty(isa: str, shape: tuple[int, int]) -> None:
    blocks, scales = oracle.random_packed(np.random.default_rng(4), *shape)
    assert mxfp4.decode(blocks, scales, isa=isa).shape == (shape[0], 32 * shape[1])
    assert mxfp4.decode_transposed(blocks, scales, isa=isa).shape == (32 * shape[1], shape[0])


def test_threads_share_one_output(isa: str) -> None:
    blocks, scales = oracle.random_packed(np.random.default_rng(5), 257, 8)
    out = np.full((256, 257), SENTINEL, np.uint16)

    def decode_part(part: tuple[slice, int]) -> None:
        rows, group = part
        window = np.s_[rows, group : group + 1]
        strip = out[32 * group : 32 * (group + 1), rows]
        mxfp4.decode_transposed(blocks[window], scales[window], strip, isa=isa)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(decode_part, [(s, g) for g in range(8) for s in (np.s_[:100], np.s_[100:])]))
    np.testing.assert_array_equal(out, oracle.decoded(blocks, scales).T)


def test_flushing_subnormals_to_zero_changes_no_bit(isa: str) -> None:
    torch = pytest.importorskip("torch")
    blocks, scales = oracle.random_packed(np.random.default_rng(6), 65, 2, 0, 4)
    expected = oracle.decoded(blocks, scales)
    torch.set_flush_denormal(True)
    try:
        values = mxfp4.decode_transposed(blocks, scales, isa=isa)
        again = mxfp4.decode(*mxfp4.encode_transposed(values, isa=isa)[:2], isa=isa)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(values, expected.T)
    np.testing.assert_array_equal(again, expected)
