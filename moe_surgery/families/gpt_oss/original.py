"""config.json of OpenAI's own layout, and its conversion to the hub's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from moe_surgery.families.base import ConfigKey
from moe_surgery.families.gpt_oss.config import number
from moe_surgery.families.gpt_oss.config_keys import DIMENSIONS, ORIGINAL_DIMENSIONS, QUANTIZATION_CONFIG

__all__ = ["hub_config"]

# The original layout's config.json leaves out what every gpt-oss shares; these are the values of
# openai/gpt-oss-20b's own config.json on the hub.
_YARN_ORIGINAL_LENGTH: Final = 4096
_PAD_TOKEN: Final = 199999
_END_TOKEN: Final = 200002


def hub_config(original: Mapping[str, object]) -> dict[str, object]:
    """config.json of the hub layout for a config.json of OpenAI's own layout.

    Raises InvalidInputError for a value that should be a number and is not, or is missing.
    """
    keys = {**DIMENSIONS, **ORIGINAL_DIMENSIONS}
    dimensions = {name: _dimension(original, key) for name, key in keys.items()}
    layers, vocabulary = dimensions["layers"], dimensions["vocabulary"]
    length = int(number(original, "initial_context_length", _YARN_ORIGINAL_LENGTH))
    factor = float(number(original, "rope_scaling_factor", 32.0))
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": original.get("eos_token_id", _END_TOKEN if vocabulary > _END_TOKEN else None),
        "experts_per_token": dimensions["top_k"],
        "head_dim": dimensions["head_dim"],
        "hidden_act": "silu",
        "hidden_size": dimensions["hidden"],
        "initial_context_length": length,
        "initializer_range": 0.02,
        "intermediate_size": dimensions["intermediate"],
        "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
        "max_position_embeddings": int(length * factor),
        "model_type": "gpt_oss",
        "num_attention_heads": dimensions["heads"],
        "num_experts_per_tok": dimensions["top_k"],
        "num_hidden_layers": layers,
        "num_key_value_heads": dimensions["kv_heads"],
        "num_local_experts": dimensions["experts"],
        "output_router_logits": False,
        "pad_token_id": original.get("pad_token_id", _PAD_TOKEN if vocabulary > _PAD_TOKEN else None),
        "quantization_config": dict(QUANTIZATION_CONFIG),
        "rms_norm_eps": number(original, "rms_norm_eps", 1e-05),
        "rope_scaling": {
            "beta_fast": float(number(original, "rope_ntk_beta", 32.0)),
            "beta_slow": float(number(original, "rope_ntk_alpha", 1.0)),
            "factor": factor,
            "original_max_position_embeddings": length,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": number(original, "rope_theta", 150000),
        "router_aux_loss_coef": 0.9,
        "sliding_window": number(original, "sliding_window", 128),
        "swiglu_limit": number(original, "swiglu_limit", 7.0),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocabulary,
    }


def _dimension(original: Mapping[str, object], key: ConfigKey) -> int:
    spelled = next((k for k in key.keys if k in original), key.keys[0])
    return int(number(original, spelled, key.default))
