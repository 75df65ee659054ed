"""The native backend against float64 and the reference: every instruction set, shape and address."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.kernels import select_backend  # noqa: E402
from moe_surgery.kernels.native import NativeBackend  # noqa: E402
from moe_surgery.kernels.native.operands import log_fallback  # noqa: E402
from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight, Weight  # noqa: E402
from tests.kernels.native_cases import (  # noqa: E402
    VARIANTS,
    draw,
    every_variant,
    native,
    needs_native,
    relative_error,
    shifted,
)
from tests.kernels.test_experts import Case, brute_force, make_case  # noqa: E402
from tests.kernels.test_route import brute_force as brute_force_route  # noqa: E402

pytestmark = needs_native

REFERENCE = ReferenceBackend()
# Sixteen bits of a block's largest value; sums in float32.
EXPERTS_ERROR = 1e-4
SUM_ERROR = 1e-6
THREADS = (1, 2, 3, 5)
STORED = (torch.bfloat16, torch.float16, torch.float32)


def stored_as(experts: ExpertWeights, dtype: torch.dtype, bias: torch.dtype) -> ExpertWeights:
    """Dense experts whose values and biases are stored in other dtypes."""

    def of(weight: Weight) -> Weight:
        return DenseWeight(weight.values.to(dtype)) if isinstance(weight, DenseWeight) else weight

    biases = {"gate_up_bias": experts.gate_up_bias.to(bias), "down_bias": experts.down_bias.to(bias)}
    return replace(experts, gate_up=of(experts.gate_up), down=of(experts.down), **biases)


def run(backend: NativeBackend | ReferenceBackend, case: Case, dtype: torch.dtype) -> torch.Tensor:
    x, weights = (torch.from_numpy(a).to(dtype) for a in (case.x, case.weights))
    return backend.experts(x, torch.from_numpy(case.ids), weights, case.experts)


@st.composite
def cases(draw: st.DrawFn, packed: bool | None = None) -> Case:
    experts = draw(st.sampled_from([1, 2, 3, 5, 32, 64]))
    stored = draw(st.none() | st.integers(experts, experts + 4))
    case = make_case(
        draw(st.integers(0, 2**32 - 1)),
        tokens=draw(st.sampled_from([1, 2, 3, 4, 5, 8, 17, 64])),
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 8))),
        hidden=32 * draw(st.integers(1, 9)),
        intermediate=32 * draw(st.integers(1, 9)),
        stored=stored,
        packed=draw(st.booleans()) if packed is None else packed,
    )
    dtypes = draw(st.sampled_from(STORED)), draw(st.sampled_from(STORED))
    return replace(case, experts=stored_as(case.experts, *dtypes))


@every_variant
@settings(max_examples=25)
@given(case=cases(), threads=st.sampled_from(THREADS), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_experts_are_the_formulas(isa: str, case: Case, threads: int, dtype: torch.dtype) -> None:
    held = {
        torch.float32: lambda a: a,
        torch.bfloat16: lambda a: torch.from_numpy(a).to(dtype).double().numpy(),
    }
    inputs = Case(held[dtype](case.x), case.ids, held[dtype](case.weights), case.experts)
    got = run(native(isa, threads), case, dtype)
    assert got.dtype == dtype
    assert relative_error(got, brute_force(inputs)) <= (EXPERTS_ERROR if dtype == torch.float32 else 4e-3)


@settings(max_examples=25)
@given(case=cases(), threads=st.sampled_from(THREADS))
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(case: Case, threads: int) -> None:
    expected = run(native("scalar"), case, torch.float32)
    for isa in VARIANTS:
        assert torch.equal(run(native(isa, threads), case, torch.float32), expected), isa


@every_variant
@settings(max_examples=15)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_token_gets_from_experts_what_it_gets_alone(isa: str, case: Case, dtype: torch.dtype) -> None:
    backend = native(isa, 3)
    together = run(backend, case, dtype)
    for i in range(len(case.x)):
        alone = Case(case.x[i : i + 1], case.ids[i : i + 1], case.weights[i : i + 1], case.experts)
        assert torch.equal(run(backend, alone, dtype)[0], together[i])


@every_variant
def test_one_layer_errs_less_than_bf16_arithmetic(isa: str) -> None:
    case = make_case(7, tokens=8, experts=8, top_k=4, hidden=960, intermediate=960)
    exact = brute_force(case)
    ours = relative_error(run(native(isa), case, torch.float32), exact)
    bf16 = relative_error(run(REFERENCE, case, torch.bfloat16).float(), exact)
    assert ours < 1e-4 < 1e-3 < bf16


@every_variant
@settings(max_examples=10)
@given(case=cases(packed=False))
def test_dense_experts_have_the_same_bits_in_every_dtype_that_holds_them(isa: str, case: Case) -> None:
    """Their values have few bits, so that F16 holds what BF16 does."""
    wide = stored_as(case.experts, torch.float32, torch.float32)
    expected = run(native(isa, 2), replace(case, experts=wide), torch.float32)
    for dtype in STORED:
        experts = stored_as(wide, dtype, torch.float32)
        assert torch.equal(run(native(isa, 2), replace(case, experts=experts), torch.float32), expected)


def moved(weight: Weight, by: int) -> Weight:
    if isinstance(weight, DenseWeight):
        return DenseWeight(shifted(weight.values, weight.values.itemsize * by))
    return Mxfp4Weight(shifted(weight.blocks, by), shifted(weight.scales, by + 3))


@every_variant
@pytest.mark.parametrize("stored", [torch.uint8, *STORED])
@given(by=st.integers(0, 63))
@settings(max_examples=15)
def test_weights_may_lie_at_any_address(isa: str, stored: torch.dtype, by: int) -> None:
    case = make_case(1, hidden=160, intermediate=96, packed=stored == torch.uint8)
    e = stored_as(case.experts, stored, torch.float32)
    case = replace(case, experts=e)
    elsewhere = replace(e, gate_up=moved(e.gate_up, by), down=moved(e.down, by + 1))
    expected = run(native(isa), case, torch.float32)
    assert torch.equal(run(native(isa), replace(case, experts=elsewhere), torch.float32), expected)


@every_variant
@pytest.mark.parametrize("packed", [True, False])
def test_an_index_gives_the_bits_of_tensors_cut_by_it(isa: str, packed: bool) -> None:
    case = make_case(experts=3, stored=7, packed=packed, tokens=6)
    e, expert_map = case.experts, case.experts.expert_map

    def cut(weight: Weight) -> Weight:
        if isinstance(weight, DenseWeight):
            return DenseWeight(weight.values[expert_map])
        return Mxfp4Weight(weight.blocks[expert_map], weight.scales[expert_map])

    own = ExpertWeights(cut(e.gate_up), e.gate_up_bias[expert_map], cut(e.down), e.down_bias[expert_map])
    expected = run(native(isa), replace(case, experts=own), torch.float32)
    assert torch.equal(run(native(isa), case, torch.float32), expected)


@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none_and_stays_with_its_token(isa: str, value: float) -> None:
    case = make_case(2, tokens=3)
    expected = run(native(isa), case, torch.float32)
    case.x[1, 5] = value
    got = run(native(isa), case, torch.float32)
    assert not got[1].isfinite().any()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


@every_variant
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e20])
def test_activations_of_any_size_keep_their_precision(isa: str, size: float) -> None:
    case = make_case(3, tokens=2)
    case.x *= size
    assert relative_error(run(native(isa), case, torch.float32), brute_force(case)) <= EXPERTS_ERROR


# --- dense products


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
@settings(max_examples=80)
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
    x, wide = draw(0, 4, 50), draw(1, 20, 80).bfloat16()
    assert torch.equal(native().linear(x, wide[3:, 7:57]), native().linear(x, wide[3:, 7:57].contiguous()))


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
    exact = brute_force(case)
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
@settings(max_examples=25)
@given(
    tokens=st.integers(1, 9),
    columns=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
    stored=st.sampled_from(STORED),
)
def test_rms_norm_is_the_formula(isa: str, tokens: int, columns: int, seed: int, stored: torch.dtype) -> None:
    x, weight = draw(seed, tokens, columns), draw(seed + 1, columns).to(stored)
    got = native(isa).rms_norm(x, weight, 1e-5)
    wide = x.double().numpy()
    exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight.double().numpy()
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
@settings(max_examples=40)
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


def attention_case(
    seed: int, batch: int, kv_heads: int, group: int, head_dim: int, slots: int, queries: int, filled: int
) -> dict[str, torch.Tensor]:
    """A cache of `filled` positions at slots of any order, and the last `queries` of them."""
    rng = np.random.default_rng(seed)
    positions = np.full((batch, slots), -1, np.int64)
    for row in positions:
        row[rng.permutation(slots)[:filled]] = np.arange(filled)
    at = np.arange(filled - queries, filled)[None].repeat(batch, 0)
    return {
        "q": draw(seed, batch, kv_heads * group, queries, head_dim),
        "k": draw(seed + 1, batch, kv_heads, slots, head_dim),
        "v": draw(seed + 2, batch, kv_heads, slots, head_dim),
        "sinks": draw(seed + 3, kv_heads * group).bfloat16(),
        "queries": torch.from_numpy(at),
        "keys": torch.from_numpy(positions),
    }


@st.composite
def attentions(draw_: st.DrawFn) -> dict[str, torch.Tensor]:
    slots = draw_(st.integers(1, 70))
    filled = draw_(st.integers(1, slots))
    return attention_case(
        draw_(st.integers(0, 2**32 - 1)),
        draw_(st.integers(1, 3)),
        draw_(st.integers(1, 3)),
        draw_(st.integers(1, 4)),
        draw_(st.sampled_from([2, 6, 16, 64, 80])),
        slots,
        draw_(st.integers(1, filled)),
        filled,
    )


@every_variant
@settings(max_examples=30)
@given(
    case=attentions(),
    window=st.none() | st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention_is_the_references_and_every_query_gets_what_it_gets_alone(
    isa: str, case: dict[str, torch.Tensor], window: int | None, dtype: torch.dtype
) -> None:
    case = {n: t if n in ("queries", "keys", "sinks") else t.to(dtype) for n, t in case.items()}
    got = native(isa, 3).attention(**case, window=window)
    assert got.dtype == dtype
    wide = {n: t if n in ("queries", "keys") else t.double().float() for n, t in case.items()}
    expected = REFERENCE.attention(**wide, window=window)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)
    assert torch.equal(got, native("scalar").attention(**case, window=window))
    order = torch.randperm(case["k"].shape[2], generator=torch.Generator().manual_seed(0))
    for i in range(case["q"].shape[2]):
        one = {
            **case,
            "q": case["q"][:, :, i : i + 1],
            "queries": case["queries"][:, i : i + 1],
            "k": case["k"][:, :, order],
            "v": case["v"][:, :, order],
            "keys": case["keys"][:, order],
        }
        assert torch.equal(native(isa).attention(**one, window=window)[:, 0], got[:, i])


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    case = attention_case(0, 1, 2, 2, 16, 8, 2, 5)
    case["queries"][0, 0] = -1
    got = native().attention(**case, window=None)
    assert not got[0, 0].any()
    assert got[0, 1].all()


@settings(max_examples=30)
@given(
    positions=st.lists(st.integers(0, 131071), min_size=1, max_size=40),
    width=st.integers(1, 40),
    scale=st.floats(0.5, 2),
)
def test_turns_are_cosine_and_sine_however_many_are_asked_for(
    positions: list[int], width: int, scale: float
) -> None:
    frequencies = 1.0 / 150000 ** (torch.arange(width) / width)
    at = torch.tensor(positions)
    cos, sin = native().rope_cos_sin(at[None], frequencies, scale)
    angles = (at[:, None].float() * frequencies).double()
    torch.testing.assert_close(cos[0], (angles.cos() * scale).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sin[0], (angles.sin() * scale).float(), rtol=1e-6, atol=1e-7)
    assert torch.equal(native().rope_cos_sin(at[-1:], frequencies, scale)[0], cos[0, -1:])


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 5), max_size=3),
    half=st.integers(1, 40),
    alone=st.lists(st.booleans(), min_size=3, max_size=3),
    transposed=st.booleans(),
)
def test_heads_are_rotated_by_their_angles(
    sizes: list[int], half: int, alone: list[bool], transposed: bool
) -> None:
    x = draw(0, *sizes, 2 * half)
    if transposed and len(sizes) > 1:  # as a model's heads, which are a view
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    shape = [1 if one else n for n, one in zip(sizes, alone, strict=False)]
    angles = draw(1, *shape, half).double()
    cos, sin = angles.cos().float(), angles.sin().float()
    turn = torch.complex(cos.double(), sin.double())
    expected = torch.view_as_real(torch.complex(*x.double().chunk(2, -1)) * turn)
    result = native().apply_rope(x, cos, sin)
    torch.testing.assert_close(result.double(), torch.cat(expected.unbind(-1), -1), rtol=0, atol=1e-5)
    assert torch.equal(
        native().apply_rope(x.bfloat16(), cos, sin), REFERENCE.apply_rope(x.bfloat16(), cos, sin)
    )
    assert torch.equal(result, REFERENCE.apply_rope(x, cos, sin))


def test_angles_that_fit_no_head_are_refused() -> None:
    x, angles = draw(0, 2, 3, 8), draw(1, 2, 1, 4)
    for wrong in (draw(1, 2, 1, 3), draw(1, 2, 2, 4), draw(1, 3, 4)):
        with pytest.raises(UsageError, match="cannot be rotated by angles"):
            native().apply_rope(x, wrong, wrong)
        with pytest.raises(UsageError, match="cannot be rotated by angles"):
            native().apply_rope(x, angles, wrong)


# --- threads


def test_calls_from_several_threads_take_turns() -> None:
    x, weight = draw(0, 5, 320), draw(1, 700, 320).bfloat16()
    expected, result = native("", 1).linear(x, weight), []

    def work() -> None:
        result.extend(native("", threads).linear(x, weight) for threads in (2, 3, 1, 5) * 10)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(result) == 160
    assert all(torch.equal(y, expected) for y in result)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    program = """
import os, torch
from moe_surgery.kernels.native import NativeBackend
backend = NativeBackend(threads=3)
x, weight = torch.ones(2, 320), torch.ones(700, 320, dtype=torch.bfloat16)
before = backend.linear(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(backend.linear(x, weight), before) else 1)
assert torch.equal(backend.linear(x, weight), before)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120, cwd=root)


# --- choosing it


def test_the_cpu_takes_it_unless_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert select_backend(cpu).name == "native"
    assert select_backend(cpu, "reference").name == "reference"
    monkeypatch.setenv("MOE_SURGERY_NATIVE", "0")
    assert select_backend(cpu).name == "reference"
    with pytest.raises(UsageError, match="`backend` native: disabled by MOE_SURGERY_NATIVE=0"):
        select_backend(cpu, "native")


def test_it_is_refused_on_other_devices() -> None:
    with pytest.raises(UsageError, match="`backend` native: runs on the CPU, not on meta"):
        select_backend(torch.device("meta"), "native")
    with pytest.raises(UsageError, match="x is on meta, not on the CPU"):
        native().linear(torch.empty(1, 3, device="meta"), torch.ones(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(("value", "threads"), [("3", 3), (" 1 ", 1), ("", None)])
def test_the_variable_sets_the_threads(
    value: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_SURGERY_THREADS", value)
    assert NativeBackend().threads == (threads or torch.get_num_threads())


@pytest.mark.parametrize("value", ["0", "-1", "two", "1025"])
def test_a_number_of_threads_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SURGERY_THREADS", value)
    with pytest.raises(UsageError, match=f"MOE_SURGERY_THREADS={value}: must be a number from 1 to 1024"):
        NativeBackend()


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    with pytest.raises(UsageError, match="instruction set 'sse9' is not available here; available: "):
        NativeBackend("sse9")


def test_what_does_not_fit_is_refused() -> None:
    case = make_case()
    x, weights, ids = (torch.from_numpy(a) for a in (case.x, case.weights, case.ids))
    x, weights = x.float(), weights.float()
    backend = native()
    with pytest.raises(UsageError, match="x has shape"):
        backend.experts(x[:, :32], ids, weights, case.experts)
    with pytest.raises(UsageError, match="weights has shape"):
        backend.experts(x, ids, weights[:, :1], case.experts)
    with pytest.raises(ValueError, match="an id of an expert is not below 4"):
        backend.experts(x, ids + 4, weights, case.experts)
    with pytest.raises(UsageError, match="weight has shape"):
        backend.linear(x, torch.ones(3, 5, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="top_k 9 of 2 experts"):
        backend.route(x, torch.ones(2, 64, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), 9)
