"""Stream a checkpoint that stores each expert separately (Qwen3-MoE's layout) to disk, of any size.

    python -m benchmarks.make_per_expert OUT                                  # 18,672 tensors, 20 GB, 8 shards
    python -m benchmarks.make_per_expert OUT --format fp8 --layers 64 --experts 256 --hidden 128 \
        --intermediate 128 --sparse                                           # 98,000 tensors, no disk space

Weights are random bits with the exponents of small numbers; nothing is compressible. With --sparse the files are
holes, for measuring memory and the time spent on names. With --runnable all tensors of the family are there, and
what config.json needs to run it.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

CHUNK_BYTES = 8 << 20
BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
FORMATS = ("bf16", "fp8")
BLOCK = 128
VOCABULARY, HEAD_DIM = 4096, 128

Tensor = tuple[str, str, tuple[int, ...]]


def tensors_of(
    layers: int, experts: int, hidden: int, intermediate: int, fmt: str, runnable: bool = False
) -> Iterator[Tensor]:
    """Every tensor as (name, dtype, shape), layer by layer; attention is one matrix of each kind."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", "BF16", (hidden,)
        for part in "qkvo":
            yield f"{prefix}self_attn.{part}_proj.weight", "BF16", (hidden, hidden)
        if runnable:
            yield prefix + "post_attention_layernorm.weight", "BF16", (hidden,)
            yield prefix + "self_attn.q_norm.weight", "BF16", (HEAD_DIM,)
            yield prefix + "self_attn.k_norm.weight", "BF16", (HEAD_DIM,)
        yield prefix + "mlp.gate.weight", "BF16", (experts, hidden)
        for expert in range(experts):
            for name, shape in (
                ("gate_proj", (intermediate, hidden)),
                ("up_proj", (intermediate, hidden)),
                ("down_proj", (hidden, intermediate)),
            ):
                stem = f"{prefix}mlp.experts.{expert}.{name}.weight"
                yield stem, "BF16" if fmt == "bf16" else "F8_E4M3", shape
                if fmt == "fp8":
                    yield stem + "_scale_inv", "F32", (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (VOCABULARY, hidden)


def nbytes(tensor: Tensor) -> int:
    _, dtype, shape = tensor
    count = BYTES[dtype]
    for dim in shape:
        count *= dim
    return count


def fill(dtype: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random bytes that are small finite numbers of `dtype`."""
    raw = np.frombuffer(rng.bytes(count), np.uint8)
    if dtype == "BF16":
        return ((raw.view(np.uint16) & 0x80FF) | 0x3C00).view(np.uint8)
    if dtype == "F32":
        return ((raw.view(np.uint32) & 0x007FFFFF) | 0x3C000000).view(np.uint8)
    return raw & 0xB7


def write_shard(path: Path, tensors: list[Tensor], rng: np.random.Generator, sparse: bool) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + nbytes(tensor)
        header[tensor[0]] = {"dtype": tensor[1], "shape": list(tensor[2]), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        if sparse:
            file.truncate(8 + len(encoded) + position)
            return
        for tensor in tensors:
            remaining = nbytes(tensor)
            while remaining:
                count = min(remaining, CHUNK_BYTES)
                file.write(fill(tensor[1], count, rng).data)
                remaining -= count
        file.flush()
        os.fsync(file.fileno())


def make_checkpoint(
    out: Path,
    *,
    layers: int,
    experts: int,
    hidden: int,
    intermediate: int,
    fmt: str = "bf16",
    shards: int = 8,
    seed: int = 0,
    sparse: bool = False,
    runnable: bool = False,
) -> tuple[int, int]:
    """Write the checkpoint into the new folder `out`; returns how many tensors it has, and their bytes."""
    out.mkdir(parents=True)
    rng = np.random.Generator(np.random.SFC64(seed))
    tensors = list(tensors_of(layers, experts, hidden, intermediate, fmt, runnable))
    total = sum(map(nbytes, tensors))
    groups: list[list[Tensor]] = [[] for _ in range(shards)]
    done = 0
    for tensor in tensors:
        groups[min(done * shards // total, shards - 1)].append(tensor)
        done += nbytes(tensor)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_shard(out / name, group, rng, sparse)
        weight_map |= {t[0]: name for t in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "moe_intermediate_size": intermediate,
    }
    if runnable:
        config |= {
            "vocab_size": VOCABULARY,
            "num_attention_heads": hidden // HEAD_DIM,
            "num_key_value_heads": hidden // HEAD_DIM,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 4096,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        }
    if fmt == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(tensors), total


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", default=48, show_default=True)
@click.option("--experts", default=128, show_default=True)
@click.option("--hidden", default=2048, show_default=True)
@click.option("--intermediate", default=256, show_default=True)
@click.option("--format", "fmt", type=click.Choice(FORMATS), default="bf16", show_default=True)
@click.option("--shards", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--sparse", is_flag=True, help="Write holes instead of weights.")
@click.option("--runnable", is_flag=True, help="Write norms and settings too, so that it can be run.")
def main(
    out: Path,
    layers: int,
    experts: int,
    hidden: int,
    intermediate: int,
    fmt: str,
    shards: int,
    seed: int,
    sparse: bool,
    runnable: bool,
) -> None:
    start = time.perf_counter()
    count, total = make_checkpoint(
        out,
        layers=layers,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        fmt=fmt,
        shards=shards,
        seed=seed,
        sparse=sparse,
        runnable=runnable,
    )
    seconds = time.perf_counter() - start
    click.echo(f"{out}: {count:,} tensors, {total:,} bytes in {seconds:.1f} s")


if __name__ == "__main__":
    main()
