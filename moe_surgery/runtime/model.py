"""gpt-oss, whole: token ids to logits."""

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
from moe_surgery.kernels.weights import Layer
from moe_surgery.runtime.cache import Cache
from moe_surgery.runtime.decoder_layer import Attend, decoder_layer
from moe_surgery.runtime.rope import Rope

__all__ = ["SCORE_BYTES", "CausalLM"]

DEFAULT_ROLLBACK = 16
# Attention scores held at once: queries x keys x heads, four bytes each.
SCORE_BYTES = 128 << 20
MOST_PREFILL = 512


class CausalLM:
    """A loaded model. Call it for logits; `new_cache` makes what decoding needs.

    `config` is that of the checkpoint (its experts and top_k are the stored ones; a layer's own
    `top_k` is what the plan leaves of it). `dtype` is the compute dtype; weights stay as stored.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: Sequence[Layer],
        norm: Tensor,
        unembedding: Tensor,
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
        """Who computes, and in what: "backend", "device" (its type) and "dtype" (compute). Results of two
        that differ here are not the same bits."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"backend": self.backend.name, "device": self.device.type, "dtype": dtype}

    def new_cache(self, batch: int, context: int, *, rollback: int = DEFAULT_ROLLBACK) -> Cache:
        """A KV cache for `batch` sequences of up to `context` tokens, padding included.

        `rollback` is how many tokens `Cache.truncate` can roll back. Raises UsageError for a context
        that the model was not made for.
        """
        c = self.config
        if not 1 <= context <= c.max_position_embeddings:
            raise UsageError(
                f"a context of {context} tokens; this model takes 1 to {c.max_position_embeddings}"
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
        """Logits float32 [batch, kept, vocabulary] for input_ids int64 [batch, tokens], on any device.

        Without `cache` the tokens are a text of their own; with it they follow what it holds, which
        grows by them. `attention_mask` [batch, tokens] is 0 at left padding. `logits_to_keep`: the
        last so many tokens only. Long inputs go through in chunks. Raises UsageError where the
        tokens do not fit the context, or are on the CPU and outside the vocabulary.
        """
        batch, tokens = input_ids.shape
        cache = cache if cache is not None else self.new_cache(batch, tokens)
        cache.check_capacity(tokens)
        ids = self._admitted(input_ids)
        keep = tokens if logits_to_keep is None else min(logits_to_keep, tokens)
        kept: list[Tensor] = []
        for start, stop in self._chunks(cache, batch, tokens):
            mask = None if attention_mask is None else attention_mask[:, start:stop]
            x = self._hidden(ids[:, start:stop], cache, mask)
            if stop == tokens or stop > tokens - keep:
                kept.append(self.lm_head(x[:, max(0, tokens - keep - start) :]))
        return kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)

    def decode_step(self, cache: Cache) -> DecodeStep | None:
        """The backend's own step of one token per sequence for `cache`, or None where it has none.

        Raises UsageError where the cache is full.
        """
        if not isinstance(self.layers, list):  # one layer at a time: nothing to decode with
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

    def _admitted(self, ids: Tensor) -> Tensor:
        """`ids` on the model's device; checked only where that waits for no device."""
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
        keys = min(cache.context, cache.length + tokens)
        step = SCORE_BYTES // (batch * keys * self.config.num_attention_heads * 4)
        step = max(1, min(step, MOST_PREFILL))
        return [(a, min(a + step, tokens)) for a in range(0, tokens, step)]

    def _hidden(self, ids: Tensor, cache: Cache, mask: Tensor | None) -> Tensor:
        """One step through all layers: ids [batch, tokens] -> [batch, tokens, hidden]."""
        positions = cache.begin(ids.shape[1], mask)
        cos, sin = self.rope(positions, self.backend)
        x = self.embed(ids)
        fused = self._fused_layers() if cache.can_write_in_place(ids.shape[1]) else None
        if fused is not None:
            x = fused(x, positions, cos, sin, cache.layer_caches())
        else:
            for number, layer in enumerate(self.layers):
                attend = self._attend(number, layer, cache, positions)
                x = decoder_layer(self.backend, self.config, layer, x, cos, sin, attend)
        cache.end()
        return x

    def _fused_layers(self) -> FusedLayers | None:
        """The layers as one operation, where the backend has it for them as they are now."""
        if self._fused is None or self._fused[0] is not self.layers:
            whole = isinstance(self.layers, list) and self.dtype == self.backend.dtype
            self._fused = (
                self.layers,
                self.backend.fuse_layers(self.layers, self._shape()) if whole else None,
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

    def lm_head(self, x: Tensor) -> Tensor:
        """Logits float32 [..., vocabulary] of hidden states x [..., hidden] after the last layer."""
        x = self.backend.rms_norm(x, self.norm, self.config.rms_norm_eps)
        return self.backend.linear(x, self.unembedding).float()
