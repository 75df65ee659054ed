"""The keys of gpt-oss's config.json and their defaults, in the hub's layout and in OpenAI's own."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from moe_surgery.families.base import ConfigKey

__all__ = ["CONFIG_KEYS", "DIMENSIONS", "ORIGINAL_DIMENSIONS", "QUANTIZATION_CONFIG"]

QUANTIZATION_CONFIG: Final = MappingProxyType(
    {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
)

# As transformers' GptOssConfig reads them: num_experts is an alias that is set last, experts_per_token
# is kept and not used.
DIMENSIONS: Final = MappingProxyType(
    {
        "layers": ConfigKey(("num_hidden_layers",)),
        "experts": ConfigKey(("num_experts", "num_local_experts")),
        "top_k": ConfigKey(("num_experts_per_tok",), default=4, unread=("experts_per_token",)),
        "hidden": ConfigKey(("hidden_size",)),
        "intermediate": ConfigKey(("intermediate_size",)),
        "heads": ConfigKey(("num_attention_heads",)),
        "kv_heads": ConfigKey(("num_key_value_heads",)),
        "head_dim": ConfigKey(("head_dim",), default=64),
        "vocabulary": ConfigKey(("vocab_size",)),
    }
)

# Defaults are those of transformers' GptOssConfig.
CONFIG_KEYS: Final = MappingProxyType(
    {
        "max_position_embeddings": ConfigKey(("max_position_embeddings",), default=131072),
        "layer_types": ConfigKey(("layer_types",)),
        "sliding_window": ConfigKey(("sliding_window",), default=128),
        "rope_scaling": ConfigKey(("rope_scaling",)),
        "rope_parameters": ConfigKey(("rope_parameters",)),
        "rope_theta": ConfigKey(("rope_theta",), default=150000.0),
        "original_length": ConfigKey(("original_max_position_embeddings",)),
        "rms_norm_eps": ConfigKey(("rms_norm_eps",), default=1e-5),
        "swiglu_limit": ConfigKey(("swiglu_limit",), default=7.0),
        "swiglu_alpha": ConfigKey(("swiglu_alpha",), default=1.702),
        "eos_token_id": ConfigKey(("eos_token_id",)),
    }
)

# openai/gpt-oss's ModelConfig reads only the first spelling.
ORIGINAL_DIMENSIONS: Final = MappingProxyType(
    {
        "experts": ConfigKey(("num_experts", "num_local_experts")),
        "top_k": ConfigKey(("experts_per_token", "num_experts_per_tok")),
    }
)
