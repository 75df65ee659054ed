"""Products of many tokens beside PyTorch's in one run: errors and Gop/s; to benchmarks/results/native_tiles.{json,md}.

    python -m benchmarks.native.tiles [--rounds 9] [--tokens 512]

A product of gpt-oss-20b's gate_up size, a layer of experts, and attention over a prompt of 2048 tokens. Gop/s count a
multiplication and an addition for each weight and token once, whatever a kernel does for them: products in tiles do
it twice, for the two halves of an activation (8-bit integers for experts with AMX, else BF16), and with Q8_0 weights
four times. The rate of one of these passes is compared with PyTorch's BF16 product. The best of the rounds is given,
since others may use the machine; ratios are of the same run.
Errors are norms relative to float64; "one pass" rounds activations to BF16 and is exact otherwise.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import click
import numpy as np
import torch
from torch.nn.functional import linear

from benchmarks.native.operands import random_bf16, random_bytes
from benchmarks.publish import begin, heading, publish, table
from moe_surgery.formats.mxfp4 import decode
from moe_surgery.kernels.native import NativeBackend
from moe_surgery.kernels.q8_0 import quantise
from moe_surgery.kernels.weights import ExpertWeights, Mxfp4Weight

HIDDEN = 2880
EXPERTS = 8
TOP_K = 4
LONG = 512  # any number of tokens that makes a step long


@dataclass
class Candidate:
    """`run` multiplies `gop` times 10^9 operations, and each `passes` times for the parts of its operands."""

    name: str
    gop: float
    run: Callable[[], object]
    passes: int = 1
    best: float = float("inf")


def make_layer() -> ExpertWeights:
    up, down = (
        Mxfp4Weight(
            random_bytes(EXPERTS, rows, HIDDEN // 32, 16),
            random_bytes(EXPERTS, rows, HIDDEN // 32, low=118, high=122),
        )
        for rows in (2 * HIDDEN, HIDDEN)
    )
    return ExpertWeights(up, random_bf16(EXPERTS, 2 * HIDDEN), down, random_bf16(EXPERTS, HIDDEN))


def paths(threads: int) -> dict[str, NativeBackend]:
    """Each instruction set in tiles where it has them, else by rows."""
    result = {}
    for isa in NativeBackend.instruction_sets():
        backend = NativeBackend(isa, threads)
        if backend.has_tiles:
            result[f"{isa}, tiles"] = backend.for_tokens(LONG)
        elif isa != "scalar":
            result[f"{isa}, rows"] = backend
    return result


def random_choices(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    return ids, torch.full((tokens, TOP_K), 1 / TOP_K)


def float64_layer(x: np.ndarray, ids: torch.Tensor, layer: ExpertWeights, rounded: bool) -> np.ndarray:
    """The layer by its formula; with `rounded` both products round their activations to BF16."""

    def values(weight: object, expert: int) -> np.ndarray:
        assert isinstance(weight, Mxfp4Weight)
        bits = decode(weight.blocks[expert].numpy(), weight.scales[expert].numpy())
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def held(a: np.ndarray) -> np.ndarray:
        return torch.from_numpy(a).bfloat16().double().numpy() if rounded else a

    y = np.zeros_like(x)
    for expert in range(EXPERTS):
        tokens = torch.where((ids == expert).any(dim=1))[0].numpy()
        h = held(x[tokens]) @ values(layer.gate_up, expert).T + layer.gate_up_bias[expert].double().numpy()
        gate, up = np.minimum(h[:, ::2], layer.limit), np.clip(h[:, 1::2], -layer.limit, layer.limit)
        z = held((up + 1) * gate / (1 + np.exp(-layer.alpha * gate)))
        out = z @ values(layer.down, expert).T + layer.down_bias[expert].double().numpy()
        y[tokens] += out / TOP_K
    return y


def relative(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def errors(weight: torch.Tensor, layer: ExpertWeights, tokens: int) -> list[dict[str, object]]:
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2))
    x64, (ids, shares) = x.double().numpy(), random_choices(tokens)
    dense, moe = x64 @ weight.double().numpy().T, float64_layer(x64, ids, layer, False)
    one_pass = {
        "dense": relative(x.bfloat16().double().numpy() @ weight.double().numpy().T, dense),
        "layer": relative(float64_layer(x64, ids, layer, True), moe),
    }
    rows: list[dict[str, object]] = [
        {"path": "one pass, exact sums", **one_pass, "dense ratio": 1.0, "layer ratio": 1.0}
    ]
    for name, backend in paths(os.cpu_count() or 1).items():
        ours = {
            "dense": relative(backend.linear(x, weight).double().numpy(), dense),
            "layer": relative(backend.experts(x, ids, shares, layer).double().numpy(), moe),
        }
        rows.append({"path": name, **ours} | {f"{key} ratio": ours[key] / one_pass[key] for key in ours})
    return rows


def speeds(weight: torch.Tensor, layer: ExpertWeights, tokens: int, rounds: int) -> list[dict[str, object]]:
    x, (ids, shares) = torch.randn(tokens, HIDDEN), random_choices(tokens)
    x_bf16, weight_f32, eight_bit = x.bfloat16(), weight.float(), quantise(weight, "the weight")
    dense = 2e-9 * tokens * weight.numel()
    moe = 2e-9 * tokens * TOP_K * 3 * HIDDEN * HIDDEN
    rows: list[dict[str, object]] = []
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        candidates = [
            Candidate("PyTorch BF16 dense", dense, lambda: linear(x_bf16, weight)),
            Candidate("PyTorch float32 dense", dense, lambda: linear(x, weight_f32)),
        ]
        for name, backend in paths(threads).items():
            halves = 2 if backend.has_tiles else 1
            candidates += [
                Candidate(f"dense, {name}", dense, partial(backend.linear, x, weight), halves),
                Candidate(f"dense in Q8_0, {name}", dense, partial(backend.linear, x, eight_bit), halves**2),
                Candidate(f"experts, {name}", moe, partial(backend.experts, x, ids, shares, layer), halves),
            ]
        for _ in range(rounds + 1):
            for candidate in candidates:
                time.sleep(0.02)  # until the threads of the one before have stopped looking for work
                start = time.perf_counter()
                candidate.run()
                candidate.best = min(candidate.best, time.perf_counter() - start)
        torch_rate = candidates[0].gop / candidates[0].best
        for candidate in candidates:
            rate = candidate.gop / candidate.best
            rows.append(
                {
                    "product": candidate.name,
                    "threads": threads,
                    "Gop/s": rate,
                    "to PyTorch BF16": rate / torch_rate,
                    "one pass to PyTorch BF16": candidate.passes * rate / torch_rate,
                }
            )
    return rows


def attention_speeds(rounds: int, tokens: int = 2048) -> list[dict[str, object]]:
    """Full attention of one layer over a prompt, 64 heads of 64 values on 8 key-value heads, by path; the error is that
    of 256 of its tokens, the first ones."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, heads, tokens, 64, generator=generator) for heads in (64, 8, 8))
    sinks, positions = torch.randn(64, generator=generator), torch.arange(tokens)[None]
    gop = 4e-9 * 64 * 64 * tokens * (tokens + 1) / 2
    q64, k64, v64 = (x[0, :, :256].double() for x in (q, k, v))
    exact = float64_attention(q64, k64, v64, sinks.double()).numpy()
    backends = {
        isa: NativeBackend(isa, os.cpu_count() or 1).for_tokens(LONG)
        for isa in NativeBackend.instruction_sets()
        if isa != "scalar"
    }
    best = dict.fromkeys(backends, float("inf"))
    errors = {}
    for _ in range(rounds):
        for isa, backend in backends.items():
            time.sleep(0.02)
            start = time.perf_counter()
            y = backend.attention(q, k, v, sinks, positions, positions, None)
            best[isa] = min(best[isa], time.perf_counter() - start)
            errors[isa] = relative(y[0, :256].double().numpy(), exact)
    return [{"set": isa, "Gop/s": gop / best[isa], "error": errors[isa]} for isa in backends]


def float64_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    heads, tokens, width = q.shape
    k, v = (x.repeat_interleave(heads // len(x), 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(
        torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf
    )
    weights = torch.cat([scores, sinks[:, None, None].expand(heads, tokens, 1)], 2).softmax(2)[..., :tokens]
    return (weights @ v).transpose(0, 1).reshape(tokens, heads * width)


@click.command(help=__doc__)
@click.option("--rounds", default=9, show_default=True)
@click.option("--tokens", default=512, show_default=True)
def main(rounds: int, tokens: int) -> None:
    weight, layer = random_bf16(2 * HIDDEN, HIDDEN), make_layer()
    report = begin(
        f"python -m benchmarks.native.tiles --rounds {rounds} --tokens {tokens}: a dense product "
        f"[{tokens}, {HIDDEN}] x [{HIDDEN}, {2 * HIDDEN}] and a layer of {EXPERTS} experts of gpt-oss-20b's size, "
        f"{TOP_K} a token. Gop/s count each weight and token once; best of the rounds, which alternate. Errors are "
        "norms relative to float64."
    )
    report["errors"] = errors(weight, layer, min(tokens, 64))
    report["speeds"] = speeds(weight, layer, tokens, rounds)
    report["attention"] = attention_speeds(rounds)
    report["machine"]["load average at the end"] = round(os.getloadavg()[0], 2)
    publish("native_tiles", report, page(report))


def page(report: dict) -> list[str]:
    lines = heading("Products of many tokens on the CPU", report)
    for name in ("errors", "speeds", "attention"):
        rows = [[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in report[name]]
        lines += ["", f"## {name.capitalize()}", "", *table(list(report[name][0]), rows)]
    return lines


if __name__ == "__main__":
    main()
