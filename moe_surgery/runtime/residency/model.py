"""A model whose experts come from a pool: token ids to logits, the same as `CausalLM`."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from moe_surgery.kernels import Backend
from moe_surgery.kernels.interface import Chosen, DecodeStep, FusedLayers
from moe_surgery.kernels.weights import Layer
from moe_surgery.runtime.cache import Cache
from moe_surgery.runtime.decoder_layer import Attend, attention_block, route
from moe_surgery.runtime.model import DEFAULT_ROLLBACK, SCORE_BYTES, CausalLM
from moe_surgery.runtime.residency.device_slots import DeviceSlots
from moe_surgery.runtime.residency.experts import stored_experts, weighted_experts
from moe_surgery.runtime.residency.memory import Budget
from moe_surgery.runtime.residency.pool import ExpertPool
from moe_surgery.runtime.step_bytes import cache_bytes

__all__ = ["ResidentCausalLM"]


class ResidentCausalLM(CausalLM):
    """See `CausalLM`. `layers` describe the experts without their weights, which `pool` holds or reads.

    A prompt goes through a layer as a whole, as far as memory allows, so that it reads each expert once. Views share
    the pool. Not for use by several threads at once.
    """

    pool: ExpertPool
    budget: Budget
    embed_rows: Callable[[Tensor], Tensor] | None
    device_slots: DeviceSlots | None = None
    """Where experts are computed on another device than the CPU."""

    @classmethod
    def of(
        cls,
        model: CausalLM,
        pool: ExpertPool,
        budget: Budget,
        embed_rows: Callable[[Tensor], Tensor] | None,
    ) -> ResidentCausalLM:
        """`model` with its experts in `pool`; `embed_rows` reads rows of its embedding, None where it is held."""
        self = cls(
            model.config,
            model.embedding,
            model.layers,
            model.norm,
            model.unembedding,
            model.dtype,
            model.backend,
        )
        self.pool, self.budget, self.embed_rows = pool, budget, embed_rows
        return self

    def new_cache(self, batch: int, context: int, *, rollback: int = DEFAULT_ROLLBACK) -> Cache:
        """See `CausalLM.new_cache`. Its memory is taken from the experts', and given back with the cache.

        Raises UsageError where the limit does not allow for it.
        """
        if self.device.type != "cpu":
            return super().new_cache(batch, context, rollback=rollback)
        nbytes = cache_bytes(self, batch, context, rollback)
        self.budget.take(nbytes, f"a cache of {batch} x {context} tokens", self.pool)
        try:
            cache = super().new_cache(batch, context, rollback=rollback)
        except BaseException:
            self.budget.give_back(nbytes, self.pool)
            raise
        weakref.finalize(cache, self.budget.give_back, nbytes, self.pool)
        return cache

    def embed(self, ids: Tensor) -> Tensor:
        return (
            super().embed(ids)
            if self.embed_rows is None
            else self.embed_rows(ids.cpu()).to(self.device, self.dtype)
        )

    def decode_step(self, cache: Cache) -> DecodeStep | None:
        return None

    def _chunks(self, cache: Cache, batch: int, tokens: int) -> list[tuple[int, int]]:
        count = -(-tokens // max(1, self.budget.most_tokens() // batch))
        return [(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]

    def _hidden(self, ids: Tensor, cache: Cache, mask: Tensor | None) -> Tensor:
        backend = self.backend.for_tokens(ids.shape[1])
        with self.budget.borrowed(ids.numel(), self.pool):
            positions = cache.begin(ids.shape[1], mask)
            cos, sin = self.rope(positions, self.backend)
            x = self.embed(ids)
            fused = self._fused_layers() if cache.can_write_in_place(ids.shape[1]) else None
            caches = [] if fused is None else cache.layer_caches()
            self._guess(0, x, fused)
            for number, layer in enumerate(self.layers):
                if fused is not None:
                    chosen = fused.attend_and_choose(number, x, positions, cos, sin, caches[number])
                else:
                    attend = self._attend(number, layer, cache, positions)
                    x = attention_block(backend, self.config, layer, x, cos, sin, attend)
                    chosen = self._choose(number, x, None)
                x = x + self._experts(backend, number, x, fused, *chosen).view(x.shape)
                self._guess(number + 1, x, fused)
            cache.end()
            self.pool.usage.end_step(ids.numel())
        return x

    def _choose(self, number: int, x: Tensor, fused: FusedLayers | None) -> Chosen:
        """What layer `number` chooses for x [batch, tokens, hidden], hidden states behind its attention."""
        if fused is not None:
            return fused.choose(number, x)
        backend = self.backend.for_tokens(x.shape[1])
        return route(backend, self.config, self.layers[number], x.view(-1, x.shape[-1]))

    def _experts(
        self,
        backend: Backend,
        number: int,
        x: Tensor,
        fused: FusedLayers | None,
        h: Tensor,
        ids: Tensor,
        weights: Tensor,
    ) -> Tensor:
        return weighted_experts(
            backend,
            self.pool if self.device_slots is None else self.device_slots,
            self.pool.usage,
            number,
            h,
            ids,
            weights,
            self.layers[number].experts,
            lambda: self._guess(number + 1, x, fused),
        )

    def _guess(self, number: int, x: Tensor, fused: FusedLayers | None) -> None:
        """Read ahead what layer `number` would choose for x, hidden states before its attention."""
        if number == len(self.layers):
            return
        layer = self.layers[number]
        _, ids, _ = self._choose(number, x, fused)
        stored = stored_experts(ids, layer.experts).cpu()
        if len(stored) == 1:  # the surest first
            self.pool.read_ahead(number, stored[0].tolist())
        else:  # those of most tokens first
            distinct, uses = torch.unique(stored, return_counts=True)
            self.pool.read_ahead(number, distinct[uses.argsort(descending=True)].tolist())

    def _attend(self, number: int, layer: Layer, cache: Cache, positions: Tensor) -> Attend:
        """As `CausalLM._attend`, a few queries at a time where a prompt is long."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [batch, heads, tokens, head_dim]
            keys, values, key_positions = cache.update(number, k, v)
            window = self.config.sliding_windows[number]
            batch, heads, tokens, _ = q.shape
            step = max(1, SCORE_BYTES // (batch * keys.shape[2] * heads * 4))
            parts = [
                self.backend.attention(
                    q[:, :, a : a + step],
                    keys,
                    values,
                    layer.sinks,
                    positions[:, a : a + step],
                    key_positions,
                    window,
                )
                for a in range(0, tokens, step)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

        return attend
