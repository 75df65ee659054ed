"""Time and memory of `moe-surgery merge` on experts and attention of gpt-oss-20b's sizes.

    python -m benchmarks.merge_budgets --work FOLDER [--layers 2]

The checkpoint has random weights; of the vocabulary, whose tables are copied, it has a hundredth. The adapter is of
rank 8, on attention and on all experts of every layer (PEFT's target_parameters). It is merged back into MXFP4 and into
BF16, which takes 1.6 GB a layer; a layer after the other, so that 24 take 24 times as long and no more memory. From a
dropped page cache until the output is flushed; memory is the peak of the whole process, mapped pages included.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.layout import Shape, gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import RESULTS, begin, heading, publish, table
from moe_surgery.bench.surgery import command_of, timed
from moe_surgery.surgery.names import MANIFEST_NAME

NAME = "merge_budgets"
RANK = 8
LAYERS, VOCABULARY = 24, 2048
SIZE = 2.0**-5
"""Of the values of both factors: the update's are near 3e-3, a tenth of the weights'."""


def factors(shape: Shape) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of an adapter's tensors: lora_A [rank, in], lora_B [out, rank], of stacked experts [rank *
    experts, in] and [out, rank * experts]."""
    hidden, inter = shape.hidden, shape.intermediate
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        prefix = f"base_model.model.model.layers.{layer}."
        dense = [
            ("self_attn.q_proj", hidden, query),
            ("self_attn.k_proj", hidden, key_value),
            ("self_attn.v_proj", hidden, key_value),
            ("self_attn.o_proj", query, hidden),
        ]
        # PEFT wraps a second parameter of a module around the first.
        stacked = [("mlp.experts.base_layer", hidden, 2 * inter), ("mlp.experts", inter, hidden)]
        for rank, modules in ((RANK, dense), (RANK * shape.experts, stacked)):
            for module, columns, rows in modules:
                yield f"{prefix}{module}.lora_A.weight", (rank, columns)
                yield f"{prefix}{module}.lora_B.weight", (rows, rank)


def make_adapter(folder: Path, shape: Shape) -> None:
    """Write an adapter of random factors in float32, as PEFT saves one."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = list(factors(shape))
    header, position = {}, 0
    for name, dims in tensors:
        end = position + 4 * dims[0] * dims[1]
        header[name] = {"dtype": "F32", "shape": list(dims), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, dims in tensors:
            file.write((SIZE * rng.standard_normal(dims, np.float32)).tobytes())
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measure(source: Path, shape: Shape, store: str, work: Path) -> dict[str, Any]:
    adapter, out = work / f"adapter-{shape.layers}", work / "merged"
    for folder in (adapter, out):
        shutil.rmtree(folder, ignore_errors=True)
    make_adapter(adapter, shape)
    done = timed(command_of("merge", adapter, source, out, "--store", store, "--quiet"), work)
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    row = {
        "store": store,
        "layers": shape.layers,
        "seconds": done.seconds,
        "peak_bytes": done.peak_bytes,
        "read_bytes": sum(f.stat().st_size for f in source.glob("*.safetensors")),
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "written_bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")),
        "update_error": (manifest.get("conversion") or {}).get("update_error"),
    }
    shutil.rmtree(adapter)
    shutil.rmtree(out)
    click.echo(str(row), err=True)
    return row


def page(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            r["store"].upper(),
            r["layers"],
            f"{r['read_bytes'] / 1e9:.2f} GB",
            f"{r['adapter_bytes'] / 1e9:.2f} GB",
            f"{r['written_bytes'] / 1e9:.2f} GB",
            f"{r['seconds']:.1f} s",
            f"{r['seconds'] / r['layers'] * LAYERS:.0f} s",
            f"{r['peak_bytes'] / 2**20:.0f} MiB",
            "" if r["update_error"] is None else f"{r['update_error']:.2f}",
        ]
        for r in report["rows"]
    ]
    sizes = ["into", "layers", "checkpoint", "adapter", "written"]
    columns = [*sizes, "time", f"projected for {LAYERS} layers", "peak memory", "error of packing"]
    return [
        *heading("Merging an adapter at full size", report),
        "",
        "An expert of these shapes is 13.2 MB in MXFP4, 49.8 MB in BF16. The error of packing is relative to the "
        "update, whose values are about a tenth of the weights'.",
        "",
        *table(columns, rows),
    ]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Scratch folder.")
@click.option("--layers", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(work: Path, layers: int, out: Path) -> None:
    shape = replace(gpt_oss_20b(), layers=layers, vocabulary=VOCABULARY)
    work.mkdir(parents=True, exist_ok=True)
    source = work / "checkpoint"
    shutil.rmtree(source, ignore_errors=True)
    make_checkpoint(source, shape, 1)
    how = (
        f"python -m benchmarks.merge_budgets --layers {layers}: rank {RANK} on attention and on all experts, random "
        "weights of gpt-oss-20b's sizes, a small vocabulary."
    )
    report = {
        **begin(how, work),
        "rows": [measure(source, shape, store, work) for store in ("mxfp4", "bf16")],
    }
    shutil.rmtree(source)
    publish(NAME, report, page(report), out)


if __name__ == "__main__":
    main()
