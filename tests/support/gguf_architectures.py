"""Which tensors and keys llama.cpp wants in a GGUF file of an architecture, as data for `tiny_ggufs`.

Shapes are written as ggml writes them, innermost first, in the words of `tiny_ggufs.dimensions`. Learnt
from src/models/*.cpp and llama-model.cpp of ggml-org/llama.cpp (0c1e570).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ARCHITECTURES", "Architecture"]

Shapes = Mapping[str, str]
"""Name after `blk.N.` (or whole name) -> dimensions."""

_QKV = {
    "attn_norm.weight": "embd",
    "attn_q.weight": "embd q",
    "attn_k.weight": "embd kv",
    "attn_v.weight": "embd kv",
    "attn_output.weight": "q embd",
}
_FFN_NORM = {"ffn_norm.weight": "embd"}
_POST_NORM = {"post_attention_norm.weight": "embd"}
_HEAD_NORMS = {"attn_q_norm.weight": "head", "attn_k_norm.weight": "head"}
_ROW_NORMS = {"attn_q_norm.weight": "q", "attn_k_norm.weight": "kv"}
_BIASED_QKV = {"attn_q.bias": "q", "attn_k.bias": "kv", "attn_v.bias": "kv"}
_ROUTER = {"ffn_gate_inp.weight": "embd experts"}
_EXPERTS = {
    "ffn_gate_exps.weight": "embd ff experts",
    "ffn_up_exps.weight": "embd ff experts",
    "ffn_down_exps.weight": "ff embd experts",
}
_SELECTION_BIAS = {"exp_probs_b.bias": "experts"}
_SHARED = {
    "ffn_gate_shexp.weight": "embd shared",
    "ffn_up_shexp.weight": "embd shared",
    "ffn_down_shexp.weight": "shared embd",
}
_GATED_SHARED = {"ffn_gate_inp_shexp.weight": "embd", **_SHARED}
_SHARED_AS_EXPERT = {name: shape.replace("shared", "ff") for name, shape in _SHARED.items()}
_DENSE = {"ffn_gate.weight": "embd dense", "ffn_up.weight": "embd dense", "ffn_down.weight": "dense embd"}
_NEXTN = {
    "nextn.eh_proj.weight": "2*embd embd",
    "nextn.enorm.weight": "embd",
    "nextn.hnorm.weight": "embd",
    "nextn.shared_head_norm.weight": "embd",
}
_DELTA_NET = {
    "attn_norm.weight": "embd",
    "attn_qkv.weight": "embd 6*state",
    "attn_gate.weight": "embd 2*state",
    "ssm_conv1d.weight": "4 6*state",
    "ssm_dt.bias": "2",
    "ssm_a": "2",
    "ssm_norm.weight": "state",
    "ssm_out.weight": "2*state embd",
}
_GATED_QKV = {**_QKV, "attn_q.weight": "embd 2*q"}
_DELTA_NET_KEYS: Mapping[str, object] = {
    "full_attention_interval": 2,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": "2*state",
    "ssm.state_size": "state",
    "ssm.time_step_rank": 2,
    "ssm.group_count": 2,
    "expert_feed_forward_length": "ff",
    "expert_shared_feed_forward_length": "shared",
}
_MLA = {
    "attn_norm.weight": "embd",
    "attn_q_a.weight": "embd q_lora",
    "attn_q_a_norm.weight": "q_lora",
    "attn_q_b.weight": "q_lora heads*mla_key",
    "attn_kv_a_mqa.weight": "embd kv_lora+rope",
    "attn_kv_a_norm.weight": "kv_lora",
    "attn_k_b.weight": "mla_key-rope kv_lora heads",
    "attn_v_b.weight": "kv_lora mla_value heads",
    "attn_output.weight": "heads*mla_value embd",
    **_FFN_NORM,
}
_MLA_KEYS: Mapping[str, object] = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": "q_lora",
    "attention.kv_lora_rank": "kv_lora",
    "attention.key_length": "kv_lora+rope",
    "attention.value_length": "kv_lora",
    "attention.key_length_mla": "mla_key",
    "attention.value_length_mla": "mla_value",
    "rope.dimension_count": "rope",
}
_SIGMOID: Mapping[str, object] = {
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.5,
}
_GRANITE: Mapping[str, object] = {
    "logit_scale": 2.0,
    "residual_scale": 0.5,
    "embedding_scale": 2.0,
    "attention.scale": 0.125,
}


@dataclass(frozen=True)
class Architecture:
    """What its blocks consist of.

    `attention` is in every block, `moe` in those with experts, `dense` in the first `leading_dense`.
    `recurrent` replaces `attention` in the even blocks. `whole` is outside the blocks, beside embedding,
    final norm and unembedding. Strings among `keys` are dimensions. `experts_are_dense` says that the
    experts' width is read from `feed_forward_length`.
    """

    attention: Shapes
    moe: Shapes
    keys: Mapping[str, object] = field(default_factory=dict)
    dense: Shapes = field(default_factory=dict)
    recurrent: Shapes = field(default_factory=dict)
    whole: Shapes = field(default_factory=dict)
    leading_dense: int = 0
    mtp: int | None = None
    """Blocks for multi-token prediction in the file by default; None where there are none."""
    groups: int = 0
    experts_are_dense: bool = False
    tied: bool = False
    merges: bool = False
    """It may have ffn_gate_up_exps instead of the pair."""


def _moe(*parts: Shapes) -> Shapes:
    result = dict(_ROUTER)
    for part in (*parts, _EXPERTS):
        result.update(part)
    return result


_WIDTH: Mapping[str, object] = {"expert_feed_forward_length": "ff"}
_SHARED_WIDTH: Mapping[str, object] = {**_WIDTH, "expert_shared_feed_forward_length": "shared"}

ARCHITECTURES: Mapping[str, Architecture] = {
    # Softmax, the chosen weights renormalised.
    "qwen3moe": Architecture({**_QKV, **_HEAD_NORMS, **_FFN_NORM}, _moe(), _WIDTH),
    "llama": Architecture({**_QKV, **_FFN_NORM}, _moe(), experts_are_dense=True),
    "granitemoe": Architecture(
        {**_QKV, **_FFN_NORM},
        _moe(_SHARED),
        {**_GRANITE, "expert_shared_feed_forward_length": "shared"},
        experts_are_dense=True,
        tied=True,
    ),
    "phimoe": Architecture(
        {
            **_QKV,
            **_FFN_NORM,
            **_BIASED_QKV,
            "attn_norm.bias": "embd",
            "attn_output.bias": "embd",
            "ffn_norm.bias": "embd",
        },
        _moe(),
        experts_are_dense=True,
        whole={"output_norm.bias": "embd", "output.bias": "vocab"},
    ),
    "hunyuan-moe": Architecture(
        {**_QKV, **_HEAD_NORMS, **_FFN_NORM}, _moe(_SHARED), _SHARED_WIDTH, experts_are_dense=True
    ),
    "dbrx": Architecture(
        {
            "attn_norm.weight": "embd",
            "attn_qkv.weight": "embd q+2*kv",
            "attn_output.weight": "q embd",
            "attn_output_norm.weight": "embd",
        },
        _moe(),
        {"attention.clamp_kqv": 8.0, "attention.layer_norm_epsilon": 1e-5},
        experts_are_dense=True,
    ),
    "grok": Architecture(
        {**_QKV, **_FFN_NORM, "attn_output_norm.weight": "embd", "layer_output_norm.weight": "embd"},
        _moe(),
        {**_WIDTH, "embedding_scale": 1.0, "logit_scale": 1.0, "attention.output_scale": 0.25},
    ),
    "qwen3next": Architecture(
        {**_GATED_QKV, **_HEAD_NORMS, **_POST_NORM},
        _moe(_GATED_SHARED),
        _DELTA_NET_KEYS,
        recurrent={**_DELTA_NET, "ssm_ba.weight": "embd 4", **_POST_NORM},
        merges=True,
        mtp=0,
    ),
    "qwen35moe": Architecture(
        {**_GATED_QKV, **_HEAD_NORMS, **_POST_NORM},
        _moe(_GATED_SHARED),
        {**_DELTA_NET_KEYS, "rope.dimension_sections": [2, 2, 2, 0]},
        recurrent={**_DELTA_NET, "ssm_alpha.weight": "embd 2", "ssm_beta.weight": "embd 2", **_POST_NORM},
        merges=True,
        mtp=0,
    ),
    # A dense MLP beside the experts, a scale for each expert.
    "gemma4": Architecture(
        {
            **_QKV,
            **_HEAD_NORMS,
            **_POST_NORM,
            **_FFN_NORM,
            **_DENSE,
            "post_ffw_norm.weight": "embd",
        },
        _moe(
            {
                "ffn_gate_inp.scale": "embd",
                "pre_ffw_norm_2.weight": "embd",
                "post_ffw_norm_1.weight": "embd",
                "post_ffw_norm_2.weight": "embd",
                "ffn_down_exps.scale": "experts",
            }
        ),
        {
            **_WIDTH,
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
    "olmoe": Architecture({**_QKV, **_ROW_NORMS, **_FFN_NORM}, _moe(), experts_are_dense=True),
    "qwen2moe": Architecture({**_QKV, **_BIASED_QKV, **_FFN_NORM}, _moe(_GATED_SHARED), _SHARED_WIDTH),
    "deepseek": Architecture(
        {**_QKV, **_FFN_NORM},
        _moe(_SHARED_AS_EXPERT),
        {**_WIDTH, "expert_shared_count": 1, "expert_weights_scale": 1.0},
        _DENSE,
        leading_dense=1,
    ),
    # Softmax over the chosen ones; biases and sinks.
    "gpt-oss": Architecture(
        {
            **_QKV,
            **_BIASED_QKV,
            "attn_output.bias": "embd",
            "attn_sinks.weight": "heads",
            **_POST_NORM,
        },
        _moe(
            {
                "ffn_gate_inp.bias": "experts",
                "ffn_gate_exps.bias": "ff experts",
                "ffn_up_exps.bias": "ff experts",
                "ffn_down_exps.bias": "embd experts",
            }
        ),
        {
            **_WIDTH,
            "attention.key_length": "head",
            "attention.value_length": "head",
            "attention.sliding_window": 32,
        },
    ),
    # A bias for the selection.
    "ernie4_5-moe": Architecture(
        {**_QKV, **_FFN_NORM},
        _moe(_SELECTION_BIAS, _SHARED),
        {**_SHARED_WIDTH, "interleave_moe_layer_step": 1},
        _DENSE,
        leading_dense=1,
    ),
    "minimax-m2": Architecture(
        {**_QKV, **_ROW_NORMS, **_FFN_NORM},
        _moe(_SELECTION_BIAS),
        {**_WIDTH, "expert_gating_func": 2},
        experts_are_dense=True,
    ),
    "glm4moe": Architecture(
        {**_QKV, **_BIASED_QKV, **_HEAD_NORMS, **_POST_NORM},
        _moe(_SELECTION_BIAS, _SHARED_AS_EXPERT),
        {
            **_WIDTH,
            **_SIGMOID,
            "expert_shared_count": 1,
            "expert_group_count": 1,
            "expert_group_used_count": 1,
        },
        _DENSE,
        leading_dense=1,
        mtp=1,
    ),
    "hy_v3": Architecture(
        {**_QKV, **_HEAD_NORMS, **_FFN_NORM},
        _moe({"exp_probs_b": "experts"}, _SHARED),
        {**_SHARED_WIDTH, **_SIGMOID},
        _DENSE,
        leading_dense=1,
        mtp=0,
        merges=True,
    ),
    "deepseek2": Architecture(
        _MLA,
        _moe(_SELECTION_BIAS, _SHARED_AS_EXPERT),
        {**_WIDTH, **_SIGMOID, **_MLA_KEYS, "expert_shared_count": 1},
        _DENSE,
        leading_dense=1,
        groups=2,
        mtp=0,
        merges=True,
    ),
    # Sigmoid without such a bias; the router reads the block's input.
    "smallthinker": Architecture({**_QKV, **_FFN_NORM}, _moe(), {**_WIDTH, "expert_gating_func": 2}),
    # Sigmoid weights that multiply the experts' inputs.
    "llama4": Architecture(
        {**_QKV, **_FFN_NORM}, _moe(_SHARED_AS_EXPERT), {**_WIDTH, "interleave_moe_layer_step": 1}
    ),
    # A second set of experts, one for each group of neighbours.
    "grovemoe": Architecture(
        {**_QKV, **_HEAD_NORMS, **_FFN_NORM},
        _moe(
            {
                "ffn_gate_chexps.weight": "embd shared experts/2",
                "ffn_up_chexps.weight": "embd shared experts/2",
                "ffn_down_chexps.weight": "shared embd experts/2",
            }
        ),
        {
            **_WIDTH,
            "expert_chunk_feed_forward_length": "shared",
            "experts_per_group": 2,
            "expert_group_scale": 0.05,
        },
    ),
}

NEXTN = _NEXTN
"""What a block for multi-token prediction has beside those of a decoder block."""
