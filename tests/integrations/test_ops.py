"""The operators give what the backend gives, and keep the promises torch.library asks of an operator."""

from __future__ import annotations

import logging

import pytest

torch = pytest.importorskip("torch")

from moe_surgery import kernels  # noqa: E402
from moe_surgery.integrations import ops  # noqa: E402
from moe_surgery.kernels import select_backend  # noqa: E402
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight  # noqa: E402
from tests.integrations.operands import EXPERTS, HIDDEN, TOP_K, inputs, operator  # noqa: E402


def expected(arguments: tuple, packed: bool) -> torch.Tensor:
    x, ids, weights, *rest, limit, alpha = arguments
    if packed:
        up, up_bias, down, down_bias = Mxfp4Weight(*rest[:2]), rest[2], Mxfp4Weight(*rest[3:5]), rest[5]
    else:
        up, up_bias, down, down_bias = DenseWeight(rest[0]), rest[1], DenseWeight(rest[2]), rest[3]
    stored = ExpertWeights(up, up_bias, down, down_bias, None, limit, alpha)
    return ops.backend_of("cpu").experts(x, ids, weights, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 7])
def test_experts_give_the_backends_bits(tokens: int, packed: bool, dtype: torch.dtype) -> None:
    arguments = inputs(tokens, packed, dtype)
    assert torch.equal(operator(packed)(*arguments), expected(arguments, packed))


def test_route_gives_the_backends_bits() -> None:
    x, weight, bias = torch.randn(3, HIDDEN), torch.randn(EXPERTS, HIDDEN), torch.randn(EXPERTS)
    result, expected = (
        torch.ops.moe_surgery.route(x, weight, bias, TOP_K),
        ops.backend_of("cpu").route(x, weight, bias, TOP_K),
    )
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 7])
def test_experts_are_sound_operators(tokens: int, packed: bool) -> None:
    """Schema, fake implementation and tracing with static and with symbolic shapes."""
    torch.library.opcheck(operator(packed), inputs(tokens, packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_is_a_sound_operator(dtype: torch.dtype) -> None:
    tensors = torch.randn(3, HIDDEN), torch.randn(EXPERTS, HIDDEN), torch.randn(EXPERTS)
    torch.library.opcheck(torch.ops.moe_surgery.route, (*(t.to(dtype) for t in tensors), TOP_K))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_whole_layer_compiles_into_one_graph(packed: bool, backend: str) -> None:
    x, _, _, *rest = inputs(4, packed)
    router = torch.randn(EXPERTS, HIDDEN), torch.randn(EXPERTS)

    def layer(x: torch.Tensor) -> torch.Tensor:
        ids, weights = torch.ops.moe_surgery.route(x, *router, TOP_K)
        return x + operator(packed)(x, ids, weights, *rest)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for tokens in (4, 9):  # the second traces again, with the number of tokens symbolic
        x = torch.randn(tokens, HIDDEN)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


@pytest.fixture
def forgotten():
    """Choose backends anew, and again after the test."""
    ops.backend_of.cache_clear()
    kernels._log_missing.cache_clear()
    yield
    ops.backend_of.cache_clear()
    kernels._log_missing.cache_clear()


def test_the_choice_is_logged_once(forgotten: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "moe_surgery"):
        for _ in range(3):
            name = ops.backend_of("cpu").name
    assert name == select_backend(torch.device("cpu")).name
    assert [r.getMessage() for r in caplog.records] == [f"experts on cpu: {name} backend"]


def test_a_cpu_without_the_extension_says_why(
    forgotten: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_SURGERY_NATIVE", "0")
    with caplog.at_level(logging.INFO, "moe_surgery"):
        assert ops.backend_of("cpu").name == "reference"
    assert caplog.messages == [
        "backend reference (plain PyTorch, slower) on cpu, because native does not work: disabled by "
        "MOE_SURGERY_NATIVE=0; `backend` reference chooses it without this note",
        "experts on cpu: reference backend",
    ]
    assert {r.levelno for r in caplog.records} == {logging.INFO}  # it was asked for


def test_a_cuda_device_without_triton_says_why(
    forgotten: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_surgery.kernels.triton.availability", lambda: "triton is not installed")
    with caplog.at_level(logging.WARNING, "moe_surgery"):
        assert ops.backend_of("cuda").name == "reference"
    assert caplog.messages == [
        "backend reference (plain PyTorch, slower) on cuda, because triton does not work: triton is not "
        "installed; `backend` reference chooses it without this note"
    ]
