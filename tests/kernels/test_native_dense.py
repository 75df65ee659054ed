"""Native products, norms and routing against float64 and the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.kernels.native.operands import log_fallback  # noqa: E402
from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from moe_surgery.kernels.weights import DenseWeight  # noqa: E402
from tests.kernels.brute_force import brute_force_experts, brute_force_route, make_case  # noqa: E402
from tests.kernels.native_cases import (  # noqa: E402
    draw,
    every_variant,
    native,
    needs_native,
    relative_error,
    run,
    shifted,
)

pytestmark = needs_native

REFERENCE = ReferenceBackend()
# Sixteen bits of a block's largest value; sums in float32.
EXPERTS_ERROR = 1e-4
SUM_ERROR = 1e-6
THREADS = (1, 2, 3, 5)
STORED = (torch.bfloat16, torch.float16, torch.float32)


@st.composite
def products(draw_: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    tokens = draw_(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 9, 33, 64]))
    rows, columns = draw_(st.integers(1, 130)), draw_(st.integers(1, 200))
    seed = draw_(st.integers(0, 2**32 - 1))
    dtype = draw_(st.sampled_from(STORED))
    weight = shifted(draw(seed, rows, columns).to(dtype), dtype.itemsize * draw_(st.integers(0, 15)))
    bias = draw(seed + 1, rows).to(draw_(st.sampled_from(STORED))) if draw_(st.booleans()) else None
    return draw(seed + 2, tokens, columns), weight, bias


@every_variant
@settings(max_examples=40)
@given(case=products(), threads=st.sampled_from(THREADS))
def test_linear_is_the_product_and_every_token_gets_what_it_gets_alone(
    isa: str, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], threads: int
) -> None:
    x, weight, bias = case
    got = native(isa, threads).linear(x, weight, bias)
    exact = x.double().numpy() @ weight.double().numpy().T
    size = np.abs(x.double().numpy()) @ np.abs(weight.double().numpy()).T
    if bias is not None:
        exact, size = exact + bias.double().numpy(), size + np.abs(bias.double().numpy())
    assert (np.abs(got.double().numpy() - exact) <= SUM_ERROR * size + 1e-30).all()
    assert torch.equal(got, native("scalar").linear(x, weight, bias))
    for i in range(len(x)):
        assert torch.equal(native(isa).linear(x[i], weight, bias), got[i])


@every_variant
@given(case=products())
@settings(max_examples=15)
def test_bfloat16_activations_give_the_rounded_product(
    isa: str, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
) -> None:
    x, weight, bias = case
    got = native(isa).linear(x.bfloat16(), weight, bias)
    assert torch.equal(got, native(isa).linear(x.bfloat16().float(), weight, bias).bfloat16())


@every_variant
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 200))
@settings(max_examples=15)
def test_the_same_values_in_another_dtype_give_the_same_bits(isa: str, seed: int, columns: int) -> None:
    x, weight, bias = (draw(seed + i, *shape) for i, shape in enumerate([(3, columns), (30, columns), (30,)]))
    weight, bias = weight.bfloat16().half(), bias.bfloat16().half()
    exact = weight.float().bfloat16().float() == weight.float()  # F16 cannot hold BF16's smallest
    weight = torch.where(exact, weight, torch.zeros_like(weight))
    expected = native(isa).linear(x, weight.float(), bias.float())
    for dtype in STORED:
        assert torch.equal(native(isa).linear(x, weight.to(dtype), bias.float()), expected)
        norm = weight[0].to(dtype)
        assert torch.equal(native(isa).rms_norm(x, norm, 1e-5), native(isa).rms_norm(x, norm.float(), 1e-5))


@every_variant
def test_every_f16_value_is_read_as_it_is(isa: str) -> None:
    """Subnormal ones, both zeros and infinities among them; NaN stays NaN. One column, so that nothing is added."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    column = native(isa).linear(torch.ones(1, 1), values[:, None])[0]
    assert torch.equal(column.nan_to_num(1e9), values.float().nan_to_num(1e9))
    assert torch.equal(column.isnan(), values.isnan())
    pair = native(isa).linear(torch.tensor([[0.0, 1.0]]), torch.stack([torch.zeros_like(values), values], 1))
    assert torch.equal(pair[0][values.isfinite()], values.float()[values.isfinite()])
    ones = torch.ones(1, len(values))
    normed = native(isa).rms_norm(ones, values, 0.0)[0]
    assert torch.equal(normed[values.isfinite()], values.float()[values.isfinite()])


def test_several_products_at_once_are_those_one_by_one() -> None:
    x = draw(0, 2, 3, 100)
    rows = ((1, torch.bfloat16), (64, torch.float32), (7, torch.float16))
    layers = [(draw(i, n, 100).to(dtype), None) for i, (n, dtype) in enumerate(rows)]
    result = native("", 3).multi_linear(x, layers)
    assert [tuple(y.shape) for y in result] == [(2, 3, 1), (2, 3, 64), (2, 3, 7)]
    for y, (weight, _) in zip(result, layers, strict=True):
        assert torch.equal(y, native().linear(x, weight))


def test_rows_may_be_a_window_of_longer_ones() -> None:
    x, weight = draw(0, 4, 50), draw(1, 20, 80).bfloat16()
    assert torch.equal(
        native().linear(x, weight[3:, 7:57]), native().linear(x, weight[3:, 7:57].contiguous())
    )


@pytest.fixture
def nothing_logged() -> Iterator[None]:
    log_fallback.cache_clear()
    yield
    log_fallback.cache_clear()


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (draw(1, 20, 50).double(), "a weight is float64"),
        (draw(1, 50, 20).T, "a weight has strides (1, 20)"),
    ],
    ids=["dtype", "strides"],
)
def test_weights_that_kernels_do_not_read_fall_back_to_plain_pytorch_with_a_warning(
    weight: torch.Tensor, reason: str, nothing_logged: None, caplog: pytest.LogCaptureFixture
) -> None:
    x = draw(0, 4, 50)
    for _ in range(3):
        got = native().linear(x, weight)
    torch.testing.assert_close(got, x @ weight.float().T, rtol=1e-4, atol=1e-4)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"native backend: {reason}; its kernels read bfloat16, float16")


def test_experts_and_routers_that_kernels_do_not_read_are_named(
    nothing_logged: None, caplog: pytest.LogCaptureFixture
) -> None:
    case = make_case(packed=False)
    e = case.experts
    rows_apart = DenseWeight(e.down.values.transpose(1, 2).contiguous().transpose(1, 2))  # type: ignore[union-attr]
    exact = brute_force_experts(case)
    for experts in (replace(e, down=rows_apart), replace(e, gate_up_bias=e.gate_up_bias.double())):
        got = run(native(), replace(case, experts=experts), torch.float32)
        assert relative_error(got, exact) <= EXPERTS_ERROR
    native().route(draw(0, 2, 8), draw(1, 4, 8).double(), draw(2, 4), 2)
    native().rms_norm(draw(0, 2, 8), draw(1, 8).double(), 1e-5)
    reasons = [m.removeprefix("native backend: ").partition(";")[0] for m in caplog.messages]
    assert reasons == [
        "down has strides (2048, 1, 32)",
        "the bias of gate_up is float64",
        "the router's weight is float64",
        "a norm's weight is float64",
    ]


@every_variant
@settings(max_examples=15)
@given(
    tokens=st.integers(1, 9),
    columns=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
    stored=st.sampled_from(STORED),
)
def test_rms_norm_is_the_formula(isa: str, tokens: int, columns: int, seed: int, stored: torch.dtype) -> None:
    x, weight = draw(seed, tokens, columns), draw(seed + 1, columns).to(stored)
    got = native(isa).rms_norm(x, weight, 1e-5)
    in_float64 = x.double().numpy()
    exact = in_float64 / np.sqrt((in_float64**2).mean(1, keepdims=True) + 1e-5) * weight.double().numpy()
    assert relative_error(got, exact) <= SUM_ERROR
    assert torch.equal(got, native("scalar").rms_norm(x, weight, 1e-5))
    assert torch.equal(got[-1], native(isa).rms_norm(x[-1], weight, 1e-5))


# --- the router


@st.composite
def routers(draw_: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Small whole numbers, so that logits are exact and ties are many."""
    tokens, experts, hidden = draw_(st.integers(1, 9)), draw_(st.integers(1, 64)), draw_(st.integers(1, 70))
    rng = np.random.default_rng(draw_(st.integers(0, 2**32 - 1)))
    most = draw_(st.integers(0, 3))
    shapes = ((tokens, hidden), (experts, hidden), experts)
    x, weight, bias = (rng.integers(-most, most + 1, s).astype(np.float32) for s in shapes)
    return x, weight, bias, draw_(st.integers(1, experts))


@every_variant
@settings(max_examples=25)
@given(
    case=routers(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    stored=st.tuples(st.sampled_from(STORED), st.sampled_from(STORED)),
)
def test_route_is_the_stable_top_k_and_its_softmax(
    isa: str,
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int],
    dtype: torch.dtype,
    stored: tuple[torch.dtype, torch.dtype],
) -> None:
    x, weight, bias, top_k = case
    tensors = (torch.from_numpy(a).to(d) for a, d in zip((weight, bias), stored, strict=True))
    inputs = torch.from_numpy(x).to(dtype), *tensors
    ids, weights = native(isa, 2).route(*inputs, top_k)
    expected_ids, expected = brute_force_route(x.astype(np.float64) @ weight.T + bias, top_k)
    assert np.array_equal(ids.numpy(), expected_ids)
    assert weights.dtype == dtype
    # The sum of up to 64 terms, each rounded.
    np.testing.assert_allclose(weights.double().numpy(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


# --- attention
