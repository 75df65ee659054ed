"""Which tensors and keys llama.cpp wants in a GGUF file of an architecture, as data for `tiny_ggufs`.

Shapes are written as ggml writes them, innermost first, in the words of `tiny_ggufs.dimensions`. Learnt
from src/models/*.cpp and llama-model.cpp of ggml-org/llama.cpp (0c1e570).
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.support.gguf_parts import (
    BIASED_QKV,
    COMPRESSED,
    DELTA_NET,
    DELTA_NET_KEYS,
    DENSE,
    FFN_NORM,
    FULL_HEADS,
    GATED_QKV,
    GATED_SHARED,
    GRANITE,
    HASH_LAYER,
    HEAD_NORMS,
    HYBRID_KEYS,
    INDEXED,
    LATENT_MOE,
    MAMBA,
    MLA,
    MLA_KEYS,
    POST_NORM,
    QKV,
    ROW_NORMS,
    SELECTION_BIAS,
    SHARED,
    SHARED_AS_EXPERT,
    SHARED_WIDTH,
    SIGMOID,
    V4_BLOCK,
    V4_KEYS,
    WIDTH,
    Architecture,
    moe_blocks,
    with_experts,
)

__all__ = ["ARCHITECTURES", "Architecture", "moe_blocks"]


ARCHITECTURES: Mapping[str, Architecture] = {
    # Softmax, the chosen weights renormalised.
    "qwen3moe": Architecture({**QKV, **HEAD_NORMS, **FFN_NORM}, with_experts(), WIDTH),
    "llama": Architecture({**QKV, **FFN_NORM}, with_experts(), experts_are_dense=True),
    "granitemoe": Architecture(
        {**QKV, **FFN_NORM},
        with_experts(SHARED),
        {**GRANITE, "expert_shared_feed_forward_length": "shared"},
        experts_are_dense=True,
        tied=True,
    ),
    "phimoe": Architecture(
        {
            **QKV,
            **FFN_NORM,
            **BIASED_QKV,
            "attn_norm.bias": "embd",
            "attn_output.bias": "embd",
            "ffn_norm.bias": "embd",
        },
        with_experts(),
        experts_are_dense=True,
        whole={"output_norm.bias": "embd", "output.bias": "vocab"},
    ),
    "hunyuan-moe": Architecture(
        {**QKV, **HEAD_NORMS, **FFN_NORM},
        with_experts(SHARED),
        SHARED_WIDTH,
        experts_are_dense=True,
    ),
    "dbrx": Architecture(
        {
            "attn_norm.weight": "embd",
            "attn_qkv.weight": "embd q+2*kv",
            "attn_output.weight": "q embd",
            "attn_output_norm.weight": "embd",
        },
        with_experts(),
        {"attention.clamp_kqv": 8.0, "attention.layer_norm_epsilon": 1e-5},
        experts_are_dense=True,
    ),
    "grok": Architecture(
        {
            **QKV,
            **FFN_NORM,
            "attn_output_norm.weight": "embd",
            "layer_output_norm.weight": "embd",
        },
        with_experts(),
        {**WIDTH, "embedding_scale": 1.0, "logit_scale": 1.0, "attention.output_scale": 0.25},
    ),
    "qwen3next": Architecture(
        {**GATED_QKV, **HEAD_NORMS, **POST_NORM},
        with_experts(GATED_SHARED),
        DELTA_NET_KEYS,
        recurrent={**DELTA_NET, "ssm_ba.weight": "embd 4", **POST_NORM},
        merges=True,
        mtp=0,
    ),
    "qwen35moe": Architecture(
        {**GATED_QKV, **HEAD_NORMS, **POST_NORM},
        with_experts(GATED_SHARED),
        {**DELTA_NET_KEYS, "rope.dimension_sections": [2, 2, 2, 0]},
        recurrent={
            **DELTA_NET,
            "ssm_alpha.weight": "embd 2",
            "ssm_beta.weight": "embd 2",
            **POST_NORM,
        },
        merges=True,
        mtp=0,
    ),
    # A dense MLP beside the experts, a scale for each expert.
    "gemma4": Architecture(
        {
            **QKV,
            **HEAD_NORMS,
            **POST_NORM,
            **FFN_NORM,
            **DENSE,
            "post_ffw_norm.weight": "embd",
        },
        with_experts(
            {
                "ffn_gate_inp.scale": "embd",
                "pre_ffw_norm_2.weight": "embd",
                "post_ffw_norm_1.weight": "embd",
                "post_ffw_norm_2.weight": "embd",
                "ffn_down_exps.scale": "experts",
            }
        ),
        {
            **WIDTH,
            "attention.key_length": "head",
            "attention.value_length": "head",
            "attention.key_length_swa": "head",
            "attention.value_length_swa": "head",
            "attention.sliding_window": 32,
            "attention.sliding_window_pattern": [True, False],
            "embedding_length_per_layer_input": 0,
        },
        whole={"rope_freqs.weight": "head/2"},
        merges=True,
        tied=True,
    ),
    # Softmax, not renormalised.
    "olmoe": Architecture(
        {**QKV, **FULL_HEADS, "attn_q_norm.weight": "q", "attn_k_norm.weight": "q", **FFN_NORM},
        with_experts(),
        {"attention.head_count_kv": "heads"},
        experts_are_dense=True,
    ),
    "qwen2moe": Architecture(
        {**QKV, **BIASED_QKV, **FFN_NORM},
        with_experts(GATED_SHARED),
        SHARED_WIDTH,
    ),
    "deepseek": Architecture(
        {**QKV, **FFN_NORM},
        with_experts(SHARED_AS_EXPERT),
        {**WIDTH, "expert_shared_count": 1, "expert_weights_scale": 1.0},
        DENSE,
        leading_dense=1,
    ),
    # Softmax over the chosen ones; biases and sinks.
    "gpt-oss": Architecture(
        {
            **QKV,
            **BIASED_QKV,
            "attn_output.bias": "embd",
            "attn_sinks.weight": "heads",
            **POST_NORM,
        },
        with_experts(
            {
                "ffn_gate_inp.bias": "experts",
                "ffn_gate_exps.bias": "ff experts",
                "ffn_up_exps.bias": "ff experts",
                "ffn_down_exps.bias": "embd experts",
            }
        ),
        {
            **WIDTH,
            "attention.key_length": "head",
            "attention.value_length": "head",
            "attention.sliding_window": 32,
        },
    ),
    # A bias for the selection.
    "ernie4_5-moe": Architecture(
        {**QKV, **FFN_NORM},
        with_experts(SELECTION_BIAS, SHARED),
        {**SHARED_WIDTH, "interleave_moe_layer_step": 1},
        DENSE,
        leading_dense=1,
    ),
    "minimax-m2": Architecture(
        {**QKV, **ROW_NORMS, **FFN_NORM},
        with_experts(SELECTION_BIAS),
        {**WIDTH, "expert_gating_func": 2},
        experts_are_dense=True,
    ),
    "glm4moe": Architecture(
        {**QKV, **BIASED_QKV, **HEAD_NORMS, **POST_NORM},
        with_experts(SELECTION_BIAS, SHARED_AS_EXPERT),
        {
            **WIDTH,
            **SIGMOID,
            "expert_shared_count": 1,
            "expert_group_count": 1,
            "expert_group_used_count": 1,
        },
        DENSE,
        leading_dense=1,
        mtp=1,
    ),
    "hy_v3": Architecture(
        {**QKV, **HEAD_NORMS, **FFN_NORM},
        with_experts({"exp_probs_b": "experts"}, SHARED),
        {**SHARED_WIDTH, **SIGMOID},
        DENSE,
        leading_dense=1,
        mtp=0,
        merges=True,
    ),
    "deepseek2": Architecture(
        MLA,
        with_experts(SELECTION_BIAS, SHARED_AS_EXPERT),
        {**WIDTH, **SIGMOID, **MLA_KEYS, "expert_shared_count": 1},
        DENSE,
        leading_dense=1,
        groups=2,
        mtp=0,
        merges=True,
    ),
    # Sigmoid without such a bias; the router reads the block's input.
    "smallthinker": Architecture({**QKV, **FFN_NORM}, with_experts(), {**WIDTH, "expert_gating_func": 2}),
    # Sigmoid weights that multiply the experts' inputs.
    "llama4": Architecture(
        {**QKV, **FFN_NORM},
        with_experts(SHARED_AS_EXPERT),
        {**WIDTH, "interleave_moe_layer_step": 1},
        layers=4,  # every fourth is without rotary embedding
    ),
    # A second set of experts, one for each group of neighbours.
    "grovemoe": Architecture(
        {**QKV, **HEAD_NORMS, **FFN_NORM},
        with_experts(
            {
                "ffn_gate_chexps.weight": "embd shared experts/2",
                "ffn_up_chexps.weight": "embd shared experts/2",
                "ffn_down_chexps.weight": "shared embd experts/2",
            }
        ),
        {
            **WIDTH,
            "expert_chunk_feed_forward_length": "shared",
            "experts_per_group": 2,
            "expert_group_scale": 0.05,
        },
    ),
    # Groups, and one tensor for queries, keys and values.
    "bailingmoe2": Architecture(
        {
            "attn_norm.weight": "embd",
            "attn_qkv.weight": "embd q+2*kv",
            "attn_output.weight": "q embd",
            **HEAD_NORMS,
            **FFN_NORM,
        },
        with_experts(SELECTION_BIAS, SHARED),
        {**SHARED_WIDTH, **SIGMOID, "expert_shared_count": 1},
        DENSE,
        leading_dense=1,
        groups=2,
    ),
    "dots1": Architecture(
        {
            **QKV,
            "attn_k.weight": "embd q",
            "attn_v.weight": "embd q",
            **HEAD_NORMS,
            **FFN_NORM,
        },
        with_experts(SELECTION_BIAS, SHARED_AS_EXPERT),
        {**WIDTH, **SIGMOID, "expert_shared_count": 1, "attention.head_count_kv": "heads"},
        DENSE,
        leading_dense=1,
    ),
    "afmoe": Architecture(
        {
            **QKV,
            **HEAD_NORMS,
            **POST_NORM,
            **FFN_NORM,
            "attn_gate.weight": "embd q",
            "post_ffw_norm.weight": "embd",
        },
        with_experts(SELECTION_BIAS, SHARED_AS_EXPERT),
        {
            **WIDTH,
            **SIGMOID,
            "expert_shared_count": 1,
            "attention.sliding_window": 32,
            "attention.sliding_window_pattern": [True, False, True],
        },
        DENSE,
        leading_dense=1,
    ),
    "exaone-moe": Architecture(
        {**QKV, **HEAD_NORMS, **FFN_NORM},
        with_experts(SELECTION_BIAS, SHARED),
        {**SHARED_WIDTH, **SIGMOID, "expert_shared_count": 1, "attention.sliding_window": 32},
        DENSE,
        leading_dense=1,
    ),
    "bailingmoe": Architecture(
        {**QKV, **FFN_NORM},
        with_experts(SHARED_AS_EXPERT),
        {**WIDTH, "expert_shared_count": 1, "expert_weights_scale": 1.0, "expert_weights_norm": True},
    ),
    "llada-moe": Architecture({**QKV, **HEAD_NORMS, **FFN_NORM}, with_experts(), WIDTH),
    "qwen3vlmoe": Architecture(
        {**QKV, **HEAD_NORMS, **FFN_NORM},
        with_experts(),
        {**WIDTH, "rope.dimension_sections": [2, 3, 3, 0]},
    ),
    # A dense MLP before the experts, with a norm of their own.
    "arctic": Architecture(
        {
            **QKV,
            **FFN_NORM,
            "ffn_gate.weight": "embd embd",
            "ffn_up.weight": "embd embd",
            "ffn_down.weight": "embd embd",
        },
        with_experts({"ffn_norm_exps.weight": "embd"}),
        experts_are_dense=True,
    ),
    # Experts without gate, on a narrower copy of the hidden state; a top-k for each block.
    "nemotron_h_moe": Architecture(
        {},
        {},
        HYBRID_KEYS,
        pattern=(MAMBA, QKV, LATENT_MOE, LATENT_MOE),
    ),
    # The first block looks its experts up by token.
    "deepseek4": Architecture(
        {},
        {},
        V4_KEYS,
        whole={
            "output_hc_fn.weight": "4*embd 4",
            "output_hc_base.weight": "4",
            "output_hc_scale.weight": "1",
        },
        pattern=(
            {**V4_BLOCK, **HASH_LAYER},
            {**V4_BLOCK, **SELECTION_BIAS, **INDEXED},
            {**V4_BLOCK, **SELECTION_BIAS, **COMPRESSED},
        ),
    ),
}
