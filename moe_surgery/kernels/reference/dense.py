"""Dense products with weights as stored, in any compute dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_surgery.kernels.interface import (
    Backend,
    DecoderModel,
    DecoderShape,
    DecodeStep,
    FusedLayers,
    KVCache,
)
from moe_surgery.kernels.q8_0 import Matrix, Q8Matrix
from moe_surgery.kernels.reference.attention import attention, visible
from moe_surgery.kernels.weights import Layer

__all__ = ["TorchDense", "apply_rope", "linear", "rms_norm"]

PIECE_BYTES = 32 << 20
Dense = TypeVar("Dense", bound="TorchDense")


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [..., columns] @ weight [rows, columns].T + bias, in x's dtype.

    A weight of another dtype is cast in pieces, so a float32 run over a BF16 checkpoint never holds a second
    copy of it; Q8_0 likewise, from float32.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(weight, Tensor) and weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    rows = max(1, PIECE_BYTES // (weight.shape[1] * x.element_size()))
    parts: Iterable[Tensor]
    if isinstance(weight, Q8Matrix):
        parts = (weight.dequantise(first, first + rows) for first in range(0, len(weight), rows))
    else:
        parts = torch.split(weight, rows)
    pieces = [F.linear(x, part.to(x.dtype)) for part in parts]
    y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm in float32, weight included; the result has x's dtype."""
    x_fp32 = x.float()
    scale = torch.rsqrt(x_fp32.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (x_fp32 * scale * weight.float()).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., head_dim], its halves rotated by angles broadcast to [..., head_dim / 2], in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class TorchDense(Backend):
    """The operations of `Backend` other than routing and experts, in plain PyTorch."""

    dtype = torch.bfloat16
    reads_q8_0 = True
    stores_scores = True

    def for_tokens(self: Dense, tokens: int) -> Dense:
        return self

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)

    def multi_linear(self, x: Tensor, layers: Sequence[tuple[Matrix, Tensor | None]]) -> list[Tensor]:
        return [linear(x, weight, bias) for weight, bias in layers]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def rope_cos_sin(self, positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * frequencies
        return angles.cos() * scale, angles.sin() * scale

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return apply_rope(x, cos, sin)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        queries: Tensor,
        keys: Tensor,
        window: int | None,
    ) -> Tensor:
        return attention(q, k, v, sinks, visible(queries, keys, window))

    def fuse_layers(self, layers: Sequence[Layer], shape: DecoderShape) -> FusedLayers | None:
        return None

    def prepare_layer(self, layer: Layer) -> Layer:
        return layer

    def decode_step(self, model: DecoderModel, cache: KVCache) -> DecodeStep | None:
        return None
