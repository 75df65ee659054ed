"""Writes the models of `tiny_families`: transformers saves them, then they get the form they are published in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.masked import auto_class
from tests.support.tiny_families import TinyFamily


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
