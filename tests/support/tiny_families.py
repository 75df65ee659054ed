"""Tiny models of every family that transformers can build, with random weights, saved as they are published."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.masked import auto_class

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
    fields = (
        "counts",
        "nested",
        "others",
        "experts",
        "stacked",
        "tail",
        "published",
        "quantised",
        "quick",
        "variant",
    )
    named = {k: settings.pop(k) for k in fields if k in settings}
    experts = named.get("experts", 8)
    return TinyFamily(name, {**_COMMON, count_key: experts, top_k_key: 2, **settings}, **named)


def save(family: TinyFamily, folder: Path) -> Path:
    """A model of `family` with random weights that matter, saved by transformers as it is published."""
    cls = CONFIG_MAPPING[family.model_type]
    settings = dict(family.settings)
    config = cls(**{family.nested: settings}, **family.others) if family.nested else cls(**settings)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            last = name.rpartition(".")[2]
            if last in ("e_score_correction_bias", "expert_bias", "router_bias"):
                value.uniform_(0.0, 0.5)
            elif value.ndim == 2 and value.shape[0] == family.experts + family.tail and last == "weight":
                value.normal_(0.0, 0.5)  # routers, which some classes leave at zero
            elif last == "per_expert_scale":
                value.uniform_(0.5, 1.5)
            elif last == "tid2eid":
                top_k = value.shape[1]
                rows = [torch.randperm(family.experts)[:top_k] for _ in range(value.shape[0])]
                value.copy_(torch.stack(rows))
    model.save_pretrained(folder)
    if family.stacked:
        stack_experts(folder)
    if family.quantised:
        quantise(folder, family.quantised)
    if family.published[0]:
        file = folder / "model.safetensors"
        renamed = {n.replace(*family.published): t for n, t in load_file(file).items()}
        save_file(renamed, file, metadata={"format": "pt"})
    return folder


def quantise(folder: Path, kind: str) -> None:
    """Rewrite a one-file checkpoint as published in FP8 (blocks of 16 x 16) or INT4 (packed, groups of 16)."""
    file, settings = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith("_proj.weight") and tensors[n].ndim == 2]:
        weight, stem = tensors.pop(name), name.removesuffix(".weight")
        if kind == "fp8":
            rows, columns = weight.shape
            blocks = weight.reshape(rows // 16, 16, columns // 16, 16)
            scales = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scales[:, None, :, None]).reshape(rows, columns)
            tensors[name] = codes.to(torch.float8_e4m3fn)
            tensors[f"{stem}.weight_scale_inv"] = scales
        else:
            groups = weight.reshape(weight.shape[0], -1, 16)
            scales = groups.abs().amax(-1) / 7
            codes = (groups / scales[..., None]).round().clamp(-8, 7).reshape(weight.shape).int() + 8
            shifts = torch.arange(0, 32, 4)
            packed = (codes.reshape(weight.shape[0], -1, 8).long() << shifts).sum(-1)
            tensors[f"{stem}.weight_packed"] = (packed - (packed >= 2**31) * 2**32).int()
            tensors[f"{stem}.weight_scale"] = scales
            tensors[f"{stem}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads(settings.read_text())
    config["quantization_config"] = QUANTISATION[kind]
    settings.write_text(json.dumps(config))


def unpacked(folder: Path) -> Path:
    """`folder`, or for INT4 a copy of it with float weights, which transformers loads without another package."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("quantization_config", {}).get("quant_method") != "compressed-tensors":
        return folder
    del config["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        packed, scales = tensors.pop(name), tensors.pop(f"{stem}_scale")
        shape = tensors.pop(f"{stem}_shape").tolist()
        codes = (packed.long()[..., None] >> torch.arange(0, 32, 4)) & 15
        weight = (codes.reshape(shape[0], -1, 16) - 8) * scales[..., None]
        tensors[stem] = weight.reshape(shape)
    copy = folder.with_name(f"{folder.name}-floats")
    copy.mkdir(exist_ok=True)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


QUANTISATION: dict[str, dict[str, Any]] = {
    "fp8": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
        "dequantize": True,
        "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
    },
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 16,
                },
            }
        },
        "ignore": ["lm_head", "re:.*mlp\\.gate$"],
        "quantization_status": "compressed",
    },
}


def stack_experts(folder: Path) -> None:
    """Rewrite a one-file checkpoint with gate and up fused and experts stacked, [experts, rows, columns]."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name in list(tensors):
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensors.pop(name)
    assert experts
    for stem, parts in experts.items():
        ordered = [parts[e] for e in range(len(parts))]
        tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat([p["gate"], p["up"]]) for p in ordered])
        tensors[f"{stem}.down_proj"] = torch.stack([p["down"] for p in ordered])
    save_file(tensors, file, metadata={"format": "pt"})


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

FAMILIES: tuple[TinyFamily, ...] = (
    _family("mixtral", "num_local_experts"),
    _family("phimoe", "num_local_experts", counts=(2, 4, 5)),
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
    _family(
        "qwen3_5_moe",
        "num_experts",
        nested="text_config",
        others={"vision_config": _VISION},
        **_LINEAR_ATTENTION,
    ),
    _family("qwen3_vl_moe", "num_experts", nested="text_config", others={"vision_config": _VISION}),
    _family("olmoe", "num_experts"),
    _family(
        "deepseek_v2", "n_routed_experts", **_MLA, **_GROUPS, first_k_dense_replace=1, n_shared_experts=1
    ),
    _family("deepseek_v3", "n_routed_experts", counts=(2, 4, 5), **_MLA, **_GROUPS, first_k_dense_replace=1),
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
    _family(
        "deepseek_v32",
        "n_routed_experts",
        counts=(2, 4, 5),
        **_MLA,
        **_GROUPS,
        first_k_dense_replace=1,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=16,
    ),
    _family(
        "glm_moe_dsa",
        "n_routed_experts",
        counts=(2, 4, 5),
        **_MLA,
        **_GROUPS,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=16,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    _family("kimi_linear", "num_experts", "num_experts_per_token", counts=(2, 4, 5), quick=False, **_MLA),
    _family("glm4_moe", "n_routed_experts", counts=(2, 4, 5), **_GROUPS, first_k_dense_replace=1),
    _family(
        "glm4_moe_lite",
        "n_routed_experts",
        counts=(2, 4, 5),
        **_MLA,
        **_GROUPS,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    _family(
        "dots1", "n_routed_experts", counts=(2, 4, 5), **_GROUPS, first_k_dense_replace=1, n_shared_experts=1
    ),
    _family("mimo_v2_flash", "n_routed_experts", counts=(2, 4, 5), quick=False, **_GROUPS),
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
    _family("hy_v3", "num_experts", mlp_layer_types=["dense", "sparse", "sparse"]),
    _family(
        "bailing_hybrid", "num_experts", counts=(2, 4, 5), first_k_dense_replace=1, n_group=1, topk_group=1
    ),
    _family(
        "jamba",
        "num_experts",
        counts=(2, 4, 5),
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
        counts=(2, 4, 5),
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
        counts=(2, 4, 5),
        **_MLA,
        tail=3,
        zero_expert_num=3,
        ffn_hidden_size=32,
        expert_ffn_hidden_size=16,
        num_layers=2,
    ),
    _family("inkling_text", "n_routed_experts", tail=2, quick=False),
    _family(
        "gemma4_text",
        "num_experts",
        "top_k_experts",
        enable_moe_block=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    ),
    _family(
        "mistral4",
        "n_routed_experts",
        counts=(2, 4, 5),
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
        counts=(2, 4, 5),
        quick=False,
    ),
    _family("qwen4_exp_text", "num_experts", quick=False),
    _family("minimax_m3_vl_text", "num_local_experts", quick=False),
    _family(
        "kimi_k25",
        "n_routed_experts",
        counts=(2, 4, 5),
        nested="text_config",
        others={"vision_config": _TOWER, "projection_hidden_size": 16},
        published=("language_model.model.blocks.", "language_model.model.layers."),
        model_type="deepseek_v3",
        first_k_dense_replace=1,
        **_MLA,
        **_GROUPS,
    ),
    _family(
        "glm4v_moe",
        "n_routed_experts",
        counts=(2, 4, 5),
        nested="text_config",
        others={"vision_config": _VISION},
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
        enable_moe_block=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    ),
    _family(
        "step3p7",
        "n_routed_experts",
        nested="text_config",
        others={"vision_config": {**_TOWER, "image_size": 28}},
        share_expert_dim=16,
        sliding_window=32,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    _family("qwen3_moe", "num_experts", variant="fp8", quantised="fp8", norm_topk_prob=True),
    _family(
        "glm4_moe",
        "n_routed_experts",
        variant="fp8",
        quantised="fp8",
        counts=(2, 4, 5),
        **_GROUPS,
        first_k_dense_replace=1,
    ),
    _family(
        "deepseek_v3",
        "n_routed_experts",
        variant="int4",
        quantised="int4",
        counts=(2, 4, 5),
        **_MLA,
        **_GROUPS,
        first_k_dense_replace=1,
    ),
    _family("solar_open", "n_routed_experts", counts=(2, 4, 5), **_GROUPS),
    _family("flex_olmo", "num_experts"),
)
