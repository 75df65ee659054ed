"""Launches of a decode step, counted for gpt-oss-20b: 24 layers, top-4."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from moe_surgery.kernels.triton.decode.launches import launch_count


@pytest.mark.parametrize(
    ("batch", "experts", "layer", "moe", "outside"),
    [
        (1, 32, 7, 3, 1),
        (1, 1, 7, 3, 1),
        (2, 32, 8, 3, 2),
        (4, 32, 8, 3, 2),
        (4, 4, 10, 5, 2),  # 16 pairs on 4 experts: sorted
        (8, 32, 10, 5, 2),
        (256, 32, 10, 5, 2),
        (257, 32, 11, 6, 2),
    ],
)
def test_launches(batch: int, experts: int, layer: int, moe: int, outside: int) -> None:
    result = launch_count(24, experts, 4, batch)
    assert (result.layer, result.moe, result.outside) == (layer, moe, outside)
    assert result.step == 24 * layer + outside
