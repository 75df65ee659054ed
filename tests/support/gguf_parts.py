"""What `gguf_architectures` is made of: tensors that blocks have in common, keys, and the form of a row.

Shapes are written as ggml writes them, innermost first, in the words of `tiny_ggufs.dimensions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shapes = Mapping[str, str]
"""Name after `blk.N.` (or whole name) -> dimensions."""

QKV = {
    "attn_norm.weight": "embd",
    "attn_q.weight": "embd q",
    "attn_k.weight": "embd kv",
    "attn_v.weight": "embd kv",
    "attn_output.weight": "q embd",
}
FULL_HEADS = {"attn_k.weight": "embd q", "attn_v.weight": "embd q"}
FFN_NORM = {"ffn_norm.weight": "embd"}
POST_NORM = {"post_attention_norm.weight": "embd"}
HEAD_NORMS = {"attn_q_norm.weight": "head", "attn_k_norm.weight": "head"}
ROW_NORMS = {"attn_q_norm.weight": "q", "attn_k_norm.weight": "kv"}
BIASED_QKV = {"attn_q.bias": "q", "attn_k.bias": "kv", "attn_v.bias": "kv"}
ROUTER = {"ffn_gate_inp.weight": "embd experts"}
EXPERTS = {
    "ffn_gate_exps.weight": "embd ff experts",
    "ffn_up_exps.weight": "embd ff experts",
    "ffn_down_exps.weight": "ff embd experts",
}
SELECTION_BIAS = {"exp_probs_b.bias": "experts"}
SHARED = {
    "ffn_gate_shexp.weight": "embd shared",
    "ffn_up_shexp.weight": "embd shared",
    "ffn_down_shexp.weight": "shared embd",
}
GATED_SHARED = {"ffn_gate_inp_shexp.weight": "embd", **SHARED}
SHARED_AS_EXPERT = {name: shape.replace("shared", "ff") for name, shape in SHARED.items()}
DENSE = {"ffn_gate.weight": "embd dense", "ffn_up.weight": "embd dense", "ffn_down.weight": "dense embd"}
NEXTN = {
    "nextn.eh_proj.weight": "2*embd embd",
    "nextn.enorm.weight": "embd",
    "nextn.hnorm.weight": "embd",
    "nextn.shared_head_norm.weight": "embd",
}
DELTA_NET = {
    "attn_norm.weight": "embd",
    "attn_qkv.weight": "embd 6*state",
    "attn_gate.weight": "embd 2*state",
    "ssm_conv1d.weight": "4 6*state",
    "ssm_dt.bias": "2",
    "ssm_a": "2",
    "ssm_norm.weight": "state",
    "ssm_out.weight": "2*state embd",
}
GATED_QKV = {**QKV, "attn_q.weight": "embd 2*q"}
DELTA_NET_KEYS: Mapping[str, object] = {
    "full_attention_interval": 2,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": "2*state",
    "ssm.state_size": "state",
    "ssm.time_step_rank": 2,
    "ssm.group_count": 2,
    "expert_feed_forward_length": "ff",
    "expert_shared_feed_forward_length": "shared",
}
MLA = {
    "attn_norm.weight": "embd",
    "attn_q_a.weight": "embd q_lora",
    "attn_q_a_norm.weight": "q_lora",
    "attn_q_b.weight": "q_lora heads*mla_key",
    "attn_kv_a_mqa.weight": "embd kv_lora+rope",
    "attn_kv_a_norm.weight": "kv_lora",
    "attn_k_b.weight": "mla_key-rope kv_lora heads",
    "attn_v_b.weight": "kv_lora mla_value heads",
    "attn_output.weight": "heads*mla_value embd",
    **FFN_NORM,
}
MLA_KEYS: Mapping[str, object] = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": "q_lora",
    "attention.kv_lora_rank": "kv_lora",
    "attention.key_length": "kv_lora+rope",
    "attention.value_length": "kv_lora",
    "attention.key_length_mla": "mla_key",
    "attention.value_length_mla": "mla_value",
    "rope.dimension_count": "rope",
}
SIGMOID: Mapping[str, object] = {
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.5,
}
GRANITE: Mapping[str, object] = {
    "logit_scale": 2.0,
    "residual_scale": 0.5,
    "embedding_scale": 2.0,
    "attention.scale": 0.125,
}


def with_experts(*parts: Shapes) -> Shapes:
    result = dict(ROUTER)
    for part in (*parts, EXPERTS):
        result.update(part)
    return result


HASH_LAYER = {"ffn_gate_tid2eid.weight": "top_k vocab"}
V4_BLOCK = {
    "attn_norm.weight": "embd",
    "attn_sinks.weight": "heads",
    "attn_q_a.weight": "embd q_lora",
    "attn_q_a_norm.weight": "q_lora",
    "attn_q_b.weight": "q_lora q",
    "attn_kv.weight": "embd head",
    "attn_kv_a_norm.weight": "head",
    "attn_output_a.weight": "q/2 2*o_lora",
    "attn_output_b.weight": "2*o_lora embd",
    "hc_attn_fn.weight": "4*embd 24",
    "hc_attn_base.weight": "24",
    "hc_attn_scale.weight": "3",
    "hc_ffn_fn.weight": "4*embd 24",
    "hc_ffn_base.weight": "24",
    "hc_ffn_scale.weight": "3",
    **FFN_NORM,
    **with_experts(SHARED_AS_EXPERT),
}
INDEXED = {
    "attn_compressor_kv.weight": "embd 2*head",
    "attn_compressor_gate.weight": "embd 2*head",
    "attn_compressor_ape.weight": "2*head 4",
    "attn_compressor_norm.weight": "head",
    "indexer.proj.weight": "embd 2",
    "indexer.attn_q_b.weight": "q_lora 128",
    "indexer_compressor_kv.weight": "embd 128",
    "indexer_compressor_gate.weight": "embd 128",
    "indexer_compressor_ape.weight": "128 4",
    "indexer_compressor_norm.weight": "64",
}
COMPRESSED = {
    "attn_compressor_kv.weight": "embd head",
    "attn_compressor_gate.weight": "embd head",
    "attn_compressor_ape.weight": "head 128",
    "attn_compressor_norm.weight": "head",
}
MAMBA = {
    "attn_norm.weight": "embd",
    "ssm_in.weight": "embd 196",
    "ssm_conv1d.weight": "4 128",
    "ssm_conv1d.bias": "128",
    "ssm_dt.bias": "4",
    "ssm_a": "1 4",
    "ssm_d": "1 4",
    "ssm_norm.weight": "32 2",
    "ssm_out.weight": "64 embd",
}
LATENT_MOE = {
    "attn_norm.weight": "embd",
    **ROUTER,
    **SELECTION_BIAS,
    "ffn_latent_down.weight": "embd latent",
    "ffn_latent_up.weight": "latent embd",
    "ffn_up_exps.weight": "latent ff experts",
    "ffn_down_exps.weight": "ff latent experts",
    "ffn_up_shexp.weight": "embd shared",
    "ffn_down_shexp.weight": "shared embd",
}
WIDTH: Mapping[str, object] = {"expert_feed_forward_length": "ff"}
SHARED_WIDTH: Mapping[str, object] = {**WIDTH, "expert_shared_feed_forward_length": "shared"}
HYBRID_KEYS: Mapping[str, object] = {
    **SHARED_WIDTH,
    "attention.head_count_kv": [0, 2, 0, 0],
    "attention.layer_norm_epsilon": 1e-5,
    "feed_forward_length": [0, 0, "ff", "ff"],
    "expert_used_count": ["top_k"] * 4,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.5,
    "moe_latent_size": "latent",
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
}
V4_KEYS: Mapping[str, object] = {
    **WIDTH,
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": "q_lora",
    "attention.key_length": "head",
    "attention.value_length": "head",
    "attention.sliding_window": 32,
    "attention.indexer.head_count": 2,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 64,
    "attention.output_group_count": 2,
    "attention.output_lora_rank": "o_lora",
    "attention.compress_rope_freq_base": 10000.0,
    "attention.compress_ratios": [0, 4, 128],
    "rope.dimension_count": "head/2",
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hash_layer_count": 1,
    "swiglu_clamp_exp": 10.0,
    "expert_gating_func": 4,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.5,
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
    layers: int = 2
    """Blocks with experts, if not told otherwise."""
    mtp: int | None = None
    """Blocks for multi-token prediction in the file by default; None where there are none."""
    groups: int = 0
    experts_are_dense: bool = False
    tied: bool = False
    pattern: tuple[Shapes, ...] = ()
    """Every block in full, where they differ more than that."""
    merges: bool = False
    """It may have ffn_gate_up_exps instead of the pair."""


def moe_blocks(row: Architecture, mtp: int | None = None) -> tuple[list[int], list[int]]:
    """Numbers of the blocks with experts in a file of the usual length: those of the trunk, and those after it."""
    if row.pattern:
        return [n for n, block in enumerate(row.pattern) if "ffn_gate_inp.weight" in block], []
    trunk = row.leading_dense + row.layers
    more = row.mtp or 0 if mtp is None else mtp
    return list(range(row.leading_dense, trunk)), list(range(trunk, trunk + more))
