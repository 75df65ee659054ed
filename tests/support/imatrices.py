"""Importance matrices made independently of the package: what is summed, and both forms of the file.

Written with the gguf package, and byte by byte as llama.cpp's legacy writer does.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGUFWriter

if TYPE_CHECKING:
    from tests.support.routed import Routed

ROUTER, GATE, UP, DOWN = (f"ffn_{n}.weight" for n in ("gate_inp", "gate_exps", "up_exps", "down_exps"))


@dataclass
class Sums:
    """Of one weight: sums of squares float64 [E, inputs] and counts int64 [E], E = 1 for a dense one."""

    squares: np.ndarray
    counts: np.ndarray


Matrix = dict[str, Sums]


def measure(routed: Routed, sequences: Sequence[Sequence[int]]) -> Matrix:
    """What llama-imatrix would sum up: transformers' model on `sequences`, watched by hooks on its experts."""
    import torch

    result: Matrix = {}

    def hook(number: int) -> Callable[..., None]:
        def watch(module, args, kwargs, _output) -> None:  # type: ignore[no-untyped-def]
            x, ids = [*args, *kwargs.values()][:2]
            x = x.reshape(-1, x.shape[-1])
            add(result, f"blk.{number}.{ROUTER}", x[None].double().numpy(), 1, [0])
            for expert in range(module.gate_up_proj.shape[0]):
                chosen = x[(ids == expert).any(dim=-1)]
                up = chosen @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
                down = module._apply_gate(up)
                experts = module.gate_up_proj.shape[0]
                for name, rows in ((GATE, chosen), (UP, chosen), (DOWN, down)):
                    add(result, f"blk.{number}.{name}", rows[None].double().numpy(), experts, [expert])

        return watch

    handles = [
        layer.mlp.experts.register_forward_hook(hook(n), with_kwargs=True)
        for n, layer in enumerate(routed.layers)
    ]
    with torch.no_grad():
        for sequence in sequences:
            routed.model(torch.tensor([list(sequence)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return result


def simulate(
    norms: Mapping[int, np.ndarray],
    ff: int,
    *,
    experts: int,
    top_k: int,
    tokens: int,
    seed: int = 0,
    unused: int = 0,
) -> Matrix:
    """Random inputs after an RMSNorm with the weights `norms` [hidden] by layer number, of random routes; the
    last `unused` experts are never chosen."""
    rng = np.random.default_rng(seed)
    result: Matrix = {}
    for number, weight in norms.items():
        raw = rng.normal(size=(tokens, weight.size)) * np.exp(rng.normal(size=weight.size))
        x = raw / np.sqrt((raw**2).mean(axis=1, keepdims=True)) * weight
        taste = rng.normal(size=experts)
        taste[experts - unused :] = -np.inf
        chosen = np.argsort(-(taste + rng.gumbel(size=(tokens, experts))), axis=1)[:, :top_k]
        middle = rng.normal(size=(experts, ff))
        add(result, f"blk.{number}.{ROUTER}", x[None], 1, [0])
        for expert in range(experts):
            rows = x[(chosen == expert).any(axis=1)]
            inputs = rng.normal(size=(len(rows), ff)) * middle[expert]
            for name, values in ((GATE, rows), (UP, rows), (DOWN, inputs)):
                add(result, f"blk.{number}.{name}", values[None], experts, [expert])
    return result


def add(matrix: Matrix, name: str, rows: np.ndarray, experts: int, at: Sequence[int]) -> None:
    """Add inputs [len(at), tokens, inputs] of the experts `at`."""
    sums = matrix.setdefault(name, Sums(np.zeros((experts, rows.shape[-1])), np.zeros(experts, np.int64)))
    sums.squares[list(at)] += (rows**2).sum(axis=1)
    sums.counts[list(at)] += rows.shape[1]


class _Writer(GGUFWriter):
    def add_architecture(self) -> None:  # an importance matrix has none
        pass


def write_gguf_imatrix(
    path: Path,
    matrix: Matrix,
    *,
    datasets: Sequence[str] = ("calibration.txt",),
    chunk_size: int = 512,
    extra: Mapping[str, np.ndarray] | None = None,
    leave_out: Sequence[str] = (),
) -> Path:
    """As llama-imatrix writes it since July 2025, with `extra` tensors and without those to `leave_out`."""
    writer = _Writer(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    tokens = max(int(s.counts.max()) for s in matrix.values())
    writer.add_uint32("imatrix.chunk_count", -(-tokens // chunk_size))
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name in sorted(matrix):
        sums = matrix[name]
        dense = len(sums.counts) == 1
        squares, counts = sums.squares.astype(np.float32), sums.counts.astype(np.float32)
        pair = {"in_sum2": squares[0] if dense else squares, "counts": counts if dense else counts[:, None]}
        for suffix, values in pair.items():
            if f"{name}.{suffix}" not in leave_out:
                writer.add_tensor(f"{name}.{suffix}", values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_legacy_imatrix(
    path: Path,
    matrix: Matrix,
    *,
    chunk_size: int = 512,
    raw: bool = False,
    tail: bool = True,
    leave_out: Sequence[str] = (),
    chunks: int | None = None,
) -> Path:
    """The legacy form: mean squares times the number of chunks that the entry's largest count makes; `raw`: the sums
    themselves, as in early 2024; `chunks` is written at the end where it is another number."""
    names = [name for name in matrix if name not in leave_out]
    out = struct.pack("<i", len(names))
    for name in names:
        sums = matrix[name]
        calls = math.ceil(int(sums.counts.max()) / chunk_size)
        values = sums.squares.astype(np.float32)
        if not raw:
            chosen = np.maximum(sums.counts, 1)[:, None].astype(np.float32)
            values = np.where(sums.counts[:, None] > 0, values / chosen, np.float32(1)) * np.float32(calls)
        encoded = name.encode()
        out += struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, values.size)
        out += values.astype("<f4").tobytes()
    if tail:
        dataset = b"calibration_datav3.txt"
        tokens = max(int(s.counts.max()) for s in matrix.values())
        out += struct.pack("<ii", chunks or tokens // chunk_size, len(dataset)) + dataset
    path.write_bytes(out)
    return path
