"""What MXFP4 and BF16 keep of a LoRA update that is merged, beside the best that MXFP4 could.

    python -m benchmarks.merge_error

Adapters of rank 8 with random factors on down_proj of example:tiny, for all experts of a layer together (PEFT's
target_parameters), are merged by moe-surgery merge into MXFP4 and into BF16. Their size is the root mean square of
the update in proportion to that of the weights. The errors are those of the stored weights against W + scale * B @ A
in float64, in proportion to the update: 1 means that nothing of it is left. The best is the least error of
every block over all scales, tried one by one, for the first experts. Results go to benchmarks/results/.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import numpy as np
from safetensors.numpy import save_file

from benchmarks.publish import begin, heading, publish, table
from moe_surgery import Checkpoint, identify_model, merge_adapter
from moe_surgery.checkpoint.checkpoint import TensorRef
from moe_surgery.formats import mxfp4
from moe_surgery.formats.mxfp4_numpy import bf16_to_float64

SOURCE = "example:tiny"
LAYER, RANK, SEED, COMPARED = 1, 8, 0, 4
SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
DOWN = f"model.layers.{LAYER}.mlp.experts.down_proj"
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def best_error(values: np.ndarray) -> float:
    """The least sum of squared errors of MXFP4 for float64 rows [..., 32 n]: every scale tried for each block."""
    grid = np.concatenate([-MAGNITUDES[::-1], MAGNITUDES])
    blocks = values.reshape(-1, 32).astype(np.float64)
    top = int(np.floor(np.log2(np.abs(blocks).max(initial=1e-30))))
    least = int(np.floor(np.log2(np.abs(blocks).max(axis=1).min() + 1e-30)))
    best = np.full(len(blocks), np.inf)
    for exponent in range(max(least, top - 40) - 8, top + 3):
        step = 2.0**exponent
        nearest = grid[np.abs(blocks[..., None] / step - grid).argmin(-1)] * step
        best = np.minimum(best, ((blocks - nearest) ** 2).sum(-1))
    return float(best.sum())


def stored(folder: str | Path, name: str) -> np.ndarray:
    """An expert weight [experts, rows, columns], float64."""
    with Checkpoint.open(folder) as checkpoint:
        model = identify_model(checkpoint)
        tensor = next(t for t in model.tensors if t.name == name)

        def raw(ref: TensorRef) -> np.ndarray:
            data = checkpoint.shards[ref.shard].source.read(ref.offset, ref.nbytes)
            return np.frombuffer(data, np.uint8 if ref.dtype == "U8" else np.uint16).reshape(ref.shape)

        if tensor.scales is None:
            return bf16_to_float64(raw(tensor.stored)).swapaxes(1, 2)
        pairs = zip(raw(tensor.stored), raw(tensor.scales), strict=True)
        return np.stack([bf16_to_float64(mxfp4.decode(blocks, scales)) for blocks, scales in pairs])


def adapter(folder: Path, shape: tuple[int, ...], size: float) -> np.ndarray:
    """Write an adapter whose update has the root mean square `size`; the update [experts, rows, columns]."""
    experts, rows, columns = shape
    rng = np.random.default_rng(SEED)
    a = rng.normal(size=(RANK * experts, columns)).astype(np.float32)
    b = (rng.normal(size=(rows, RANK * experts)) * size / np.sqrt(RANK)).astype(np.float32)
    folder.mkdir()
    module = f"base_model.model.{DOWN.rpartition('.')[0]}"
    save_file(
        {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_parameters": ["experts.down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    a64, b64 = (
        a.astype(np.float64).reshape(experts, RANK, columns),
        b.astype(np.float64).reshape(rows, RANK, experts),
    )
    return np.einsum("ore,eri->eoi", b64, a64)


def measure(work: Path) -> list[dict[str, object]]:
    base = stored(SOURCE, DOWN)
    rms = float(np.sqrt((base**2).mean()))
    rows: list[dict[str, object]] = []
    for number, size in enumerate(SIZES):
        lora = work / f"lora-{number}"
        update = adapter(lora, base.shape, size * rms)
        wanted, update_sq = base + update, float((update**2).sum())
        row: dict[str, object] = {"size": size}
        for store in ("mxfp4", "bf16"):
            out = work / f"{store}-{number}"
            merge_adapter(lora, SOURCE, out, store=store, card=False)
            error = (stored(out, DOWN) - wanted) ** 2
            row[store] = float(np.sqrt(error.sum() / update_sq))
            if store == "mxfp4":
                first = float((update[:COMPARED] ** 2).sum())
                row["ours"] = float(np.sqrt(error[:COMPARED].sum() / first))
                row["best"] = float(np.sqrt(best_error(wanted[:COMPARED]) / first))
        rows.append(row)
        click.echo(str(row), err=True)
    return rows


def page(report: dict) -> list[str]:
    lines = heading("What is kept of a merged update", report)
    lines += [
        "",
        f"example:tiny, down_proj of layer {LAYER}, rank {RANK}. Errors relative to the update; those of MXFP4 beside",
        f"the best of all scales for the first {COMPARED} experts:",
        "",
    ]
    columns = (
        "update relative to weights",
        "BF16",
        "MXFP4",
        f"MXFP4, {COMPARED} experts",
        "best possible",
        "more than best",
    )
    rows = [
        (
            f"{r['size']:g}",
            f"{r['bf16']:.4f}",
            f"{r['mxfp4']:.4f}",
            f"{r['ours']:.4f}",
            f"{r['best']:.4f}",
            f"{100 * (r['ours'] / r['best'] - 1):.3f} %",
        )
        for r in report["rows"]
    ]
    return [*lines, *table(columns, rows)]


@click.command(help=__doc__)
def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = {**begin("python -m benchmarks.merge_error", Path(folder)), "rows": measure(Path(folder))}
    publish("merge_error", report, page(report))


if __name__ == "__main__":
    main()
