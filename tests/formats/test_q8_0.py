"""Q8_0 against the gguf package's quantisation, bit for bit, and against llama.cpp's own where it is installed."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.formats import q8_0
from moe_surgery.formats.convert import Words
from moe_surgery.formats.expert_format import BF16, F16, F32, ExpertFormat
from tests.support.ggml_reader import ggml_library

gguf = pytest.importorskip("gguf", reason="the gguf package quantises as well")

Q8_0 = 8
LEAST_SCALE = 2.0**-128
"""Below it 1 / scale overflows, and what the gguf package makes of infinities depends on the processor."""


def floats(values: Words, source: ExpertFormat) -> np.ndarray:
    """Bits as float32 [N / 32, 32]."""
    if source == BF16:
        values = values.astype(np.uint32) << np.uint32(16)
    x = values.view(np.float16) if source == F16 else values.view(np.float32)
    return x.astype(np.float32).reshape(-1, 32)


def encoded(values: Words, source: ExpertFormat, isa: str | None = None) -> np.ndarray:
    """Bytes u8 [N / 32, 34], written to an odd address."""
    out = np.full(len(values) // 32 * 34 + 2, 0xAA, np.uint8)
    q8_0.encode(values, source, out[1:-1], isa=isa)
    assert out[0] == out[-1] == 0xAA
    return out[1:-1].reshape(-1, 34)


def check(values: Words, source: ExpertFormat, isa: str) -> None:
    x, got = floats(values, source), encoded(values, source, isa)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    scale = np.abs(x).max(axis=1) / np.float32(127)
    usual = (scale == 0) | (scale >= LEAST_SCALE)
    np.testing.assert_array_equal(got[usual], expected[usual])
    assert not got[~usual].any()


def finite(rng: np.random.Generator, blocks: int, source: ExpertFormat, largest: int) -> Words:
    """Random bits of magnitude below `largest`, the values of a block of similar or of any size."""
    dtype = np.uint32 if source == F32 else np.uint16
    sign = {BF16: 0x8000, F16: 0x8000, F32: 0x80000000}[source]
    if rng.random() < 0.5:
        bits = rng.integers(0, largest, (blocks, 32))
    else:
        spread = largest >> 5
        bits = rng.integers(0, largest - spread, (blocks, 1)) + rng.integers(0, spread, (blocks, 32))
    bits = np.where(rng.random(bits.shape) < 0.1, 0, bits) | np.where(rng.random(bits.shape) < 0.5, sign, 0)
    values: Words = bits.astype(dtype).reshape(-1)
    return values


# Bits of the first value too large: 65520 * 127 in BF16 and F32, infinity in F16.
LARGEST = {BF16: 0x4AFE, F16: 0x7C00, F32: 0x4AFDE000}


@pytest.mark.parametrize("source", [BF16, F16, F32], ids=lambda f: f.name)
@given(seed=st.integers(0, 2**32), blocks=st.integers(1, 70))
def test_random_values(q8_0_isa: str, source: ExpertFormat, seed: int, blocks: int) -> None:
    check(finite(np.random.default_rng(seed), blocks, source, LARGEST[source]), source, q8_0_isa)


def test_every_bf16_value(q8_0_isa: str) -> None:
    """Each as the largest of its block and beside a value that makes its code any of 0 to 127."""
    bits = np.arange(LARGEST[BF16], dtype=np.uint16)
    alone = np.zeros((len(bits), 32), np.uint16)
    alone[:, 5] = bits | 0x8000
    alone[:, 9] = np.maximum(bits, 128) - 128  # half of it
    check(alone.reshape(-1), BF16, q8_0_isa)
    check(np.resize(bits, len(bits) // 32 * 32), BF16, q8_0_isa)


def test_halves_are_rounded_away_from_zero(q8_0_isa: str) -> None:
    x = np.zeros((127, 32), np.float32)
    for row in range(127):
        x[row, :3] = 127, row + 0.5, -row - 0.5
        x[row, 3:5] = np.nextafter(np.float32(row + 0.5), np.array([0, 200], np.float32))
    for factor in (1, 2.0**-10, 2.0**-40, 2.0**15):
        values = (x * np.float32(factor)).view(np.uint32).reshape(-1)
        check(values, F32, q8_0_isa)
        codes = encoded(values, F32, q8_0_isa)[:, 2:].view(np.int8)
        for row in range(127):
            assert codes[row, :5].tolist() == [127, row + 1, -row - 1, row, row + 1]


def test_scales_are_rounded_to_even(q8_0_isa: str) -> None:
    """Around the midpoints of F16, subnormal ones included."""
    halves = np.concatenate([np.arange(0, 0x400, 7), np.arange(0x400, 0x7BFF, 61)]).astype(np.uint16)
    low, high = halves.view(np.float16).astype(np.float32), (halves + np.uint16(1)).view(np.float16)
    middle = (low + high.astype(np.float32)) / 2
    for direction in (-np.inf, None, np.inf):
        largest = middle * np.float32(127)
        if direction is not None:
            largest = np.nextafter(largest, np.float32(direction))
        x = np.zeros((len(largest), 32), np.float32)
        x[:, 31] = largest
        check(x.view(np.uint32).reshape(-1), F32, q8_0_isa)


@pytest.mark.parametrize(
    ("bits", "problem"),
    [
        (0x7F80, "a NaN or an infinity"),
        (0xFF80, "a NaN or an infinity"),
        (0x7FC0, "a NaN or an infinity"),
        (0x4AFE, "8.32307e[+]06 is too large for the F16 scale of a block"),
        (0x7F7F, "3.38953e[+]38 is too large"),
    ],
)
def test_what_no_block_can_hold_is_refused(q8_0_isa: str, bits: int, problem: str) -> None:
    values = np.full(32 * 5000, 0x3F80, np.uint16)
    values[32 * 4321 + 17] = values[32 * 4900] = bits
    with pytest.raises(InvalidInputError, match=f"values from {32 * 4321}: {problem}"):
        encoded(values, BF16, q8_0_isa)


def test_sizes_and_names_that_do_not_fit_are_refused() -> None:
    values = np.zeros(64, np.uint16)
    for count, nbytes in ((63, 34), (64, 34), (64, 69)):
        with pytest.raises(UsageError, match="not whole blocks"):
            q8_0.encode(values[:count], BF16, np.zeros(nbytes, np.uint8))
    with pytest.raises(UsageError, match=r"isa .sse9. is not available here: choose one of .*numpy"):
        encoded(values, BF16, "sse9")


def test_llama_cpp_quantises_the_same() -> None:
    library = ggml_library()
    if library is None:
        pytest.skip("llama-cpp-python is not installed: pip install llama-cpp-python builds it")
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    rng = np.random.default_rng(0)
    values = np.concatenate([finite(rng, 100, BF16, LARGEST[BF16]) for _ in range(20)])
    x = np.ascontiguousarray(floats(values, BF16))
    scale = np.abs(x).max(axis=1) / np.float32(127)
    usual = (scale == 0) | (scale >= LEAST_SCALE)
    out = np.zeros((len(x), 34), np.uint8)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, out)]
    numbers = [ctypes.c_int64(n) for n in (0, len(x), 32)]
    assert ggml.ggml_quantize_chunk(ctypes.c_int(Q8_0), *pointers, *numbers, None) == out.size
    np.testing.assert_array_equal(encoded(values, BF16)[usual], out[usual])
