"""Long steps of the native backend: products in tiles against float64, and a token's result beside other tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.formats.native import native_module  # noqa: E402
from moe_surgery.kernels.interface import SHORT_STEP  # noqa: E402
from moe_surgery.kernels.native import NativeBackend  # noqa: E402
from moe_surgery.kernels.weights import DenseWeight, Mxfp4Weight, Weight  # noqa: E402
from tests.kernels.brute_force import Case, brute_force_experts, make_case  # noqa: E402
from tests.kernels.native_cases import (  # noqa: E402
    TILED,
    VARIANTS,
    draw,
    native,
    needs_native,
    relative_error,
    run,
    shifted,
)
from tests.support.checkpoints import decode  # noqa: E402

pytestmark = needs_native

every_tiled_variant = pytest.mark.parametrize("isa", TILED)
needs_integers = pytest.mark.skipif("amx" not in TILED, reason="the processor has no AMX")


def tiled(isa: str, threads: int = 1) -> NativeBackend:
    return native(isa, threads).for_tokens(SHORT_STEP + 1)


def one_pass_error(x: torch.Tensor, weight: torch.Tensor) -> float:
    """The error of activations rounded to BF16, all else exact."""
    weight64 = weight.double().numpy().T
    return relative_error(x.bfloat16().double() @ weight64, x.double().numpy() @ weight64)


@st.composite
def products(draw_: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    tokens = draw_(st.sampled_from([1, 2, 15, 16, 17, 31, 33, 70]))
    rows, columns = draw_(st.integers(1, 130)), draw_(st.integers(1, 200))
    seed = draw_(st.integers(0, 2**32 - 1))
    weight = shifted(draw(seed, rows, columns).bfloat16(), 2 * draw_(st.integers(0, 31)))
    bias = draw(seed + 1, rows) if draw_(st.booleans()) else None
    return draw(seed + 2, tokens, columns), weight, bias


@every_tiled_variant
@settings(max_examples=30)
@given(case=products(), threads=st.sampled_from([1, 2, 5]))
def test_linear_is_the_product_and_every_token_gets_what_it_gets_alone(
    isa: str, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], threads: int
) -> None:
    x, weight, bias = case
    got = tiled(isa, threads).linear(x, weight, bias)
    exact = x.double().numpy() @ weight.double().numpy().T
    size = np.abs(x.double().numpy()) @ np.abs(weight.double().numpy()).T
    if bias is not None:
        exact, size = exact + bias.double().numpy(), size + np.abs(bias.double().numpy())
    assert (np.abs(got.double().numpy() - exact) <= 1e-5 * size).all()
    for i in range(len(x)):
        assert torch.equal(tiled(isa).linear(x[i], weight, bias), got[i])


def test_large_products_are_cut_without_a_trace() -> None:
    """More tokens, rows and columns than a piece has."""
    x, weight = draw(0, 300, 2100), draw(1, 600, 2100).bfloat16()
    for isa in TILED:
        got = tiled(isa, 1).linear(x, weight)
        assert torch.equal(tiled(isa, 3).linear(x, weight), got)
        assert torch.equal(tiled(isa, 2).linear(x[100:140], weight), got[100:140])
        assert torch.equal(tiled(isa, 2).linear(x, weight[200:450]), got[:, 200:450])
        exact = x.double().numpy() @ weight.double().numpy().T
        error, one_pass = relative_error(got, exact), one_pass_error(x, weight)
        assert 20 * error <= one_pass, (isa, error, one_pass)


def test_several_products_at_once_are_those_one_by_one() -> None:
    x = draw(0, 2, 20, 100)
    rows = ((1, torch.bfloat16), (64, torch.float32), (7, torch.float16), (300, torch.bfloat16))
    layers = [(draw(i, n, 100).to(dtype), None) for i, (n, dtype) in enumerate(rows)]
    for isa in VARIANTS:
        for y, (weight, _) in zip(tiled(isa, 3).multi_linear(x, layers), layers, strict=True):
            assert torch.equal(y, tiled(isa).linear(x, weight))


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    experts = draw_(st.sampled_from([1, 2, 5, 32]))
    return make_case(
        draw_(st.integers(0, 2**32 - 1)),
        tokens=draw_(st.sampled_from([1, 5, 17, 40, 90])),
        experts=experts,
        top_k=draw_(st.integers(1, min(experts, 4))),
        hidden=32 * draw_(st.integers(1, 9)),
        intermediate=32 * draw_(st.integers(1, 9)),
        stored=draw_(st.none() | st.integers(experts, experts + 4)),
        packed=draw_(st.booleans()),
    )


@every_tiled_variant
@settings(max_examples=12)
@given(
    case=cases(), threads=st.sampled_from([1, 2, 5]), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_experts_are_the_formulas(isa: str, case: Case, threads: int, dtype: torch.dtype) -> None:
    held = (
        (lambda a: a)
        if dtype == torch.float32
        else (lambda a: torch.from_numpy(a).to(dtype).double().numpy())
    )
    inputs = Case(held(case.x), case.ids, held(case.weights), case.experts)
    got = run(tiled(isa, threads), case, dtype)
    assert got.dtype == dtype
    rounding = 1e-4 if isa == "amx" and isinstance(case.experts.gate_up, Mxfp4Weight) else 2e-5
    assert relative_error(got, brute_force_experts(inputs)) <= (rounding if dtype == torch.float32 else 4e-3)


@every_tiled_variant
@settings(max_examples=8)
@given(case=cases(), threads=st.sampled_from([1, 3]))
def test_a_token_gets_from_experts_what_it_gets_alone(isa: str, case: Case, threads: int) -> None:
    """Experts that few of many tokens choose among them."""
    together = run(tiled(isa, threads), case, torch.float32)
    for i in range(len(case.x)):
        alone = Case(case.x[i : i + 1], case.ids[i : i + 1], case.weights[i : i + 1], case.experts)
        assert torch.equal(run(tiled(isa), alone, torch.float32)[0], together[i])


def in_bf16(packed: Case) -> Case:
    """The same case with its MXFP4 weights as BF16."""

    def dense(weight: Weight) -> DenseWeight:
        assert isinstance(weight, Mxfp4Weight)
        bits = torch.from_numpy(decode(weight.blocks.numpy(), weight.scales.numpy()).view(np.int16))
        return DenseWeight(bits.view(torch.bfloat16).transpose(1, 2).contiguous())

    e = packed.experts
    return replace(packed, experts=replace(e, gate_up=dense(e.gate_up), down=dense(e.down)))


@pytest.mark.skipif("avx512bf16" not in TILED, reason="the processor has no BF16 products")
def test_packed_experts_and_the_same_values_in_bf16_give_the_same_bits() -> None:
    packed = make_case(3, tokens=50, hidden=160, intermediate=1056)
    expected = run(tiled("avx512bf16"), packed, torch.float32)
    assert torch.equal(run(tiled("avx512bf16", 2), in_bf16(packed), torch.float32), expected)


def with_scales(case: Case, change: Callable[[np.ndarray, np.random.Generator], None]) -> Case:
    """`case` after `change` of the scales of each of its two weights, uint8 [experts, rows, blocks]."""
    rng, e = np.random.default_rng(5), case.experts
    for weight in (e.gate_up, e.down):
        assert isinstance(weight, Mxfp4Weight)
        change(weight.scales.numpy(), rng)
    return case


@needs_integers
@pytest.mark.parametrize("spread", [1, 4, 30, 120])
def test_integers_take_scales_that_differ_within_a_row(spread: int) -> None:
    def change(scales: np.ndarray, rng: np.random.Generator) -> None:
        scales[:] = rng.integers(122 - spread, 123, scales.shape)

    case = with_scales(make_case(4, tokens=40, hidden=1120, intermediate=576), change)
    got = run(tiled("amx", 2), case, torch.float32)
    assert relative_error(got, brute_force_experts(case)) <= 1e-4
    alone = Case(case.x[3:4], case.ids[3:4], case.weights[3:4], case.experts)
    assert torch.equal(run(tiled("amx"), alone, torch.float32)[0], got[3])


@needs_integers
@pytest.mark.parametrize("scale", [0, 119, 124, 190])
def test_blocks_and_rows_of_zeros_may_have_any_scale(scale: int) -> None:
    case = make_case(6, tokens=40, hidden=640, intermediate=320)
    e = case.experts
    for weight in (e.gate_up, e.down):
        assert isinstance(weight, Mxfp4Weight)
        weight.blocks[:, ::3, 2] &= 0x88
        weight.scales[:, ::3, 2] = scale
        weight.blocks[:, 5] &= 0x88
        weight.scales[:, 5] = scale
    assert relative_error(run(tiled("amx", 2), case, torch.float32), brute_force_experts(case)) <= 1e-4


@needs_integers
@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_experts_with_scales_beyond_integers_are_multiplied_in_bf16_and_others_are_not(which: str) -> None:
    case = make_case(8, tokens=40)
    before = run(tiled("amx"), case, torch.float32)
    weight = getattr(case.experts, which)
    weight.scales[1, 0, 0] = 191
    got = run(tiled("amx", 2), case, torch.float32)
    chose = (case.ids == 1).any(1)
    assert 0 < chose.sum() < len(chose)
    assert torch.equal(got[~chose], before[~chose])
    only = replace(case, ids=case.ids[:, :1] * 0 + 1, weights=case.weights[:, :1])
    assert torch.equal(
        run(tiled("amx"), only, torch.float32), run(tiled("amx"), in_bf16(only), torch.float32)
    )
    weight.scales[1, 0, 0] = 190
    assert not torch.equal(
        run(tiled("amx"), only, torch.float32), run(tiled("amx"), in_bf16(only), torch.float32)
    )
    assert relative_error(run(tiled("amx"), only, torch.float32), brute_force_experts(only)) <= 1e-4


@every_tiled_variant
def test_one_layer_errs_far_less_than_with_activations_in_bf16(isa: str) -> None:
    case = make_case(7, tokens=40, experts=4, top_k=2, hidden=960, intermediate=960)
    exact = brute_force_experts(case)
    error = relative_error(run(tiled(isa), case, torch.float32), exact)
    rounded = torch.from_numpy(case.x).bfloat16().double().numpy()
    one_pass = relative_error(torch.from_numpy(brute_force_experts(replace(case, x=rounded))), exact)
    assert 20 * error <= one_pass, (error, one_pass)


@every_tiled_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none_and_stays_with_its_token(isa: str, value: float) -> None:
    case = make_case(2, tokens=40)
    expected = run(tiled(isa), case, torch.float32)
    case.x[1, 5] = value
    got = run(tiled(isa), case, torch.float32)
    assert not got[1].isfinite().any()
    assert torch.equal(np.delete(got, 1, axis=0), np.delete(expected, 1, axis=0))


@every_tiled_variant
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e20])
def test_activations_of_any_size_keep_their_precision(isa: str, size: float) -> None:
    case = make_case(3, tokens=40)
    case.x *= size
    assert relative_error(run(tiled(isa), case, torch.float32), brute_force_experts(case)) <= 1e-4


@pytest.mark.parametrize("isa", VARIANTS)
def test_short_steps_and_sets_without_tiles_go_by_rows(isa: str) -> None:
    backend, x, weight = native(isa), draw(0, 40, 64), draw(1, 50, 64).bfloat16()
    assert native_module().TILED_TOKENS == SHORT_STEP + 1  # type: ignore[union-attr]
    assert backend.for_tokens(SHORT_STEP) is backend
    assert tiled(isa).for_tokens(1).linear(x, weight).equal(backend.linear(x, weight))
    assert tiled(isa).linear(x, weight.float()).equal(backend.linear(x, weight.float()))
    if isa not in TILED:
        assert tiled(isa).linear(x, weight).equal(backend.linear(x, weight))
