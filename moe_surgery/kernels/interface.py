"""What a backend offers: the operations of a decoder layer that read weights or the cache, and fused forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_surgery.kernels.weights import ExpertWeights, Layer

__all__ = [
    "NOWHERE",
    "Backend",
    "DecodeStep",
    "DecoderModel",
    "DecoderShape",
    "FusedLayers",
    "KVCache",
    "LayerSlots",
]

NOWHERE = -1  # position of a cache slot that holds nothing, or a padding token


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What decoder layers have in common. `sliding_windows[i]` is layer i's window, None for full attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    sliding_windows: Sequence[int | None]


@dataclass(frozen=True, slots=True)
class LayerSlots:
    """One layer's cache in a step.

    `keys` and `values` [batch, kv_heads, slots, head_dim] and `positions` int64 [batch, slots] of the
    slots, the step's included, -1 for none; `places` int64 [columns] or [batch, columns] says in which
    slots the step's columns are to be stored.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    places: Tensor


class FusedLayers(Protocol):
    """All decoder layers as one operation."""

    def __call__(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[LayerSlots]
    ) -> Tensor:
        """The hidden states x [batch, columns, hidden] behind the last layer, whose memory may be x's.

        `positions` int64 [batch, columns], cos and sin float32 [batch, columns, head_dim / 2].
        """
        ...


@dataclass(frozen=True, slots=True)
class DecoderModel:
    """A whole decoder with its weights, for `Backend.decode_step`.

    embedding and unembedding [vocabulary, hidden], norm [hidden] of the last RMSNorm; `rope` gives cos and
    sin float32 [..., head_dim / 2] for positions int64 [...]; `dtype` is the compute dtype.
    """

    layers: Sequence[Layer]
    shape: DecoderShape
    embedding: Tensor
    norm: Tensor
    unembedding: Tensor
    rope: Callable[[Tensor], tuple[Tensor, Tensor]]
    dtype: torch.dtype


class KVCache(Protocol):
    """The keys and values that a decode step reads and extends; see `moe_surgery.runtime.cache.Cache`.

    keys[i] and values[i] [batch, kv_heads, slots[i], head_dim]; `positions[n]` int64 [batch, n] says
    which position each slot holds in layers of n slots, NOWHERE for none. Column c of a sequence is kept in
    slot c % n, at position c - pads.
    """

    batch: int
    context: int
    slots: list[int]
    keys: list[Tensor]
    values: list[Tensor]
    positions: dict[int, Tensor]

    @property
    def length(self) -> int:
        """Columns of the longest sequence."""
        ...

    @property
    def ragged(self) -> bool:
        """Whether sequences have different lengths."""
        ...

    @property
    def pads(self) -> Tensor:
        """Padding columns of each sequence, int64 [batch]; another tensor where they have changed."""
        ...

    def check_room(self, columns: int) -> None:
        """Raise UsageError where `columns` more do not fit the context."""
        ...

    def advance(self, columns: int) -> None:
        """Count `columns` more, which the step has stored."""
        ...


class DecodeStep(Protocol):
    """One step of decoding, for one model and one cache."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits float32 [batch, vocabulary] for tokens int64 [batch]; the next call may reuse their memory.

        The cache grows by one column. Raises UsageError where it is full, or its sequences have different
        lengths by now.
        """
        ...


class Backend(Protocol):
    """One implementation of these operations. The runtime calls nothing else of it.

    Weights stay as stored, usually BF16 or packed; results have x's dtype.
    """

    name: str
    dtype: torch.dtype  # what a model computes in unless told otherwise

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Choose experts: ids int64 [tokens, top_k] and weights [tokens, top_k] in x's dtype.

        x [tokens, hidden], weight [experts, hidden], bias [experts]. The k largest logits, largest
        first, ties to the lowest index; weights are the softmax over those k alone.
        """
        ...

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
        """The weighted sum of the chosen experts' outputs: [tokens, hidden] in x's dtype."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., columns] @ weight [rows, columns].T + bias [rows]."""
        ...

    def multi_linear(self, x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """`linear` of one x with each (weight, bias)."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 inside."""
        ...

    def rope_cos_sin(self, positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [...] times frequencies float32 [n], times scale: float32 [..., n]."""
        ...

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., head_dim], at most four axes, its halves (a, b) turned: (a cos - b sin, b cos + a sin).

        cos and sin float32, broadcast to [..., head_dim / 2].
        """
        ...

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
        """Attention with one extra logit per head, `sinks`, whose probability is dropped.

        q [batch, heads, queries, head_dim]; k, v [batch, kv_heads, keys, head_dim]; sinks [heads];
        positions `queries` int64 [batch, queries] and `keys` [batch, keys], negative for none: a query
        sees the keys at its own position and before, at most `window` of them. Returns
        [batch, queries, heads * head_dim]; a query that sees nothing gives zeros.
        """
        ...

    def fuse_layers(self, layers: Sequence[Layer], shape: DecoderShape) -> FusedLayers | None:
        """`layers` as one operation that gives what the others above give one by one, bit for bit.

        None where there is no such thing for these weights.
        """
        ...

    def prepare_layer(self, layer: Layer) -> Layer:
        """`layer` laid out in memory as `decode_step` reads it, the values unchanged; called at loading."""
        ...

    def decode_step(self, model: DecoderModel, cache: KVCache) -> DecodeStep | None:
        """A step of one token per sequence as one operation, or None where there is none for these two.

        The cache may be used by others between steps (prefill, truncation). Raises UsageError where it is
        full: making a step takes a free column.
        """
        ...
