"""Float formats convert like torch and numpy; MXFP4 as computed in float64."""

from __future__ import annotations

import mxfp4_oracle as oracle
import numpy as np
import pytest

from moe_surgery.errors import InvalidInputError
from moe_surgery.formats import mxfp4
from moe_surgery.formats.convert import cast, encode_transposed
from moe_surgery.formats.expert_format import BF16, F16, F32, FORMATS, MXFP4, ExpertFormat

torch = pytest.importorskip("torch")

TORCH = {BF16: (torch.bfloat16, np.int16), F16: (torch.float16, np.int16), F32: (torch.float32, np.int32)}
DENSE = tuple(TORCH)
MIDPOINTS = (oracle.E2M1[1:] + oracle.E2M1[:-1]) / 2


def every_pattern(expert_format: ExpertFormat) -> np.ndarray:
    """All bits of a 16-bit format; for F32 random ones, and those near 16-bit rounding boundaries."""
    if expert_format != F32:
        return np.arange(1 << 16, dtype=np.uint16)
    rng = np.random.default_rng(0)
    at_random = rng.integers(0, 1 << 32, 400_000, np.uint32)
    middles = [(np.arange(1 << 16, dtype=np.uint32) << 16) + step for step in (0, 0x7FFF, 0x8000, 0x8001)]
    halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    steps = [halves + np.uint32(s) for s in (0xFFF, 0x1000, 0x1001)]
    small = rng.uniform(-1e-7, 1e-7, 50_000).astype(np.float32).view(np.uint32)
    return np.concatenate([at_random, *middles, *steps, small])


def by_torch(values: np.ndarray, source: ExpertFormat, target: ExpertFormat) -> np.ndarray:
    dtype, integer = TORCH[source]
    cast_to, out = TORCH[target]
    converted = torch.from_numpy(values.view(integer).copy()).view(dtype).to(cast_to)
    return (
        converted.view({np.int16: torch.int16, np.int32: torch.int32}[out]).numpy().view(f"u{out().itemsize}")
    )


def floats(bits: np.ndarray, expert_format: ExpertFormat) -> np.ndarray:
    """Bits as float64."""
    dtype, integer = TORCH[expert_format]
    return torch.from_numpy(bits.view(integer).copy()).view(dtype).double().numpy()


@pytest.mark.parametrize("target", DENSE, ids=lambda f: f.name)
@pytest.mark.parametrize("source", DENSE, ids=lambda f: f.name)
def test_values_are_rounded_as_torch_rounds_them(source: ExpertFormat, target: ExpertFormat) -> None:
    values = every_pattern(source)
    expected = by_torch(values, source, target)
    before, after = floats(values, source), floats(expected, target)
    too_large = np.isfinite(before) & ~np.isfinite(after)
    assert too_large.any() == (source.exponents[1] > target.exponents[1] or (source, target) == (F32, BF16))
    got = cast(values[~too_large], source, target)
    nan = np.isnan(before[~too_large])
    assert np.isnan(floats(got, target)[nan]).all()
    np.testing.assert_array_equal(got[~nan], expected[~too_large][~nan])
    if target.can_represent(source):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("source", "target", "value", "largest"),
    [(F32, F16, 65520.0, 65519.996), (F32, BF16, 3.3962e38, 3.3961e38), (BF16, F16, 65536.0, 65280.0)],
    ids=["f32 to f16", "f32 to bf16", "bf16 to f16"],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_too_large_for_the_target_is_refused(
    source: ExpertFormat, target: ExpertFormat, value: float, largest: float, sign: int
) -> None:
    def bits(number: float) -> np.ndarray:
        f32 = np.array([1.0, sign * number], np.float32).view(np.uint32)
        return f32 if source == F32 else (f32 >> 16).astype(np.uint16)

    with pytest.raises(InvalidInputError, match=f"1 values, up to .*, are too large for {target.label}"):
        cast(bits(value), source, target)
    assert np.isfinite(floats(cast(bits(largest), source, target), target)).all()


def near_midpoints() -> np.ndarray:
    """Float32 [32, C]: under scale 127 the midpoints between codes and their float32 neighbours, of both signs.

    The first value of each column fixes the scale.
    """
    near = [np.nextafter(np.float32(m), np.float32(to)) for m in MIDPOINTS for to in (0, 100)] + [
        np.float32(m) for m in MIDPOINTS
    ]
    far = [np.float32(m * (1 + 2.0**-k * s)) for m in MIDPOINTS for k in range(9, 24) for s in (1, -1)]
    values = np.array([*near, *far], np.float32)
    values = np.concatenate([values, -values])
    padded = np.pad(values, (0, -len(values) % 31)).reshape(-1, 31).T
    return np.ascontiguousarray(np.vstack([np.full((1, padded.shape[1]), 6, np.float32), padded]))


def nearest(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes nearest to float64 values [...] under scales [...]: search over all eight, ties to even."""
    grid = np.ldexp(oracle.E2M1, scales.astype(np.int32)[..., None] - 127)
    distance = np.abs(grid - np.abs(values)[..., None])
    closest = distance == distance.min(axis=-1, keepdims=True)
    even_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    code = even_first[np.argmax(closest[..., even_first], axis=-1)]
    return (code + 8 * np.signbit(values)).astype(np.uint8)


def encoded(bits: np.ndarray, source: ExpertFormat) -> tuple[np.ndarray, np.ndarray, object]:
    inputs, rows = bits.shape
    blocks = np.full((rows, inputs // 32, 16), 0xA5, np.uint8)
    scales = np.full((rows, inputs // 32), 0xA5, np.uint8)
    return blocks, scales, encode_transposed(bits, source, blocks, scales)


def samples(source: ExpertFormat) -> np.ndarray:
    """Bits [96, 201] of values of many sizes; with subnormal ones, and zeros of both signs."""
    rng = np.random.default_rng(3)
    low, high = (-24, 15) if source == F16 else (-140, 120)
    scale = np.exp2(rng.integers(low, high, (3, 1, 201)).repeat(32, 1).reshape(96, 201))
    values = (rng.standard_normal((96, 201)) * scale * rng.choice([0, -0.0, 1, 1], (96, 201))).astype(
        np.float32
    )
    return values.astype(np.float16).view(np.uint16) if source == F16 else values.view(np.uint32)


@pytest.mark.parametrize("source", [F16, F32], ids=lambda f: f.name)
def test_every_code_is_the_nearest_to_the_value_itself(source: ExpertFormat) -> None:
    bits = samples(source)
    blocks, scales, _ = encoded(bits, source)
    values = floats(bits, source).T.reshape(201, 3, 32)
    expected = nearest(values, np.broadcast_to(scales[..., None], values.shape))
    np.testing.assert_array_equal(oracle.codes_of(blocks), expected)


def test_values_a_hair_from_a_midpoint_are_not_rounded_twice() -> None:
    """Through BF16 by nearest, 0.25 + 2^-26 would become the midpoint 0.25, and then 0."""
    values = near_midpoints()
    blocks, scales, _ = encoded(values.view(np.uint32), F32)
    assert set(scales.flat) == {127}
    expected = nearest(values.T.astype(np.float64), np.full(values.T.shape, 127))
    np.testing.assert_array_equal(oracle.codes_of(blocks[:, 0]), expected)
    twice = by_torch(values.view(np.uint32), F32, BF16).reshape(values.shape)
    assert (oracle.nearest(twice.T, np.full(values.T.shape, 127)) != expected).any()


@pytest.mark.parametrize("source", [F16, F32], ids=lambda f: f.name)
def test_what_is_lost_is_counted_against_the_values_themselves(source: ExpertFormat) -> None:
    bits = samples(source)
    blocks, scales, report = encoded(bits, source)
    values = floats(bits, source)
    decoded = floats(oracle.decoded(blocks, scales), BF16).T
    inexact = (values != decoded).T.reshape(201, 3, 32).any(axis=-1)
    assert (report.blocks, report.inexact_blocks) == (603, np.count_nonzero(inexact))
    assert report.error_sq == pytest.approx(np.sum((values - decoded) ** 2), rel=1e-12)
    assert report.norm_sq == pytest.approx(np.sum(values**2), rel=1e-12)


@pytest.mark.parametrize("spread", ["normal", "uniform"])
def test_scales_lose_hardly_more_than_the_best_of_three(spread: str) -> None:
    draw = getattr(np.random.default_rng(4), "standard_normal" if spread == "normal" else "random")
    values = draw((320, 400)).astype(np.float32)
    _, _, report = encoded(values.view(np.uint32), F32)
    x = values.astype(np.float64).T.reshape(400, 10, 32)
    first = np.floor(np.log2(np.abs(x).max(axis=-1))).astype(int) + 125

    def error_under(scales: np.ndarray) -> np.ndarray:
        q = np.ldexp(oracle.E2M1, scales[..., None] - 127)[..., None, :]
        return (np.abs(np.abs(x)[..., None] - q).min(axis=-1) ** 2).sum(axis=-1)

    best = np.minimum.reduce([error_under(first + step) for step in (-1, 0, 1)]).sum()
    assert best * (1 - 1e-12) <= report.error_sq <= best * 1.0005


@pytest.mark.parametrize("source", [F16, F32], ids=lambda f: f.name)
def test_values_that_bf16_holds_give_its_bytes(source: ExpertFormat) -> None:
    rng = np.random.default_rng(5)
    bf16 = (rng.integers(0x3800, 0x4400, (128, 70), np.uint16)) | (
        rng.integers(0, 2, (128, 70), np.uint16) << 15
    )
    blocks, scales, report = mxfp4.encode_transposed(bf16)
    got = encoded(by_torch(bf16, BF16, source).reshape(bf16.shape), source)
    np.testing.assert_array_equal(got[0], blocks)
    np.testing.assert_array_equal(got[1], scales)
    assert got[2].inexact_blocks == report.inexact_blocks
    assert got[2].relative_error == pytest.approx(report.relative_error, rel=1e-12)


@pytest.mark.parametrize("source", [F16, F32], ids=lambda f: f.name)
def test_what_came_from_mxfp4_comes_back_without_loss(source: ExpertFormat) -> None:
    """All codes; all scales that the format holds."""
    low, high = (112, 138) if source == F16 else (0, 252)
    blocks, scales = oracle.random_packed(np.random.default_rng(8), 500, 2, low, high)
    bits = by_torch(oracle.decoded(blocks, scales).T.copy(), BF16, source).reshape(64, 500)
    again, result, report = encoded(bits, source)
    assert (report.inexact_blocks, report.error_sq) == (0, 0.0)
    np.testing.assert_array_equal(oracle.decoded(again, result), oracle.decoded(blocks, scales))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", [F16, F32], ids=lambda f: f.name)
def test_what_mxfp4_cannot_hold_is_refused_with_its_position(source: ExpertFormat, wrong: float) -> None:
    values = np.ones((96, 300), np.float32)
    values[40, 250] = wrong
    bits = values.view(np.uint32) if source == F32 else values.astype(np.float16).view(np.uint16)
    with pytest.raises(InvalidInputError, match=r"row 250, block 1 of 32 values holds an? (NaN|infinity)"):
        encoded(bits, source)


def test_a_nan_whose_upper_bits_say_infinity_is_still_refused() -> None:
    bits = np.ones((32, 1), np.float32).view(np.uint32)
    bits[3] = 0x7F800001
    with pytest.raises(InvalidInputError, match="holds a NaN"):
        encoded(bits, F32)


def test_formats_say_what_a_weight_takes_and_what_they_hold() -> None:
    tensors = {f.name: [(t.suffix, t.dtype, t.shape) for t in f.tensors(6, 64)] for f in FORMATS.values()}
    assert tensors == {
        "bf16": [("", "BF16", (64, 6))],
        "f16": [("", "F16", (64, 6))],
        "f32": [("", "F32", (64, 6))],
        "mxfp4": [("_blocks", "U8", (6, 2, 16)), ("_scales", "U8", (6, 2))],
    }
    assert {f.name: f.nbytes(6 * 64) for f in FORMATS.values()} == {
        "mxfp4": 204,
        "bf16": 768,
        "f16": 768,
        "f32": 1536,
    }
    holds = {
        (a.name, b.name) for a in FORMATS.values() for b in FORMATS.values() if a != b and a.can_represent(b)
    }
    assert holds == {("bf16", "mxfp4"), ("f32", "mxfp4"), ("f32", "bf16"), ("f32", "f16")}
    assert [f.fits_columns(48) for f in (MXFP4, F16)] == [False, True]
