"""Measure block shapes on the GPU at hand and write the best into the OVERRIDES of `kernels.triton.tuning`.

    python -m benchmarks.kernels.autotune            # all entries for this architecture, some minutes
    python -m benchmarks.kernels.autotune --dry-run  # print what would be written

Shapes are gpt-oss-20b's (hidden and intermediate 2880, 32 experts, top-4). Every candidate's output is held
against that of the present entry, and the present entry against the reference backend, before a time
counts. Times are medians with the L2 cache flushed between runs, as in a model whose layers
evict each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped,import-not-found,unused-ignore]
from triton.testing import do_bench  # type: ignore[import-untyped,import-not-found,unused-ignore]

from moe_surgery.kernels.reference import ReferenceBackend
from moe_surgery.kernels.triton import (
    TritonBackend,
    availability,
    moe_gemv,
    moe_grouped_gemm,
    routing_metadata,
    tuning,
)
from moe_surgery.kernels.triton.launch import Launch
from moe_surgery.kernels.triton.operands import operand
from moe_surgery.kernels.triton.tuning import Blocks, get_device_props, split_k_for
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight, Weight

HIDDEN = INTERMEDIATE = 2880
EXPERTS, TOP_K = 32, 4
# A candidate replaces the present entry if it is faster by this much: less is noise.
GAIN = 0.02
Build = Callable[[Blocks], tuple[Launch, torch.Tensor]]


def candidates(key: tuning.Key) -> list[tuning.Entry]:
    """Block shapes to try for one entry, the present one first."""
    _, kind, block_n = key
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    if block_n == 0:
        rows, columns = (8, 16, 32, 64), (64, 128, 256, 512, 1024) if kind == "mxfp4" else (32, 64, 128)
    else:
        rows, columns = (16, 32, 64, 128), (64, 128)
    grid = [*product(rows, columns, (2, 4, 8), (2, 3, 4))]
    present = tuning.BLOCKS[key]
    return [present, *(entry for entry in grid if entry != present and entry[0] * max(block_n, 1) <= 8192)]


def write_overrides(path: Path, overrides: dict[int, dict[tuning.Key, tuning.Entry]], comment: str) -> None:
    """Replace the OVERRIDES at the end of the tuning module at `path`; `comment` is a line above it."""
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

    biases = [
        torch.randn(EXPERTS, n, device=device, dtype=torch.bfloat16) for n in (2 * INTERMEDIATE, HIDDEN)
    ]
    return ExpertWeights(weight(2 * INTERMEDIATE, HIDDEN), biases[0], weight(HIDDEN, INTERMEDIATE), biases[1])


def builder(key: tuning.Key, experts: ExpertWeights, device: torch.device) -> Build:
    """A function from blocks to the launch of `key` and the tensor that it fills."""
    operation, _, block_n = key
    up = operand(experts.gate_up, experts.gate_up_bias, "gate_up")
    down = operand(experts.down, experts.down_bias, "down")
    sms = get_device_props(device).multiprocessors
    tokens = block_n * EXPERTS // TOP_K if block_n else 1
    x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    ids = torch.rand(tokens, EXPERTS, device=device).argsort(dim=1)[:, :TOP_K].contiguous()
    weights = torch.rand(tokens, TOP_K, device=device, dtype=torch.bfloat16)
    z = torch.randn(tokens * TOP_K, INTERMEDIATE, device=device, dtype=torch.bfloat16)
    routing = routing_metadata.empty_routing(ids.numel(), EXPERTS, max(block_n, 8), device)
    for launch in routing_metadata.routing_launches(ids, EXPERTS, routing):
        launch.run()

    def build(blocks: Blocks) -> tuple[Launch, torch.Tensor]:
        weight = up if operation == "gate_up" else down
        rows = INTERMEDIATE if operation == "gate_up" else HIDDEN
        programs_n = routing.max_tiles if block_n else (ids.numel() if operation == "gate_up" else tokens)
        steps = -(-weight.columns // blocks.block_k) * (TOP_K if not block_n and operation == "down" else 1)
        split_k = split_k_for(programs_n * -(-rows // blocks.block_m), steps, sms)
        if operation == "gate_up":
            out = torch.empty_like(z)
            if block_n:
                return moe_grouped_gemm.gate_up_grouped_gemm(
                    x, TOP_K, routing, None, up, out, 7.0, 1.702, blocks, split_k, False
                ), out
            return moe_gemv.gate_up_gemv(x, ids, None, up, out, 7.0, 1.702, blocks, split_k), out
        if block_n:
            parts = torch.empty(len(z), HIDDEN, device=device)
            return moe_grouped_gemm.down_grouped_gemm(
                z, weights, routing, None, down, parts, blocks, split_k, False
            ), parts
        out = torch.empty_like(x)
        return moe_gemv.down_gemv(z, ids, weights, None, down, out, blocks, split_k), out

    return build


def best(key: tuning.Key, build: Build) -> tuple[tuning.Entry, float, float]:
    """(fastest entry, its milliseconds, those of the present entry) among candidates with the right output."""
    times: dict[tuning.Entry, float] = {}
    expected = None
    for entry in candidates(key):
        launch, out = build(Blocks(*entry))
        try:
            launch.run()
        except OutOfResources:
            continue
        if expected is None:
            expected = out.clone()
        scale = expected.abs().max()
        if not bool(((out - expected).abs().max() / scale) < 2e-2):
            raise RuntimeError(f"{key} {entry}: the output differs from the present entry's")
        times[entry] = float(do_bench(launch.run, warmup=5, rep=30, return_mode="median"))
    present = tuning.BLOCKS[key]
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
        result = TritonBackend().experts(x, ids, weights, experts).float()
        expected = ReferenceBackend().experts(x, ids, weights, experts).float()
        if not bool((result - expected).abs().max() / expected.abs().max() < 4e-2):
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
    arch = get_device_props(device).arch
    result: dict[tuning.Key, tuning.Entry] = {}
    for kind in ("mxfp4", "dense"):
        experts = layer(kind, device)
        gate(experts, device)
        for key in (key for key in tuning.BLOCKS if key[1] == kind):
            entry, time, before = best(key, builder(key, experts, device))
            print(f"{key}: {entry} {time * 1e3:.1f} us, present {before * 1e3:.1f} us", flush=True)
            if entry != tuning.BLOCKS[key]:
                result[key] = entry
        del experts
    if not options.dry_run:
        comment = f"{torch.cuda.get_device_name(device)}, Triton {triton.__version__}, sm_{arch}"
        write_overrides(Path(str(tuning.__file__)), {**tuning.OVERRIDES, arch: result}, comment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
