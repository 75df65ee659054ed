"""Arguments of the operators."""

from __future__ import annotations

import torch

from moe_surgery.integrations import ops  # noqa: F401  # registers torch.ops.moe_surgery

HIDDEN, INNER, EXPERTS, TOP_K = 64, 32, 5, 2


def inputs(tokens: int, packed: bool, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    """The arguments of `experts_mxfp4` or `experts`."""
    random = torch.Generator().manual_seed(tokens)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    def codes(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=random)

    ids = torch.rand(tokens, EXPERTS, generator=random).argsort(dim=1)[:, :TOP_K].contiguous()
    weights = floats(tokens, TOP_K).softmax(-1)
    biases = floats(EXPERTS, 2 * INNER), floats(EXPERTS, HIDDEN)
    if packed:
        up = (
            codes(0, 255, EXPERTS, 2 * INNER, HIDDEN // 32, 16),
            codes(120, 124, EXPERTS, 2 * INNER, HIDDEN // 32),
        )
        down = codes(0, 255, EXPERTS, HIDDEN, INNER // 32, 16), codes(120, 124, EXPERTS, HIDDEN, INNER // 32)
    else:
        up, down = (floats(EXPERTS, HIDDEN, 2 * INNER),), (floats(EXPERTS, INNER, HIDDEN),)
    return floats(tokens, HIDDEN), ids, weights, *up, biases[0], *down, biases[1], 7.0, 1.702


def operator(packed: bool):
    return torch.ops.moe_surgery.experts_mxfp4 if packed else torch.ops.moe_surgery.experts
