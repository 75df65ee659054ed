"""Measure block shapes on the GPU at hand and write the best into the block table's OVERRIDES.

    python -m benchmarks.kernels.autotune            # all entries for this architecture, some minutes
    python -m benchmarks.kernels.autotune --dry-run  # print what would be written

Shapes are gpt-oss-20b's (hidden and intermediate 2880, 32 experts, top-4). Every candidate's output is held
against that of the present entry, and the present entry against the reference backend, before a time
counts. Times are medians with the second-level cache flushed between runs, as in a model whose layers
evict each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from moe_surgery.kernels.reference import ReferenceBackend
from moe_surgery.kernels.triton import TritonBackend, availability, dispatch, slots, table, tiles
from moe_surgery.kernels.triton.blocks import Blocks, chip_of, split_for
from moe_surgery.kernels.triton.launch import Launch
from moe_surgery.kernels.triton.operands import operand
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight, Weight

HIDDEN = UNITS = 2880
EXPERTS, TOP_K = 32, 4
# A candidate replaces the present entry if it is faster by this much: less is noise.
GAIN = 0.02
Build = Callable[[Blocks], tuple[Launch, torch.Tensor]]


def candidates(key: table.Key) -> list[table.Entry]:
    """Block shapes to try for one entry, the present one first."""
    _, kind, width = key
    if width == 0:
        rows, columns = (8, 16, 32, 64), (64, 128, 256, 512, 1024) if kind == "mxfp4" else (32, 64, 128)
    else:
        rows, columns = (16, 32, 64, 128), (64, 128)
    grid = [*product(rows, columns, (2, 4, 8), (2, 3, 4))]
    present = table.BLOCKS[key]
    return [present, *(entry for entry in grid if entry != present and entry[0] * max(width, 1) <= 8192)]


def write_overrides(path: Path, overrides: dict[int, dict[table.Key, table.Entry]], comment: str) -> None:
    """Replace the OVERRIDES at the end of the table module at `path`; `comment` is a line above it."""
    before, marker, rest = path.read_text().partition("OVERRIDES: dict[")
    signature = marker + rest.partition(" = ")[0]
    lines = [line for line in before.splitlines() if not line.startswith("# Measured:")]
    if comment:
        lines.append(f"# Measured: {comment}")
    body = []
    for arch, rows in sorted(overrides.items()):
        body += [
            f"    {arch}: {{",
            *(f"        {key!r}: {row!r}," for key, row in sorted(rows.items())),
            "    },",
        ]
    written = " = {\n" + "\n".join(body) + "\n}" if body else " = {}"
    path.write_text("\n".join(lines) + "\n" + signature + written.replace("'", '"') + "\n")


def layer(kind: str, device: torch.device) -> ExpertWeights:
    """Random experts of the measured shape."""

    def weight(rows: int, columns: int) -> Weight:
        if kind == "dense":
            values = torch.randn(EXPERTS, columns, rows, device=device, dtype=torch.bfloat16) / columns**0.5
            return DenseWeight(values)
        blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), device=device, dtype=torch.uint8)
        scales = torch.randint(117, 121, blocks.shape[:3], device=device, dtype=torch.uint8)
        return Mxfp4Weight(blocks, scales)

    biases = [torch.randn(EXPERTS, n, device=device, dtype=torch.bfloat16) for n in (2 * UNITS, HIDDEN)]
    return ExpertWeights(weight(2 * UNITS, HIDDEN), biases[0], weight(HIDDEN, UNITS), biases[1])


def builder(key: table.Key, experts: ExpertWeights, device: torch.device) -> Build:
    """A function from blocks to the launch of `key` and the tensor that it fills."""
    operation, _, width = key
    up = operand(experts.gate_up, experts.gate_up_bias, "gate_up")
    down = operand(experts.down, experts.down_bias, "down")
    sms = chip_of(device).multiprocessors
    tokens = width * EXPERTS // TOP_K if width else 1
    x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    ids = torch.rand(tokens, EXPERTS, device=device).argsort(dim=1)[:, :TOP_K].contiguous()
    weights = torch.rand(tokens, TOP_K, device=device, dtype=torch.bfloat16)
    z = torch.randn(tokens * TOP_K, UNITS, device=device, dtype=torch.bfloat16)
    schedule = dispatch.schedule_for(ids.numel(), EXPERTS, max(width, 8), device)
    for launch in dispatch.dispatch(ids, EXPERTS, schedule):
        launch.run()

    def build(blocks: Blocks) -> tuple[Launch, torch.Tensor]:
        weight = up if operation == "gate_up" else down
        rows = UNITS if operation == "gate_up" else HIDDEN
        lines = schedule.most_tiles if width else (ids.numel() if operation == "gate_up" else tokens)
        steps = -(-weight.columns // blocks.columns) * (TOP_K if not width and operation == "down" else 1)
        split = split_for(lines * -(-rows // blocks.rows), steps, sms)
        if operation == "gate_up":
            out = torch.empty_like(z)
            if width:
                return tiles.gate_up_tiles(
                    x, TOP_K, schedule, None, up, out, 7.0, 1.702, blocks, split, False
                ), out
            return slots.gate_up_slots(x, ids, None, up, out, 7.0, 1.702, blocks, split), out
        if width:
            parts = torch.empty(len(z), HIDDEN, device=device)
            return tiles.down_tiles(z, weights, schedule, None, down, parts, blocks, split, False), parts
        out = torch.empty_like(x)
        return slots.down_slots(z, ids, weights, None, down, out, blocks, split), out

    return build


def best(key: table.Key, build: Build) -> tuple[table.Entry, float, float]:
    """(fastest entry, its milliseconds, those of the present entry) among candidates with the right output."""
    times: dict[table.Entry, float] = {}
    wanted = None
    for entry in candidates(key):
        launch, out = build(Blocks(*entry))
        try:
            launch.run()
        except OutOfResources:
            continue
        if wanted is None:
            wanted = out.clone()
        scale = wanted.abs().max()
        if not bool(((out - wanted).abs().max() / scale) < 2e-2):
            raise RuntimeError(f"{key} {entry}: the output differs from the present entry's")
        times[entry] = float(do_bench(launch.run, warmup=5, rep=30, return_mode="median"))
    present = table.BLOCKS[key]
    fastest = min(times, key=lambda entry: times[entry])
    if times[fastest] > (1 - GAIN) * times[present]:
        fastest = present
    return fastest, times[fastest], times[present]


def gate(experts: ExpertWeights, device: torch.device) -> None:
    """Raise unless the backend agrees with the reference on this device, sorted and unsorted."""
    for tokens in (1, 64):
        x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
        ids = torch.rand(tokens, EXPERTS, device=device).argsort(dim=1)[:, :TOP_K].contiguous()
        weights = torch.rand(tokens, TOP_K, device=device, dtype=torch.bfloat16)
        found = TritonBackend().experts(x, ids, weights, experts).float()
        wanted = ReferenceBackend().experts(x, ids, weights, experts).float()
        if not bool((found - wanted).abs().max() / wanted.abs().max() < 4e-2):
            raise RuntimeError(f"{tokens} tokens: the backend disagrees with the reference; no time counts")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or availability() is not None:
        print(f"cannot measure: {availability() or 'no CUDA device is available'}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    arch = chip_of(device).arch
    found: dict[table.Key, table.Entry] = {}
    for kind in ("mxfp4", "dense"):
        experts = layer(kind, device)
        gate(experts, device)
        for key in (key for key in table.BLOCKS if key[1] == kind):
            entry, time, before = best(key, builder(key, experts, device))
            print(f"{key}: {entry} {time * 1e3:.1f} us, present {before * 1e3:.1f} us", flush=True)
            if entry != table.BLOCKS[key]:
                found[key] = entry
        del experts
    if not options.dry_run:
        comment = f"{torch.cuda.get_device_name(device)}, Triton {triton.__version__}, sm_{arch}"
        write_overrides(Path(str(table.__file__)), {**table.OVERRIDES, arch: found}, comment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
