"""One layer's operations by backend, experts and tokens: random weights of the model's hidden size.

`benchmarks/native` measures the native ones closer, by instruction set and threads.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from moe_surgery.bench.kernels import KernelCall, kernel_calls, usable_backends  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402

CPU = torch.device("cpu")
BACKENDS = usable_backends(CPU)
TOKENS = (1, 8)


@pytest.fixture(scope="module", params=[4, 32], ids="{} experts".format)
def calls(request: pytest.FixtureRequest, target: CausalLM) -> dict[tuple[str, str, int], KernelCall]:
    """By backend, operation and tokens, all over the same weights."""
    result = kernel_calls(BACKENDS, CPU, request.param, tokens=TOKENS, hidden=target.config.hidden_size)
    return {(call.backend, call.operation, call.tokens): call for several in result for call in several}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("operation", ["route", "experts", "dense"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_call(
    benchmark,
    calls: dict[tuple[str, str, int], KernelCall],
    bandwidth: float,
    backend: str,
    operation: str,
    tokens: int,
) -> None:
    call = calls[backend, operation, tokens]
    benchmark.group = f"{operation}, {call.experts} experts, {tokens} tokens"
    benchmark.pedantic(call.run, rounds=10, warmup_rounds=1)
    benchmark.extra_info["read_bytes"] = call.read_bytes
    if benchmark.enabled:
        rate = call.read_bytes / benchmark.stats.stats.median
        benchmark.extra_info.update({"GB/s": rate / 1e9, "share_of_plain_read": rate / bandwidth})
