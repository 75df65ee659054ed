"""Bytes that a step reads and that a model occupies: weights from its tensors, caches from their shape."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moe_surgery.kernels.q8_0 import Matrix
from moe_surgery.kernels.weights import DenseWeight, Layer, Weight
from moe_surgery.runtime.decode_cost import distinct_experts
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.speculation.draft_length import Costs

__all__ = ["cache_bytes", "counted_costs", "model_step_bytes", "usable_bytes", "weight_bytes"]


def model_step_bytes(model: CausalLM, tokens: int = 1) -> float:
    """Weight bytes read by a step over `tokens` tokens, all sequences together, of a model or a view.

    Per layer the distinct experts of `tokens` under uniform routing (real routing repeats itself and reads
    less); of the embedding one row per token. Without the KV cache.
    """
    total = float(model.norm.nbytes + model.unembedding.nbytes)
    total += tokens * model.embedding.nbytes / len(model.embedding)
    for layer in model.layers:
        read = distinct_experts(len(layer.router.weight), layer.top_k, tokens)
        total += sum(t.nbytes for t in _dense(layer)) + read * _expert_bytes(layer)
    return total


def counted_costs(target: CausalLM, draft: CausalLM, batch: int, max_length: int) -> Costs:
    """Costs in bytes: the time of a decode step where memory bandwidth is the limit."""
    read = [model_step_bytes(target, batch * (n + 1)) for n in range(max_length + 1)]
    one, two = (model_step_bytes(draft, batch * tokens) for tokens in (1, 2))
    return Costs(one, read, two - one)


def weight_bytes(model: CausalLM, shared_with: CausalLM | None = None) -> int:
    """Bytes of the weights of `model`, each storage once, without those shared with `shared_with`."""
    shared = set() if shared_with is None else {t.data_ptr() for t in _all(shared_with)}
    storages = {t.data_ptr(): t.nbytes for t in _all(model)}
    return sum(nbytes for address, nbytes in storages.items() if address not in shared)


def cache_bytes(model: CausalLM, batch: int, context: int, rollback: int) -> int:
    """Bytes of keys and values of `CausalLM.new_cache(batch, context, rollback=rollback)`, without allocating it."""
    c = model.config
    slots = sum(context if w is None else min(context, w + rollback) for w in c.sliding_windows)
    return 2 * batch * c.num_key_value_heads * slots * c.head_dim * model.dtype.itemsize


def usable_bytes(model: CausalLM) -> int:
    """Bytes of the weights that `model` can use: those of a checkpoint with only the experts of a view."""
    dense = {t.data_ptr(): t.nbytes for t in (model.embedding, model.unembedding, model.norm)}
    total = float(sum(dense.values()))
    for layer in model.layers:
        total += sum(t.nbytes for t in _dense(layer)) + len(layer.router.weight) * _expert_bytes(layer)
    return round(total)


def _all(model: CausalLM) -> Iterator[Matrix]:
    yield from (model.embedding, model.unembedding, model.norm)
    for layer in model.layers:
        yield from _dense(layer)
        experts = layer.experts
        yield from (*_parts(experts.gate_up), experts.gate_up_bias, *_parts(experts.down), experts.down_bias)
        if experts.expert_map is not None:
            yield experts.expert_map


def _dense(layer: Layer) -> Iterator[Matrix]:
    """Everything of a layer but its experts."""
    yield from (layer.attention_norm, layer.mlp_norm, layer.sinks)
    for projection in (layer.q, layer.k, layer.v, layer.o, layer.router):
        yield projection.weight
        if projection.bias is not None:
            yield projection.bias


def _expert_bytes(layer: Layer) -> float:
    """Bytes of one stored expert, biases included."""
    experts = layer.experts
    parts = (*_parts(experts.gate_up), experts.gate_up_bias, *_parts(experts.down), experts.down_bias)
    return sum(t.nbytes / len(t) for t in parts)


def _parts(weight: Weight) -> tuple[Tensor, ...]:
    return (weight.values,) if isinstance(weight, DenseWeight) else (weight.blocks, weight.scales)
