"""All decoder layers in one call of the extension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_surgery.kernels.interface import Chosen, DecoderShape, LayerCache
from moe_surgery.kernels.native.operands import (
    F32,
    UnsupportedWeight,
    check_readable,
    matrix_of,
    projection_of,
    values_of,
)
from moe_surgery.kernels.weights import DenseWeight, Layer, Weight

__all__ = ["NativeStack"]


class NativeStack:
    """See `moe_surgery.kernels.interface.FusedLayers`. Float32 hidden states and caches on the CPU.

    No Python runs between two operations, which saves a tenth of a token's time on the full-size model. The
    constructor raises UnsupportedWeight for weights that the kernels do not read.
    """

    def __init__(self, native: Any, engine: Any, layers: Sequence[Layer], shape: DecoderShape) -> None:
        self._engine = engine
        self._layers = list(layers)  # keeps the memory behind the addresses below alive
        hidden = layers[0].q.weight.shape[1]
        self._stack = native.Stack(
            hidden, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rms_norm_eps
        )
        for layer, window in zip(layers, shape.sliding_windows, strict=True):
            _check(layer, hidden, shape)
            e = layer.experts
            projections = (layer.q, layer.k, layer.v, layer.o, layer.router)
            self._stack.add_layer(
                values_of(layer.attention_norm),
                values_of(layer.mlp_norm),
                values_of(layer.sinks),
                tuple(projection_of(*p.pair) for p in projections),
                _matrix_of(native, "gate_up", e.gate_up, e.gate_up_bias),
                _matrix_of(native, "down", e.down, e.down_bias),
                e.limit,
                e.alpha,
                0 if e.expert_map is None else e.expert_map.data_ptr(),
                layer.top_k,
                window or 0,
            )

    def __call__(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[LayerCache]
    ) -> Tensor:
        x, positions, cos, sin = (a.contiguous() for a in (x, positions, cos, sin))
        batch, tokens, _ = x.shape
        self._engine.run(
            self._stack,
            x.data_ptr(),
            batch,
            tokens,
            positions.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            [_slots(cache) for cache in caches],
        )
        return x

    def choose(self, number: int, x: Tensor) -> Chosen:
        return self._choose(number, x, (0, 0, 0), [])

    def attend_and_choose(
        self, number: int, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache
    ) -> Chosen:
        positions, cos, sin = (a.contiguous() for a in (positions, cos, sin))
        addresses = positions.data_ptr(), cos.data_ptr(), sin.data_ptr()
        return self._choose(number, x, addresses, [_slots(cache)])

    def _choose(
        self, number: int, x: Tensor, addresses: tuple[int, int, int], caches: list[tuple[object, ...]]
    ) -> Chosen:
        if x.dtype != F32 or not x.is_contiguous():
            raise ValueError("hidden states must be float32 and contiguous")
        batch, tokens, hidden = x.shape
        h = torch.empty((batch * tokens, hidden))
        ids = torch.empty((batch * tokens, self._layers[number].top_k), dtype=torch.int64)
        weights = torch.empty(ids.shape)
        results = h.data_ptr(), ids.data_ptr(), weights.data_ptr()
        self._engine.choose(self._stack, number, x.data_ptr(), batch, tokens, *addresses, caches, results)
        return h, ids, weights


def _matrix_of(native: Any, what: str, weight: Weight, bias: Tensor) -> Any:
    """`matrix_of`; for weights without memory, which only `choose` and `attend_and_choose` allow, an empty one."""
    values = weight.values if isinstance(weight, DenseWeight) else weight.blocks
    if not values.is_meta:
        return matrix_of(native, what, weight, bias)
    return native.packed_matrix(0, 0, 0, 0, 0, 0, 0, weight.rows, weight.columns, (0, 0))


def _check(layer: Layer, hidden: int, shape: DecoderShape) -> None:
    """Raise UnsupportedWeight unless the kernels read all weights but the experts and their shapes agree."""
    q_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    expected = {"q": (q_rows, hidden), "k": (kv_rows, hidden), "v": (kv_rows, hidden), "o": (hidden, q_rows)}
    experts = len(layer.router.weight)
    for projection, size in (
        *((getattr(layer, name), size) for name, size in expected.items()),
        (layer.router, (experts, hidden)),
    ):
        weight, bias = projection.weight, projection.bias
        check_readable("a weight", weight)
        check_readable("a bias", bias)
        if weight.shape != size or (bias is not None and bias.shape != (size[0],)):
            raise UnsupportedWeight(f"a weight has shape {tuple(weight.shape)}, needed {size}")
    for vector, length in (
        (layer.attention_norm, hidden),
        (layer.mlp_norm, hidden),
        (layer.sinks, shape.num_heads),
    ):
        check_readable("a norm's weight or sinks", vector)
        if vector.shape != (length,):
            raise UnsupportedWeight(
                f"a norm's weight or sinks have shape {tuple(vector.shape)}, needed ({length},)"
            )
    e, expert_map = layer.experts, layer.experts.expert_map
    fits = (e.gate_up.columns, e.gate_up.rows, e.down.rows) == (hidden, 2 * e.down.columns, hidden)
    named = expert_map is None or (
        expert_map.dtype == torch.int64 and expert_map.is_contiguous() and len(expert_map) == experts
    )
    if not (fits and named and 1 <= layer.top_k <= experts):
        raise UnsupportedWeight("the experts' shapes or expert map do not fit the layer")


def _slots(cache: LayerCache) -> tuple[object, ...]:
    """`LayerCacheTuple` of the extension."""
    keys, values, positions, slot_ids = cache.keys, cache.values, cache.positions, cache.slot_ids
    assert keys.dtype == values.dtype == F32
    return (
        keys.data_ptr(),
        keys.stride()[:3],
        values.data_ptr(),
        values.stride()[:3],
        keys.shape[2],
        positions.data_ptr(),
        positions.stride(0),
        slot_ids.data_ptr(),
        slot_ids.stride(0) if slot_ids.ndim == 2 else 0,
    )
