"""Random weights of gpt-oss-20b's shape, made on the device: speed and memory, not quality."""

from __future__ import annotations

import torch

from moe_surgery.bench.random_weights import normal, random_experts
from moe_surgery.families.model_config import ModelConfig, RopeParameters
from moe_surgery.kernels import Backend
from moe_surgery.kernels.reference.mxfp4 import decode
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Layer, Mxfp4Weight, Projection
from moe_surgery.runtime.cache import Cache
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.step_bytes import weight_bytes

__all__ = ["as_dense", "fill_cache", "gpt_oss_20b", "random_experts", "random_model", "weight_bytes"]

TOP_K = 4


def gpt_oss_20b(
    experts: int = 32, layers: int = 24, hidden: int = 2880, vocabulary: int = 201088
) -> ModelConfig:
    windows = tuple(128 if number % 2 == 0 else None for number in range(layers))
    rope = RopeParameters(150000.0, 32.0, 4096, 32.0, 1.0, False, 1.3465735902799727)
    return ModelConfig(
        layers, hidden, hidden, 64, 8, 64, vocabulary, experts, TOP_K, 131072, windows, rope, 1e-5, 7.0, 1.702, ()
    )  # fmt: skip


def as_dense(experts: ExpertWeights) -> ExpertWeights:
    """The same values in BF16, transposed as BF16 checkpoints keep them."""

    def dense(weight: object) -> DenseWeight:
        assert isinstance(weight, Mxfp4Weight)
        values = torch.empty(
            len(weight.blocks), weight.columns, weight.rows, dtype=torch.bfloat16, device=weight.blocks.device
        )
        for expert in range(len(weight.blocks)):
            values[expert] = decode(weight.blocks[expert], weight.scales[expert], torch.bfloat16).T
        return DenseWeight(values)

    return ExpertWeights(dense(experts.gate_up), experts.gate_up_bias, dense(experts.down), experts.down_bias)


def random_model(config: ModelConfig, device: torch.device, backend: Backend) -> CausalLM:
    """A model of `config` in BF16 with MXFP4 experts."""
    c, heads = config, config.num_attention_heads * config.head_dim
    width = c.hidden_size**-0.5

    def projection(rows: int, columns: int) -> Projection:
        return Projection(normal(device, rows, columns, scale=columns**-0.5), normal(device, rows, scale=0.1))

    def layer() -> Layer:
        return Layer(
            attention_norm=normal(device, c.hidden_size).abs(),
            q=projection(heads, c.hidden_size),
            k=projection(c.num_key_value_heads * c.head_dim, c.hidden_size),
            v=projection(c.num_key_value_heads * c.head_dim, c.hidden_size),
            o=projection(c.hidden_size, heads),
            sinks=normal(device, c.num_attention_heads),
            mlp_norm=normal(device, c.hidden_size).abs(),
            router=projection(c.num_local_experts, c.hidden_size),
            experts=random_experts(c.num_local_experts, c.hidden_size, device),
            top_k=min(c.num_experts_per_tok, c.num_local_experts),
        )

    layers = [backend.prepare_layer(layer()) for _ in range(c.num_hidden_layers)]
    embedding = normal(device, c.vocab_size, c.hidden_size)
    unembedding = normal(device, c.vocab_size, c.hidden_size, scale=width)
    norm = normal(device, c.hidden_size).abs()
    return CausalLM(config, embedding, layers, norm, unembedding, torch.bfloat16, backend)


def fill_cache(cache: Cache, tokens: int, seed: int = 0) -> None:
    """Random keys and values for `tokens` tokens of an empty cache, as after a prompt."""
    generator = torch.Generator(cache.keys[0].device).manual_seed(seed)
    for kept in (*cache.keys, *cache.values):
        # Through BF16, so that caches of any dtype hold the same numbers.
        kept.copy_(torch.randn(kept.shape, generator=generator, device=kept.device).bfloat16())
    for slots, positions in cache.positions.items():
        for token in range(max(0, tokens - slots), tokens):
            positions[:, token % slots] = token
    cache.advance(tokens)
