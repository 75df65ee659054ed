"""gpt-oss in llama.cpp: tensor names, metadata keys, and constants that llama.cpp hard-codes.

Source: the gpt-oss part of llama.cpp's converter, and its loader (src/models/openai-moe.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from moe_surgery.families.base import WeightNames
from moe_surgery.families.gguf_architecture import GgufArchitecture
from moe_surgery.families.model_config import ModelConfig
from moe_surgery.families.model_spec import ModelSpec

__all__ = ["GGUF"]

ARCHITECTURE: Final = "gpt-oss"
SWIGLU_LIMIT: Final = 7.0
SWIGLU_ALPHA: Final = 1.702
_BLOCK: Final = "blk.{layer}."


def names(weights: WeightNames) -> Mapping[str, tuple[str, ...]]:
    """Tensor -> its name in GGUF, or two names where its rows alternate between two GGUF tensors."""
    layer = weights.layer
    projections = (
        (layer.q, "attn_q"),
        (layer.k, "attn_k"),
        (layer.v, "attn_v"),
        (layer.o, "attn_output"),
        (layer.router, "ffn_gate_inp"),
    )
    return {
        weights.embedding: ("token_embd.weight",),
        weights.norm: ("output_norm.weight",),
        weights.unembedding: ("output.weight",),
        layer.attention_norm: (_BLOCK + "attn_norm.weight",),
        layer.mlp_norm: (_BLOCK + "post_attention_norm.weight",),
        layer.sinks: (_BLOCK + "attn_sinks.weight",),
        layer.gate_up: (_BLOCK + "ffn_gate_exps.weight", _BLOCK + "ffn_up_exps.weight"),
        layer.gate_up_bias: (_BLOCK + "ffn_gate_exps.bias", _BLOCK + "ffn_up_exps.bias"),
        layer.down: (_BLOCK + "ffn_down_exps.weight",),
        layer.down_bias: (_BLOCK + "ffn_down_exps.bias",),
        **{p.weight: (f"{_BLOCK}{name}.weight",) for p, name in projections},
        **{p.bias: (f"{_BLOCK}{name}.bias",) for p, name in projections},
    }


def unsupported(model: ModelSpec, config: ModelConfig) -> str | None:
    """What llama.cpp would compute differently than the model, or None."""
    full = [bool(i % 2) for i in range(config.num_hidden_layers)]
    factor = 0.1 * math.log(config.rope_parameters.factor) + 1.0 if config.rope_parameters.factor > 1 else 1.0
    problems = {
        f"swiglu_limit is {config.swiglu_limit:g}, but llama.cpp hard-codes 7": (
            config.swiglu_limit != SWIGLU_LIMIT
        ),
        f"swiglu_alpha is {config.swiglu_alpha:g}, but llama.cpp hard-codes 1.702": (
            config.swiglu_alpha != SWIGLU_ALPHA
        ),
        "layer_types do not alternate from sliding to full attention, which llama.cpp hard-codes": (
            [w is None for w in config.sliding_windows] != full
        ),
        "attention_bias is false, but llama.cpp needs the biases": (
            model.described.weights.layer.o.bias.format(layer=0) not in {t.name for t in model.tensors}
        ),
        "attention_factor is not YaRN's default, which llama.cpp hard-codes": (
            not math.isclose(config.rope_parameters.attention_factor, factor, rel_tol=1e-6)
        ),
    }
    return next((problem for problem, holds in problems.items() if holds), None)


def metadata(config: ModelConfig, experts: int, top_k: int) -> dict[str, int | float | str]:
    """The keys that llama.cpp's loader reads, for `experts` kept and `top_k` of them active."""
    values: dict[str, int | float | str] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": experts,
        "expert_used_count": top_k,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_windows[0] or 0,
        "vocab_size": config.vocab_size,
    }
    values["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    values["rope.freq_base"] = config.rope_parameters.rope_theta
    if config.rope_parameters.factor != 1:
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config.rope_parameters.factor,
            "rope.scaling.original_context_length": config.rope_parameters.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": config.rope_parameters.beta_fast,
            "rope.scaling.yarn_beta_slow": config.rope_parameters.beta_slow,
        }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


GGUF: Final = GgufArchitecture(ARCHITECTURE, names, metadata, unsupported)
