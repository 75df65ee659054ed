"""Stream a random-weight gpt-oss checkpoint of any size to disk.

The full-size default has gpt-oss-20b's 459 tensors, shapes, dtypes and shard names: 13.76 GB in
three shards, layers cut across shard borders. Weights are random but sane (finite, small), so the
result can be run as well as pruned:

    python benchmarks/make_checkpoint.py OUT                  # gpt-oss-20b's shapes
    python benchmarks/make_checkpoint.py OUT --layers 4 ...   # anything smaller

Memory stays at a few tens of MB whatever the size; nothing is compressible or deduplicable.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Shape:
    """What a gpt-oss configuration says about tensor shapes."""

    layers: int = 24
    experts: int = 32
    top_k: int = 4
    hidden: int = 2880
    intermediate: int = 2880
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 201088


Tensor = tuple[str, str, tuple[int, ...]]


def tensors_of(shape: Shape) -> Iterator[Tensor]:
    """Every tensor of the MXFP4 hub layout as (name, dtype, shape), layer by layer."""
    hidden, inter, experts = shape.hidden, shape.intermediate, shape.experts
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", "BF16", (shape.vocabulary, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        yield prefix + "input_layernorm.weight", "BF16", (hidden,)
        yield mlp + "experts.down_proj_bias", "BF16", (experts, hidden)
        yield mlp + "experts.down_proj_blocks", "U8", (experts, hidden, inter // 32, 16)
        yield mlp + "experts.down_proj_scales", "U8", (experts, hidden, inter // 32)
        yield mlp + "experts.gate_up_proj_bias", "BF16", (experts, 2 * inter)
        yield mlp + "experts.gate_up_proj_blocks", "U8", (experts, 2 * inter, hidden // 32, 16)
        yield mlp + "experts.gate_up_proj_scales", "U8", (experts, 2 * inter, hidden // 32)
        yield mlp + "router.bias", "BF16", (experts,)
        yield mlp + "router.weight", "BF16", (experts, hidden)
        yield prefix + "post_attention_layernorm.weight", "BF16", (hidden,)
        for name, rows in (("k", key_value), ("q", query), ("v", key_value)):
            yield attention + f"{name}_proj.bias", "BF16", (rows,)
            yield attention + f"{name}_proj.weight", "BF16", (rows, hidden)
        yield attention + "o_proj.bias", "BF16", (hidden,)
        yield attention + "o_proj.weight", "BF16", (hidden, query)
        yield attention + "sinks", "BF16", (shape.heads,)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (shape.vocabulary, hidden)


def config_of(shape: Shape) -> dict[str, object]:
    """A config.json in the key order and spelling of the hub's gpt-oss-20b."""
    kinds = ["sliding_attention", "full_attention"]
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 2,
        "experts_per_token": shape.top_k,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "layer_types": [kinds[layer % 2] for layer in range(shape.layers)],
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "output_router_logits": False,
        "pad_token_id": 1,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def nbytes(tensor: Tensor) -> int:
    """Bytes of a U8 or BF16 tensor."""
    _, dtype, dims = tensor
    count = 1
    for dim in dims:
        count *= dim
    return count * (1 if dtype == "U8" else 2)


def fill(name: str, dtype: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` bytes of plausible content for the tensor `name`, uint8."""
    if name.endswith("norm.weight"):
        return np.full(count // 2, 0x3F80, np.uint16).view(np.uint8)
    raw = np.frombuffer(rng.bytes(count), np.uint8)
    if name.endswith("_scales"):
        return (raw & 3) + 118  # factors 2^-9 to 2^-6: weights of magnitude 0.02, as the real ones have
    if dtype == "BF16":  # random sign and mantissa, exponent of 2^-7 or 2^-6
        return ((raw.view(np.uint16) & 0x80FF) | 0x3C00).view(np.uint8)
    return raw


def into_shards(tensors: list[Tensor], shards: int) -> list[list[Tensor]]:
    """Consecutive runs of about equal bytes, cut without regard to layers (as the hub's are)."""
    share = sum(map(nbytes, tensors)) / shards
    groups: list[list[Tensor]] = [[] for _ in range(shards)]
    done = 0
    for tensor in tensors:
        groups[min(int(done / share), shards - 1)].append(tensor)
        done += nbytes(tensor)
    return groups


def write_shard(path: Path, tensors: list[Tensor], rng: np.random.Generator) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, dims in tensors:
        end = position + nbytes((name, dtype, dims))
        header[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            remaining = nbytes(tensor)
            while remaining:
                count = min(remaining, CHUNK_BYTES)
                file.write(fill(tensor[0], tensor[1], count, rng).data)
                remaining -= count
        os.fsync(file.fileno())


def make_checkpoint(out: Path, shape: Shape, shards: int, seed: int = 0) -> int:
    """Write the checkpoint into the new folder `out`; returns the bytes of its tensors."""
    out.mkdir(parents=True)
    rng = np.random.Generator(np.random.SFC64(seed))
    tensors = list(tensors_of(shape))
    groups = [group for group in into_shards(tensors, shards) if group]
    last = len(groups) - 1
    # gpt-oss-20b's three shards are numbered from 0 and "of 00002"; so are ours.
    names = [f"model-{i:05d}-of-{last:05d}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        write_shard(out / name, group, rng)
    total = sum(map(nbytes, tensors))
    weight_map = {t[0]: name for name, group in zip(names, groups, strict=True) for t in group}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config_of(shape), indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "pad_token_id": 1}) + "\n")
    return total


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", default=24, show_default=True)
@click.option("--experts", default=32, show_default=True)
@click.option("--top-k", default=4, show_default=True)
@click.option("--hidden", default=2880, show_default=True)
@click.option("--intermediate", default=2880, show_default=True)
@click.option("--heads", default=64, show_default=True)
@click.option("--kv-heads", default=8, show_default=True)
@click.option("--head-dim", default=64, show_default=True)
@click.option("--vocabulary", default=201088, show_default=True)
@click.option("--shards", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, shards: int, seed: int, **dims: int) -> None:
    start = time.perf_counter()
    total = make_checkpoint(out, Shape(**dims), shards, seed)
    seconds = time.perf_counter() - start
    click.echo(f"{out}: {total:,} bytes of tensors in {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s)")


if __name__ == "__main__":
    main()
