"""A slow, independent definition of MXFP4 that uses no table or threshold of the package."""

from __future__ import annotations

import numpy as np

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_float(bits: np.ndarray) -> np.ndarray:
    """BF16 bits to float64: BF16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_bits(values: np.ndarray) -> np.ndarray:
    """Float64 values that BF16 represents exactly (or that overflow) to BF16 bits."""
    with np.errstate(over="ignore"):
        f32 = values.astype(np.float32).view(np.uint32)
    assert not (f32 & 0xFFFF).any()
    return (f32 >> 16).astype(np.uint16)


def codes_of(blocks: np.ndarray) -> np.ndarray:
    """Blocks u8 [..., 16] to codes u8 [..., 32]."""
    return np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)


def blocks_of(codes: np.ndarray) -> np.ndarray:
    """Codes u8 [..., 32] to blocks u8 [..., 16]."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks u8 [R, G, 16] and scales u8 [R, G] to BF16 bits [R, 32 G], by the definition."""
    codes = codes_of(blocks)
    magnitude = np.ldexp(E2M1[codes & 7], scales.astype(np.int32)[..., None] - 127)
    return to_bits(np.where(codes & 8, -magnitude, magnitude)).reshape(len(blocks), -1)


def nearest(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes nearest to BF16 bits [...] under scales [...]: search over all eight, ties to even."""
    grid = np.ldexp(E2M1, scales.astype(np.int32)[..., None] - 127)
    magnitude = np.abs(to_float(values))
    distance = np.abs(grid - magnitude[..., None])
    closest = distance == distance.min(axis=-1, keepdims=True)
    even_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    code = even_first[np.argmax(closest[..., even_first], axis=-1)]
    return (code + 8 * (values >> 15)).astype(np.uint8)


def best_scales(values: np.ndarray) -> np.ndarray:
    """Scale bytes u8 [R] for finite BF16 bits [32, R]: all three candidates tried, in Python's integers."""
    bits = (values & 0x7FFF).astype(np.int64)
    first = np.maximum((bits.max(axis=0) >> 7) - 2, 0)
    units = np.where(bits < 128, 2 * bits, 128 + (bits & 127)).astype(object)  # of 2^-134
    units = units * 2 ** np.maximum(bits >> 7, 0).astype(object)
    largest, column = bits.argmax(axis=0), np.arange(values.shape[1])
    chosen = []
    for order, step in enumerate((0, -1, 1)):  # the order settles ties
        scale = np.clip(first + step, 0, 252)
        grid = (2 * E2M1).astype(int).astype(object) * 2 ** (scale + 6).astype(object)[:, None]
        distance = np.abs(grid - units[..., None]).min(axis=-1)
        rank = np.full(len(first), order)
        chosen.append(
            list(zip((distance**2).sum(axis=0), distance[largest, column], rank, scale, strict=True))
        )
    return np.array([min(candidates)[3] for candidates in zip(*chosen, strict=True)], np.uint8)


def random_packed(
    rng: np.random.Generator, rows: int, groups: int, low: int = 0, high: int = 255
) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks [rows, groups, 16] and scales [rows, groups] between low and high."""
    blocks = rng.integers(0, 256, (rows, groups, 16), dtype=np.uint8)
    return blocks, rng.integers(low, high + 1, (rows, groups), dtype=np.uint8)
