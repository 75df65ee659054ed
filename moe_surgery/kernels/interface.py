"""The interface of a backend: the operations of a decoder layer that read weights or the cache, and fused forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_surgery.kernels.q8_0 import Matrix
from moe_surgery.kernels.weights import ExpertWeights, Layer

__all__ = [
    "EMPTY",
    "SHORT_STEP",
    "Backend",
    "Chosen",
    "DecodeStep",
    "DecoderModel",
    "DecoderShape",
    "FusedLayers",
    "KVCache",
    "LayerCache",
    "MeasuredExperts",
]

# Tokens of a sequence in a step up to which a backend computes all steps alike (see `Backend.for_tokens`).
SHORT_STEP = 31
EMPTY = -1  # the position of an empty cache slot, and of a padding token


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Constants of all decoder layers. `sliding_windows[i]` is layer i's window, None for full attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    sliding_windows: Sequence[int | None]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's cache in a step.

    `keys` and `values` [batch, num_kv_heads, slots, head_dim]; `positions` int64 [batch, slots], the step's
    tokens included, EMPTY for none; `slot_ids` int64 [tokens] or [batch, tokens]: the slots in which to store
    the step's tokens.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    slot_ids: Tensor


@dataclass(frozen=True, slots=True)
class MeasuredExperts:
    """What `Backend.experts` returns, and measures of each expert's output f before its weight.

    `y` [tokens, hidden]. `norms` |f|, float64 [tokens, top_k]; `least` and `largest`, the least and the largest
    f_i, float32 [tokens, top_k].
    """

    y: Tensor
    norms: Tensor
    least: Tensor
    largest: Tensor


Chosen = tuple[Tensor, Tensor, Tensor]
"""The experts' input norm(x) [tokens, hidden], and what `Backend.route` returns for it: ids and weights."""


class FusedLayers(Protocol):
    """All decoder layers as one operation; where experts are not in memory, each layer up to them."""

    def __call__(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[LayerCache]
    ) -> Tensor:
        """The hidden states [batch, tokens, hidden] after the last layer; they may share x's memory.

        x [batch, tokens, hidden], `positions` int64 [batch, tokens], cos and sin float32
        [batch, tokens, head_dim / 2].
        """
        ...

    def choose(self, number: int, x: Tensor) -> Chosen:
        """What layer `number` would choose for x [batch, tokens, hidden], hidden states behind its attention.

        For experts that are not in memory (weights on the device "meta"): the caller gets them and adds their sum.
        """
        ...

    def attend_and_choose(
        self, number: int, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache
    ) -> Chosen:
        """`choose` after the layer's attention, which is added to x; arguments as for a call, of one layer."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderModel:
    """A whole decoder with its weights, for `Backend.decode_step`.

    embedding and unembedding [vocab_size, hidden], norm [hidden] of the last RMSNorm; `rope` returns cos and
    sin float32 [..., head_dim / 2] for positions int64 [...]; `dtype` is the compute dtype.
    """

    layers: Sequence[Layer]
    shape: DecoderShape
    embedding: Tensor
    norm: Tensor
    unembedding: Matrix
    rope: Callable[[Tensor], tuple[Tensor, Tensor]]
    dtype: torch.dtype


class KVCache(Protocol):
    """The keys and values that a decode step reads and extends; see `moe_surgery.runtime.cache.Cache`.

    keys[i] and values[i] [batch, num_kv_heads, slots[i], head_dim]; `positions[n]` int64 [batch, n] holds the
    position of the token in each slot of layers with n slots, EMPTY for none. Token i of a sequence, counted
    from 0 with padding, is in slot i % n, at position i - pads.
    """

    batch: int
    context: int
    slots: list[int]
    keys: list[Tensor]
    values: list[Tensor]
    positions: dict[int, Tensor]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        ...

    @property
    def ragged(self) -> bool:
        """Whether sequences have different lengths."""
        ...

    @property
    def pads(self) -> Tensor:
        """Padding tokens of each sequence, int64 [batch]; a new tensor whenever they change."""
        ...

    def check_capacity(self, tokens: int) -> None:
        """Raise UsageError where `tokens` more do not fit the context."""
        ...

    def advance(self, tokens: int) -> None:
        """Count `tokens` more in each sequence, which the step has stored."""
        ...


class DecodeStep(Protocol):
    """One step of decoding, for one model and one cache."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits float32 [batch, vocab_size] for tokens int64 [batch]; the next call may reuse their memory.

        The cache grows by one token per sequence. Raises UsageError where it is full, or where its sequences
        now have different lengths.
        """
        ...


class Backend(Protocol):
    """One implementation of these operations; the runtime calls nothing else.

    A subclass inherits `measured_experts` that returns None and must define all else.
    Weights stay as they are given: as stored, usually BF16 or packed, or in Q8_0; results have x's dtype.
    """

    name: str
    dtype: torch.dtype  # the default compute dtype
    reads_q8_0: bool  # whether `linear` takes matrices in Q8_0
    stores_scores: bool  # whether attention holds the scores of all queries, keys and heads at a time

    def for_tokens(self, tokens: int) -> Backend:
        """This backend for steps of `tokens` tokens a sequence.

        A backend may compute steps of more than SHORT_STEP tokens otherwise than shorter ones, with other
        rounding. Which it is depends on this number alone, not on how many tokens an operation gets, so that a
        token's result does not depend on the tokens beside it. Fused layers choose by themselves.
        """
        ...

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Choose experts: ids int64 [tokens, top_k] and weights [tokens, top_k] in x's dtype.

        x [tokens, hidden], weight [experts, hidden], bias [experts]. The k largest logits, largest
        first, ties to the lowest index; weights are the softmax over those k alone.
        """
        ...

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
        """The weighted sum of the chosen experts' outputs: [tokens, hidden] in x's dtype."""
        ...

    def measured_experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        expert_weights: ExpertWeights,
        groups: Tensor,
        sums: Tensor,
    ) -> MeasuredExperts | None:
        """`experts`, with measures of the outputs taken in the same pass; None where the backend has no such pass.

        `groups` int64 [tokens] on the CPU. Each output, before its weight, is added to `sums`, float64
        [groups, experts, hidden] on the CPU, in the row of its token's group and its expert. `expert_weights`
        without an `expert_map`.
        """
        return None

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        """x [..., columns] @ weight [rows, columns].T + bias [rows]."""
        ...

    def multi_linear(self, x: Tensor, layers: Sequence[tuple[Matrix, Tensor | None]]) -> list[Tensor]:
        """`linear` of one x with each (weight, bias)."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 inside."""
        ...

    def rope_cos_sin(self, positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [...] times frequencies float32 [n], times scale: float32 [..., n]."""
        ...

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., head_dim] with at most four axes; its halves (a, b) become (a cos - b sin, b cos + a sin).

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

        q [batch, num_heads, queries, head_dim]; k, v [batch, num_kv_heads, keys, head_dim]; sinks [num_heads];
        positions `queries` int64 [batch, queries] and `keys` [batch, keys], negative for none: a query attends
        to the keys at its own position and before, at most `window` of them. Returns
        [batch, queries, num_heads * head_dim], zeros for a query with no visible key.
        """
        ...

    def fuse_layers(self, layers: Sequence[Layer], shape: DecoderShape) -> FusedLayers | None:
        """`layers` as one operation with the same results, bit for bit, as the operations above one by one.

        None where the backend has no such operation for these weights.
        """
        ...

    def prepare_layer(self, layer: Layer) -> Layer:
        """`layer` in the memory layout that `decode_step` reads, values unchanged; called when loading."""
        ...

    def decode_step(self, model: DecoderModel, cache: KVCache) -> DecodeStep | None:
        """A step of one token per sequence as one operation, or None where the backend has none for this model
        and cache.

        The cache may be used otherwise between steps (prefill, truncation). Raises UsageError where it is
        full: capturing a step needs a free slot.
        """
        ...
