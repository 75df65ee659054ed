"""gpt-oss (20b, 120b) in the hub's layout and in OpenAI's own (`original/`)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from moe_surgery.checkpoint.text import describe
from moe_surgery.errors import InvalidInputError
from moe_surgery.families.base import (
    ConfigKey,
    Family,
    Layout,
    Role,
    StoredAs,
    Tensor,
)

_ATTENTION: Final = "model.layers.{layer}.self_attn."
_MLP: Final = "model.layers.{layer}.mlp."
_BIAS: Final = ("attention_bias", True)

TENSORS: Final = (
    Tensor("model.embed_tokens.weight", ("vocabulary", "hidden"), Role.EMBEDDING),
    Tensor("model.layers.{layer}.input_layernorm.weight", ("hidden",), Role.NORM),
    Tensor(_ATTENTION + "q_proj.weight", ("heads*head_dim", "hidden"), Role.ATTENTION),
    Tensor(_ATTENTION + "q_proj.bias", ("heads*head_dim",), Role.ATTENTION, present_if=_BIAS),
    Tensor(_ATTENTION + "k_proj.weight", ("kv_heads*head_dim", "hidden"), Role.ATTENTION),
    Tensor(_ATTENTION + "k_proj.bias", ("kv_heads*head_dim",), Role.ATTENTION, present_if=_BIAS),
    Tensor(_ATTENTION + "v_proj.weight", ("kv_heads*head_dim", "hidden"), Role.ATTENTION),
    Tensor(_ATTENTION + "v_proj.bias", ("kv_heads*head_dim",), Role.ATTENTION, present_if=_BIAS),
    Tensor(_ATTENTION + "o_proj.weight", ("hidden", "heads*head_dim"), Role.ATTENTION),
    Tensor(_ATTENTION + "o_proj.bias", ("hidden",), Role.ATTENTION, present_if=_BIAS),
    Tensor(_ATTENTION + "sinks", ("heads",), Role.ATTENTION),
    Tensor("model.layers.{layer}.post_attention_layernorm.weight", ("hidden",), Role.NORM),
    Tensor(_MLP + "router.weight", ("experts", "hidden"), Role.ROUTER),
    Tensor(_MLP + "router.bias", ("experts",), Role.ROUTER),
    Tensor(_MLP + "experts.gate_up_proj", ("experts", "2*intermediate", "hidden"), Role.EXPERT_WEIGHT),
    Tensor(_MLP + "experts.gate_up_proj_bias", ("experts", "2*intermediate"), Role.EXPERT_BIAS),
    Tensor(_MLP + "experts.down_proj", ("experts", "hidden", "intermediate"), Role.EXPERT_WEIGHT),
    Tensor(_MLP + "experts.down_proj_bias", ("experts", "hidden"), Role.EXPERT_BIAS),
    Tensor("model.norm.weight", ("hidden",), Role.NORM),
    Tensor(
        "lm_head.weight",
        ("vocabulary", "hidden"),
        Role.UNEMBEDDING,
        present_if=("!tie_word_embeddings", True),
    ),
)

_BLOCK: Final = "block.{layer}."
_QKV_ROWS: Final = "heads*head_dim+2*kv_heads*head_dim"
_ORIGINAL_NAMES: Final = {
    "model.embed_tokens.weight": StoredAs("embedding.weight"),
    "model.norm.weight": StoredAs("norm.scale"),
    "lm_head.weight": StoredAs("unembedding.weight"),
    "model.layers.{layer}.input_layernorm.weight": StoredAs(_BLOCK + "attn.norm.scale"),
    "model.layers.{layer}.post_attention_layernorm.weight": StoredAs(_BLOCK + "mlp.norm.scale"),
    _ATTENTION + "sinks": StoredAs(_BLOCK + "attn.sinks"),
    _ATTENTION + "o_proj.weight": StoredAs(_BLOCK + "attn.out.weight"),
    _ATTENTION + "o_proj.bias": StoredAs(_BLOCK + "attn.out.bias"),
    _MLP + "router.weight": StoredAs(_BLOCK + "mlp.gate.weight"),
    _MLP + "router.bias": StoredAs(_BLOCK + "mlp.gate.bias"),
    _MLP + "experts.gate_up_proj": StoredAs(_BLOCK + "mlp.mlp1_weight"),
    _MLP + "experts.gate_up_proj_bias": StoredAs(_BLOCK + "mlp.mlp1_bias"),
    _MLP + "experts.down_proj": StoredAs(_BLOCK + "mlp.mlp2_weight"),
    _MLP + "experts.down_proj_bias": StoredAs(_BLOCK + "mlp.mlp2_bias"),
} | {
    f"{_ATTENTION}{part}_proj.{leaf}": StoredAs(_BLOCK + f"attn.qkv.{leaf}", start, _QKV_ROWS)
    for leaf in ("weight", "bias")
    for part, start in (
        ("q", "0"),
        ("k", "heads*head_dim"),
        ("v", "heads*head_dim+kv_heads*head_dim"),
    )
}

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

# openai/gpt-oss's own ModelConfig knows the first spelling only.
_ORIGINAL_DIMENSIONS: Final = MappingProxyType(
    {
        "experts": ConfigKey(("num_experts", "num_local_experts")),
        "top_k": ConfigKey(("experts_per_token", "num_experts_per_tok")),
    }
)

# The original layout's config.json leaves out what every gpt-oss shares; these are the values of
# openai/gpt-oss-20b's own config.json on the hub.
_YARN_ORIGINAL_LENGTH: Final = 4096
_PAD_TOKEN: Final = 199999
_END_TOKEN: Final = 200002
_MAX_NUMBER: Final = 10**9


def hub_config(original: Mapping[str, object]) -> dict[str, object]:
    """config.json of the hub layout for a config.json of OpenAI's own layout.

    Raises InvalidInputError for a value that should be a number and is missing or none.
    """
    keys = {**DIMENSIONS, **_ORIGINAL_DIMENSIONS}
    dimensions = {name: _dimension(original, key) for name, key in keys.items()}
    layers, vocabulary = dimensions["layers"], dimensions["vocabulary"]
    length = int(_number(original, "initial_context_length", _YARN_ORIGINAL_LENGTH))
    factor = float(_number(original, "rope_scaling_factor", 32.0))
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
        "rms_norm_eps": _number(original, "rms_norm_eps", 1e-05),
        "rope_scaling": {
            "beta_fast": float(_number(original, "rope_ntk_beta", 32.0)),
            "beta_slow": float(_number(original, "rope_ntk_alpha", 1.0)),
            "factor": factor,
            "original_max_position_embeddings": length,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": _number(original, "rope_theta", 150000),
        "router_aux_loss_coef": 0.9,
        "sliding_window": _number(original, "sliding_window", 128),
        "swiglu_limit": _number(original, "swiglu_limit", 7.0),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocabulary,
    }


def _dimension(original: Mapping[str, object], key: ConfigKey) -> int:
    spelled = next((k for k in key.keys if k in original), key.keys[0])
    return int(_number(original, spelled, key.default))


def _number(original: Mapping[str, object], key: str, default: float | None) -> float:
    value = original.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _MAX_NUMBER:
        raise InvalidInputError(f"config.json: {key} is {describe(value)}, not a number above 0")
    return value


HUB: Final = Layout("hub", "transformers")
ORIGINAL: Final = Layout(
    "original",
    "OpenAI's code",
    names=MappingProxyType(_ORIGINAL_NAMES),
    blocks=".blocks",
    scales=".scales",
    side_files_dropped=frozenset({"dtypes.json"}),
    parent_side_files=(
        "LICENSE",
        "README.md",
        "USAGE_POLICY",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    hub_config=hub_config,
    dimensions=_ORIGINAL_DIMENSIONS,
)

GPT_OSS: Final = Family(
    model_type="gpt_oss",
    title="gpt-oss",
    dimensions=DIMENSIONS,
    tensors=TENSORS,
    layouts=(HUB, ORIGINAL),
    quantization_config=QUANTIZATION_CONFIG,
)
