from __future__ import annotations

import math

import mxfp4_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from moe_surgery.errors import InvalidInputError
from moe_surgery.formats import mxfp4
from moe_surgery.formats.encode_report import EncodeReport

INFINITY, NAN, ONE = 0x7F80, 0x7FC0, 0x3F80
SIGN = 0x8000


def gaussian_bits(seed: int, shape: tuple[int, int]) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def round_trip(values: np.ndarray, isa: str) -> np.ndarray:
    blocks, scales, _ = mxfp4.encode_transposed(values, isa=isa)
    return mxfp4.decode_transposed(blocks, scales, isa=isa)


def columns_for_scale(scale: int) -> np.ndarray:
    """Every value that could round differently under a scale, 31 to a column u16 [32, C].

    From 7 times the scale down to three binades below the smallest nonzero code. The first value of each
    column is 6 times the scale: no other scale is better for such a block.
    """
    top = scale + 2  # exponent field of 4 and 6
    magnitudes = np.arange(max(top - 6, 0) << 7, ((top << 7) | 0x60) + 1, dtype=np.uint16)
    values = np.concatenate([magnitudes, magnitudes | SIGN])
    padded = np.pad(values, (0, -len(values) % 31)).reshape(-1, 31).T
    return np.vstack([np.full((1, padded.shape[1]), (top << 7) | 0x40, np.uint16), padded])


def test_every_rounding_decision_under_every_scale(isa: str) -> None:
    parts = [columns_for_scale(scale) for scale in range(253)]
    scales = np.concatenate([np.full(part.shape[1], s, np.uint8) for s, part in enumerate(parts)])
    values = np.ascontiguousarray(np.concatenate(parts, axis=1))
    blocks, chosen, _ = mxfp4.encode_transposed(values, isa=isa)
    np.testing.assert_array_equal(chosen[:, 0], scales)
    expected = oracle.nearest(values.T, np.broadcast_to(scales[:, None], values.T.shape))
    np.testing.assert_array_equal(oracle.codes_of(blocks[:, 0]), expected)


def test_blocks_without_normal_values_round_under_scale_zero(isa: str) -> None:
    magnitudes = np.arange(128, dtype=np.uint16)
    values = np.concatenate([magnitudes, magnitudes | SIGN]).reshape(-1, 32).T
    tiled = np.ascontiguousarray(np.tile(values, 16))
    blocks, scales, _ = mxfp4.encode_transposed(tiled, isa=isa)
    assert not scales.any()
    np.testing.assert_array_equal(
        oracle.codes_of(blocks[:, 0]), oracle.nearest(tiled.T, np.zeros(tiled.T.shape, np.uint8))
    )


def test_every_scale_and_pair_of_codes_comes_back(isa: str) -> None:
    """decode(encode(decode(x))) == decode(x) for every block.

    Under the first scale a value's code depends on the block only through the block's largest magnitude,
    and so does whether a block with an infinity is accepted; and a block without an error under the
    first scale keeps it. So blocks of two codes cover every block.
    """
    scale, first, second = (a.reshape(-1) for a in np.indices((256, 16, 16), dtype=np.uint8))
    codes = np.tile(np.stack([first, second], axis=1), 16)
    values = oracle.decoded(oracle.blocks_of(codes)[:, None], scale[:, None]).T
    blocks, scales, report = mxfp4.encode_transposed(np.ascontiguousarray(values), isa=isa)
    np.testing.assert_array_equal(oracle.decoded(blocks, scales), values.T)
    assert (report.blocks, report.inexact_blocks, report.error_sq) == (1 << 16, 0, 0.0)


@pytest.mark.parametrize("scale", [0, 1, 2, 3, 4, 127, 251, 252, 253, 254, 255])
@settings(max_examples=15, deadline=None)
@given(blocks=st_numpy.arrays(np.uint8, st.tuples(st.integers(1, 70), st.integers(1, 3), st.just(16))))
def test_any_blocks_come_back(scale: int, blocks: np.ndarray) -> None:
    scales = np.full(blocks.shape[:2], scale, np.uint8)
    for isa in mxfp4.instruction_sets():
        values = mxfp4.decode_transposed(blocks, scales, isa=isa)
        np.testing.assert_array_equal(round_trip(values, isa), values)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 140), st.integers(1, 5), st.integers(0, 2**32), st.sampled_from([0x7F7F, 0x02FF, 0x3FFF])
)
def test_every_implementation_agrees(rows: int, groups: int, seed: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, largest + 1, (32 * groups, rows), dtype=np.uint16)
    values |= rng.integers(0, 2, values.shape, dtype=np.uint16) << 15
    blocks, scales, report = mxfp4.encode_transposed(values, isa="numpy")
    for isa in mxfp4.instruction_sets():
        other_blocks, other_scales, other = mxfp4.encode_transposed(values, isa=isa)
        np.testing.assert_array_equal(other_blocks, blocks)
        np.testing.assert_array_equal(other_scales, scales)
        assert (other.blocks, other.inexact_blocks) == (report.blocks, report.inexact_blocks)
        assert other.error_sq == pytest.approx(report.error_sq, rel=1e-12)
        assert other.norm_sq == pytest.approx(report.norm_sq, rel=1e-12)


def test_windows_of_input_and_output(isa: str) -> None:
    values = gaussian_bits(0, (96, 150))
    expected_blocks, expected_scales, expected = mxfp4.encode_transposed(
        np.ascontiguousarray(values[:, 7:140]), isa="numpy"
    )
    blocks, scales = np.full((133, 5, 16), 0xA5, np.uint8), np.full((133, 5), 0xA5, np.uint8)
    result = mxfp4.encode_transposed(values[:, 7:140], blocks[:, 1:4], scales[:, 1:4], isa=isa)
    np.testing.assert_array_equal(blocks[:, 1:4], expected_blocks)
    np.testing.assert_array_equal(scales[:, 1:4], expected_scales)
    assert (blocks[:, [0, 4]] == 0xA5).all()
    assert (scales[:, [0, 4]] == 0xA5).all()
    assert result[2].inexact_blocks == expected.inexact_blocks


def test_zeros_keep_their_signs_and_get_scale_zero(isa: str) -> None:
    values = np.zeros((32, 100), np.uint16)
    values[::3, ::2] = SIGN
    blocks, scales, report = mxfp4.encode_transposed(values, isa=isa)
    assert not scales.any()
    assert set(np.unique(oracle.codes_of(blocks))) == {0, 8}
    np.testing.assert_array_equal(mxfp4.decode_transposed(blocks, scales, isa=isa), values)
    assert report == EncodeReport(blocks=100)
    assert report.relative_error == 0.0


def test_a_block_of_zeros_beside_others(isa: str) -> None:
    values = gaussian_bits(1, (32, 128))
    values[:, 5::7] = 0
    expected = mxfp4.encode_transposed(values, isa="numpy")
    blocks, scales, _ = mxfp4.encode_transposed(values, isa=isa)
    np.testing.assert_array_equal(blocks, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


def test_values_above_six_saturate(isa: str) -> None:
    values = np.full((32, 1), 0x40E0, np.uint16)  # 7: as far from 6 as from 8, and 6 is the first scale's
    assert (round_trip(values, isa) == 0x40C0).all()


def test_report_sums_are_those_of_float64(isa: str) -> None:
    values = gaussian_bits(2, (64, 133))
    _, _, report = mxfp4.encode_transposed(values, isa=isa)
    original, back = oracle.to_float(values), oracle.to_float(round_trip(values, isa))
    assert report.norm_sq == pytest.approx(np.sum(original**2), rel=1e-13)
    assert report.error_sq == pytest.approx(np.sum((original - back) ** 2), rel=1e-13)
    assert report.relative_error == pytest.approx(math.sqrt(report.error_sq / report.norm_sq))
    assert 0.05 < report.relative_error < 0.2
    changed = (values != round_trip(values, isa)).reshape(2, 32, 133).any(axis=1)
    assert report.inexact_blocks == changed.sum()


def test_reports_add_up(isa: str) -> None:
    values = gaussian_bits(3, (64, 40))
    whole = mxfp4.encode_transposed(values, isa=isa)[2]
    parts = [mxfp4.encode_transposed(values[k : k + 32], isa=isa)[2] for k in (0, 32)]
    total = EncodeReport.total(parts)
    assert (total.blocks, total.inexact_blocks) == (whole.blocks, whole.inexact_blocks) == (80, 80)
    assert total.error_sq == pytest.approx(whole.error_sq)
    assert total.norm_sq == pytest.approx(whole.norm_sq)


def test_recovered_infinities_count_as_exact_and_add_nothing(isa: str) -> None:
    values = np.zeros((32, 2), np.uint16)
    values[3, 0], values[4, 0] = INFINITY | SIGN, 0x7F40  # -infinity and 3 * 2^126
    values[:, 1] = ONE
    blocks, scales, report = mxfp4.encode_transposed(values, isa=isa)
    assert scales[:, 0].tolist() == [253, 125]
    assert oracle.codes_of(blocks[0, 0])[3:5].tolist() == [8 + 6, 5]
    assert report == EncodeReport(blocks=2, norm_sq=32.0)


@pytest.mark.parametrize("beside", [ONE, 0x7E40, 0x7F60, 0x7F7F, 1])
def test_an_infinity_with_a_value_that_no_block_combines_with_it(isa: str, beside: int) -> None:
    values = np.zeros((64, 70), np.uint16)
    values[33, 65], values[40, 65] = INFINITY, beside
    with pytest.raises(InvalidInputError, match=r"^row 65, block 1 of 32 values holds an infinity"):
        mxfp4.encode_transposed(values, isa=isa)


@pytest.mark.parametrize("nan", [NAN, 0x7F81, 0xFFFF])
@pytest.mark.parametrize("row", [0, 63, 64, 99])
def test_a_nan_is_named(isa: str, row: int, nan: int) -> None:
    values = gaussian_bits(4, (96, 100))
    values[95, row] = nan
    with pytest.raises(InvalidInputError, match=f"^row {row}, block 2 of 32 values holds a NaN"):
        mxfp4.encode_transposed(values, isa=isa)


def test_the_first_bad_block_is_named_by_row_then_block(isa: str) -> None:
    values = gaussian_bits(5, (96, 100))
    values[0, 80] = values[64, 7] = values[40, 7] = values[0, 99] = NAN
    with pytest.raises(InvalidInputError, match=r"^row 7, block 1 "):
        mxfp4.encode_transposed(values, isa=isa)


def test_empty(isa: str) -> None:
    for shape in ((0, 5), (64, 0)):
        assert mxfp4.encode_transposed(np.zeros(shape, np.uint16), isa=isa)[2] == EncodeReport()
