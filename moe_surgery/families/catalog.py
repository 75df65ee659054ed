"""The families that can be pruned by tensor names alone: one entry each, pure data.

To add one: an entry here, and one in tests/support/tiny_families.py. Names are those on disk. Where they were
taken from, and what each family does, is in docs/families.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from moe_surgery.families.base import LAYERS, CatalogFamily

__all__ = ["CATALOG", "UNTESTED"]

SOFTMAX: Final = "softmax"
SOFTMAX_BIAS: Final = "softmax with a selection bias"
SIGMOID_BIAS: Final = "sigmoid with a selection bias"

_GATE_BIAS: Final = MappingProxyType({"mlp.gate.e_score_correction_bias": 0})
_BLOCK: Final = "block_sparse_moe."

_QWEN = CatalogFamily("qwen3_moe", "Qwen3-MoE", SOFTMAX)
_MIXTRAL = CatalogFamily(
    "mixtral", "Mixtral", SOFTMAX, router=_BLOCK + "gate.weight", experts=_BLOCK + "experts."
)
# A group's score is the sum of its two best experts, also where all experts are one group.
_DEEPSEEK = CatalogFamily("deepseek_v3", "DeepSeek-V3", SIGMOID_BIAS, slices=_GATE_BIAS, minimum=2)
_GRANITE = CatalogFamily(
    "granitemoe",
    "Granite-MoE",
    SOFTMAX,
    router=_BLOCK + "router.layer.weight",
    experts=_BLOCK + "experts.",
    stacked=(_BLOCK + "input_linear.", _BLOCK + "output_linear."),
)
_LLAMA4 = CatalogFamily(
    "llama4",
    "Llama-4",
    "sigmoid on the input, top-1",
    router="feed_forward.router.weight",
    experts="feed_forward.experts.",
)
_GEMMA4 = CatalogFamily(
    "gemma4",
    "Gemma-4",
    "softmax with a scale per expert",
    router="router.proj.weight",
    experts="experts.",
    slices={"router.per_expert_scale": 0},
    whole=("router.scale",),
)
_STEP = CatalogFamily(
    "step3p7",
    "Step-3.5/3.7",
    SIGMOID_BIAS,
    router="moe.gate.weight",
    experts="moe.experts.",
    stacked=("moe.gate_proj.", "moe.up_proj.", "moe.down_proj."),
    slices={"moe.router_bias": 0},
)
_INKLING = CatalogFamily(
    "inkling_text",
    "Inkling",
    SIGMOID_BIAS,
    slices={"mlp.gate.bias": 0, "mlp.gate.e_score_correction_bias": 0},
    whole=("mlp.gate.global_scale",),
    layers=("model.llm.layers.", *LAYERS),
    tail_key="n_shared_experts",
)
_MINIMAX_M3 = replace(
    _MIXTRAL,
    model_type="minimax_m3_vl",
    title="MiniMax-M3",
    routing=SIGMOID_BIAS,
    slices={_BLOCK + "e_score_correction_bias": 0, _BLOCK + "gate.e_score_correction_bias": 0},
)
_HUNYUAN3 = CatalogFamily(
    "hy_v3", "Hy3", SIGMOID_BIAS, router="mlp.router.gate.weight", slices={"mlp.expert_bias": 0}
)


def _like(family: CatalogFamily, **titles: str) -> tuple[CatalogFamily, ...]:
    """`family` under other model types, each with its title."""
    return tuple(replace(family, model_type=name, title=title) for name, title in titles.items())


# Several entries of one model type are spellings of it; the first one whose router is in the checkpoint counts.
CATALOG: Final[tuple[CatalogFamily, ...]] = (
    _MIXTRAL,
    replace(_MIXTRAL, model_type="phimoe", title="Phi-3.5-MoE", routing="sparsemixer", minimum=2),
    replace(
        _MIXTRAL,
        model_type="minimax_m2",
        title="MiniMax-M2",
        routing=SIGMOID_BIAS,
        slices={_BLOCK + "e_score_correction_bias": 0},
    ),
    _MINIMAX_M3,
    replace(_MINIMAX_M3, model_type="minimax_m3_vl_text"),
    *_like(replace(_DEEPSEEK, minimum=1), minimax_m3_vl="MiniMax-M3", minimax_m3_vl_text="MiniMax-M3"),
    _QWEN,
    *_like(
        _QWEN,
        qwen2_moe="Qwen2-MoE",
        qwen3_next="Qwen3-Next",
        qwen3_5_moe="Qwen3.5-MoE",
        qwen3_5_moe_text="Qwen3.5-MoE",
        qwen4_exp="Qwen3.8-Flash-Next",
        qwen4_exp_text="Qwen3.8-Flash-Next",
        qwen3_vl_moe="Qwen3-VL-MoE",
        qwen3_vl_moe_text="Qwen3-VL-MoE",
        olmoe="OLMoE",
        flex_olmo="FlexOlmo",
    ),
    replace(_QWEN, model_type="deepseek_v2", title="DeepSeek-V2", group_minimum=1),
    _DEEPSEEK,
    *_like(
        _DEEPSEEK,
        deepseek_v32="DeepSeek-V3.2",
        glm_moe_dsa="GLM-5",
        kimi_k2="Kimi-K2",
        kimi_k25="Kimi-K2.5",
        glm4_moe="GLM-4.5",
        glm4_moe_lite="GLM-4.7-Flash",
        glm4v_moe="GLM-4.5V",
        glm4v_moe_text="GLM-4.5V",
        dots1="dots.llm1",
        mimo_v2_flash="MiMo-V2-Flash",
        solar_open="Solar-Open",
    ),
    replace(
        _MIXTRAL,
        model_type="kimi_linear",
        title="Kimi-Linear",
        minimum=2,
        routing=SIGMOID_BIAS,
        slices={_BLOCK + "gate.e_score_correction_bias": 0},
    ),
    CatalogFamily(
        "deepseek_v4",
        "DeepSeek-V4",
        "square root of softplus with a selection bias, or a table",
        router="ffn.gate.weight",
        experts="ffn.experts.",
        slices={"ffn.gate.bias": 0, "ffn.gate.e_score_correction_bias": 0},
        layers=("layers.", "model.layers."),
        mtp=("mtp.", "model.mtp."),
        table="ffn.gate.tid2eid",
    ),
    _GRANITE,
    *_like(_GRANITE, granitemoeshared="Granite-MoE", granitemoehybrid="Granite-4"),
    _LLAMA4,
    *_like(_LLAMA4, llama4_text="Llama-4"),
    CatalogFamily(
        "ernie4_5_moe", "ERNIE-4.5", SOFTMAX_BIAS, slices={"mlp.moe_statics.e_score_correction_bias": 1}
    ),
    CatalogFamily("hunyuan_v1_moe", "Hunyuan-A13B", SOFTMAX, router="mlp.gate.wg.weight"),
    _HUNYUAN3,
    replace(_HUNYUAN3, model_type="afmoe", title="AFMoE"),
    CatalogFamily(
        "bailing_hybrid", "Ling/Ring 2", SIGMOID_BIAS, slices={"mlp.gate.expert_bias": 0}, minimum=2
    ),
    CatalogFamily(
        "jamba",
        "Jamba",
        SOFTMAX,
        router="feed_forward.router.weight",
        experts="feed_forward.experts.",
        minimum=2,
    ),
    CatalogFamily(
        "lfm2_moe",
        "LFM2-MoE",
        SIGMOID_BIAS,
        router="feed_forward.gate.weight",
        experts="feed_forward.experts.",
        slices={"feed_forward.expert_bias": 0},
    ),
    CatalogFamily(
        "nemotron_h",
        "Nemotron-H",
        SIGMOID_BIAS,
        router="mixer.gate.weight",
        experts="mixer.experts.",
        slices={"mixer.gate.e_score_correction_bias": 0},
        minimum=2,
        layers=("backbone.layers.", "model.layers."),
    ),
    CatalogFamily("laguna", "Laguna", SIGMOID_BIAS, slices={"mlp.experts.e_score_correction_bias": 0}),
    CatalogFamily(
        "longcat_flash",
        "LongCat-Flash",
        SOFTMAX_BIAS,
        router="mlp.router.classifier.weight",
        slices={"mlp.router.e_score_correction_bias": 0},
        tail_key="zero_expert_num",
        minimum=2,
    ),
    _INKLING,
    *_like(_INKLING, inkling_mm_model="Inkling"),
    _GEMMA4,
    *_like(_GEMMA4, gemma4_text="Gemma-4"),
    _STEP,
    *_like(_STEP, step3p7_text="Step-3.5/3.7", step3p5="Step-3.5/3.7"),
    replace(_QWEN, model_type="mistral4", title="Mistral-4", minimum=2),
)

UNTESTED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "qwen3_omni_moe": "it has two pools of experts (thinker and talker) with separate counts",
        "qwen3_omni_moe_thinker": "it is part of a model with two pools of experts",
        "kimi_k3": "its tensor names are only known from reports",
        "mistral_large4": "its tensor names are only known from reports",
        "bailing_moe_v2": "its names and routing come from code on the hub that was not run here",
        "ernie4_5_vl_moe": "it has two pools of experts (text and vision) behind one router",
    }
)
"""Model types that were seen but not tested, and what is missing."""
