"""The choice of a block's scale: least squared error of three candidates."""

from __future__ import annotations

import mxfp4_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_surgery.formats import mxfp4

SIGN = 0x8000


def bf16(values: list[float]) -> np.ndarray:
    """Values, zeros after them, as one block u16 [32, 1]."""
    return oracle.to_bits(np.array([*values, *[0.0] * (32 - len(values))]))[:, None]


def contested(rng: np.random.Generator, exponent: int, columns: int) -> np.ndarray:
    """Blocks whose candidates nearly tie, u16 [32, columns]; `exponent` is that of the largest."""
    fractions = np.array([*range(18), *range(0x5C, 0x80)])
    largest = (exponent << 7) | rng.choice(fractions, columns)
    shape = (31, columns)
    # Around the values that only the finer one of two scales has: 1/4 and 3/4 of the coarser scale.
    coarser = (largest & 127) > 0x60
    upper = rng.integers(0, 2, shape)
    middle = ((exponent - 4 + coarser + upper) << 7) + 64 * upper
    near = np.maximum(middle + rng.integers(-3, 4, shape) * rng.integers(0, 6, columns), 0)
    anything = rng.integers(0, (exponent + 1) << 7, shape)
    high = np.maximum(largest - rng.integers(0, 160, shape), 0)
    kind = rng.random(shape)
    values = np.where(kind < np.sqrt(rng.random(columns)), near, np.where(kind < 0.97, anything, high))
    block = np.concatenate([largest[None], np.minimum(values, largest)]).astype(np.uint16)
    return rng.permuted(block, axis=0) | rng.integers(0, 2, block.shape, dtype=np.uint16) << 15


def check(values: np.ndarray, isa: str) -> np.ndarray:
    """Encode and compare scales and codes with the search; the scales."""
    blocks, scales, _ = mxfp4.encode_transposed(values, isa=isa)
    expected = oracle.best_scales(values)
    np.testing.assert_array_equal(scales[:, 0], expected)
    codes = oracle.nearest(values.T, np.broadcast_to(expected[:, None], values.T.shape))
    np.testing.assert_array_equal(oracle.codes_of(blocks[:, 0]), codes)
    return scales[:, 0]


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.integers(0, 254), st.sampled_from([0, 1, 2, 3, 5, 6, 253, 254])), st.integers(0, 2**32))
def test_the_scale_is_the_best_of_three(exponent: int, seed: int) -> None:
    values = contested(np.random.default_rng(seed), exponent, 70)
    for isa in mxfp4.instruction_sets():
        check(values, isa)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 0x7F7F), st.integers(0, 2**32))
def test_the_scale_is_the_best_of_three_for_any_values(largest: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, largest + 1, (32, 70), dtype=np.uint16)
    values |= rng.integers(0, 2, values.shape, dtype=np.uint16) << 15
    for isa in mxfp4.instruction_sets():
        check(values, isa)


def test_every_candidate_wins(isa: str) -> None:
    values = np.concatenate(
        [contested(np.random.default_rng(e), e, 400) for e in (5, 6, 7, 120, 252)], axis=1
    )
    scales = check(values, isa).astype(int)
    steps = scales - ((values & 0x7FFF).max(axis=0) >> 7) + 2
    assert min(np.count_nonzero(steps == step) for step in (-1, 0, 1)) > 50


@pytest.mark.parametrize("scale", [*range(2, 8), 127, 250, 251, 252])
def test_a_largest_value_of_four_that_shrank_by_a_hair(isa: str, scale: int) -> None:
    """It is the four of the same scale still, not the six of the scale below."""
    rng = np.random.default_rng(scale)
    codes = rng.integers(0, 7, (200, 32), dtype=np.uint8) | rng.integers(0, 2, (200, 32), np.uint8) << 3
    codes[:, 7] = 6  # 4 times the scale
    blocks, scales = oracle.blocks_of(codes)[:, None], np.full((200, 1), scale, np.uint8)
    values = oracle.decoded(blocks, scales).T.copy()
    fours = (values & 0x7FFF) == (values[7] & 0x7FFF)
    values[fours] -= 1  # the next value towards zero
    result = mxfp4.encode_transposed(values, isa=isa)
    np.testing.assert_array_equal(result[0], blocks)
    np.testing.assert_array_equal(result[1], scales)
    assert result[2].inexact_blocks == 200
    assert result[2].relative_error < 0.004


def test_equal_sums_are_settled_by_the_largest_value(isa: str) -> None:
    """Under the scale 2^0: 7 1/32 - 6 and an exact 3/8 -> 1/2, against 8 - 7 1/32 and 3/8 -> 0."""
    tied = bf16([7.03125, 0.375])
    assert ((7.03125 - 6) ** 2 + (0.375 - 0.5) ** 2) == ((8 - 7.03125) ** 2 + 0.375**2)
    assert check(tied, isa) == 128
    assert check(bf16([7.03125, 0.375, 0.5]), isa) == 127


def test_the_first_scale_stays_where_the_one_below_is_as_good(isa: str) -> None:
    """A four that would become a three, 1 apart, against sixteen quarters that would be exact, 1/16 each."""
    assert check(bf16([4.0, *[0.25] * 16]), isa) == 127
    assert check(bf16([4.0, *[0.25] * 17]), isa) == 126
    assert check(bf16([-4.0, *[0.25, -0.75] * 8]), isa) == 127
    assert check(bf16([-4.0, *[0.25, -0.75] * 9]), isa) == 126


def test_seven_is_nearer_to_no_other_code(isa: str) -> None:
    """7 is 1 from 6 and 1 from 8, so the first scale stays."""
    assert check(bf16([7.0]), isa) == 127
    assert check(bf16([7.03125]), isa) == 128


def test_the_largest_finite_values_do_not_become_infinities(isa: str) -> None:
    values = np.zeros((32, 70), np.uint16)
    values[3] = 0x7F00 + np.arange(70)  # from 2^127 on, above seven times 2^125 as well
    values[4] = 0x7F7F | SIGN
    assert (check(values, isa) == 252).all()
    decoded = mxfp4.decode_transposed(*mxfp4.encode_transposed(values, isa=isa)[:2], isa=isa)
    assert ((decoded & 0x7FFF) < 0x7F80).all()


def test_what_came_from_mxfp4_gets_the_scale_of_its_largest_value(isa: str) -> None:
    """In tiles with blocks that are searched, and in tiles without."""
    rng = np.random.default_rng(0)
    values = contested(rng, 120, 256)
    lossless = np.r_[0:64, 65:250:2]
    blocks, scales = oracle.random_packed(rng, len(lossless), 1, 0, 255)
    scales[:8] = np.arange(8)[:, None]
    blocks[::3] &= 0x99  # nothing above 0.5
    values[:, lossless] = oracle.decoded(blocks, scales).T
    finite = ((values & 0x7FFF) < 0x7F80).all(axis=0)
    back, chosen, report = mxfp4.encode_transposed(values, isa=isa)
    largest = oracle.to_float(values[:, lossless] & 0x7FFF).max(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.clip(np.floor(np.log2(largest)) - 2 + 127, 0, 253)
    np.testing.assert_array_equal(chosen[lossless, 0], expected)
    np.testing.assert_array_equal(oracle.decoded(back, chosen)[lossless].T, values[:, lossless])
    assert report.inexact_blocks <= 256 - len(lossless)
    check(np.ascontiguousarray(values[:, finite]), isa)
