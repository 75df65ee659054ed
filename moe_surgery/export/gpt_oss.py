"""gpt-oss in llama.cpp: names of tensors, metadata keys, and what that runtime takes for granted.

Source: the gpt-oss part of llama.cpp's converter, and its loader (src/models/openai-moe.cpp).
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Final

from moe_surgery.errors import InvalidInputError
from moe_surgery.export.gguf import Metadata
from moe_surgery.families.model import Model
from moe_surgery.formats.expert_format import BF16, F16, F32, MXFP4, ExpertFormat
from moe_surgery.runtime.config import ModelConfig

__all__ = ["ARCHITECTURE", "NAMES", "add_model", "check_supported"]

ARCHITECTURE: Final = "gpt-oss"
SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702
FILE_TYPES: Final = MappingProxyType({F32: 0, F16: 1, BF16: 32, MXFP4: 38})
"""llama.cpp's numbers for what most weights are stored as."""
QUANTIZATION_VERSION: Final = 2

_LAYER: Final = "model.layers.{layer}."
_ATTENTION: Final = _LAYER + "self_attn."
_MLP: Final = _LAYER + "mlp."
NAMES: Final = MappingProxyType(
    {
        "model.embed_tokens.weight": ("token_embd.weight",),
        "model.norm.weight": ("output_norm.weight",),
        "lm_head.weight": ("output.weight",),
        _LAYER + "input_layernorm.weight": ("blk.{layer}.attn_norm.weight",),
        _LAYER + "post_attention_layernorm.weight": ("blk.{layer}.post_attention_norm.weight",),
        _ATTENTION + "sinks": ("blk.{layer}.attn_sinks.weight",),
        _MLP + "router.weight": ("blk.{layer}.ffn_gate_inp.weight",),
        _MLP + "router.bias": ("blk.{layer}.ffn_gate_inp.bias",),
        _MLP + "experts.gate_up_proj": (
            "blk.{layer}.ffn_gate_exps.weight",
            "blk.{layer}.ffn_up_exps.weight",
        ),
        _MLP + "experts.gate_up_proj_bias": (
            "blk.{layer}.ffn_gate_exps.bias",
            "blk.{layer}.ffn_up_exps.bias",
        ),
        _MLP + "experts.down_proj": ("blk.{layer}.ffn_down_exps.weight",),
        _MLP + "experts.down_proj_bias": ("blk.{layer}.ffn_down_exps.bias",),
    }
    | {
        f"{_ATTENTION}{ours}_proj.{leaf}": (f"blk.{{layer}}.attn_{theirs}.{leaf}",)
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
        for leaf in ("weight", "bias")
    }
)
"""Tensor -> its name in GGUF, or two names for tensors whose rows alternate between two of GGUF."""


def check_supported(model: Model, config: ModelConfig) -> None:
    """Raise InvalidInputError where llama.cpp would compute something else than the model does."""
    full = [bool(i % 2) for i in range(config.layers)]
    factor = 0.1 * math.log(config.rope.factor) + 1.0 if config.rope.factor > 1 else 1.0
    problems = {
        f"swiglu_limit is {config.swiglu_limit:g}, and llama.cpp has 7 built in": (
            config.swiglu_limit != SWIGLU_LIMIT
        ),
        f"swiglu_alpha is {config.swiglu_alpha:g}, and llama.cpp has 1.702 built in": (
            config.swiglu_alpha != SWIGLU_ALPHA
        ),
        "layer_types do not alternate from sliding to full attention, as llama.cpp has it": (
            [w is None for w in config.windows] != full
        ),
        "attention_bias is false, and llama.cpp needs the biases": (
            not any(t.name.endswith("o_proj.bias") for t in model.tensors)
        ),
        "attention_factor is not the usual one of YaRN, which llama.cpp has built in": (
            not math.isclose(config.rope.attention_factor, factor, rel_tol=1e-6)
        ),
    }
    for problem in (p for p, holds in problems.items() if holds):
        raise InvalidInputError(f"config.json: {problem}; this model cannot be exported to GGUF")


def add_model(
    metadata: Metadata,
    model: Model,
    config: ModelConfig,
    name: str,
    experts: int,
    top_k: int,
    expert_format: ExpertFormat,
) -> None:
    """Append what llama.cpp has to know of `model` with `experts` kept and `top_k` of them active."""
    intermediate = model.dimensions["intermediate"]
    metadata.text("general.architecture", ARCHITECTURE)
    metadata.text("general.type", "model")
    metadata.text("general.name", name)
    metadata.u32("general.file_type", FILE_TYPES[expert_format])
    metadata.u32("general.quantization_version", QUANTIZATION_VERSION)
    numbers = {
        "block_count": config.layers,
        "context_length": config.context,
        "embedding_length": config.hidden,
        "feed_forward_length": intermediate,
        "expert_feed_forward_length": intermediate,
        "expert_count": experts,
        "expert_used_count": top_k,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.windows[0] or 0,
        "vocab_size": config.vocabulary,
    }
    for key, number in numbers.items():
        metadata.u32(f"{ARCHITECTURE}.{key}", number)
    metadata.f32(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon", config.eps)
    metadata.f32(f"{ARCHITECTURE}.rope.freq_base", config.rope.theta)
    if config.rope.factor != 1:
        scaling = f"{ARCHITECTURE}.rope.scaling."
        metadata.text(scaling + "type", "yarn")
        metadata.f32(scaling + "factor", config.rope.factor)
        metadata.u32(scaling + "original_context_length", config.rope.original_length)
        metadata.f32(scaling + "yarn_beta_fast", config.rope.beta_fast)
        metadata.f32(scaling + "yarn_beta_slow", config.rope.beta_slow)
