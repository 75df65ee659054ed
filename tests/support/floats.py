"""Checkpoints whose weights are F16 or F32, with values that BF16 does not hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.support.checkpoints import Tensors

DTYPES = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}
"""A format's numpy dtype; uint16 holds the bits of BF16."""


def is_expert_weight(name: str) -> bool:
    return name.endswith(("gate_up_proj", "down_proj"))


def is_dense(name: str) -> bool:
    return not is_expert_weight(name)


def in_dtype(
    dtype: str, which: Callable[[str], bool] = lambda name: True, seed: int = 0
) -> Callable[[Tensors], None]:
    """An edit of BF16 tensors: those that `which` names become `dtype`, with bits in the whole significand."""
    rng = np.random.default_rng([11, seed])

    def edit(tensors: Tensors) -> None:
        for name, bits in tensors.items():
            if which(name) and dtype != "bf16":
                noise = 1 + rng.uniform(-(2.0**-8), 2.0**-8, bits.shape)
                tensors[name] = (as_float64(bits) * noise).astype(DTYPES[dtype])

    return edit


def as_float64(values: np.ndarray) -> np.ndarray:
    """The values of a tensor, whichever dtype it has."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)
