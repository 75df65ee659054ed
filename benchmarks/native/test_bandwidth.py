"""Bytes of weights per second, for each kernel, instruction set, number of threads and batch, beside a plain read.

pytest benchmarks/native --benchmark-columns=median,min,rounds -p no:xdist
python -m benchmarks.native        the same interleaved in one run, written to benchmarks/results/
"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")

from benchmarks.native.operands import Measured, Operands  # noqa: E402
from moe_surgery.kernels.native import NativeBackend  # noqa: E402

VARIANTS = [isa for isa in NativeBackend.instruction_sets() if isa != "scalar"]
THREADS = sorted({1, os.cpu_count() or 1})


@pytest.fixture(scope="module")
def operands() -> Operands:
    return Operands()


def measure(benchmark, measured: Measured) -> None:
    benchmark.extra_info["bytes"] = measured.nbytes
    benchmark.pedantic(measured.run, rounds=5, warmup_rounds=1)
    benchmark.extra_info["GB/s"] = measured.nbytes / 1e9 / benchmark.stats.stats.median


@pytest.mark.parametrize("threads", THREADS)
def test_plain_read(benchmark, operands: Operands, threads: int) -> None:
    measure(benchmark, operands.plain_read(threads))


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("isa", VARIANTS)
def test_linear(benchmark, operands: Operands, isa: str, threads: int, tokens: int) -> None:
    measure(benchmark, operands.linear(NativeBackend(isa, threads), tokens))


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "bf16"])
@pytest.mark.parametrize("isa", VARIANTS)
def test_experts(benchmark, operands: Operands, isa: str, packed: bool, threads: int, tokens: int) -> None:
    measure(benchmark, operands.experts(NativeBackend(isa, threads), tokens, packed))
