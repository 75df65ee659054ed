"""Stream a random-weight gpt-oss checkpoint of any size to disk.

The full-size default has gpt-oss-20b's 459 tensors, shapes, dtypes and shard names: 13.76 GB in
three shards, layers cut across shard borders. Weights are random but sane (finite, small), so the
result can be run as well as pruned:

    python -m benchmarks.make_checkpoint OUT                  # gpt-oss-20b's shapes
    python -m benchmarks.make_checkpoint OUT --layers 4 ...   # anything smaller

Memory stays at a few tens of MB whatever the size; nothing is compressible or deduplicable.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.layout import Shape, gpt_oss_20b, hub_config, is_packed, tensor_shapes

CHUNK_BYTES = 8 << 20


Tensor = tuple[str, str, tuple[int, ...]]


def tensors_of(shape: Shape) -> list[Tensor]:
    """Every tensor of the MXFP4 hub layout as (name, dtype, shape), layer by layer, by name in a layer."""
    shapes = tensor_shapes(shape)
    order = {name: number for number, name in enumerate(dict.fromkeys(map(block_of, shapes)))}
    names = sorted(shapes, key=lambda name: (order[block_of(name)], name))
    return [(name, "U8" if is_packed(name) else "BF16", shapes[name]) for name in names]


def block_of(name: str) -> str:
    """The layer that a tensor belongs to ("model.layers.3"), or its own name where it is outside them."""
    return ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name


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
    tensors = tensors_of(shape)
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
    (out / "config.json").write_text(json.dumps(hub_config(shape), indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "pad_token_id": 1}) + "\n")
    return total


def shape_options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for each dimension, gpt-oss-20b's by default."""
    for field in reversed(fields(Shape)):
        default = getattr(gpt_oss_20b(), field.name)
        option = click.option(f"--{field.name.replace('_', '-')}", default=default, show_default=True)
        command = option(command)
    return command


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@shape_options
@click.option("--shards", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, shards: int, seed: int, **dimensions: Any) -> None:
    start = time.perf_counter()
    total = make_checkpoint(out, Shape(**dimensions), shards, seed)
    seconds = time.perf_counter() - start
    click.echo(f"{out}: {total:,} bytes of tensors in {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s)")


if __name__ == "__main__":
    main()
