"""Any backend made batch-invariant: a token's result does not depend on the other tokens of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_surgery.kernels.interface import (
    Backend,
    DecoderModel,
    DecoderShape,
    DecodeStep,
    FusedLayers,
    KVCache,
)
from moe_surgery.kernels.q8_0 import Matrix
from moe_surgery.kernels.weights import ExpertWeights, Layer

__all__ = ["SUFFIX", "InvariantBackend"]

SUFFIX = "-invariant"


class InvariantBackend(Backend):
    """See `moe_surgery.kernels.interface.Backend`: every operation of `backend`, one token at a time.

    A library chooses its kernels, and with them the order of summation, by the number of rows, so a step of
    several tokens rounds differently from several steps of one. Here each token is computed alone: its
    products, and attention over just its visible keys, in order of position. The price: a step over n tokens
    reads the weights n times. The native backend is batch-invariant without this.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name = backend.name + SUFFIX
        self.dtype = backend.dtype
        self.reads_q8_0 = backend.reads_q8_0
        self.stores_scores = backend.stores_scores

    def for_tokens(self, tokens: int) -> InvariantBackend:
        return self

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        ids, weights = zip(
            *(self._backend.route(row, weight, bias, top_k) for row in torch.split(x, 1)), strict=True
        )
        return torch.cat(ids), torch.cat(weights)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
        rows = zip(*(torch.split(a, 1) for a in (x, ids, weights)), strict=True)
        return torch.cat([self._backend.experts(a, b, c, expert_weights) for a, b, c in rows])

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        return _by_row(lambda row: self._backend.linear(row, weight, bias), x)

    def multi_linear(self, x: Tensor, layers: Sequence[tuple[Matrix, Tensor | None]]) -> list[Tensor]:
        return [self.linear(x, weight, bias) for weight, bias in layers]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _by_row(lambda row: self._backend.rms_norm(row, weight, eps), x)

    def rope_cos_sin(self, positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        parts = [
            self._backend.rope_cos_sin(p, frequencies, scale) for p in torch.split(positions.reshape(-1), 1)
        ]
        shape = (*positions.shape, len(frequencies))
        cos, sin = (torch.cat(part).view(shape) for part in zip(*parts, strict=True))
        return cos, sin

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._backend.apply_rope(x, cos, sin)  # each product and sum is rounded by itself

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
        out = q.new_zeros((q.shape[0], q.shape[2], q.shape[1] * q.shape[3]))
        for b in range(q.shape[0]):
            order = keys[b].argsort(stable=True)
            key_positions = keys[b][order]
            for i, position in enumerate(queries[b].tolist()):
                first = 0 if window is None else max(0, position - window + 1)
                visible = order[(key_positions >= first) & (key_positions <= position)]
                if not len(visible):
                    continue
                one = (q[b : b + 1, :, i : i + 1], k[b : b + 1, :, visible], v[b : b + 1, :, visible], sinks)
                at = (queries[b : b + 1, i : i + 1], keys[b : b + 1, visible])
                out[b : b + 1, i : i + 1] = self._backend.attention(*one, *at, window)
        return out

    def fuse_layers(self, layers: Sequence[Layer], shape: DecoderShape) -> FusedLayers | None:
        return None

    def prepare_layer(self, layer: Layer) -> Layer:
        return layer

    def decode_step(self, model: DecoderModel, cache: KVCache) -> DecodeStep | None:
        return None


def _by_row(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`operation` on each row of x [..., columns] as [1, columns]."""
    rows = torch.cat([operation(row) for row in torch.split(x.reshape(-1, x.shape[-1]), 1)])
    return rows.view(*x.shape[:-1], rows.shape[-1])
