"""gpt-oss checkpoints as the hub has them: every tensor's name and shape, and config.json, for any dimensions.

Written down here from the published checkpoints, apart from moe_surgery, so that tests can compare with it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Shape", "gpt_oss_20b", "hub_config", "is_packed", "quantization_config", "tensor_shapes"]


@dataclass(frozen=True)
class Shape:
    """The dimensions of a gpt-oss model; the defaults are as small as MXFP4 allows to be interesting."""

    layers: int = 2
    experts: int = 4
    top_k: int = 2
    hidden: int = 64
    intermediate: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    vocabulary: int = 24
    sliding_window: int = 64
    initial_context: int = 512
    rope_factor: float = 8.0

    @property
    def packs(self) -> bool:
        """Whether the expert weights are whole MXFP4 blocks."""
        return self.hidden % 32 == 0 and self.intermediate % 32 == 0


def gpt_oss_20b() -> Shape:
    return Shape(24, 32, 4, 2880, 2880, 64, 8, 64, 201088, 128, 4096, 32.0)


def is_packed(name: str) -> bool:
    """Whether a tensor of `tensor_shapes` holds bytes of MXFP4 (U8) and not BF16."""
    return name.endswith(("_blocks", "_scales"))


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the hub's MXFP4 layout; `_blocks` and `_scales` are U8, all others BF16."""
    hidden, inter, experts = shape.hidden, shape.intermediate, shape.experts
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        for part, rows in (("q", query), ("k", key_value), ("v", key_value)):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (rows, hidden)
            shapes[f"{prefix}self_attn.{part}_proj.bias"] = (rows,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, query)
        shapes[prefix + "self_attn.o_proj.bias"] = (hidden,)
        shapes[prefix + "self_attn.sinks"] = (shape.heads,)
        shapes[prefix + "mlp.router.weight"] = (experts, hidden)
        shapes[prefix + "mlp.router.bias"] = (experts,)
        for name, rows, columns in (("gate_up_proj", 2 * inter, hidden), ("down_proj", hidden, inter)):
            shapes[f"{prefix}mlp.experts.{name}_blocks"] = (experts, rows, columns // 32, 16)
            shapes[f"{prefix}mlp.experts.{name}_scales"] = (experts, rows, columns // 32)
            shapes[f"{prefix}mlp.experts.{name}_bias"] = (experts, rows)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (shape.vocabulary, hidden)
    return shapes


def hub_config(shape: Shape) -> dict[str, object]:
    """config.json of the MXFP4 layout, in the key order and spelling of the hub's gpt-oss-20b."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 2,
        "experts_per_token": shape.top_k,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initial_context_length": shape.initial_context,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(shape.layers)],
        "max_position_embeddings": int(shape.initial_context * shape.rope_factor),
        "model_type": "gpt_oss",
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "output_router_logits": False,
        "pad_token_id": 1,
        "quantization_config": quantization_config(),
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": shape.rope_factor,
            "original_max_position_embeddings": shape.initial_context,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": shape.sliding_window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def quantization_config() -> dict[str, object]:
    unquantised = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {"modules_to_not_convert": unquantised, "quant_method": "mxfp4"}
