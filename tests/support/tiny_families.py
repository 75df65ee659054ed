"""Tiny models of every family that transformers can build: their settings. `tiny_checkpoints` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

HIDDEN = 32
VOCABULARY = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_GROUPS = {"n_group": 1, "topk_group": 1}
_TWO_OR_MORE = {"counts": (2, 4, 5)}
_DENSE_THEN_MOE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_DEEPSEEK_V3: dict[str, Any] = {**_TWO_OR_MORE, **_MLA, **_GROUPS, "first_k_dense_replace": 1}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 16}


@dataclass(frozen=True)
class TinyFamily:
    """`settings` of its text configuration; `counts` are valid numbers of experts to keep of `experts`.

    `nested` is the key of the text configuration in a multimodal one, with the `others`. `stacked` checkpoints hold
    the experts of a layer in one tensor, as published, where transformers saves them apart. `tail` is the number
    of the router's rows after those of experts; `published` replaces part of the names that transformers saves.
    `quantised`: "fp8" or "int4", the matrices of a layer but the router's. `quick` ones are part of the default suite.
    """

    model_type: str
    settings: Mapping[str, Any]
    experts: int = 8
    counts: tuple[int, ...] = (1, 4, 5)
    nested: str | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    stacked: bool = False
    tail: int = 0
    published: tuple[str, str] = ("", "")
    quantised: str = ""
    quick: bool = True
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.model_type} {self.variant}".strip()


def _family(
    name: str, count_key: str, top_k_key: str = "num_experts_per_tok", /, **settings: Any
) -> TinyFamily:
    named = {
        f.name: settings.pop(f.name)
        for f in fields(TinyFamily)
        if f.name in settings and f.name != "model_type"
    }
    experts = named.get("experts", 8)
    return TinyFamily(name, {**_COMMON, count_key: experts, top_k_key: 2, **settings}, **named)


_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "shared_expert_intermediate_size": 16,
}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}

_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
}

_WITH_VISION: dict[str, Any] = {"nested": "text_config", "others": {"vision_config": _VISION}}
_GEMMA4: dict[str, Any] = {
    "enable_moe_block": True,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}

FAMILIES: tuple[TinyFamily, ...] = (
    _family("mixtral", "num_local_experts"),
    _family("phimoe", "num_local_experts", **_TWO_OR_MORE),
    _family(
        "minimax_m2",
        "num_local_experts",
        rotary_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    ),
    _family("qwen2_moe", "num_experts", shared_expert_intermediate_size=16, mlp_only_layers=[1]),
    _family("qwen3_moe", "num_experts", decoder_sparse_step=1, norm_topk_prob=True),
    _family("qwen3_next", "num_experts", **_LINEAR_ATTENTION),
    _family("qwen3_5_moe_text", "num_experts", **_LINEAR_ATTENTION),
    _family("qwen3_5_moe", "num_experts", **_WITH_VISION, **_LINEAR_ATTENTION),
    _family("qwen3_vl_moe", "num_experts", **_WITH_VISION),
    _family("olmoe", "num_experts"),
    _family(
        "deepseek_v2", "n_routed_experts", **_MLA, **_GROUPS, first_k_dense_replace=1, n_shared_experts=1
    ),
    _family("deepseek_v3", "n_routed_experts", **_DEEPSEEK_V3),
    _family(
        "deepseek_v3",
        "n_routed_experts",
        variant="grouped",
        experts=16,
        counts=(8, 12),
        **_MLA,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
    ),
    _family(
        "deepseek_v2",
        "n_routed_experts",
        variant="grouped",
        experts=12,
        counts=(4, 8),
        **_MLA,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        first_k_dense_replace=1,
        n_shared_experts=1,
    ),
    _family("deepseek_v32", "n_routed_experts", **_DEEPSEEK_V3, **_INDEXER),
    _family(
        "glm_moe_dsa", "n_routed_experts", **_TWO_OR_MORE, **_MLA, **_GROUPS, **_INDEXER, **_DENSE_THEN_MOE
    ),
    _family("kimi_linear", "num_experts", "num_experts_per_token", **_TWO_OR_MORE, quick=False, **_MLA),
    _family("glm4_moe", "n_routed_experts", **_TWO_OR_MORE, **_GROUPS, first_k_dense_replace=1),
    _family("glm4_moe_lite", "n_routed_experts", **_TWO_OR_MORE, **_MLA, **_GROUPS, **_DENSE_THEN_MOE),
    _family(
        "dots1", "n_routed_experts", **_TWO_OR_MORE, **_GROUPS, first_k_dense_replace=1, n_shared_experts=1
    ),
    _family("mimo_v2_flash", "n_routed_experts", **_TWO_OR_MORE, quick=False, **_GROUPS),
    _family("granitemoe", "num_local_experts"),
    _family("granitemoeshared", "num_local_experts", shared_intermediate_size=16),
    _family(
        "granitemoehybrid",
        "num_local_experts",
        shared_intermediate_size=16,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
        layer_types=["mamba", "attention", "mamba"],
    ),
    _family(
        "llama4_text",
        "num_local_experts",
        intermediate_size_mlp=32,
        interleave_moe_layer_step=2,
        num_hidden_layers=4,
    ),
    _family("ernie4_5_moe", "moe_num_experts", "moe_k", moe_layer_start_index=1, moe_layer_end_index=2),
    _family("hunyuan_v1_moe", "num_experts", "moe_topk"),
    _family("hy_v3", "num_experts", **_DENSE_THEN_MOE),
    _family("bailing_hybrid", "num_experts", **_TWO_OR_MORE, first_k_dense_replace=1, **_GROUPS),
    _family(
        "jamba",
        "num_experts",
        **_TWO_OR_MORE,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    _family(
        "lfm2_moe",
        "num_experts",
        num_dense_layers=1,
        layer_types=["conv", "full_attention", "full_attention"],
    ),
    _family(
        "nemotron_h",
        "n_routed_experts",
        **_TWO_OR_MORE,
        **_GROUPS,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        num_hidden_layers=4,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        moe_shared_expert_intermediate_size=16,
        use_mamba_kernels=False,
    ),
    _family("afmoe", "num_experts", num_dense_layers=1, n_group=1),
    _family("laguna", "num_experts", shared_expert_intermediate_size=16),
    _family(
        "longcat_flash",
        "n_routed_experts",
        "moe_topk",
        **_TWO_OR_MORE,
        **_MLA,
        tail=3,
        zero_expert_num=3,
        ffn_hidden_size=32,
        expert_ffn_hidden_size=16,
        num_layers=2,
    ),
    _family("inkling_text", "n_routed_experts", tail=2, quick=False),
    _family("gemma4_text", "num_experts", "top_k_experts", **_GEMMA4),
    _family(
        "mistral4",
        "n_routed_experts",
        **_TWO_OR_MORE,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        },
        **_MLA,
        **_GROUPS,
        first_k_dense_replace=0,
    ),
    _family(
        "deepseek_v4",
        "n_routed_experts",
        mlp_layer_types=["hash_moe", "moe", "moe"],
        **_TWO_OR_MORE,
        quick=False,
    ),
    _family("qwen4_exp_text", "num_experts", quick=False),
    _family("minimax_m3_vl_text", "num_local_experts", quick=False),
    _family(
        "kimi_k25",
        "n_routed_experts",
        nested="text_config",
        others={"vision_config": _TOWER, "projection_hidden_size": 16},
        published=("language_model.model.blocks.", "language_model.model.layers."),
        model_type="deepseek_v3",
        **_DEEPSEEK_V3,
    ),
    _family(
        "glm4v_moe",
        "n_routed_experts",
        **_TWO_OR_MORE,
        **_WITH_VISION,
        first_k_dense_replace=1,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 1.0,
        },
        **_GROUPS,
    ),
    _family(
        "llama4",
        "num_local_experts",
        nested="text_config",
        others={
            "vision_config": {
                **_TOWER,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "image_size": 28,
            }
        },
        intermediate_size_mlp=32,
        interleave_moe_layer_step=1,
    ),
    _family(
        "gemma4",
        "num_experts",
        "top_k_experts",
        nested="text_config",
        others={
            "vision_config": {
                **_TOWER,
                "head_dim": 8,
                "num_key_value_heads": 2,
                "position_embedding_size": 16,
            }
        },
        **_GEMMA4,
    ),
    _family(
        "step3p7",
        "n_routed_experts",
        nested="text_config",
        others={"vision_config": {**_TOWER, "image_size": 28}},
        share_expert_dim=16,
        sliding_window=32,
        **_DENSE_THEN_MOE,
    ),
    _family("qwen3_moe", "num_experts", variant="fp8", quantised="fp8", norm_topk_prob=True),
    _family(
        "glm4_moe",
        "n_routed_experts",
        variant="fp8",
        quantised="fp8",
        **_TWO_OR_MORE,
        **_GROUPS,
        first_k_dense_replace=1,
    ),
    _family("deepseek_v3", "n_routed_experts", variant="int4", quantised="int4", **_DEEPSEEK_V3),
    _family("solar_open", "n_routed_experts", **_TWO_OR_MORE, **_GROUPS),
    _family("flex_olmo", "num_experts"),
)
