"""What the kernels should compute, in numpy float64 and plain loops; nothing of the package is used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def decoded(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> Array:
    """Blocks [..., groups, 16] and scales [..., groups] to values [..., 32 * groups]."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    size = np.ldexp(E2M1[codes & 7], scales.astype(np.int32)[..., None] - 127)
    return np.where(codes & 8, -size, size).reshape(*blocks.shape[:-2], -1)


def experts(
    x: Array, ids: NDArray[np.int64], weights: Array, gate_up: Array, gate_up_bias: Array,
    down: Array, down_bias: Array, limit: float = 7.0, alpha: float = 1.702,
) -> Array:  # fmt: skip
    """The weighted sum of the chosen experts; gate_up [E, 2I, H] and down [E, H, I] as matrices."""
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            h = gate_up[expert] @ row + gate_up_bias[expert]
            gate = np.minimum(h[0::2], limit)
            up = np.clip(h[1::2], -limit, limit)
            z = (up + 1) * gate / (1 + np.exp(-alpha * gate))
            out[token] += weight * (down[expert] @ z + down_bias[expert])
    return out


def route(x: Array, weight: Array, bias: Array, top_k: int) -> tuple[NDArray[np.int64], Array]:
    """The k best by (logit descending, index ascending), and the softmax over their logits."""
    logits = x @ weight.T + bias
    ids = np.array([sorted(range(len(bias)), key=lambda e, row=row: (-row[e], e))[:top_k] for row in logits])
    chosen = np.take_along_axis(logits, ids, axis=1)
    share = np.exp(chosen - logits.max(axis=1, keepdims=True))
    return ids, share / share.sum(axis=1, keepdims=True)
