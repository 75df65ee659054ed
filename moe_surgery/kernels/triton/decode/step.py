"""One decode step as a fixed list of kernel launches, captured once in a CUDA graph and replayed.

Every buffer is allocated beforehand, and everything that changes from step to step (the tokens, their number
in the cache) is read from the device, so a replay needs no host input and never waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.kernels.interface import EMPTY, DecoderModel, KVCache
from moe_surgery.kernels.q8_0 import as_stored
from moe_surgery.kernels.triton import tuning
from moe_surgery.kernels.triton.backend import experts_launches, route_launches
from moe_surgery.kernels.triton.decode.attention import attention
from moe_surgery.kernels.triton.decode.fused_projections import KVWrite, ProjectionInput, output, qkv, unembed
from moe_surgery.kernels.triton.decode.norm import residual_norm
from moe_surgery.kernels.triton.decode.qkv_weights import bias_of, join_qkv
from moe_surgery.kernels.triton.launch import Launch, interpreting
from moe_surgery.kernels.weights import Layer

__all__ = ["DecodeStep"]


class DecodeStep:
    """See `moe_surgery.kernels.interface.DecodeStep`. Belongs to one model and one cache, which may be
    used otherwise between steps (prefill, truncation)."""

    @torch.inference_mode()
    def __init__(self, model: DecoderModel, cache: KVCache, *, capture: bool = True) -> None:
        """Allocate buffers, build the launches, run them once, and capture them where `capture` is set.

        Layers whose q, k and v are not joined yet are copied and joined. Raises UsageError where
        `unavailable` gives a reason, or the cache is full: the first run needs a free slot.
        """
        reason = self.unavailable(model, cache)
        if reason is not None:
            raise UsageError(f"captured decode step: {reason}")
        cache.check_capacity(1)
        self._cache, self._vocabulary = cache, len(model.unembedding)
        self._graph: torch.cuda.CUDAGraph | None = None
        batch, device = cache.batch, model.norm.device
        self._ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self._cache_position = torch.full((1,), cache.length, dtype=torch.int64, device=device)
        self._pads = cache.pads.clone()
        self._last_pads, self._last_length = cache.pads, cache.length
        self.logits = torch.empty(batch, self._vocabulary, dtype=torch.float32, device=device)
        if device.type != "cuda":
            self._launches = self._build(model)
            return
        # The kernels' counters belong to a stream: build, run and capture on the same one.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._launches = self._build(model)
            self._warm_up()
            stream.synchronize()
            if capture:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=stream):
                    self._run()
        torch.cuda.current_stream(device).wait_stream(stream)

    @staticmethod
    def unavailable(model: DecoderModel, cache: KVCache) -> str | None:
        """Why this model and cache cannot have a captured step, in a few words, or None."""
        if cache.keys[0].dtype != model.dtype or cache.keys[0].device != model.norm.device:
            return "the cache was made for another dtype or device"
        if cache.ragged:
            return "the cache's sequences have different lengths"
        if len(cache.positions) > 2:
            return "the layers have sliding windows of different lengths"
        return None

    @property
    def launches(self) -> int:
        """Kernel launches of a step."""
        return len(self._launches)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits float32 [batch, vocab_size] for tokens int64 [batch], in a buffer the next call overwrites.

        Raises UsageError where the cache is full, the shape is another, or tokens on the CPU are outside
        the vocabulary. Tokens on a device are not checked: that would mean waiting for it.
        """
        cache = self._cache
        cache.check_capacity(1)
        if cache.ragged:
            raise UsageError("captured decode step: the cache's sequences have different lengths")
        if tuple(tokens.shape) != (cache.batch,):
            raise UsageError(f"captured decode step: tokens {tuple(tokens.shape)}, needed ({cache.batch},)")
        if tokens.device.type == "cpu":
            low, high = map(int, tokens.aminmax())
            if low < 0 or high >= self._vocabulary:
                raise UsageError(
                    f"token {low if low < 0 else high} is not one of the model's {self._vocabulary}"
                )
        self._ids.copy_(tokens)
        self._sync_with_cache()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()
        cache.advance(1)
        self._last_length = cache.length
        return self.logits

    def _sync_with_cache(self) -> None:
        """Copy to the device what changed in the cache since the last step: at most two small launches."""
        if self._last_length != self._cache.length:
            self._cache_position.fill_(self._cache.length)
        if self._last_pads is not self._cache.pads:
            self._pads.copy_(self._cache.pads)
            self._last_pads = self._cache.pads

    def _run(self) -> None:
        for launch in self._launches:
            launch.run()

    def _warm_up(self) -> None:
        """Compile every kernel by running a step, then remove its token from the cache.

        Its slot is empty, or holds a token that no later one attends to and that the next step overwrites.
        """
        self._run()
        for slots, positions in self._cache.positions.items():
            positions[:, self._cache.length % slots] = EMPTY
        self._cache_position.fill_(self._cache.length)

    def _build(self, model: DecoderModel) -> list[Launch]:
        """The launches of a step in order; their arguments keep all buffers alive."""
        cache, shape, device = self._cache, model.shape, model.norm.device
        batch, upcast_fp32 = cache.batch, interpreting() or model.dtype != torch.bfloat16
        multiprocessors = tuning.get_device_props(device).multiprocessors
        cos, sin = model.rope(torch.arange(cache.context, device=device))

        def buffer(columns: int) -> Tensor:
            return torch.empty((batch, columns), dtype=model.dtype, device=device)

        total, mid, h, y = (buffer(len(model.norm)) for _ in range(4))
        q, attended = (buffer(shape.num_heads * shape.head_dim) for _ in range(2))
        launches: list[Launch] = []

        def normed(
            x: Tensor, added: Tensor | None, norm_weight: Tensor, row_ids: Tensor | None = None
        ) -> ProjectionInput:
            """The input of a projection, norm(x + added): fused at one token, else computed by a separate launch."""
            if batch == 1:
                return ProjectionInput(h, x, added, row_ids, norm_weight, total, shape.rms_norm_eps)
            launches.append(residual_norm(x, added, norm_weight, h, shape.rms_norm_eps, total, row_ids))
            return ProjectionInput(h)

        for number, layer in enumerate(map(join_qkv, model.layers)):
            first = number == 0
            inputs = normed(
                model.embedding if first else mid,
                None if first else y,
                layer.attention_norm,
                self._ids if first else None,
            )
            keys, values = cache.keys[number], cache.values[number]
            positions = cache.positions[cache.slots[number]]
            kv_write = KVWrite(keys, values, positions, self._cache_position, self._pads, cos, sin)
            weight, bias = _joined(layer)
            launches.append(qkv(inputs, weight, bias, q, kv_write, upcast_fp32))
            window, sinks = shape.sliding_windows[number], layer.sinks
            args = (q, keys, values, positions, self._cache_position, self._pads, sinks, window, attended)
            launches.append(attention(*args, multiprocessors, upcast_fp32))
            launches.append(
                output(
                    attended, total, as_stored(layer.o.weight, "triton"), bias_of(layer.o), mid, upcast_fp32
                )
            )
            launches.append(residual_norm(mid, None, layer.mlp_norm, h, shape.rms_norm_eps))
            launches += _moe(layer, h, y)
        inputs = normed(mid, y, model.norm)
        launches.append(
            unembed(
                inputs, as_stored(model.unembedding, "triton"), self.logits, self._cache_position, upcast_fp32
            )
        )
        return launches


def _moe(layer: Layer, h: Tensor, y: Tensor) -> list[Launch]:
    """Route and experts of the Triton backend: y of h, both [batch, hidden]."""
    assert layer.router.bias is not None
    ids = torch.empty((len(h), layer.top_k), dtype=torch.int64, device=h.device)
    weights = torch.empty((len(h), layer.top_k), dtype=h.dtype, device=h.device)
    return [
        *route_launches(h, layer.router.weight, layer.router.bias, layer.top_k, ids, weights),
        *experts_launches(h, ids, weights, layer.experts, y),
    ]


def _joined(layer: Layer) -> tuple[Tensor, Tensor]:
    """Weight [rows, hidden] and bias [rows] over all of q, k and v, which `join_qkv` made adjacent."""
    rows = sum(len(p.weight) for p in (layer.q, layer.k, layer.v))
    columns = layer.q.weight.shape[1]
    weight = as_stored(layer.q.weight, "triton").as_strided((rows, columns), (columns, 1))
    return weight, bias_of(layer.q).as_strided((rows,), (1,))
