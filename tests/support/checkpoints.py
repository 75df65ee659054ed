"""Small gpt-oss checkpoints with random weights, in every layout, written with the safetensors library.

A tensor is a numpy array; uint16 holds the bits of BF16, uint8 is U8. The same shape and seed give the
same model in every layout, so that results from one can be compared with results from another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import TensorSpec, deserialize, serialize_file

from benchmarks.layout import Shape as Shape
from benchmarks.layout import gpt_oss_20b as gpt_oss_20b
from benchmarks.layout import hub_config, is_packed
from benchmarks.layout import quantization_config as quantization_config
from benchmarks.layout import tensor_shapes as tensor_shapes

Tensors = dict[str, np.ndarray]

LAYOUTS = ("mxfp4", "bf16", "resaved", "original")
"""Hub MXFP4, hub BF16 (as transformers 4 saves it), BF16 as transformers 5 saves it again, OpenAI's own."""

INDEX = "model.safetensors.index.json"
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_DTYPES = {"uint16": ("bfloat16", "BF16"), "uint8": ("uint8", "U8")}
_DTYPES |= {"float16": ("float16", "F16"), "float32": ("float32", "F32")}
_FROM_FILE = {file: np.dtype(name) for name, (_, file) in _DTYPES.items()}


def make_tensors(
    shape: Shape, layout: str = "mxfp4", seed: int = 0, *, scales: tuple[int, int] = (114, 122)
) -> Tensors:
    """Random tensors of `shape` in `layout`, small and finite; `scales` is the range of MXFP4 scale bytes.

    BF16 layouts hold the values that the MXFP4 layout of the same seed decodes to (any values where
    the dimensions are not whole blocks).
    """
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, dims in tensor_shapes(shape).items():
        if name.endswith("_blocks"):
            tensors[name] = rng.integers(0, 256, dims, np.uint8)
        elif name.endswith("_scales"):
            tensors[name] = rng.integers(scales[0], scales[1] + 1, dims, np.uint8)
        else:
            tensors[name] = random_bf16(rng, dims)
    if layout == "mxfp4":
        return tensors
    if layout == "original":
        return to_original(tensors, shape)
    if shape.packs:
        tensors = to_bf16(tensors)
    else:
        tensors = {k: v for k, v in tensors.items() if not k.endswith(("_blocks", "_scales"))}
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}.mlp.experts."
            gate_up, down = (shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden)
            tensors[prefix + "gate_up_proj"] = random_bf16(rng, (shape.experts, *gate_up))
            tensors[prefix + "down_proj"] = random_bf16(rng, (shape.experts, *down))
    if layout == "resaved":
        return {
            f"{k}_blocks" if k.endswith(("gate_up_proj", "down_proj")) else k: v for k, v in tensors.items()
        }
    return tensors


def random_bf16(rng: np.random.Generator, dims: Sequence[int]) -> np.ndarray:
    """Values of magnitude 2^-5 to 2^-3 and both signs, as BF16 bits."""
    return (rng.integers(0, 0x100, dims, np.uint16) | 0x3D00) ^ (rng.integers(0, 2, dims, np.uint16) << 15)


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 blocks [..., rows, groups, 16] and scales [..., rows, groups] as BF16 [..., rows, columns]."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-1], 32)
    with np.errstate(over="ignore"):
        values = np.ldexp(E2M1[codes & 7], scales.astype(np.int32)[..., None] - 127)
    bits = values.astype(np.float32).view(np.uint32) >> 16
    return (bits | (codes.astype(np.uint32) & 8) << 12).astype(np.uint16).reshape(*blocks.shape[:-2], -1)


def decode_transposed(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The same as BF16 checkpoints hold it: [..., columns, rows]."""
    return np.ascontiguousarray(np.swapaxes(decode(blocks, scales), -1, -2))


def to_bf16(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Hub MXFP4 tensors as the hub's BF16 layout has them."""
    result: Tensors = {}
    for name, value in tensors.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            result[base] = decode_transposed(value, tensors[base + "_scales"])
        elif not name.endswith("_scales"):
            result[name] = value
    return result


def to_original(tensors: Mapping[str, np.ndarray], shape: Shape) -> Tensors:
    """Hub MXFP4 tensors under the names of OpenAI's own layout, q, k and v fused."""
    result: Tensors = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.scale": tensors["model.norm.weight"],
        "unembedding.weight": tensors["lm_head.weight"],
    }
    renamed = {
        "input_layernorm.weight": "attn.norm.scale",
        "self_attn.sinks": "attn.sinks",
        "self_attn.o_proj.weight": "attn.out.weight",
        "self_attn.o_proj.bias": "attn.out.bias",
        "post_attention_layernorm.weight": "mlp.norm.scale",
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.router.bias": "mlp.gate.bias",
    }
    for ours, original in (("gate_up_proj", "mlp1"), ("down_proj", "mlp2")):
        renamed[f"mlp.experts.{ours}_blocks"] = f"mlp.{original}_weight.blocks"
        renamed[f"mlp.experts.{ours}_scales"] = f"mlp.{original}_weight.scales"
        renamed[f"mlp.experts.{ours}_bias"] = f"mlp.{original}_bias"
    for layer in range(shape.layers):
        hub, original_prefix = f"model.layers.{layer}.", f"block.{layer}."
        for ours, original in renamed.items():
            result[original_prefix + original] = tensors[hub + ours]
        for leaf in ("weight", "bias"):
            parts = [tensors[f"{hub}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            result[f"{original_prefix}attn.qkv.{leaf}"] = np.concatenate(parts)
    return result


# --- config.json


def make_config(shape: Shape, layout: str = "mxfp4") -> dict[str, object]:
    """config.json as `layout` spells it."""
    if layout == "original":
        return {
            "num_hidden_layers": shape.layers,
            "num_experts": shape.experts,
            "experts_per_token": shape.top_k,
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "swiglu_limit": 7.0,
            "head_dim": shape.head_dim,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "sliding_window": shape.sliding_window,
            "initial_context_length": shape.initial_context,
            "rope_theta": 150000,
            "rope_scaling_factor": shape.rope_factor,
            "rope_ntk_alpha": 1,
            "rope_ntk_beta": 32,
        }
    config = hub_config(shape)
    if layout != "mxfp4":
        del config["quantization_config"]
    if layout == "resaved":
        rope = config.pop("rope_scaling")
        assert isinstance(rope, dict)
        del config["rope_theta"], config["torch_dtype"], config["experts_per_token"]
        config |= {"dtype": "bfloat16", "rope_parameters": {**rope, "rope_theta": 150000}}
    return dict(sorted(config.items()))


# --- files


def write_checkpoint(
    folder: Path,
    shape: Shape | None = None,
    layout: str = "mxfp4",
    *,
    seed: int = 0,
    shards: int = 1,
    index: bool | None = None,
    edit_tensors: Callable[[Tensors], object] | None = None,
    edit_config: Callable[[dict[str, object]], object] | None = None,
) -> Path:
    """Write a checkpoint of `shape` into the new folder `folder` and return it.

    `edit_tensors` and `edit_config` change what is written in place. See `write_folder` for the rest.
    """
    shape = shape or Shape()
    tensors, config = make_tensors(shape, layout, seed), make_config(shape, layout)
    if edit_tensors:
        edit_tensors(tensors)
    if edit_config:
        edit_config(config)
    return write_folder(folder, tensors, config, shards=shards, index=index, seed=seed)


def write_folder(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, object],
    *,
    shards: int = 1,
    index: bool | None = None,
    seed: int = 0,
) -> Path:
    """Write tensors and config.json, and some side files, into the new folder `folder`.

    With several shards the tensors are scattered over them at random, blocks without their scales. By
    default there is an index if there are several; `index` overrides that.
    """
    folder.mkdir(parents=True)
    names = list(tensors)
    rng = np.random.default_rng([seed, shards])
    rng.shuffle(names)
    count = min(shards, len(names))
    # Each shard gets one tensor, the rest fall where they may.
    homes = [*range(count), *(int(s) for s in rng.integers(0, count, len(names) - count))]
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = ["model.safetensors"]
    for number, file in enumerate(files):
        members = {n: tensors[n] for n, home in zip(names, homes, strict=True) if home == number}
        save_tensors(folder / file, members)
    if index if index is not None else count > 1:
        weight_map = {n: files[home] for n, home in zip(names, homes, strict=True)}
        total = sum(t.nbytes for t in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / INDEX).write_text(text)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2], "pad_token_id": 1}\n')
    (folder / "chat_template.jinja").write_bytes(b"{# not \xff valid text, and no newline #}")
    (folder / "README.md").write_text("# A model\n")
    return folder


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One safetensors file, written by the safetensors library (in its own order)."""
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=_DTYPES[value.dtype.name][0],
            shape=value.shape,
            data_ptr=value.ctypes.data,
            data_len=value.nbytes,
        )
        for name, value in arrays.items()
    }
    serialize_file(specs, path, metadata={"format": "pt"})


def load_tensors(folder: str | os.PathLike[str]) -> Tensors:
    """Every tensor of all .safetensors files of `folder`, read by the safetensors library."""
    result: Tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, entry in deserialize(file.read_bytes()):
            assert name not in result, f"{name} is in two shards"
            values = np.frombuffer(entry["data"], _FROM_FILE[entry["dtype"]])
            result[name] = values.reshape(entry["shape"])
    return result


def load_config(folder: str | os.PathLike[str]) -> dict[str, object]:
    config = json.loads((Path(folder) / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def assert_same_tensors(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """The same names, and for each the same dtype, shape and bytes."""
    assert sorted(got) == sorted(expected)
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert got[name].tobytes() == value.tobytes(), name


def kept_tensors(tensors: Mapping[str, np.ndarray], layers: Sequence[Sequence[int]]) -> Tensors:
    """Hub tensors of either storage with only the experts `layers[i]` of layer i, in that order."""
    result: Tensors = {}
    for name, value in tensors.items():
        if ".mlp." in name:
            result[name] = value[list(layers[int(name.split(".")[2])])]
        else:
            result[name] = value
    return result


def write_sparse_checkpoint(folder: Path, shape: Shape, shards: int = 3) -> Path:
    """A hub MXFP4 checkpoint of any size that takes no disk space: headers, then holes."""
    folder.mkdir(parents=True)
    groups: list[dict[str, object]] = [{} for _ in range(shards)]
    sizes, weight_map = [0] * shards, {}
    # Numbered as gpt-oss-20b's three are: from 0, and "of 00002".
    files = [f"model-{i:05d}-of-{shards - 1:05d}.safetensors" for i in range(shards)]
    for number, (name, dims) in enumerate(tensor_shapes(shape).items()):
        home = number % shards
        packed = is_packed(name)
        end = sizes[home] + int(np.prod(dims)) * (1 if packed else 2)
        dtype = "U8" if packed else "BF16"
        groups[home][name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [sizes[home], end]}
        sizes[home], weight_map[name] = end, files[home]
    for file, group, size in zip(files, groups, sizes, strict=True):
        header = json.dumps(group).encode()
        header += b" " * (-len(header) % 8)
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(folder / file, 8 + len(header) + size)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(make_config(shape)))
    return folder
