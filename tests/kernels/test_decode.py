"""MXFP4 decoded by PyTorch has the bits of the specification, in every dtype that can hold them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.formats import mxfp4  # noqa: E402
from moe_surgery.kernels.reference.mxfp4 import decode  # noqa: E402
from tests.support.checkpoints import decode as by_definition  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def as_floats(bits: np.ndarray) -> torch.Tensor:
    """BF16 bits as the float32 values they stand for."""
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32))


def everything() -> tuple[np.ndarray, np.ndarray]:
    """All 256 bytes under each of the 256 scales: blocks [256, 16, 16], scales [256, 16]."""
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(256, axis=0)
    return blocks, np.arange(256, dtype=np.uint8)[:, None].repeat(16, axis=1)


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit: signed zeros and infinities differ."""
    return torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_every_scale_has_the_bits_of_the_specification(dtype: torch.dtype) -> None:
    blocks, scales = everything()
    bits = mxfp4.decode(blocks, scales, isa="numpy")
    assert np.array_equal(bits, by_definition(blocks, scales))
    got = decode(torch.from_numpy(blocks), torch.from_numpy(scales), dtype)
    assert got.dtype == dtype
    assert same_bits(got, as_floats(bits).to(dtype))


@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    groups=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_leading_shape_keeps_its_order(
    lead: list[int], groups: int, dtype: torch.dtype, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*lead, 2, groups, 16), np.uint8)
    scales = rng.integers(0, 256, (*lead, 2, groups), np.uint8)
    got = decode(torch.from_numpy(blocks), torch.from_numpy(scales), dtype)
    assert same_bits(got, as_floats(by_definition(blocks, scales)).to(dtype))


def test_a_window_of_rows_decodes_as_those_rows_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(0, 256, (3, 8, 2, 16), np.uint8))
    scales = torch.from_numpy(rng.integers(0, 256, (3, 8, 2), np.uint8))
    whole = decode(blocks, scales, torch.float32)
    assert same_bits(decode(blocks[:, 3:7], scales[:, 3:7], torch.float32), whole[:, 3:7])
