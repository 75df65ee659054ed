"""Small checkpoints that store each expert separately, of random bytes, written without the safetensors library.

A tensor is (dtype, shape, bytes): pruning never looks at values, so any format can be written.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path

from safetensors import deserialize

Tensor = tuple[str, tuple[int, ...], bytes]
Tensors = dict[str, Tensor]

BITS = {
    "F32": 32,
    "BF16": 16,
    "F16": 16,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "I32": 32,
    "I64": 64,
}
HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, DENSE = 64, 32, 6, 4, 1

FORMATS: dict[str, dict[str, tuple[str, Callable[[int, int], tuple[int, ...]]]]] = {
    "bf16": {"weight": ("BF16", lambda o, i: (o, i))},
    "fp8 block": {
        "weight": ("F8_E4M3", lambda o, i: (o, i)),
        "weight_scale_inv": ("F32", lambda o, i: (-(-o // 32), -(-i // 32))),
    },
    "int4 packed": {
        "weight_packed": ("I32", lambda o, i: (o, i // 8)),
        "weight_scale": ("BF16", lambda o, i: (o, i // 32)),
        "weight_shape": ("I64", lambda o, i: (2,)),
    },
    "nvfp4": {
        "weight": ("U8", lambda o, i: (o, i // 2)),
        "weight_scale": ("F8_E4M3", lambda o, i: (o, i // 16)),
        "weight_scale_2": ("F32", lambda o, i: ()),
        "input_scale": ("F32", lambda o, i: ()),
    },
    "awq": {
        "qweight": ("I32", lambda o, i: (i, o // 8)),
        "qzeros": ("I32", lambda o, i: (i // 32, o // 8)),
        "scales": ("F16", lambda o, i: (i // 32, o)),
    },
    "gptq": {
        "qweight": ("I32", lambda o, i: (i // 8, o)),
        "qzeros": ("I32", lambda o, i: (i // 32, o // 8)),
        "scales": ("F16", lambda o, i: (i // 32, o)),
        "g_idx": ("I32", lambda o, i: (i,)),
    },
    "exl3": {
        "trellis": ("I16", lambda o, i: (i // 16, o // 16, 64)),
        "suh": ("F16", lambda o, i: (i,)),
        "svh": ("F16", lambda o, i: (o,)),
    },
}
"""Leaves of a Linear [o, i] in each published per-expert format, blocks of 32."""


def tensor(rng: random.Random, dtype: str, shape: Sequence[int]) -> Tensor:
    return dtype, tuple(shape), rng.randbytes(prod(shape) * BITS[dtype] // 8)


def deepseek(fmt: str = "bf16", *, mtp: bool = False, experts: int = EXPERTS, seed: int = 0) -> Tensors:
    """The tensors of a DeepSeek-V3-like model of `LAYERS` layers, the first dense; attention is left out."""
    rng = random.Random(seed)
    tensors = {
        "model.embed_tokens.weight": tensor(rng, "BF16", (16, HIDDEN)),
        "model.norm.weight": tensor(rng, "BF16", (HIDDEN,)),
        "lm_head.weight": tensor(rng, "BF16", (16, HIDDEN)),
    }
    for layer in range(LAYERS + mtp):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = tensor(rng, "BF16", (HIDDEN,))
        projections = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN)}
        projections["down_proj"] = (HIDDEN, INTERMEDIATE)
        if layer < DENSE:
            for name, shape in projections.items():
                tensors[f"{prefix}mlp.{name}.weight"] = tensor(rng, "BF16", shape)
            continue
        if layer >= LAYERS:
            tensors[prefix + "eh_proj.weight"] = tensor(rng, "BF16", (HIDDEN, 2 * HIDDEN))
        tensors[prefix + "mlp.gate.weight"] = tensor(rng, "F32", (experts, HIDDEN))
        tensors[prefix + "mlp.gate.e_score_correction_bias"] = tensor(rng, "F32", (experts,))
        for name, shape in projections.items():
            tensors[f"{prefix}mlp.shared_experts.{name}.weight"] = tensor(rng, "BF16", shape)
            for expert in range(experts):
                for leaf, (dtype, stored) in FORMATS[fmt].items():
                    key = f"{prefix}mlp.experts.{expert}.{name}.{leaf}"
                    tensors[key] = tensor(rng, dtype, stored(*shape))
    return tensors


def config(*, mtp: bool = False, experts: int = EXPERTS, **others: object) -> dict[str, object]:
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": LAYERS,
        "first_k_dense_replace": DENSE,
        "n_routed_experts": experts,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": int(mtp),
        **others,
    }


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, object],
    *,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """The checkpoint in the new folder `folder`; with several shards tensors are scattered at random."""
    folder.mkdir(parents=True)
    rng, names = random.Random(seed), list(tensors)
    if shards > 1:
        rng.shuffle(names)
    files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    if shards == 1:
        files = ["model.safetensors"]
    weight_map = {}
    for number, file in enumerate(files):
        members = names[number::shards]
        weight_map |= dict.fromkeys(members, file)
        write_file(folder / file, {name: tensors[name] for name in members})
    if shards > 1:
        index = {
            "metadata": {"total_size": sum(len(t[2]) for t in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    return folder


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header, position = {}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(raw)]}
        position += len(raw)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, _, raw in tensors.values():
            file.write(raw)


def read(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, read by the safetensors library."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in deserialize(file.read_bytes()):
            assert name not in found
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def rows(value: Tensor, kept: Sequence[int]) -> Tensor:
    """The entries `kept` of axis 0."""
    dtype, shape, raw = value
    step = len(raw) // shape[0]
    return dtype, (len(kept), *shape[1:]), b"".join(raw[e * step : (e + 1) * step] for e in kept)


def pruned(tensors: Mapping[str, Tensor], kept: Mapping[int, Sequence[int]]) -> Tensors:
    """What pruning should leave of `tensors` with experts `kept[layer]`, in that order."""
    result: Tensors = {}
    for name, value in tensors.items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else -1
        if layer not in kept or "shared" in name or ".mlp." not in name:
            result[name] = value
        elif ".gate." in name:
            result[name] = rows(value, kept[layer])
        elif int(parts[5]) in kept[layer]:
            parts[5] = str(list(kept[layer]).index(int(parts[5])))
            result[".".join(parts)] = value
    return result
