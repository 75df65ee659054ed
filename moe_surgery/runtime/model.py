"""The whole model: token ids to logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_surgery.errors import UsageError
from moe_surgery.families.model_config import ModelConfig
from moe_surgery.kernels import Backend
from moe_surgery.kernels.interface import DecoderModel, DecoderShape, DecodeStep, FusedLayers
from moe_surgery.kernels.q8_0 import Matrix, Q8Matrix
from moe_surgery.kernels.weights import Layer
from moe_surgery.runtime.cache import Cache
from moe_surgery.runtime.decoder_layer import Attend, decoder_layer
from moe_surgery.runtime.rope import Rope

__all__ = ["SCORE_BYTES", "CausalLM"]

DEFAULT_ROLLBACK = 16
# Attention scores in memory at a time: queries x keys x heads, four bytes each.
SCORE_BYTES = 128 << 20
# Tokens in a step of one sequence, of each of four and more a quarter: many, so that what a step does once for each
# expert, reading and decoding its weights, is shared by many tokens.
MAX_PREFILL_TOKENS = 2048


class CausalLM:
    """A loaded model. Call it for logits; `new_cache` makes what decoding needs.

    `config` is the checkpoint's: its numbers of experts are the stored ones, a layer's `top_k` may be smaller in
    a view. `dtype` is the compute dtype; weights stay as loaded.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: Sequence[Layer],
        norm: Tensor,
        unembedding: Matrix,
        dtype: torch.dtype,
        backend: Backend,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.unembedding = unembedding
        self.dtype = dtype
        self.backend = backend
        self.device = norm.device
        self.rope = Rope(config.rope_parameters, config.head_dim, self.device)
        self._fused: tuple[Sequence[Layer], FusedLayers | None] | None = None

    @property
    def computation(self) -> dict[str, str]:
        """The "backend", "device" (type), compute "dtype", and "dense" where it is not "keep".

        Models that differ in any give different bits.
        """
        dtype = str(self.dtype).removeprefix("torch.")
        dense = {} if self.dense == "keep" else {"dense": self.dense}
        return {"backend": self.backend.name, "device": self.device.type, "dtype": dtype, **dense}

    @property
    def dense(self) -> str:
        """The format of attention's matrices and the unembedding: "keep" for as stored, or "q8_0"."""
        return "q8_0" if isinstance(self.unembedding, Q8Matrix) else "keep"

    def new_cache(self, batch: int, context: int, *, rollback: int = DEFAULT_ROLLBACK) -> Cache:
        """A KV cache for `batch` sequences of up to `context` tokens, padding included.

        `rollback` is how many tokens `Cache.truncate` can roll back. Raises UsageError for a context
        beyond the model's.
        """
        c = self.config
        if not 1 <= context <= c.max_position_embeddings:
            raise UsageError(
                f"a context of {context} tokens; this model supports 1 to {c.max_position_embeddings}"
            )
        return Cache(
            batch,
            context,
            c.sliding_windows,
            c.num_key_value_heads,
            c.head_dim,
            self.dtype,
            self.device,
            rollback,
        )

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """Logits float32 [batch, kept, vocab_size] for input_ids int64 [batch, tokens], on any device.

        With `cache` the tokens continue those in it and are added to it. `attention_mask` [batch, tokens] is 0
        at left padding. `logits_to_keep`: only for the last tokens, this many. Long inputs are processed in
        chunks. Raises UsageError where the tokens do not fit the context, or are on the CPU and outside the
        vocabulary.
        """
        batch, tokens = input_ids.shape
        cache = cache if cache is not None else self.new_cache(batch, tokens)
        cache.check_capacity(tokens)
        ids = self._checked_ids(input_ids)
        keep = tokens if logits_to_keep is None else min(logits_to_keep, tokens)
        logits: list[Tensor] = []
        for start, stop in self._chunks(cache, batch, tokens):
            mask = None if attention_mask is None else attention_mask[:, start:stop]
            x = self._hidden(ids[:, start:stop], cache, mask)
            if stop == tokens or stop > tokens - keep:
                kept = x[:, max(0, tokens - keep - start) :]
                logits.append(self.lm_head(kept, self.backend.for_tokens(stop - start)))
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    def decode_step(self, cache: Cache) -> DecodeStep | None:
        """The backend's own step of one token per sequence for `cache`, or None where it has none.

        Raises UsageError where the cache is full.
        """
        if not isinstance(self.layers, list):  # loaded one layer at a time: no decode step
            return None
        return self.backend.decode_step(self.decoder_model(), cache)

    def decoder_model(self) -> DecoderModel:
        """This model's weights and constants as a backend's decode step takes them."""
        return DecoderModel(
            self.layers,
            self._shape(),
            self.embedding,
            self.norm,
            self.unembedding,
            partial(self.rope, backend=self.backend),
            self.dtype,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states [..., hidden] before the first layer, of ids int64 [...] on the model's device."""
        return F.embedding(ids, self.embedding).to(self.dtype)

    def _checked_ids(self, ids: Tensor) -> Tensor:
        """`ids` on the model's device; checked only on the CPU, where that waits for no device."""
        if not ids.numel():
            raise UsageError("no tokens; give at least one")
        if ids.device.type == "cpu":
            low, high = map(int, ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise UsageError(
                    f"token {low if low < 0 else high} is not one of the model's {self.config.vocab_size}"
                )
        return ids.to(self.device)

    def _chunks(self, cache: Cache, batch: int, tokens: int) -> list[tuple[int, int]]:
        """Chunks of about the same length, so that a backend takes all of a long input for long steps."""
        step = max(1, MAX_PREFILL_TOKENS // min(batch, 4))
        if self.backend.stores_scores:
            keys = min(cache.context, cache.length + tokens)
            step = min(step, max(1, SCORE_BYTES // (batch * keys * self.config.num_attention_heads * 4)))
        count = -(-tokens // step)
        return [(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]

    def _hidden(self, ids: Tensor, cache: Cache, mask: Tensor | None) -> Tensor:
        """A forward pass through all layers: ids [batch, tokens] -> [batch, tokens, hidden]."""
        positions = cache.begin(ids.shape[1], mask)
        cos, sin = self.rope(positions, self.backend)
        x = self.embed(ids)
        fused = self._fused_layers() if cache.can_write_in_place(ids.shape[1]) else None
        if fused is not None:
            x = fused(x, positions, cos, sin, cache.layer_caches())
        else:
            backend = self.backend.for_tokens(ids.shape[1])
            for number, layer in enumerate(self.layers):
                attend = self._attend(number, layer, cache, positions)
                x = decoder_layer(backend, self.config, layer, x, cos, sin, attend)
        cache.end()
        return x

    def _fused_layers(self) -> FusedLayers | None:
        """The layers as one operation where the backend has one, rebuilt when `layers` is replaced."""
        if self._fused is None or self._fused[0] is not self.layers:
            fusable = isinstance(self.layers, list) and self.dtype == self.backend.dtype
            self._fused = (
                self.layers,
                self.backend.fuse_layers(self.layers, self._shape()) if fusable else None,
            )
        return self._fused[1]

    def _shape(self) -> DecoderShape:
        c = self.config
        return DecoderShape(
            c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps, c.sliding_windows
        )

    def _attend(self, number: int, layer: Layer, cache: Cache, positions: Tensor) -> Attend:
        """Attention of layer `number` over `cache`, to which it adds the step's keys and values."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [batch, heads, tokens, head_dim]
            keys, values, key_positions = cache.update(number, k, v)
            window = self.config.sliding_windows[number]
            return self.backend.attention(q, keys, values, layer.sinks, positions, key_positions, window)

        return attend

    def lm_head(self, x: Tensor, backend: Backend) -> Tensor:
        """Logits float32 [..., vocabulary] of hidden states x [..., hidden] after the last layer."""
        x = backend.rms_norm(x, self.norm, self.config.rms_norm_eps)
        return backend.linear(x, self.unembedding).float()
