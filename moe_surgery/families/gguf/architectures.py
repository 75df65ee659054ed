"""What is known about GGUF architectures, one line each: the models behind them, and what they read differently.

The naming rule of `tensors` holds for all; an architecture that is not listed is cut by it as well. Source: models/
of ggml-org/llama.cpp (0c1e570).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]

GATING: Final[Mapping[int, str]] = MappingProxyType(
    {
        0: "the architecture's default",
        1: "softmax",
        2: "sigmoid",
        3: "softmax over the chosen experts",
        4: "square root of softplus",
    }
)
"""By the number of `expert_gating_func`."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp.

    `model_types` are transformers' names for the models with it, of which plans and rankings are for any;
    the first is what new plans name. `norm` is the norm before the router, after `blk.N.`. `width_from_top_k`:
    without the key `expert_feed_forward_length` the width of an expert is taken to be
    feed_forward_length / expert_used_count. `top_k_per_layer`: `expert_used_count` may be an array that counts.
    `refused_counts` are numbers of experts of which none can be dropped, and why.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    norm: str = "ffn_norm.weight"
    width_from_top_k: bool = False
    top_k_per_layer: bool = False
    refused_counts: tuple[tuple[int, str], ...] = ()
    known: bool = True


def _arch(name: str, title: str, *model_types: str) -> Architecture:
    return Architecture(name, title, model_types or (name.replace("-", "_"),))


def _post_attention(architecture: Architecture) -> Architecture:
    return replace(architecture, norm="post_attention_norm.weight")


def _narrow(architecture: Architecture) -> Architecture:
    return replace(architecture, width_from_top_k=True)


_MAVERICK: Final = (
    "llama.cpp takes every llama4 model with another number of experts than 128 for one that normalises queries and "
    "keys (Scout), so that attention would change"
)

_LISTED: Final = (
    _arch("afmoe", "AFMoE"),
    replace(_arch("arctic", "Arctic"), norm="ffn_norm_exps.weight"),
    _arch("bailingmoe", "Ling", "bailing_moe"),
    _arch("bailingmoe2", "Ling/Ring 2", "bailing_moe_v2", "bailing_moe"),
    _arch("bailingmoe3", "Ling/Ring 2.5", "bailing_hybrid"),
    replace(_arch("cohere2moe", "Command MoE", "cohere2_moe"), norm="attn_norm.weight"),
    replace(_arch("dbrx", "DBRX"), norm="attn_output_norm.weight"),
    _arch("deepseek", "DeepSeek MoE"),
    _arch(
        "deepseek2",
        "DeepSeek-V2/V3",
        "deepseek_v3",
        "deepseek_v2",
        "kimi_k2",
        "kimi_k25",
        "glm4_moe_lite",
        "mistral4",
        "deepseek_v32",
        "glm_moe_dsa",
    ),
    _arch("deepseek2-ocr", "DeepSeek-OCR", "deepseek_v2", "deepseek_vl_v2"),
    _arch("deepseek32", "DeepSeek-V3.2", "deepseek_v32"),
    _arch("deepseek4", "DeepSeek-V4", "deepseek_v4"),
    _arch("dflash", "DFlash"),
    _arch("dots1", "dots.llm1"),
    _arch("dots3note", "dots.note"),
    _arch("ernie4_5-moe", "ERNIE-4.5", "ernie4_5_moe"),
    _arch("exaone-moe", "EXAONE MoE", "exaone_moe"),
    _arch("gemma4", "Gemma-4", "gemma4", "gemma4_text"),
    _arch("glm-dsa", "GLM-5", "glm_moe_dsa"),
    _narrow(
        _post_attention(_arch("glm4moe", "GLM-4.5", "glm4_moe", "glm4v_moe", "glm4v_moe_text", "solar_open"))
    ),
    _arch("glm5-next", "GLM-5-Next", "glm5_next"),
    _post_attention(_arch("gpt-oss", "gpt-oss", "gpt_oss")),
    _arch("granite_swa", "Granite-MoE"),
    _arch("granitehybrid", "Granite-4", "granitemoehybrid"),
    _arch("granitemoe", "Granite-MoE", "granitemoe", "granitemoeshared"),
    _arch("grok", "Grok"),
    _narrow(_arch("grovemoe", "GroveMoE", "grove_moe")),
    _arch("hunyuan-moe", "Hunyuan-A13B", "hunyuan_v1_moe"),
    _narrow(_arch("hy_v3", "Hy3")),
    _arch("hy_v4", "Hy4"),
    _arch("jamba", "Jamba"),
    _arch("kimi-k3", "Kimi-K3"),
    _arch("kimi-linear", "Kimi-Linear"),
    _arch("laguna", "Laguna"),
    _arch("lfm2moe", "LFM2-MoE", "lfm2_moe"),
    _narrow(_arch("llada-moe", "LLaDA-MoE")),
    _arch("llama", "Mixtral", "mixtral"),
    replace(_arch("llama4", "Llama-4", "llama4", "llama4_text"), refused_counts=((128, _MAVERICK),)),
    _narrow(_arch("mellum", "Mellum")),
    _arch("mimo2", "MiMo-V2-Flash", "mimo_v2_flash"),
    _arch("minimax-m2", "MiniMax-M2"),
    _arch("minimax-m3", "MiniMax-M3", "minimax_m3_vl", "minimax_m3_vl_text"),
    _arch("mistral4", "Mistral-4"),
    _narrow(replace(_arch("nemotron_h_moe", "Nemotron-H", "nemotron_h"), top_k_per_layer=True)),
    _arch("nomic-bert-moe", "Nomic-Embed-MoE", "nomic_bert"),
    _arch("olmoe", "OLMoE", "olmoe", "flex_olmo"),
    _arch("phimoe", "Phi-3.5-MoE"),
    _narrow(_arch("qwen2moe", "Qwen2-MoE", "qwen2_moe")),
    _narrow(_post_attention(_arch("qwen35moe", "Qwen3.5-MoE", "qwen3_5_moe", "qwen3_5_moe_text"))),
    _narrow(_arch("qwen3moe", "Qwen3-MoE", "qwen3_moe")),
    _narrow(_post_attention(_arch("qwen3next", "Qwen3-Next", "qwen3_next"))),
    _narrow(_arch("qwen3vlmoe", "Qwen3-VL-MoE", "qwen3_vl_moe", "qwen3_vl_moe_text")),
    _post_attention(_arch("qwen4exp", "Qwen3.8-Flash-Next", "qwen4_exp", "qwen4_exp_text")),
    _narrow(_arch("rnd1", "RND1")),
    _arch("smallthinker", "SmallThinker"),
    _arch("step35", "Step-3.5/3.7", "step3p5", "step3p7", "step3p7_text"),
)

ARCHITECTURES: Final[Mapping[str, Architecture]] = MappingProxyType({a.name: a for a in _LISTED})
"""By name, the prefix of the metadata's keys."""


def architecture_of(name: str) -> Architecture:
    """The entry of the architecture `name`, or one with what can be assumed of an unknown one."""
    listed = ARCHITECTURES.get(name)
    if listed is not None:
        return listed
    return replace(_arch(name, name), width_from_top_k=True, known=False)
